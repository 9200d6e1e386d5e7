"""Does the prompt curriculum pay? Finding prompts of intermediate difficulty, and learning from them.

    python scripts/bench_curriculum.py learn --out bench/learn --jobs 2
    python scripts/bench_curriculum.py report --out bench/learn
    python scripts/bench_curriculum.py select --out bench/select --run bench/learn/runs/prompt_curriculum-0

learn: every selector with every seed from one warmed-up start, each in a process of its own. Finished runs are kept:
the same command goes on where it was stopped. report: the table and the plot again, from the raw figures.
select: seconds that a value model and 3 rollouts a prompt take to find the same number of prompts, side by side.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from bench_common import ROOT, cores, hardware, hardware_text
from bench_report import render, write_plot
from tqdm.auto import tqdm

from siftrl.recipe import GRPOStage, Recipe, SelectionConfig, SignalsConfig, dump, load_recipe, resolved
from siftrl.recipe_text import RecipeError, dump_yaml
from siftrl.run import PARTS, write_json

SELECTORS = ["uniform", "prompt_curriculum", "dynamic_sampling", "posterior_sampling"]
SMOKE = [
    "model.scratch.hidden_size=64",
    "model.scratch.num_layers=2",
    "model.scratch.num_heads=2",
    "model.scratch.num_kv_heads=2",
    "data.reasoning_gym.size=400",
    "data.reasoning_gym.tasks=[{name: chain_sum, config: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}]",
    'data.prompt_template="{metadata[expression]}="',
    "data.eval.size=32",
    "stages.0.trainer.max_steps=60",
    "stages.0.trainer.warmup_steps=5",
    "stages.0.trainer.learning_rate=3e-3",
    "stages.1.prompts_per_step=4",
    "stages.1.completions_per_prompt=8",
    "stages.1.micro_batch_size=16",
    "stages.1.trainer.max_steps=6",
]
"""The quickstart, small enough to see in seconds that a benchmark works; its figures mean nothing."""


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except RecipeError as error:
        print(f"bench_curriculum: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
        return sub

    def with_recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"))
        sub.add_argument("--smoke", action="store_true", help="seconds instead of an hour, to see that it works")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")

    learn = command("learn", learn_command, "Train with each selector and seed; held-out accuracy against its cost.")
    with_recipe(learn)
    learn.add_argument(
        "--selectors",
        nargs="+",
        default=SELECTORS,
        metavar="NAME",
        help="names, or LABEL={name: ..., key: ...}; a name alone has the recipe's own keys where the recipe uses it",
    )
    learn.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    learn.add_argument("--start", type=Path, help="a warmed-up model; default: the recipe's stages before GRPO")
    learn.add_argument("--start-per-seed", action="store_true", help="warm a start up for each seed, not one for all")
    learn.add_argument("--eval-every", type=int, default=10, help="optimizer steps between evaluations")
    learn.add_argument("--eval-size", type=int, default=1024, help="held-out rows")
    learn.add_argument("--checkpoint-every", type=int, help="default: one checkpoint, at the end")
    learn.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")

    command("report", report_command, "Render the table and the plot of `learn` again.")

    select = command("select", select_command, "Time a value model and rollouts at finding the same prompts.")
    with_recipe(select)
    select.add_argument("--run", dest="trained", type=Path, help="a finished prompt_curriculum run: its policy and V")
    select.add_argument("--model", type=Path, help="instead: a policy, whose value model is trained here")
    select.add_argument("--train-prompts", type=int, default=512, help="with --model: groups V is trained on")
    select.add_argument("--engine", choices=["transformers", "vllm"], default="vllm")
    select.add_argument("--engine-args", type=yaml.safe_load, default={}, metavar="{key: value}", help="of vllm.LLM")
    select.add_argument("--value", type=yaml.safe_load, default={}, metavar="{key: value}", help="changes V's settings")
    select.add_argument("--keep", nargs="+", type=int, default=[16, 128], help="m, the prompts to find")
    select.add_argument("--candidates", type=int, default=4, help="k: found out of k times m")
    select.add_argument("--rollouts", type=int, default=3, help="rollouts a prompt that V is compared with")
    select.add_argument("--lengths", nargs="*", type=int, default=[8, 64, 256], help="forced completion lengths")
    select.add_argument("--repeats", type=int, default=10, help="timed pairs")
    select.add_argument("--batch-size", type=int, default=512, help="transformers: completions generated at once")
    select.add_argument("--reference-prompts", type=int, default=256, help="held-out prompts that V is judged on")
    select.add_argument("--reference-rollouts", type=int, default=32)
    return parser


def select_command(args: argparse.Namespace) -> int:
    from bench_select import run_select

    return run_select(args, SMOKE if args.smoke else [])


# ----------------------------------------------------------------------------------------------------------- learn


@dataclass(frozen=True)
class Job:
    """One `siftrl train` in a process of its own."""

    name: str
    recipe: Recipe
    file: Path
    log: Path
    selector: str = ""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.recipe.run_folder

    @property
    def steps(self) -> int:
        return sum(int(stage.trainer["max_steps"]) for stage in self.recipe.stages)

    def finished(self) -> bool:
        summary = self.folder / "summary.json"
        if not (summary.exists() and (self.folder / "model").exists()):
            return False
        if (self.folder / "recipe.yaml").read_text(encoding="utf-8") != dump(self.recipe):
            raise RecipeError(f"{self.folder} was run with other settings: choose another --out, or remove it")
        return len(json.loads(summary.read_text(encoding="utf-8"))["stages"]) == len(self.recipe.stages)

    def steps_done(self) -> int:
        """Steps that the run's log tells of so far."""
        done: dict[str, int] = {}
        if (metrics := self.folder / "metrics.jsonl").exists():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # being written
                done[record["stage"]] = max(done.get(record["stage"], 0), record["step"])
        return sum(done.values())


def learn_command(args: argparse.Namespace) -> int:
    overrides = [*(SMOKE if args.smoke else []), *args.overrides]
    eval_size = 32 if args.smoke else args.eval_size
    eval_every = 2 if args.smoke else args.eval_every
    recipe = load_recipe(args.recipe, overrides)
    if not isinstance(recipe.stages[-1], GRPOStage) or "max_steps" not in recipe.stages[-1].trainer:
        raise RecipeError(f"{args.recipe}: the last stage has to be grpo, with trainer.max_steps")
    for stage in recipe.stages:  # prompt selectors are compared: all rows are trained on
        stage.batch_selector, stage.signals, stage.selection = None, SignalsConfig(), SelectionConfig()
    out = args.out.resolve()
    for folder in ("recipes", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    start_seeds = args.seeds if args.start_per_seed else args.seeds[:1]
    starts = dict.fromkeys(args.seeds, args.start.resolve() if args.start else None)
    if args.start is None:
        jobs = {seed: _start_job(recipe, out, seed) for seed in start_seeds}
        _run_jobs(list(jobs.values()), min(args.jobs, len(jobs)), "warming up")
        starts = {seed: (jobs[seed] if seed in jobs else jobs[start_seeds[0]]).folder / "model" for seed in args.seeds}
    jobs_ = []
    for seed in args.seeds:  # selectors inside seeds: what changes on the machine meanwhile meets all of them alike
        for text in args.selectors:
            label, selector = _selector(text, recipe.stages[-1])
            start = starts[seed]
            assert start is not None
            jobs_.append(
                _learn_job(recipe, out, label, selector, seed, start, eval_every, eval_size, args.checkpoint_every)
            )
    stage = recipe.stages[-1]
    settings = {
        "recipe": Path(args.recipe).name,
        "overrides": overrides,
        "prompts_per_step": stage.prompts_per_step,
        "completions_per_prompt": stage.completions_per_prompt,
        "steps": stage.trainer["max_steps"],
        "eval_rows": eval_size,
        "jobs": args.jobs,
        "cores_a_job": max(1, len(cores()) // args.jobs),
        "start_per_seed": args.start_per_seed,
    }

    def save() -> None:
        runs = [_figures(job, stage.prompts_per_step) for job in jobs_ if job.finished()]
        write_json(out / "learn.json", {"hardware": facts, "settings": settings, "runs": runs})

    failed = _run_jobs(jobs_, args.jobs, "training", save)
    save()
    report_command(args)
    return 1 if failed else 0


def report_command(args: argparse.Namespace) -> int:
    raw = json.loads((args.out / "learn.json").read_text(encoding="utf-8"))
    if not raw["runs"]:
        print("no run is finished yet")
        return 1
    text = render(raw)
    (args.out / "learn.md").write_text(text, encoding="utf-8")
    print(text)
    try:
        write_plot(raw, args.out / "learn.png")
    except ModuleNotFoundError:
        print("no plot without matplotlib: pip install siftrl[plot]")
        return 0
    print(f"table: {args.out / 'learn.md'}\nplot:  {args.out / 'learn.png'}\nraw:   {args.out / 'learn.json'}")
    return 0


def _selector(text: str, stage: Any) -> tuple[str, dict[str, Any]]:
    """Label and recipe section of one of --selectors."""
    label, _, section = text.partition("=")
    if section:
        return label, yaml.safe_load(section)
    own = stage.prompt_selector
    return text, {"name": text, **(own.options if own is not None and own.name == text else {})}


def _job(document: dict[str, Any], out: Path, name: str, **facts: Any) -> Job:
    document["name"] = name
    document["output"] = {"dir": str(out / "runs"), "overwrite": True}
    file = out / "recipes" / f"{name}.yaml"
    file.write_text(dump_yaml(document), encoding="utf-8")
    return Job(name, load_recipe(file), file, out / "logs" / f"{name}.log", **facts)


def _start_job(recipe: Recipe, out: Path, seed: int) -> Job:
    document = resolved(recipe)
    document["stages"] = document["stages"][:-1]
    if not document["stages"]:
        raise RecipeError("the recipe has no stage before grpo: give --start, the model to start from")
    document["seed"] = seed
    document["checkpoint"] = {"every": None}
    return _job(document, out, f"start-{seed}", seed=seed)


def _learn_job(
    recipe: Recipe,
    out: Path,
    label: str,
    selector: dict[str, Any],
    seed: int,
    start: Path,
    eval_every: int,
    eval_size: int,
    checkpoint_every: int | None,
) -> Job:
    document = resolved(recipe)
    stage = document["stages"][-1]
    stage["prompt_selector"] = selector
    stage["eval"] = {**(stage["eval"] or {}), "every": eval_every, "greedy": True, "samples": 1}
    data = document["data"] if stage["data"] is None else stage["data"]
    if data["eval"] is None or data["eval"]["path"] is None:
        data["eval"] = {**(data["eval"] or {}), "size": eval_size}
    document["stages"] = [stage]
    document["model"] |= {"path": str(start), "scratch": None}
    document["seed"] = seed
    document["checkpoint"] = {"every": checkpoint_every or stage["trainer"]["max_steps"], "keep": 1000}
    return _job(document, out, f"{label}-{seed}", selector=label, seed=seed)


def _run_jobs(jobs: list[Job], at_once: int, what: str, after_each: Any = None) -> list[Job]:
    """Run what is not finished yet, `at_once` at a time, each on cores of its own; returns those that failed."""
    waiting = [job for job in jobs if not job.finished()]
    if len(waiting) < len(jobs):
        print(f"{what}: {len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
    mine = cores()
    share = max(1, len(mine) // at_once)
    free = [mine[i * share : (i + 1) * share] or mine for i in range(at_once)]
    running: list[tuple[Job, subprocess.Popen[bytes], list[int], float]] = []
    failed: list[Job] = []
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds between lines of a log
    bar = tqdm(total=sum(job.steps for job in waiting), desc=what, unit="step", mininterval=every, miniters=0)
    done = 0
    try:
        while waiting or running:
            while waiting and free:
                job, on = waiting.pop(0), free.pop(0)
                shutil.rmtree(job.folder, ignore_errors=True)  # what a stopped run left
                running.append((job, _launch(job, on, pinned=at_once > 1), on, time.perf_counter()))
            time.sleep(0.5)
            bar.update(done + sum(job.steps_done() for job, *_ in running) - bar.n)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                job, process, on, began = entry
                running.remove(entry)
                free.append(on)
                done += job.steps
                if process.returncode == 0:
                    bar.write(f"{job.name}: done in {time.perf_counter() - began:.0f} s")
                    if after_each is not None:
                        after_each()
                else:
                    failed.append(job)
                    tail = "\n".join(job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
                    bar.write(f"{job.name}: FAILED ({job.log}):\n{tail}")
    finally:
        bar.close()
        for _, process, _, _ in running:
            process.terminate()
    if failed and after_each is None:
        raise SystemExit(1)
    return failed


def _launch(job: Job, on: list[int], pinned: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "siftrl", "train", str(job.file)]
    if pinned and (taskset := shutil.which("taskset")):
        command = [taskset, "-c", ",".join(map(str, on)), *command]
    threads = {name: str(len(on)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(job.log, "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | threads)


def _figures(job: Job, prompts_per_step: int) -> dict[str, Any]:
    """What a finished run's folder says, as `bench_report` reads it."""
    points = []
    for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "held_out" in record:
            seconds = {part: record["seconds"][part] for part in PARTS}
            points.append(
                {
                    "step": record["step"],
                    "accuracy": record["held_out"]["reward"],
                    "rollouts": record["rollouts"],
                    "tokens": record["tokens"],
                    "seconds": sum(seconds.values()),
                    "parts": seconds,
                }
            )
    effective = _effective(job.folder / "selection.jsonl", prompts_per_step)
    return {"selector": job.selector, "seed": job.seed, "points": points, **effective}


def _effective(selection: Path, prompts_per_step: int) -> dict[str, float]:
    """Shares of groups with spread, among all that were generated and among those trained on: means over steps.

    A group of 0/1 rewards has spread where its mean is neither. A step trains on as many groups as it keeps; refused
    groups, which dynamic sampling generates besides, fill up only where too few were accepted.
    """
    steps: dict[int, list[float]] = {}
    for line in selection.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        means = [c["reward"] for c in record["candidates"] if c["chosen"] and c["reward"] is not None]
        steps.setdefault(record["step"], []).extend(means)
    generated, trained = [], []
    for means in steps.values():
        effective = sum(1e-6 < mean < 1 - 1e-6 for mean in means)
        generated.append(effective / len(means))
        trained.append(min(1.0, effective / prompts_per_step))
    return {
        "effective_generated": sum(generated) / len(generated),
        "effective_trained": sum(trained) / len(trained),
    }


if __name__ == "__main__":
    sys.exit(main())
