"""A coreset as an estimator: the policy gradient of few completions against that of all, in a small model's rollouts.

The model has learned a little, so that completions are neither all alike nor all noise. The gradients that are compared
are autograd's, of the V projection, which the coreset sees, and of all parameters, which it does not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from siftrl import policy
from siftrl.batch_selection import Link, choose
from siftrl.scoring import Scorer
from siftrl.selectors.gradient_coreset import GradientCoreset
from siftrl.selectors.uniform_rows import UniformRows
from siftrl.signals import ValueGradient
from siftrl.types import BatchSelector, Selection, Signals

PROMPTS, GROUP, ROLLOUTS, DRAWS = 8, 8, 4, 10
PUBLISHED = ValueGradient("spsa", perturbations=1, epsilon=1e-3, shared=True)
METHODS: dict[str, Callable[[], BatchSelector]] = {
    "uniform": UniformRows,
    "clusters": GradientCoreset,
    "clusters, no history": lambda: GradientCoreset(history=False),
    "paper": lambda: GradientCoreset(paper=True),
}


@dataclass(frozen=True)
class Rollout:
    """value: float64 [B, D], the gradient of each row's policy loss with respect to the V projection.
    products: float64 [B, B], g_i . g_j, of "value" and of "all" parameters: what follows from gradients' combinations.
    """

    signals: Signals
    value: Tensor
    products: dict[str, Tensor]

    @property
    def usable(self) -> Tensor:
        assert self.signals.advantages is not None
        return self.signals.advantages != 0


@pytest.fixture(scope="module")
def rollouts(tiny_model: str) -> list[Rollout]:
    return roll_out(tiny_model, ROLLOUTS, seed=0)


def roll_out(folder: str, num: int, seed: int) -> list[Rollout]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _warm_up(model, tokenizer)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        return [_rollout(model, tokenizer, seed) for seed in range(num)]


def _sums(num: int) -> list[tuple[str, str]]:
    """Questions of one length, with their answers."""
    return [(f"{a:02}+{b:02}=", str(a + b)) for a, b in torch.randint(0, 100, (num, 2)).tolist()]


def _warm_up(model: Any, tokenizer: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
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
    model.eval()


def _rollout(model: Any, tokenizer: Any, seed: int) -> Rollout:
    questions, answers = zip(*_sums(PROMPTS), strict=True)
    prompts = torch.tensor([tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions])
    width = prompts.shape[1]
    generated = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=5, num_return_sequences=GROUP
    )
    completions = [_until_end(row[width:], tokenizer.eos_token_id) for row in generated]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor([_reward(text, answers[row // GROUP]) for row, text in enumerate(texts)])
    groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
    table = rewards.view(PROMPTS, GROUP)
    advantages = ((table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)).flatten()
    rows = [
        policy.as_row(
            {
                "prompt_ids": prompts[row // GROUP],
                "completion_ids": completion,
                "completion_mask": torch.ones_like(completion),
                "advantages": advantages[row],
            },
            torch.ones(1),
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
    tensors, _ = scorer.score(rows, None, seed)
    signals = Signals(
        num_tokens=torch.tensor([len(completion) for completion in completions]),
        rewards=rewards,
        advantages=advantages,
        groups=groups,
        tensors=tensors,
    )
    value, everything = _gradients(model, rows)
    return Rollout(signals, value, {"value": value @ value.T, "all": everything @ everything.T})


def _until_end(completion: Tensor, end: int) -> Tensor:
    ends = (completion == end).nonzero().flatten()
    return completion[: int(ends[0]) + 1] if len(ends) else completion


def _reward(text: str, answer: str) -> float:
    """The share of characters that are right, and in their place."""
    return sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer))


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


# ------------------------------------------------------------------------------------------------- what is compared


def shares(signals: Signals) -> Tensor:
    """float64 [B]: what each row counts in the loss."""
    return (signals.num_tokens if signals.shares is None else signals.shares).double()


def compare(rollout: Rollout, selection: Selection) -> dict[str, float]:
    """Of the V projection and of all parameters the cosine of g^ and g, and the error |g^ - g| / |g|.

    g = sum_i s_i g_i / sum_i s_i over all rows with an advantage, g^ = sum_k w_k s_k g_k / sum_k w_k s_k over the kept.
    """
    kept = torch.zeros(len(rollout.signals), dtype=torch.float64)
    kept[selection.indices] = selection.weights.double()
    whole, few = (
        weights / weights.sum() for weights in (shares(rollout.signals) * rows for rows in (rollout.usable, kept))
    )
    figures = {}
    for name, products in rollout.products.items():
        norm, gap = (whole @ products @ whole).sqrt(), few - whole
        figures[f"{name} cosine"] = float(few @ products @ whole / (norm * (few @ products @ few).sqrt()))
        figures[f"{name} error"] = float((gap @ products @ gap).clamp(min=0).sqrt() / norm)
    return figures


def judge(rollouts: list[Rollout], method: str, keep: float) -> list[dict[str, float]]:
    """Of each rollout the mean over draws; the selector goes on from one to the next."""
    selector, generator = METHODS[method](), torch.Generator().manual_seed(0)
    judged = []
    for rollout in rollouts:
        link = Link(selector, round(keep * int(rollout.usable.sum())))
        draws = [
            compare(rollout, choose([link], rollout.signals, rollout.usable, generator))
            for _ in range(DRAWS if method == "uniform" else 1)
        ]
        judged.append(mean(draws))
    return judged


def mean(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in figures) for name in figures[0]}


def counting(counts: str, rollout: Rollout) -> Rollout:
    """The rollout for a loss that is a mean over rows, or over tokens."""
    ones = torch.ones(len(rollout.signals))
    return replace(rollout, signals=replace(rollout.signals, shares=ones if counts == "rows" else None))


# --------------------------------------------------------------------------------------------------------- the tests


def test_the_signal_is_the_policy_gradient_of_v(rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        gradients = rollout.signals[ValueGradient()]
        dense = gradients.total(torch.eye(len(gradients))).double()
        assert torch.allclose(dense, rollout.value, rtol=1e-4, atol=1e-6)
        assert not dense[~rollout.usable].any() and dense[rollout.usable].any(1).all()


@pytest.mark.parametrize("keep", [0.5, 0.25])
@pytest.mark.parametrize("counts", ["rows", "tokens"])
def test_the_coreset_is_nearer_to_the_whole_gradient(rollouts: list[Rollout], counts: str, keep: float) -> None:
    given = [counting(counts, rollout) for rollout in rollouts]
    # The first rollout gives the history. Adam's step from nothing is the gradient's sign, where the size of an
    # advantage does not show: there the coreset is no better than random rows.
    found = {method: mean(judge(given, method, keep)[1:]) for method in METHODS}
    for method in ("clusters", "clusters, no history"):
        for other in ("uniform", "paper"):
            assert found[method]["value error"] < 0.6 * found[other]["value error"], (method, other)
            assert found[method]["all error"] < 0.85 * found[other]["all error"], (method, other)
        assert found[method]["value cosine"] > found["uniform"]["value cosine"]
        assert found[method]["all cosine"] > found["uniform"]["all cosine"]


@pytest.mark.parametrize("counts", ["rows", "tokens"])
def test_completions_that_came_several_times_are_kept_once(rollouts: list[Rollout], counts: str) -> None:
    """Row i comes 1 + i % 3 times: with a place for each kind, nothing of the gradient is lost."""
    rollout = counting(counts, rollouts[0])
    kinds = rollout.usable.nonzero().flatten()
    rows = kinds.repeat_interleave(1 + torch.arange(len(kinds)) % 3)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    several = Rollout(
        rollout.signals.subset(rows),
        rollout.value[rows],
        {name: products[rows][:, rows] for name, products in rollout.products.items()},
    )
    num_kinds = len(rollout.value[kinds].unique(dim=0))
    for history in (True, False):
        link = Link(GradientCoreset(history=history), num_kinds)
        selection = choose([link], several.signals, several.usable, torch.Generator())
        assert compare(several, selection)["all error"] < 1e-3
        assert selection.weights.max() > 2 * selection.weights.min()
        unweighted = replace(selection, weights=torch.ones(num_kinds))
        assert compare(several, unweighted)["all error"] > 0.1


def test_sources_of_completions(rollouts: list[Rollout]) -> None:
    """A small source's completions are all kept, as long as they have an advantage; the prompts name their source."""
    rollout = rollouts[0]
    prompt = rollout.signals.groups
    assert prompt is not None and rollout.usable[prompt == 0].all()
    source = ["rare" if number == 0 else "common" for number in prompt.tolist()]
    signals = replace(rollout.signals, source=source, source_sizes={"rare": 1, "common": 99})
    keep = int(rollout.usable.sum()) // 2
    selection = choose([Link(GradientCoreset(), keep)], signals, rollout.usable, torch.Generator())
    kept = selection.indices.tolist()
    assert kept[:GROUP] == list(range(GROUP)) and len(kept) == keep
    assert selection.reasons == ("small source",) * GROUP + ("medoid",) * (keep - GROUP)
    assert rollout.usable[kept].all()
