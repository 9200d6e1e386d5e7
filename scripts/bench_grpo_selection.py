"""Does choosing prompts, completions and a coreset of them pay in GRPO? One start, one task, many arms, three seeds.

    python scripts/bench_grpo_selection.py learn --out bench/grpo_selection --jobs 2
    python scripts/bench_grpo_selection.py report --out bench/grpo_selection

learn: every arm with every seed from one warmed-up start, each in a process of its own on its share of the cores; arms
take turns inside a seed. All take the same number of optimizer steps, with the same number of rollouts each. Finished
runs are kept: the same command goes on where it was stopped. report: the tables and the plot again.
docs/benchmarks.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_common import cores, hardware, hardware_text
from bench_grpo_report import render, write_plot
from tqdm.auto import tqdm

CURRICULUM: tuple[str, dict[str, Any]] = (
    "prompt_curriculum",
    {"candidates": 8, "window": 64, "value": {"lr": 3e-4, "head_lr": 3e-3, "updates": 4, "micro_batch_size": 256}},
)
HALF = {
    name: {"prompts": CURRICULUM, "chain": [(name, {}, 0.5)]}
    for name in ("uniform_rows", "largest_advantage", "reward_variance", "utility_diversity", "gradient_coreset")
}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "uniform, skipping": {"skip": True},
    "curriculum": {"prompts": CURRICULUM},
    **{f"curriculum, {name}": arm for name, arm in HALF.items()},
    "all three": {
        "prompts": CURRICULUM,
        "chain": [("largest_advantage", {}, 0.75), ("gradient_coreset", {}, 2 / 3)],
    },
}
"""Arm -> its prompt selector with keys, its chain of batch selectors with keys and shares, and whether completions
without advantage are left out of the passes where nothing else would leave them out."""
SETTINGS: tuple[str, ...] = (
    "prompts",
    "completions",
    "micro_batch",
    "scoring_batch",
    "steps",
    "updates",
    "iterations",
    "lr",
)
SETTINGS += ("temperature", "max_tokens", "rows", "eval_size", "eval_every")
START: tuple[str, ...] = ("width", "layers", "warm_up_steps", "warm_up_rows", "terse_steps")
SMOKE = {
    "prompts": 4,
    "completions": 4,
    "micro_batch": 8,
    "scoring_batch": 8,
    "steps": 2,
    "rows": 64,
    "eval_size": 18,
    "eval_every": 1,
    "width": 32,
    "layers": 2,
    "warm_up_steps": 20,
    "terse_steps": 2,
    "warm_up_rows": 16,
}
"""Small enough to see in seconds that the benchmark works; its figures mean nothing."""


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if getattr(args, "smoke", False):
        vars(args).update(SMOKE)
    return int(args.function(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    learn = commands.add_parser("learn", help="every arm with every seed")
    start = commands.add_parser("start", help="the model that all start from (what `learn` begins with)")
    run = commands.add_parser("run", help="one arm with one seed (what `learn` starts)")
    report = commands.add_parser("report", help="the tables and the plot of `learn` again")
    for sub, function in (
        (learn, learn_command),
        (start, start_command),
        (run, run_command),
        (report, report_command),
    ):
        sub.set_defaults(function=function)
        sub.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    for sub in (learn, start):
        sub.add_argument("--width", type=int, default=96)
        sub.add_argument("--layers", type=int, default=4)
        sub.add_argument("--warm-up-steps", type=int, default=700, help="steps of its first stage")
        sub.add_argument("--terse-steps", type=int, default=10, help="steps of the warm-up's second stage")
        sub.add_argument("--warm-up-rows", type=int, default=128, help="rows of a warm-up step")
    for sub in (learn, run):
        sub.add_argument("--prompts", type=int, default=16, help="prompts of a rollout")
        sub.add_argument("--completions", type=int, default=16, help="completions of a prompt")
        sub.add_argument("--micro-batch", type=int, default=128, help="most rows of a forward and backward pass")
        sub.add_argument("--scoring-batch", type=int, default=256, help="rows of a scoring pass")
        sub.add_argument("--steps", type=int, default=100, help="rollouts")
        sub.add_argument("--updates", type=int, default=1, help="optimizer steps that share a rollout's rows")
        sub.add_argument("--iterations", type=int, default=1, help="times that a rollout's rows are trained on")
        sub.add_argument("--lr", type=float, default=7e-5)
        sub.add_argument("--temperature", type=float, default=1.0)
        sub.add_argument("--max-tokens", type=int, default=24)
        sub.add_argument("--rows", type=int, default=20_000, help="rows of the training set")
        sub.add_argument("--eval-size", type=int, default=600, help="held-out rows")
        sub.add_argument("--eval-every", type=int, default=5, help="rollouts between evaluations")
    learn.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    learn.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    learn.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    learn.add_argument("--smoke", action="store_true", help="seconds instead of an hour, to see that it works")
    run.add_argument("--arm", required=True, choices=list(ARMS))
    run.add_argument("--seed", type=int, required=True)
    return parser


def start_command(args: argparse.Namespace) -> int:
    from bench_grpo_task import warm_up

    warm_up(args, args.out / "start")
    return 0


def run_command(args: argparse.Namespace) -> int:
    from bench_grpo_task import run

    run(args, ARMS[args.arm], args.out / "start" / "model", _file(args.out, args.arm, args.seed))
    return 0


# ---------------------------------------------------------------------------------------------------- all of them


def learn_command(args: argparse.Namespace) -> int:
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    settings = {name: getattr(args, name) for name in (*SETTINGS, *START, "seeds")}
    settings |= {"jobs": args.jobs, "cores_a_job": max(1, len(cores()) // args.jobs)}
    described, arms = args.out / "settings.json", args.arms
    if described.exists():
        was = json.loads(described.read_text(encoding="utf-8"))["settings"]
        if changed := [name for name in settings if was.get(name) != settings[name]]:
            print(f"{args.out} was run with other settings ({', '.join(changed)}): choose another --out, or remove it")
            return 2
        arms = [arm for arm in ARMS if arm in (*was["arms"], *arms)]
    described.write_text(json.dumps({"hardware": facts, "settings": settings | {"arms": arms}}), encoding="utf-8")
    made = (args.out / "start" / "model").exists()
    if not made and launch(_command(args, "start", START), args.out / "start.log", cores()).wait():
        print(f"the start was not made, see {args.out / 'start.log'}")
        return 1
    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    waiting = [job for job in jobs if not read_run(args.out, *job)["finished"]]
    shares = [cores()[index :: args.jobs] or cores() for index in range(args.jobs)]
    running: dict[int, tuple[subprocess.Popen[bytes], tuple[str, int]]] = {}
    failed = 0
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="runs", unit="run")
    try:
        while waiting or running:
            for slot in range(args.jobs):
                if slot in running and running[slot][0].poll() is not None:
                    process, job = running.pop(slot)
                    failed += process.returncode != 0
                    bar.update()
                    bar.write(f"{job[0]}, seed {job[1]}: {'FAILED, see its log' if process.returncode else 'done'}")
                if slot not in running and waiting:
                    job = waiting.pop(0)
                    running[slot] = _start(args, *job, shares[slot]), job
            time.sleep(0.5)
    finally:
        bar.close()
        for process, _ in running.values():
            process.terminate()
    report_command(args)
    return 1 if failed else 0


def _start(args: argparse.Namespace, arm: str, seed: int, on: Sequence[int]) -> subprocess.Popen[bytes]:
    file = _file(args.out, arm, seed)
    file.unlink(missing_ok=True)  # what a stopped run left
    command = [*_command(args, "run", SETTINGS), "--arm", arm, "--seed", str(seed)]
    return launch(command, file.with_suffix(".log"), on)


def launch(command: list[str], log: Path, on: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a process on its cores, with as many threads; what it prints goes to `log`."""
    if taskset := shutil.which("taskset"):
        command = [taskset, "-c", ",".join(map(str, on)), *command]
    environment = {
        "OMP_NUM_THREADS": str(len(on)),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)


def _command(args: argparse.Namespace, name: str, settings: Sequence[str]) -> list[str]:
    command = [sys.executable, __file__, name, "--out", str(args.out)]
    for setting in settings:
        command += [f"--{setting.replace('_', '-')}", str(getattr(args, setting))]
    return command


def _file(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}.jsonl"


def read_run(out: Path, arm: str, seed: int) -> dict[str, Any]:
    """A run as `bench_grpo_report` takes it; one that has not come to its end has the points that it came to."""
    file = _file(out, arm, seed)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    points = [line for line in lines if "step" in line]
    return {"arm": arm, "seed": seed, "points": points, "finished": len(points) < len(lines)}


def report_command(args: argparse.Namespace) -> int:
    raw = json.loads((args.out / "settings.json").read_text(encoding="utf-8"))
    settings = raw["settings"]
    raw["runs"] = [read_run(args.out, arm, seed) for arm in settings["arms"] for seed in settings["seeds"]]
    text = render(raw)
    (args.out / "grpo_selection.md").write_text(text, encoding="utf-8")
    (args.out / "grpo_selection.json").write_text(json.dumps(raw), encoding="utf-8")
    print(text)
    try:
        write_plot(raw, args.out / "grpo_selection.png")
    except ModuleNotFoundError:
        print("no plot without matplotlib: pip install siftrl[plot]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
