"""What can only be seen on a GPU: short runs, each a process with a limit of its own, and a line each of what came out.

    python scripts/device_check.py --model models/SmolLM2-135M-Instruct --out device-check
    python scripts/device_check.py --model models/SmolLM2-135M-Instruct --out device-check --only eval-vllm top-p

Each check trains for 2 steps on sums that the script writes itself, so nothing is downloaded; it runs without a GPU as
well, slowly, on vLLM for CPUs. What a check printed is in OUT/NAME.log, its run in OUT/NAME. Exit code 1 where one
failed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).with_name("train.py")
GRPO: dict[str, Any] = {
    "kind": "grpo",
    "prompts_per_step": 4,
    "completions_per_prompt": 8,
    "micro_batch_size": 8,
    "batch_selector": {"name": "reward_variance", "keep": 0.5},
    "rollout": {"engine": "vllm", "max_completion_tokens": 32, "max_model_len": 256},
    "eval": {},
    "trainer": {"max_steps": 2, "learning_rate": 1e-5, "disable_tqdm": True},
}
SFT = {"kind": "sft", "rows_per_step": 8, "micro_batch_size": 8, "trainer": {"max_steps": 2, "disable_tqdm": True}}


@dataclass(frozen=True)
class Check:
    """One run of a recipe: what it changes, and what must be seen in its records; `found` returns figures or raises."""

    about: str
    stages: list[dict[str, Any]]
    found: Callable[[list[dict[str, Any]]], dict[str, float]] = lambda lines: {}
    model: dict[str, Any] = field(default_factory=dict)
    deepspeed: str | None = None
    limit: int = 150


def grpo(**rollout: Any) -> dict[str, Any]:
    return GRPO | {"rollout": GRPO["rollout"] | rollout}


def trained_with(**trainer: Any) -> dict[str, Any]:
    return GRPO | {"trainer": GRPO["trainer"] | trainer}


def figures(*names: str) -> Callable[[list[dict[str, Any]]], dict[str, float]]:
    """The largest of each figure over the run's steps; all must be there and finite."""

    def found(lines: list[dict[str, Any]]) -> dict[str, float]:
        seen = {name: [line[name] for line in lines if line.get(name) is not None] for name in names}
        missing = [name for name, values in seen.items() if not values]
        assert not missing, f"never logged: {missing}"
        largest = {name: max(values) for name, values in seen.items()}
        assert all(map(math.isfinite, largest.values())), largest
        return largest

    return found


RATIO = "sampling/importance_sampling_ratio/mean"


def ratio_near_one(lines: list[dict[str, Any]]) -> dict[str, float]:
    largest = figures(RATIO, "sampling/masked", "engine/logprob_drift")(lines)
    ratios = [line[RATIO] for line in lines if RATIO in line]
    assert all(abs(ratio - 1) < 0.1 for ratio in ratios), f"ratios {ratios}: the engine's probabilities are of a cut"
    return largest


CHECKS = {
    "plain": Check("colocated vLLM in the default precision", [grpo()], ratio_near_one),
    "top-p": Check("the engine's probabilities are of the whole distribution", [grpo(top_p=0.8)], ratio_near_one),
    "fp16": Check("16-bit floats for GPUs without bfloat16", [trained_with(fp16=True, bf16=False)], figures("loss")),
    "sleep": Check("vLLM's memory is freed while the trainer updates", [grpo(sleep=True)], ratio_near_one),
    "two-engines": Check("two stages, each with a vLLM", [GRPO | {"name": "a"}, GRPO | {"name": "b"}], limit=240),
    "lora-zero3": Check("adapters under ZeRO-3 are merged", [SFT, grpo()], model={"lora": {}}, deepspeed="zero3"),
    "qlora": Check(
        "adapters of a 4-bit base are trained in float32, and merged",
        [GRPO | {"rollout": {"max_completion_tokens": 32}}],
        model={"lora": {}, "quantize": "4bit"},
    ),
}


def rows(first: int, count: int) -> str:
    pairs = [(a, a + 1) for a in range(first, first + count)]
    texts = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in pairs]
    return "".join(json.dumps(text) + "\n" for text in texts)


def run(command: list[str], log: Path, limit: int) -> str | None:
    """Run a command with its output in `log`; returns why it failed, or None."""
    with log.open("w") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"not at its end after {limit} s"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return None if code == 0 else f"exit code {code}: {last[:200]}"


def train(name: str, check: Check, model: str, out: Path) -> tuple[str | None, dict[str, float]]:
    data = {"path": str(out / "rows"), "prompt": "question", "completion": "answer", "chat": True}
    recipe = {
        "model": {"path": model} | check.model,
        "data": data | {"eval": {"path": str(out / "rows"), "size": 8}},
        "rewards": ["math_verify"],
        "stages": check.stages,
        "distribution": {"deepspeed": check.deepspeed},
        "logging": {"every": 1},
        "output": {"dir": str(out), "overwrite": True},
    }
    (out / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    launcher = ["deepspeed", "--num_accelerators", "1"] if check.deepspeed else [sys.executable]
    problem = run([*launcher, str(TRAIN), str(out / f"{name}.yaml")], out / f"{name}.log", check.limit)
    if problem is not None:
        return problem, {}
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    try:
        assert (out / name / "model" / "config.json").is_file(), "no model was written"
        return None, check.found(lines)
    except AssertionError as error:
        return str(error), {}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a chat model's folder or hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and what they print")
    parser.add_argument("--only", nargs="*", choices=[*CHECKS, "eval-vllm"], help="these checks (default: all)")
    args = parser.parse_args()
    out = args.out.absolute()
    (out / "rows").mkdir(parents=True, exist_ok=True)
    (out / "rows" / "train.jsonl").write_text(rows(1, 64))
    (out / "rows" / "test.jsonl").write_text(rows(100, 8))
    results: dict[str, Any] = {}
    for name in args.only or [*CHECKS, "eval-vllm"]:
        began = time.perf_counter()
        found: dict[str, float] = {}
        if name == "eval-vllm":
            command = [sys.executable, "-m", "siftrl", "eval", args.model, "--data", str(out / "rows"), "--chat"]
            command += ["--prompt", "question", "--reward", "math_verify", "--engine", "vllm", "--max-tokens", "32"]
            problem = run([*command, "--json", str(out / "eval.json")], out / f"{name}.log", 150)
        else:
            problem, found = train(name, CHECKS[name], args.model, out)
        seconds = time.perf_counter() - began
        results[name] = {"problem": problem, "seconds": seconds} | found
        shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        print(f"{name:12} {'failed: ' + problem if problem else 'ok'}  {seconds:.0f} s  {shown}", flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=2))
    return int(any(result["problem"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
