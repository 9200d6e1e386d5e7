"""`bench_curriculum.py select`: a value model against a few rollouts a prompt, at finding the same number of prompts.

Both find the m prompts of k·m whose mean reward is nearest to the target: V by one forward pass over the prompts, the
rollouts by generating n completions of each and scoring them. They take turns on the same candidates, new ones for
each pair, so that neither the machine's other work nor a prefix cache favours one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_common import Spread, hardware, hardware_text, table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from siftrl import plugins, state, value
from siftrl.calibration import equivalent_rollouts, explained_variance, group_statistics, rank_correlation
from siftrl.data import load_data
from siftrl.evaluate import score
from siftrl.models import load_tokenizer
from siftrl.recipe import GRPOStage, ModelConfig, Recipe, RecipeError, load_recipe
from siftrl.reward_guard import load_rewards
from siftrl.rollout import Sampling, TransformersEngine, VLLMEngine, vllm_generate
from siftrl.row_shapes import encode_prompts
from siftrl.run import write_json

Generate = Callable[[list[list[int]], int, bool], list[list[int]]]
"""(prompt ids, most tokens of a completion, whether every completion gets that many) -> completion ids."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Parts:
    """All that both ways need."""

    recipe: Recipe
    stage: GRPOStage
    policy: Any
    tokenizer: Any
    value_model: value.ValueModel
    train: Any  # data sets
    held_out: Any
    rewards: tuple[list[Any], list[float]]
    target: float
    value_steps_behind: int

    def hidden(self) -> value.HiddenStates | None:
        if self.value_model.body is not None:
            return None
        decoder = value.decoder(self.policy)
        return lambda ids, mask: decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def tokens(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return encode_prompts([row["prompt"] for row in rows], self.tokenizer)

    def value_tokens(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return encode_prompts([row["prompt"] for row in rows], self.value_model.tokenizer)

    def score(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> Tensor:
        """float [n, G]: the rewards of n prompts' completions, G of each in a row."""
        each = len(completions) // len(rows)
        repeated = [row for row in rows for _ in range(each)]
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        chat = not isinstance(rows[0]["prompt"], str)
        answers = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        columns = {name: [row[name] for row in repeated] for name in rows[0] if name not in ("prompt", "completion")}
        prompts = [row["prompt"] for row in repeated]
        return score(*self.rewards, prompts, answers, columns, completions).view(len(rows), each)


def run_select(args: argparse.Namespace, smoke: list[str]) -> int:
    if smoke:
        args.keep, args.lengths, args.repeats = [4], [8], 2
        args.reference_prompts, args.reference_rollouts, args.train_prompts = 16, 8, 32
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    parts = _load(args, smoke)
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    generate = _engine(args, parts)
    most = parts.stage.rollout.max_completion_tokens
    if args.trained is None:
        _train(parts, generate, args.train_prompts, most)
    quality = _quality(parts, generate, args, most)
    timings = []
    for keep in args.keep:
        for length in (None, *args.lengths):
            timings.append(_timing(parts, generate, args, keep, length or most, forced=length is not None))
    raw = {
        "hardware": facts,
        "settings": {
            "engine": args.engine,
            "candidates": args.candidates,
            "rollouts": args.rollouts,
            "repeats": args.repeats,
            "value": dataclasses.asdict(parts.value_model.config),
            "value_parameters": sum(p.numel() for p in parts.value_model.parameters()),
            "policy_parameters": sum(p.numel() for p in parts.policy.parameters()),
            "value_steps_behind": parts.value_steps_behind,
        },
        "quality": quality,
        "timings": timings,
    }
    write_json(args.out / "select.json", raw)
    text = _render(raw)
    (args.out / "select.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nraw: {args.out / 'select.json'}")
    return 0


# --------------------------------------------------------------------------------------------------------- loading


def _load(args: argparse.Namespace, smoke: list[str]) -> Parts:
    if (args.trained is None) == (args.model is None):
        raise RecipeError("give --run, a finished prompt_curriculum run, or --model, a policy to train V for here")
    behind, saved = 0, None
    if args.trained is not None:
        recipe = load_recipe(args.trained / "recipe.yaml", args.overrides)
        folder, start = args.trained / "model", _start_of(recipe, args.trained)
        checkpoint = state.last_checkpoint(args.trained / "checkpoints" / recipe.stages[-1].name)
        if checkpoint is None:
            raise RecipeError(f"{args.trained} holds no checkpoint of its last stage (checkpoint.every), so no V")
        saved = state.load_file(checkpoint / "siftrl.pt").get("value_model")
        if saved is None:
            raise RecipeError(f"{args.trained} was not trained with prompt_curriculum: its checkpoint holds no V")
        stages = json.loads((args.trained / "summary.json").read_text(encoding="utf-8"))["stages"]
        behind = stages[-1]["steps"] - state.step_of(checkpoint)
    else:
        recipe = load_recipe(args.recipe, [*smoke, *args.overrides])
        folder = start = args.model
    stage = recipe.stages[-1]
    if not isinstance(stage, GRPOStage) or stage.prompt_selector is None:
        raise RecipeError("the recipe's last stage has to be grpo, with a prompt_selector that has a value model")
    selector = plugins.load("selector", stage.prompt_selector.name, stage.prompt_selector.options)
    config = dataclasses.replace(selector.value, **args.value)
    if config.body == "own":
        config = dataclasses.replace(config, model=config.model or str(start))
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # as TRL trains: bf16 on GPUs
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
    value_model = value.build(config, policy, tokenizer, DEVICE)
    if saved is not None:
        value_model.load_state(saved)
    data = load_data(recipe.data_of(stage), "grpo", tokenizer)
    held_out = data.eval if data.eval is not None else data.train
    rewards = load_rewards(recipe.rewards_of(stage))
    return Parts(recipe, stage, policy, tokenizer, value_model, data.train, held_out, rewards, selector.target, behind)


def _start_of(recipe: Recipe, run: Path) -> Path:
    """The model that the run's last stage started from: what the untrained weights of V's body are."""
    if len(recipe.stages) > 1:
        return run / "stages" / recipe.stages[-2].name
    return run / "stages" / "scratch" if recipe.model.path is None else Path(recipe.model.path)


def _engine(args: argparse.Namespace, parts: Parts) -> Generate:
    rollout, tokenizer = parts.stage.rollout, parts.tokenizer

    def sampling(most: int) -> Sampling:
        return Sampling(most, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)

    if args.engine == "transformers":
        ending = TransformersEngine(parts.policy, tokenizer)
        endless = TransformersEngine(parts.policy, tokenizer, eos_ids=[len(tokenizer) + 1])  # never drawn

        def by_transformers(ids: list[list[int]], most: int, forced: bool) -> list[list[int]]:
            engine, size = endless if forced else ending, args.batch_size
            batches = [ids[at : at + size] for at in range(0, len(ids), size)]
            return [row for batch in batches for row in engine.generate(batch, sampling(most)).ids]

        return by_transformers

    longest = max(len(ids) for ids in parts.tokens(list(parts.train.select(range(min(len(parts.train), 4096))))))
    width = max(longest + 8 + max([rollout.max_completion_tokens, *args.lengths]), rollout.max_model_len or 0)
    options: dict[str, Any] = {"max_model_len": width}
    if width > parts.policy.config.get_text_config().max_position_embeddings:
        # only forced completions are that long, and nobody reads them
        options["hf_overrides"] = {"max_position_embeddings": width}
    if DEVICE == "cuda":
        options["gpu_memory_utilization"] = rollout.gpu_memory_utilization
    folder = str(args.trained / "model" if args.trained is not None else args.model)
    llm = VLLMEngine.from_path(folder, **(options | args.engine_args)).llm

    def by_vllm(ids: list[list[int]], most: int, forced: bool) -> list[list[int]]:
        # success rates need no log-probabilities, and vLLM takes time to hand them over
        return vllm_generate(llm, ids, sampling(most), None, ignore_eos=forced, logprobs=None).ids

    return by_vllm


# ------------------------------------------------------------------------------------------------- training, judging


def _repeat(ids: list[list[int]], times: int) -> list[list[int]]:
    return [row for row in ids for _ in range(times)]


def _train(parts: Parts, generate: Generate, num_prompts: int, most: int) -> None:
    """Regress V on the group means of prompts drawn uniformly, one pass, in the recipe's steps."""
    step, each = parts.stage.prompts_per_step, parts.stage.completions_per_prompt
    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(1))[:num_prompts].tolist()
    for at in tqdm(range(0, len(order), step), desc="training V", unit="step"):
        rows = [parts.train[i] for i in order[at : at + step]]
        rewards = parts.score(rows, generate(_repeat(parts.tokens(rows), each), most, False))
        parts.value_model.update(parts.value_tokens(rows), rewards, parts.hidden())


def _quality(parts: Parts, generate: Generate, args: argparse.Namespace, most: int) -> dict[str, Any]:
    """V and an n-rollout estimate, judged by a reference of many other rollouts of held-out prompts."""
    rows = list(parts.held_out.select(range(min(args.reference_prompts, len(parts.held_out)))))
    ids = parts.tokens(rows)
    reference = []
    for _ in tqdm(range(args.reference_rollouts), desc="reference", unit="rollout of each prompt"):
        reference.append(parts.score(rows, generate(ids, most, False)))
    groups = group_statistics(torch.cat(reference, dim=1))
    estimate = parts.score(rows, generate(_repeat(ids, args.rollouts), most, False)).double().nanmean(1)
    predicted = parts.value_model.predict(parts.value_tokens(rows), parts.hidden()).mean.double()
    keep = len(rows) // args.candidates
    found = {}
    for name, guess in {"value model": predicted, f"{args.rollouts} rollouts": estimate}.items():
        chosen = (guess - parts.target).abs().argsort(stable=True)[:keep]
        found[name] = _judged(guess, groups) | {"spread_found": groups.variance[chosen].mean().item()}
    found["value model"]["equivalent_rollouts"] = equivalent_rollouts(
        predicted, groups.mean, groups.variance, groups.count
    )
    best = groups.variance.sort(descending=True).values[:keep].mean().item()
    return {
        "prompts": len(rows),
        "reference_rollouts": args.reference_rollouts,
        "reward": groups.mean.mean().item(),
        "by": found,
        "spread_uniform": groups.variance.mean().item(),
        "spread_best": best,
    }


def _judged(guess: Tensor, groups: Any) -> dict[str, float]:
    """Explained variance against the reference's means, and with the reference's own noise taken out.

    The reference's n rollouts add s2/n to both mean squares, s2 the mean variance within a group; without it they are
    those against the true success rates. r2: the squared correlation, the most that any shift and scale would explain.
    """
    mean = groups.mean
    noise = (groups.variance / groups.count).mean()
    error, whole = (mean - guess).square().mean() - noise, mean.var(correction=0) - noise
    return {
        "explained_variance": explained_variance(guess, mean),
        "explained_variance_denoised": float(1 - error / whole) if whole > 0 else float("nan"),
        "r2": float(torch.corrcoef(torch.stack([guess, mean]))[0, 1].square()),
        "rank_correlation": rank_correlation(guess, mean),
    }


# ---------------------------------------------------------------------------------------------------------- timing


def _timing(
    parts: Parts, generate: Generate, args: argparse.Namespace, keep: int, length: int, forced: bool
) -> dict[str, Any]:
    """Seconds of both ways, measured in pairs; each pair has candidates of its own."""
    num = keep * args.candidates
    if num > len(parts.train):
        raise RecipeError(
            f"--keep {keep} with --candidates {args.candidates} needs {num} rows: there are {len(parts.train)}"
        )
    generator = torch.Generator().manual_seed(2)
    seconds: dict[str, list[float]] = {"value": [], "rollouts": [], "generation": [], "value_update": []}
    tokens = []
    what = f"m={keep}, " + (f"{length} tokens forced" if forced else "real lengths")
    for repeat in tqdm(range(args.repeats + 1), desc=what, unit="pair"):
        rows = [parts.train[i] for i in torch.randperm(len(parts.train), generator=generator)[:num].tolist()]
        ids, value_ids = parts.tokens(rows), parts.value_tokens(rows)
        t0 = time.perf_counter()
        _nearest(parts.value_model.predict(value_ids, parts.hidden()).mean, parts.target, keep)
        t1 = time.perf_counter()
        completions = generate(_repeat(ids, args.rollouts), length, forced)
        t2 = time.perf_counter()
        rewards = parts.score(rows, completions)
        _nearest(rewards.nanmean(1), parts.target, keep)
        t3 = time.perf_counter()
        parts.value_model.update(value_ids[:keep], rewards[:keep], parts.hidden())  # what V costs besides, each step
        t4 = time.perf_counter()
        if repeat > 0:  # the first pair warms both up
            spent = {"value": t1 - t0, "rollouts": t3 - t1, "generation": t2 - t1, "value_update": t4 - t3}
            for name, figure in spent.items():
                seconds[name].append(figure)
            tokens.append(sum(map(len, completions)) / len(completions))
    return {"keep": keep, "of": num, "forced": forced, "length": sum(tokens) / len(tokens), "seconds": seconds}


def _nearest(means: Tensor, target: float, keep: int) -> Tensor:
    return (means - target).abs().argsort(stable=True)[:keep]


def _render(raw: dict[str, Any]) -> str:
    settings, quality = raw["settings"], raw["quality"]
    num = settings["rollouts"]
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Settings: {settings}"]
    rows = []
    for timing in raw["timings"]:
        seconds = timing["seconds"]
        median = {name: Spread.of(values) for name, values in seconds.items()}
        pairs = Spread.of([b / a for a, b in zip(seconds["value"], seconds["rollouts"], strict=True)])
        whole = median["value"].median + median["value_update"].median
        rows.append(
            [
                f"{timing['keep']} of {timing['of']}",
                f"{timing['length']:.1f}" + (" (forced)" if timing["forced"] else ""),
                median["value"].text(4),
                median["rollouts"].text(),
                f"**{median['rollouts'].median / median['value'].median:.1f}** ({pairs.low:.1f}..{pairs.high:.1f})",
                f"{median['generation'].median / median['value'].median:.1f}",
                f"{median['rollouts'].median / whole:.1f}",
            ]
        )
    heading = ["prompts found", "tokens a completion", "value model, s: median (min..max)", f"{num} rollouts each, s"]
    heading += ["ratio (of each pair: min..max)", "ratio, generation alone", "ratio, V's training counted"]
    parts.append(table(heading, rows))
    parts.append(
        f"Judged on {quality['prompts']} held-out prompts by {quality['reference_rollouts']} other rollouts each "
        f"(mean reward {quality['reward']:.3f}):"
    )
    heading = ["found by", "explained variance", "with the reference's noise taken out", "r2", "rank correlation"]
    heading += ["reward variance of the prompts found", "equivalent rollouts"]
    rows = [
        [
            name,
            f"{by['explained_variance']:.3f}",
            f"{by['explained_variance_denoised']:.3f}",
            f"{by['r2']:.3f}",
            f"{by['rank_correlation']:.3f}",
            f"{by['spread_found']:.3f}",
            f"{by['equivalent_rollouts']:.2f}" if "equivalent_rollouts" in by else num,
        ]
        for name, by in quality["by"].items()
    ]
    empty = [""] * 4
    rows += [["drawn uniformly", *empty, f"{quality['spread_uniform']:.3f}", ""]]
    rows += [["the reference itself", *empty, f"{quality['spread_best']:.3f}", ""]]
    parts.append(table(heading, rows))
    return "\n\n".join(parts) + "\n"
