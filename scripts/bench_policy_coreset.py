"""How well a few completions stand for all: the policy gradient of those that a selector keeps against that of all.

    python scripts/bench_policy_coreset.py --json policy_coreset.json
    python scripts/bench_policy_coreset.py --untrained --loss rows --json untrained.json

A small model that has learned what answers to sums look like, if hardly the sums, so that completions are neither all
alike nor all noise, rolls out several batches; it stays as it is meanwhile. Of each batch every method keeps some of
the completions with an advantage, scored and chosen by the code that training uses. The gradient of the kept ones'
(weighted) policy loss is compared with that of all. A method goes on from one batch to the next: a coreset has seen
nothing before the first, which is therefore shown apart. It prints its tables; --json writes every figure.
docs/benchmarks.md explains them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_common import hardware, hardware_text, table
from bench_coreset import compare
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from siftrl import policy
from siftrl.batch_selection import Link, choose
from siftrl.models import save_scratch_model
from siftrl.recipe import ScratchConfig
from siftrl.run import write_json
from siftrl.scoring import Scorer
from siftrl.selectors.gradient_coreset import GradientCoreset
from siftrl.selectors.largest_advantage import LargestAdvantage
from siftrl.selectors.reward_variance import RewardVariance
from siftrl.selectors.uniform_rows import UniformRows
from siftrl.signals import ValueGradient
from siftrl.types import BatchSelector, Selection, Signals

SIZES = ScratchConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64, max_positions=64)
PROMPTS, GROUP, LENGTH, WARM_UP_STEPS = 8, 8, 5, 30
PUBLISHED = ValueGradient("spsa", perturbations=1, epsilon=1e-3, shared=True)
METHODS: dict[str, Callable[[], BatchSelector]] = {
    "uniform_rows": UniformRows,
    "largest_advantage": LargestAdvantage,
    "reward_variance": RewardVariance,
    "gradient_coreset": GradientCoreset,
    "gradient_coreset, history: false": lambda: GradientCoreset(history=False),
    "gradient_coreset, weights: none": lambda: GradientCoreset(weights="none"),
    "gradient_coreset, paper: true": lambda: GradientCoreset(paper=True),
}
"""Label -> a new selector."""
DRAWS = 10
"""Choices of a method that draws rows, or between equals, in each batch: its own luck is not what is compared."""
DRAWN = ("uniform_rows", "largest_advantage", "reward_variance")
LOSSES = {"rows": "A loss that is a mean over rows (grpo, sapo)", "tokens": "A loss that is a mean over tokens"}
FIGURES = ("cosine", "error", "value_cosine", "value_error")


@dataclass(frozen=True)
class Rollout:
    """value: float64 [B, D], the gradient of each row's policy loss with respect to the last block's V projection.
    products: float64 [B, B], the g_i . g_j of all parameters' gradients, and of that projection's alone.
    """

    signals: Signals
    value: Tensor
    products: tuple[Tensor, Tensor]

    @property
    def usable(self) -> Tensor:
        """bool [B]: the rows with an advantage."""
        assert self.signals.advantages is not None
        return self.signals.advantages != 0

    def counting(self, loss: str) -> Rollout:
        """The rollout for a loss that is a mean over "rows", or over "tokens"."""
        shares = torch.ones(len(self.signals)) if loss == "rows" else None
        return replace(self, signals=replace(self.signals, shares=shares))


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.smoke:
        args.seeds, args.rollouts = args.seeds[:2], 2
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    runs = []
    for seed in tqdm(args.seeds, desc="models", unit="model"):
        with tempfile.TemporaryDirectory() as folder:
            save_scratch_model(SIZES, folder, seed)
            rollouts = roll_out(folder, args.rollouts, seed, args.untrained)
        runs.append(_run(rollouts, args.loss, args.keep) | {"seed": seed})
    settings = {name: given for name, given in vars(args).items() if name not in ("json", "smoke")}
    raw = {"hardware": facts, "settings": settings, "runs": runs}
    if args.json is not None:
        write_json(args.json, raw)
    print(f"\n{_render(raw)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that it works; figures mean nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="a model and its rollouts each")
    parser.add_argument("--rollouts", type=_two_or_more, default=11, help="batches of completions of each model")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25], help="of the rows with an advantage")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES), help="what a row counts in the loss")
    parser.add_argument(
        "--untrained", action="store_true", help="models that have learned nothing; digits are rewarded"
    )
    return parser


def _two_or_more(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError("the first is shown apart; write 2 or more")
    return int(text)


# ------------------------------------------------------------------------------------------------------ the rollouts


def roll_out(folder: str, num: int, seed: int, untrained: bool = False) -> list[Rollout]:
    """Of the model in a folder after some SFT steps. Untrained, it gets nothing right, and is rewarded for digits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not untrained:
            _warm_up(model, tokenizer)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        return [_rollout(model, tokenizer, index, _digits if untrained else _right) for index in range(num)]


def _sums(num: int) -> list[tuple[str, str]]:
    """Questions of one length, with their answers."""
    return [(f"{a:02}+{b:02}=", str(a + b)) for a, b in torch.randint(0, 100, (num, 2)).tolist()]


def _warm_up(model: Any, tokenizer: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(WARM_UP_STEPS):
        questions, answers = zip(*_sums(32), strict=True)
        ids = tokenizer([q + a for q, a in zip(questions, answers, strict=True)], padding=True, padding_side="right")
        input_ids, mask = torch.tensor(ids["input_ids"]), torch.tensor(ids["attention_mask"])
        input_ids = torch.cat([input_ids, torch.full_like(input_ids[:, :1], tokenizer.pad_token_id)], dim=1)
        ends = mask.sum(1)
        input_ids[torch.arange(len(ends)), ends] = tokenizer.eos_token_id
        labels = input_ids.masked_fill(torch.arange(input_ids.shape[1]) > ends[:, None], -100)
        labels[:, : len(questions[0])] = -100
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()


def _rollout(model: Any, tokenizer: Any, index: int, reward: Callable[[str, str], float]) -> Rollout:
    questions, answers = zip(*_sums(PROMPTS), strict=True)
    prompts = torch.tensor([tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions])
    width = prompts.shape[1]
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=LENGTH,
        num_return_sequences=GROUP,
    )
    completions = [_until_end(row[width:], tokenizer.eos_token_id) for row in generated]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor([reward(text, answers[row // GROUP]) for row, text in enumerate(texts)])
    groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
    by_prompt = rewards.view(PROMPTS, GROUP)
    advantages = (by_prompt - by_prompt.mean(1, keepdim=True)) / (by_prompt.std(1, keepdim=True) + 1e-4)
    rows = [
        policy.as_row(
            {
                "prompt_ids": prompts[row // GROUP],
                "completion_ids": completion,
                "completion_mask": torch.ones_like(completion),
                "advantages": advantages.flatten()[row],
            }
        )
        for row, completion in enumerate(completions)
    ]
    scorer = Scorer(
        model,
        [ValueGradient(), PUBLISHED],
        functools.partial(policy.collate, pad_token_id=tokenizer.pad_token_id),
        micro_batch_size=16,
        device=torch.device("cpu"),
        precision=contextlib.nullcontext,
        row_losses=functools.partial(policy.scored_losses, beta=0.0, correct_kl=False),
    )
    tensors, _ = scorer.score(rows, None, seed=index)
    signals = Signals(
        num_tokens=torch.tensor([len(completion) for completion in completions]),
        rewards=rewards,
        advantages=advantages.flatten(),
        groups=groups,
        tensors=tensors,
    )
    value, everything = _gradients(model, rows)
    return Rollout(signals, value, (everything @ everything.T, value @ value.T))


def _until_end(completion: Tensor, end: int) -> Tensor:
    ends = (completion == end).nonzero().flatten()
    return completion[: int(ends[0]) + 1] if len(ends) else completion


def _right(text: str, answer: str) -> float:
    """The share of characters that are right, and in their place."""
    return sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer))


def _digits(text: str, answer: str) -> float:
    """The share of digits among the characters, whatever the answer."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def _gradients(model: Any, rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of -A mean_t log p(y_t), row by row, without padding: float64 [B, D], of the V projection and of everything."""
    value = [name for name, _ in model.named_parameters()].index("model.layers.1.self_attn.v_proj.weight")
    of_value, of_all = [], []
    for row in rows:
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        loss = row["advantages"] * nn.functional.cross_entropy(logits, row["labels"][1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        of_value.append(gradients[value].flatten())
        of_all.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(of_value).double(), torch.stack(of_all).double()


# ---------------------------------------------------------------------------------------------------- the comparison


def _run(rollouts: list[Rollout], losses: list[str], keeps: list[float]) -> dict[str, Any]:
    quality = []
    for loss in losses:
        given = [rollout.counting(loss) for rollout in rollouts]
        quality += [
            {"loss": loss, "keep": keep, "method": method, "rollouts": judge(given, method, keep)}
            for keep in keeps
            for method in METHODS
        ]
    usable = [int(rollout.usable.sum()) for rollout in rollouts]
    return {"usable": usable, "rewards": [_mean_reward(rollout) for rollout in rollouts], "quality": quality}


def _mean_reward(rollout: Rollout) -> float:
    assert rollout.signals.rewards is not None
    return rollout.signals.rewards.mean().item()


def judge(rollouts: list[Rollout], method: str, keep: float) -> list[dict[str, float]]:
    """Of each rollout the mean over draws; the selector goes on from one to the next."""
    selector, generator = METHODS[method](), torch.Generator().manual_seed(0)
    judged = []
    for rollout in rollouts:
        link = Link(selector, max(round(keep * int(rollout.usable.sum())), 1))
        draws = [
            against_all(rollout, choose([link], rollout.signals, rollout.usable, generator))
            for _ in range(DRAWS if method in DRAWN else 1)
        ]
        judged.append(mean(draws))
    return judged


def against_all(rollout: Rollout, selection: Selection) -> dict[str, float]:
    """Cosine and error (see `compare`) of all parameters' gradient, and of the V projection's alone.

    g = sum_i s_i g_i / sum_i s_i over all rows with an advantage, g^ = sum_k w_k s_k g_k / sum_k w_k s_k over the kept.
    """
    signals = rollout.signals
    kept = torch.zeros(len(signals), dtype=torch.float64)
    kept[selection.indices] = selection.weights.double()
    shares = (signals.num_tokens if signals.shares is None else signals.shares) * rollout.usable
    of_all, of_value = (compare(kept, shares, products) for products in rollout.products)
    return dict(zip(FIGURES, (*of_all, *of_value), strict=True))


def mean(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in figures) for name in figures[0]}


# ---------------------------------------------------------------------------------------------------------- the tables


def _render(raw: dict[str, Any]) -> str:
    settings, runs = raw["settings"], raw["runs"]
    usable, reward = (fmean(figure for run in runs for figure in run[name]) for name in ("usable", "rewards"))
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Settings: {settings}"]
    parts.append(
        f"Of {PROMPTS * GROUP} completions {usable:.1f} have an advantage; their mean reward is {reward:.2f}. Mean over"
        f" a model's rollouts without its first, then over {len(runs)} models ± its standard error; in the last columns"
        " the first rollout alone."
    )
    for loss in settings["loss"]:
        rows = [_cells(runs, loss, keep, method) for keep in settings["keep"] for method in METHODS]
        heading = ["method", "share kept", "cosine", "error", "cosine, V alone", "error, V alone"]
        parts += [f"{LOSSES[loss]}:", table([*heading, "error, first", "error, V alone, first"], rows)]
    return "\n\n".join(parts) + "\n"


def _cells(runs: list[dict[str, Any]], loss: str, keep: float, method: str) -> list[str]:
    """A row of the table: a method at one share kept."""
    judged = [
        one["rollouts"]
        for run in runs
        for one in run["quality"]
        if (one["loss"], one["keep"], one["method"]) == (loss, keep, method)
    ]
    later = [mean(rollouts[1:]) for rollouts in judged]
    cells = [_mean([figures[name] for figures in later]) for name in FIGURES]
    cells += [_mean([rollouts[0][name] for rollouts in judged]) for name in ("error", "value_error")]
    return [method, f"{keep:g}", *cells]


def _mean(values: list[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{fmean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    sys.exit(main())
