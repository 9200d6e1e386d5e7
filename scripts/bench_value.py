"""Which value model predicts best: every setting on one recorded stream of prompts and rewards.

    python scripts/bench_curriculum.py learn --out bench/stream --selectors uniform --checkpoint-every 20
    python scripts/bench_value.py --out bench/value --run bench/stream/runs/uniform-0 bench/stream/runs/uniform-1

A finished run with the uniform selector is the stream: its selection.jsonl says which prompts each step rolled out and
what came of them. Each value model goes through it as in training: predict the step's prompts, be judged, learn from
their group means. So its figures are out of sample, and every setting sees the same. For a head on the policy's hidden
state (body: policy) the policy moves along, from checkpoint to checkpoint of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_common import hardware, hardware_text, table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from siftrl import state, value
from siftrl.calibration import brier, equivalent_rollouts, explained_variance, group_statistics, rank_correlation
from siftrl.data import load_data
from siftrl.models import load_tokenizer
from siftrl.recipe import GRPOStage, RecipeError, load_recipe
from siftrl.row_shapes import encode_prompts
from siftrl.run import write_json
from siftrl.value import ValueConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Stream:
    """One run: for each step the prompts' tokens and their rewards, float [P, G]; and the policies it went through."""

    name: str
    tokenizer: Any
    start: str
    prompts: list[list[list[int]]]
    rewards: list[Tensor]
    spare: list[list[int]]  # other prompts of the data set: what scoring candidates is timed on
    policies: dict[int, str]  # optimizer step -> folder

    @classmethod
    def of(cls, run: Path, steps: int | None) -> Stream:
        recipe = load_recipe(run / "recipe.yaml")
        stage = recipe.stages[-1]
        if not isinstance(stage, GRPOStage) or len(recipe.stages) > 1 or recipe.model.path is None:
            raise RecipeError(f"{run}: make the stream with bench_curriculum.py learn --selectors uniform")
        tokenizer = load_tokenizer(recipe.model)
        rows = load_data(recipe.data_of(stage), "grpo", tokenizer).train
        prompts, rewards = [], []
        for line in (run / "selection.jsonl").read_text(encoding="utf-8").splitlines()[:steps]:
            chosen = [c for c in json.loads(line)["candidates"] if c["chosen"] and c["reward"] is not None]
            prompts.append(encode_prompts([rows[c["id"]]["prompt"] for c in chosen], tokenizer))
            rewards.append(torch.stack([_group(c["reward"], stage.completions_per_prompt) for c in chosen]))
        some = rows.select(range(min(len(rows), 4 * stage.prompts_per_step)))["prompt"]
        policies = {
            state.step_of(folder): str(folder) for folder in state.checkpoints(run / "checkpoints" / stage.name)
        }
        start = recipe.model.path
        return cls(
            run.name, tokenizer, start, prompts, rewards, encode_prompts(some[:], tokenizer), {0: start} | policies
        )


def _group(mean: float, count: int) -> Tensor:
    """float [G]: the log has a group's mean only, which says all where rewards are 0 or 1."""
    correct = round(mean * count)
    if abs(correct - mean * count) > 1e-3 * count:
        raise RecipeError(f"a group mean of {mean} is not one of {count} rewards of 0 or 1, which this benchmark needs")
    return torch.arange(count).lt(correct).float()


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.smoke:
        args.steps, args.lr, args.head_lr, args.updates = 4, [3e-4], [3e-3], [1]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    try:
        streams = [Stream.of(run.resolve(), args.steps) for run in args.run]
    except RecipeError as error:
        print(f"bench_value: {error}", file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    jobs = list(itertools.product(_grid(args), streams))
    for config, stream in tqdm(jobs, desc="value models", unit="run"):
        results.append({"config": dataclasses.asdict(config), "stream": stream.name, **_replay(config, stream)})
        raw = {"hardware": facts, "streams": [_about(stream) for stream in streams], "results": results}
        write_json(args.out / "value.json", raw)
    text = _render(raw)
    (args.out / "value.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nraw: {args.out / 'value.json'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="finished runs with the uniform selector")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--steps", type=int, help="only the first steps of each stream")
    parser.add_argument("--bodies", nargs="+", default=["own/full", "own/lora", "own/head", "policy/head"])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="of an own body")
    parser.add_argument("--head-lr", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--updates", nargs="+", type=int, default=[1, 2])
    return parser


def _grid(args: argparse.Namespace) -> Iterator[ValueConfig]:
    for name in args.bodies:
        body, train = name.split("/")
        rates = args.lr if train != "head" else [ValueConfig.lr]
        for lr, head_lr, updates in itertools.product(rates, args.head_lr, args.updates):
            yield ValueConfig(body=body, train=train, lr=lr, head_lr=head_lr, updates=updates)


def _about(stream: Stream) -> dict[str, Any]:
    means = torch.cat(stream.rewards).mean(1)
    return {
        "name": stream.name,
        "steps": len(stream.rewards),
        "prompts_per_step": len(stream.rewards[0]),
        "completions_per_prompt": stream.rewards[0].size(1),
        "reward": means.mean().item(),
        "policies": sorted(stream.policies),
    }


def _replay(config: ValueConfig, stream: Stream) -> dict[str, Any]:
    """Let one value model go through a stream; its figures over the first and the second half of the steps."""
    torch.manual_seed(0)
    policy = _policy(stream.start)
    if config.body == "own":
        config = dataclasses.replace(config, model=stream.start)
    model = value.build(config, policy, stream.tokenizer, DEVICE)
    hidden = _hidden(policy) if config.body == "policy" else None
    predicted: list[Tensor] = []
    predict_seconds, update_seconds = [], []
    for step, (prompts, rewards) in enumerate(zip(stream.prompts, stream.rewards, strict=True)):
        if hidden is not None and step > 0 and step in stream.policies:
            hidden = _hidden(_policy(stream.policies[step]))
        predicted.append(model.predict(prompts, hidden).mean)
        t0 = time.perf_counter()
        model.predict(stream.spare, hidden)
        t1 = time.perf_counter()
        model.update(prompts, rewards, hidden)
        t2 = time.perf_counter()
        predict_seconds.append(t1 - t0)
        update_seconds.append(t2 - t1)
    half = len(predicted) // 2
    return {
        "early": _judge(predicted[:half], stream.rewards[:half]),
        "late": _judge(predicted[half:], stream.rewards[half:]),
        "predict_seconds": sorted(predict_seconds)[half],
        "update_seconds": sorted(update_seconds)[half],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _policy(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()


def _hidden(policy: Any) -> value.HiddenStates:
    decoder = value.decoder(policy)
    return lambda ids, mask: decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _judge(predicted: list[Tensor], rewards: list[Tensor]) -> dict[str, float]:
    """Over all prompts of these steps, each predicted before its rollouts."""
    guess, groups = torch.cat(predicted).double(), group_statistics(torch.cat(rewards))
    return {
        "explained_variance": explained_variance(guess, groups.mean),
        "brier": brier(guess, groups.mean),
        "rank_correlation": rank_correlation(guess, groups.mean),
        "equivalent_rollouts": equivalent_rollouts(guess, groups.mean, groups.variance, groups.count),
    }


def _render(raw: dict[str, Any]) -> str:
    """One row a setting, means over the streams, the best first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in raw["results"]:
        config = result["config"]
        lr = config["lr"] if config["train"] != "head" else ""
        key = (f"{config['body']}/{config['train']}", lr, config["head_lr"], config["updates"])
        groups.setdefault(key, []).append(result)
    rows = []
    for key, results in groups.items():
        late, early = ([result[half] for result in results] for half in ("late", "early"))
        variances = [judged["explained_variance"] for judged in late]
        rows.append(
            [
                *key,
                f"{fmean(variances):.3f} ({min(variances):.3f}..{max(variances):.3f})",
                f"{fmean(judged['explained_variance'] for judged in early):.3f}",
                f"{fmean(judged['rank_correlation'] for judged in late):.3f}",
                f"{fmean(judged['equivalent_rollouts'] for judged in late):.2f}",
                f"{1000 * fmean(result['predict_seconds'] for result in results):.1f}",
                f"{1000 * fmean(result['update_seconds'] for result in results):.1f}",
                f"{results[0]['trained']:,}",
            ]
        )
    rows.sort(key=lambda row: -float(row[4].split()[0]))
    heading = ["body/train", "lr", "head_lr", "updates", "explained variance, second half", "first half"]
    heading += ["rank correlation", "equivalent rollouts", "score 4P prompts, ms", "update, ms", "trained weights"]
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Streams: {raw['streams']}", table(heading, rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
