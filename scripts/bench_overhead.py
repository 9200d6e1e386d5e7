"""What siftrl costs over plain TRL: the same GRPO job, in turns, in one process.

    python scripts/bench_overhead.py --out bench/overhead

siftrl's trainer without a selector has to give TRL's losses and weights bit for bit, in TRL's time. With a selector on,
it shows what choosing costs. The job: a Qwen3 from scratch (or --model), sums as prompts, and as reward the share of
digits, which a random model earns too, so that the losses are not zero.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_common import Spread, hardware, hardware_text, table
from datasets import Dataset
from tqdm.auto import tqdm
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from siftrl import plugins
from siftrl.models import save_scratch_model
from siftrl.recipe import ScratchConfig
from siftrl.run import write_json
from siftrl.trainers.grpo import GRPOTrainer

TRL, OFF = "trl", "siftrl, no selector"


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.smoke:
        args.steps, args.repeats, args.hidden_size, args.layers = 3, 2, 64, 2
    args.out.mkdir(parents=True, exist_ok=True)
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    kinds = [TRL, OFF, *args.selectors]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or _scratch(args, Path(folder) / "model")
        bar = tqdm(total=(args.repeats + 1) * len(kinds), desc="runs", unit="run")
        for repeat in range(args.repeats + 1):
            # A B, B A, A B: a machine that slows down does so for both
            for kind in kinds if repeat % 2 else reversed(kinds):
                run = _run(kind, str(model), args, Path(folder))
                if repeat > 0:  # the first round warms up
                    runs[kind].append(run)
                bar.update()
        bar.close()
    same = all(
        theirs["losses"] == ours["losses"] and theirs["weights"] == ours["weights"]
        for theirs, ours in zip(runs[TRL], runs[OFF], strict=True)
    )
    if not any(runs[TRL][0]["losses"]):
        raise SystemExit("every loss is zero, so their equality says nothing: choose another --model or --steps")
    settings = {name: str(given) if isinstance(given, Path) else given for name, given in vars(args).items()}
    del settings["out"]
    write_json(args.out / "overhead.json", {"hardware": facts, "settings": settings, "same": same, "runs": runs})
    text = f"Hardware: {hardware_text(facts)}\n\nSettings: {settings}\n\n{_render(runs, same, args.steps)}"
    (args.out / "overhead.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nraw: {args.out / 'overhead.json'}")
    return 0 if same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--model", type=Path, help="a model folder; default: a Qwen3 from scratch")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="GRPO steps of one run")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each kind, after one to warm up")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--completions", type=int, default=16, help="completions a prompt")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=8, help="tokens of a completion, at most")
    parser.add_argument("--selectors", nargs="*", default=["uniform", "prompt_curriculum"])
    return parser


def _scratch(args: argparse.Namespace, folder: Path) -> Path:
    sizes = ScratchConfig(
        hidden_size=args.hidden_size, num_layers=args.layers, num_heads=args.hidden_size // 32, max_positions=128
    )
    save_scratch_model(sizes, folder, seed=0)
    return folder


def digit_share(completions: list[str], **columns: Any) -> list[float]:
    """The share of digits among a completion's characters."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def _run(kind: str, model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build a trainer, time its training, and take down what it came to."""
    micro_batches = args.prompts * args.completions // args.micro_batch
    options = GRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=micro_batches,
        num_generations=args.completions,
        max_completion_length=args.max_tokens,
        max_steps=args.steps,
        learning_rate=1.5e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=0,
    )
    numbers = range(100, 1000)
    sums = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in numbers[::15] for b in numbers[::15]]})
    common: dict[str, Any] = {"model": model, "reward_funcs": digit_share, "args": options, "train_dataset": sums}
    if kind == TRL:
        trainer = TRLTrainer(**common)
    else:
        selector = None if kind == OFF else plugins.load("selector", kind, {})
        trainer = GRPOTrainer(**common, prompt_selector=selector)
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": digest.hexdigest(),
        "parts": {} if kind == TRL else dict(trainer.clock.seconds),
    }


def _render(runs: dict[str, list[dict[str, Any]]], same: bool, steps: int) -> str:
    heading = [
        "trainer",
        "seconds a run: median (min..max)",
        "ratio to TRL: of medians",
        "of each pair: median (min..max)",
    ]
    heading += ["ratio of CPU seconds", "choosing, share of the work", "choosing, ms a step"]
    rows = []
    for kind, mine in runs.items():
        base = runs[TRL]
        seconds = Spread.of([run["seconds"] for run in mine])
        pairs = Spread.of([a["seconds"] / b["seconds"] for a, b in zip(mine, base, strict=True)])
        ratio = seconds.median / Spread.of([run["seconds"] for run in base]).median
        cpu = Spread.of([run["cpu_seconds"] for run in mine]).median
        cpu /= Spread.of([run["cpu_seconds"] for run in base]).median
        row = [kind, seconds.text(2), f"{ratio:.3f}", pairs.text(), f"{cpu:.3f}"]
        if kind in (TRL, OFF):
            row += ["", ""]
        else:
            choosing = [run["parts"]["propose"] + run["parts"]["value_update"] for run in mine]
            shares = [spent / sum(run["parts"].values()) for spent, run in zip(choosing, mine, strict=True)]
            row += [f"{Spread.of(shares).median:.1%}", f"{1000 * Spread.of(choosing).median / steps:.1f}"]
        rows.append(row)
    verdict = "identical, bit for bit" if same else "DIFFERENT"
    verdict = f"Losses and weights of siftrl without a selector and of TRL: {verdict} ({len(runs[TRL])} pairs)."
    return f"{verdict}\n\n{table(heading, rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
