"""Does choosing rows inside a batch pay? One mixture, one model made from scratch, six ways to choose, three seeds.

    python scripts/bench_batch_learning.py learn --out bench/batch_learning --jobs 2
    python scripts/bench_batch_learning.py report --out bench/batch_learning

learn: every arm with every seed, each in a process of its own on its share of the cores; arms take turns inside a
seed. All read the same number of candidate rows a step; "full" trains on all of them, the others on half. Finished
runs are kept: the same command goes on where it was stopped. report: the tables and the plot again.
docs/benchmarks.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_common import cores, hardware, hardware_text, table

ARMS: dict[str, list[tuple[str, dict[str, Any], float | int]]] = {
    "full batch": [],
    "uniform": [("uniform_rows", {}, 0.5)],
    "high loss": [("high_loss", {}, 0.5)],
    "utility_diversity": [("utility_diversity", {}, 0.5)],
    "gradient_coreset": [("gradient_coreset", {}, 0.5)],
    "both": [("utility_diversity", {}, 0.75), ("gradient_coreset", {}, 2 / 3)],
}
FULL = "full batch"
FAMILIES: dict[str, tuple[float, dict[str, Any], Callable[[dict[str, Any]], str]]] = {
    "products": (
        0.5,
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        lambda m: m["expression"].replace(" ", "") + "=",
    ),
    "spell_backward": (0.25, {"min_word_len": 3, "max_word_len": 7}, lambda m: f"back {m['word']}:"),
    "chain_sum": (
        0.235,
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        lambda m: m["expression"].replace(" ", "") + "=",
    ),
    "number_sorting": (
        0.015,
        {"min_numbers": 3, "max_numbers": 3, "min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99},
        lambda m: f"sort {m['direction'][:4]} {' '.join(str(int(float(n))) for n in m['original_numbers'])}:",
    ),
}
"""Family -> (share of the rows, settings, the prompt made of a row's metadata): short prompts for a small model."""
SMALL = "number_sorting"
CLOSED = ("products",)
"""Families with so few different questions (100) that held-out rows cannot be kept out of the training set."""


def make_rows(size: int, seed: int, exclude: frozenset[str], shares: dict[str, float]) -> list[dict[str, str]]:
    """Rows with prompt, completion and source, the families in the given shares."""
    from siftrl import gym_rows
    from siftrl.recipe import ReasoningGymConfig, ReasoningGymTask

    tasks = [ReasoningGymTask(name=name, weight=shares[name], config=FAMILIES[name][1]) for name in FAMILIES]
    config = ReasoningGymConfig(tasks=tasks, size=size, seed=seed)
    rows = []
    for row in gym_rows.make_rows(config, size=size, seed=seed, exclude=exclude):
        prompt = FAMILIES[row["task"]][2](row["metadata"])
        answer = row["answer"].replace("'", "").replace(",", "").strip("[]")
        rows.append({"prompt": prompt, "completion": answer, "source": row["task"], "question": row["question"]})
    return rows


# ------------------------------------------------------------------------------------------------------- one run


def run_command(args: argparse.Namespace) -> int:
    """One arm with one seed, in this process; writes its points."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig

    from siftrl import SFTTrainer, models, plugins
    from siftrl.recipe import ScratchConfig

    equal = {name: 1.0 for name in FAMILIES}
    held_out = make_rows(args.eval_size, 10_001, frozenset(), equal)
    known = frozenset(row["question"] for row in held_out if row["source"] not in CLOSED)
    shares = {name: share for name, (share, _, _) in FAMILIES.items()}
    rows = make_rows(args.rows, 1, known, shares)
    start = args.out / f"start-{args.seed}-{args.job}"
    scratch = ScratchConfig(
        hidden_size=args.width, num_layers=args.layers, num_heads=4, intermediate_size=3 * args.width, max_positions=96
    )
    models.save_scratch_model(scratch, start, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    options = SFTConfig(
        output_dir=str(args.out / "runs" / args.job),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(50, args.steps // 4),
        adam_beta2=0.98,
        logging_steps=max(args.steps // 10, 1),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=args.seed,
    )
    chain = [(plugins.load("selector", name, keys), keep) for name, keys, keep in json.loads(args.chain)]
    trainer = SFTTrainer(
        model,
        options,
        train_dataset=Dataset.from_list(rows).remove_columns("question"),
        processing_class=tokenizer,
        batch_selector=chain or None,
        source_column="source" if chain else None,
        scoring_batch_size=args.batch,
    )
    evaluate = held_out_evaluation(held_out, tokenizer, trainer)
    points: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        seconds, since = 0.0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            points.append({"step": 0, "seconds": 0.0, "tokens": 0, **evaluate()})
            self.since = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % args.eval_every and state.global_step != args.steps:
                return
            self.seconds += time.perf_counter() - self.since  # evaluation is not training
            summary = trainer.sift_summary()
            points.append(
                {"step": state.global_step, "seconds": self.seconds, "tokens": summary["tokens"], **evaluate()}
            )
            self.since = time.perf_counter()

    trainer.add_callback(Watch())
    trainer.train()
    summary = trainer.sift_summary()
    report = {"arm": args.arm, "seed": args.seed, "points": points, "seconds": summary["seconds"]}
    report["selection"] = summary.get("selection")
    (args.out / f"{args.job}.json").write_text(json.dumps(report))
    return 0


def held_out_evaluation(rows: list[dict[str, str]], tokenizer: Any, trainer: Any) -> Callable[[], dict[str, Any]]:
    """Loss and greedy accuracy by family. An answer that is the most likely token at each of its places is the greedy
    completion, so one forward pass gives both."""
    import torch

    ends = tokenizer.eos_token
    batches = []
    for source in FAMILIES:
        mine = [row for row in rows if row["source"] == source]
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in mine]
        whole = [tokenizer(row["prompt"] + row["completion"] + ends)["input_ids"] for row in mine]
        width = max(map(len, whole))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in whole])
        counts = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, all_) in enumerate(zip(prompts, whole, strict=True)):
            counts[row, len(prompt) - 1 : len(all_) - 1] = True
        batches.append((source, ids, counts))

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        model, device = trainer.model.eval(), trainer.accelerator.device
        result: dict[str, Any] = {"loss": {}, "accuracy": {}}
        for source, ids, counts in batches:
            ids, counts = ids.to(device), counts.to(device)
            logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits.float()
            targets = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
            losses = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
            right = (logits.argmax(-1) == targets) | ~counts
            result["loss"][source] = losses[counts].mean().item()
            result["accuracy"][source] = right.all(1).float().mean().item()
        model.train()
        for figure in ("loss", "accuracy"):
            by_source = result[figure]
            result[figure + "_mixture"] = sum(FAMILIES[name][0] * value for name, value in by_source.items())
            result[figure + "_mean"] = fmean(by_source.values())
        return result

    return evaluate


# ---------------------------------------------------------------------------------------------------- all of them


def learn_command(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hardware.json").write_text(json.dumps(hardware()))
    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    shares = [cores()[index :: args.jobs] or cores() for index in range(args.jobs)]
    waiting = [job for job in jobs if not (args.out / f"{_job(*job)}.json").exists()]
    print(f"{len(waiting)} of {len(jobs)} runs to do, {args.jobs} at a time", flush=True)
    running: dict[int, tuple[subprocess.Popen[str], str]] = {}
    failed = 0
    while waiting or running:
        for slot in range(args.jobs):
            if slot in running and running[slot][0].poll() is not None:
                process, name = running.pop(slot)
                failed += process.returncode != 0
                print(f"{name}: {'done' if not process.returncode else 'failed, see its log'}", flush=True)
            if slot not in running and waiting:
                arm, seed = waiting.pop(0)
                running[slot] = _start(args, arm, seed, shares[slot]), _job(arm, seed)
        time.sleep(0.5)
    return 1 if failed else report_command(args)


def _job(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '_')}-{seed}"


def _start(args: argparse.Namespace, arm: str, seed: int, on: Sequence[int]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "run", "--arm", arm, "--seed", str(seed), "--job", _job(arm, seed)]
    command += ["--chain", json.dumps(ARMS[arm])]
    for name in ("out", "rows", "batch", "steps", "lr", "width", "layers", "eval_every", "eval_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(len(on)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", ",".join(map(str, on)), *command]
    with (args.out / f"{_job(arm, seed)}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, text=True)


# --------------------------------------------------------------------------------------------------------- report


def cost_to_reach(points: Sequence[dict[str, Any]], target: float, cost: str) -> float | None:
    """The cost after which the held-out loss stays at or below `target`, linear between evaluations; None: never."""
    above = [index for index, point in enumerate(points) if point["loss_mixture"] > target]
    if not above:
        return float(points[0][cost])
    if above[-1] + 1 == len(points):
        return None
    before, after = points[above[-1]], points[above[-1] + 1]
    share = (before["loss_mixture"] - target) / (before["loss_mixture"] - after["loss_mixture"])
    return float(before[cost] + share * (after[cost] - before[cost]))


def mean_curve(runs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The runs' points, averaged over seeds step by step."""
    keys = ("step", "seconds", "tokens", "loss_mixture", "loss_mean", "accuracy_mixture", "accuracy_mean")
    return [
        {key: fmean(point[key] for point in points) for key in keys}
        for points in zip(*(run["points"] for run in runs), strict=True)
    ]


def render(runs: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The tables, as markdown."""
    arms = {arm: [run for run in runs if run["arm"] == arm] for arm in ARMS}
    arms = {arm: mine for arm, mine in arms.items() if mine}
    parts = [f"Hardware: {hardware_text(facts)}"]

    def last(mine: list[dict[str, Any]], figure: str, source: str | None = None) -> list[float]:
        ends = [run["points"][-1][figure] for run in mine]
        return [end[source] if source else end for end in ends]

    rows = []
    for arm, mine in arms.items():
        share = [run["selection"]["share_of_time"] for run in mine if run["selection"]]
        rows.append(
            [
                arm,
                len(mine),
                _spread(last(mine, "loss_mixture")),
                _spread(last(mine, "accuracy_mixture")),
                f"{fmean(last(mine, 'tokens')):,.0f}",
                f"{fmean(last(mine, 'seconds')):.0f}",
                f"{fmean(share):.2f}" if share else "",
            ]
        )
    heading = [
        "arm",
        "seeds",
        "held-out loss",
        "accuracy",
        "tokens trained",
        "seconds",
        "selection's share of the step",
    ]
    parts.append("At the end, mean (min..max) over seeds:\n\n" + table(heading, rows))
    families = list(FAMILIES)
    for figure, text in (("loss", "Held-out loss"), ("accuracy", "Accuracy")):
        rows = [[arm, *(_spread(last(mine, figure, source)) for source in families)] for arm, mine in arms.items()]
        heads = [f"{name} ({100 * FAMILIES[name][0]:g} %)" for name in families]
        parts.append(f"{text} by family, at the end:\n\n" + table(["arm", *heads], rows))
    if FULL in arms:
        ends = {arm: mean_curve(mine)[-1]["loss_mixture"] for arm, mine in arms.items()}
        parts.append(_against_full(arms, ends[FULL], "the full batch's held-out loss at its end"))
        level = max(ends.values())
        parts.append(_against_full(arms, level, "the held-out loss that every arm reached"))
    return "\n\n".join(parts) + "\n"


def _against_full(arms: dict[str, list[dict[str, Any]]], level: float, what: str) -> str:
    """What each arm's mean curve needs to come to a loss for good, as a share of all that the full batch spent."""
    whole, rows = mean_curve(arms[FULL])[-1], []
    for arm, mine in arms.items():
        curve = mean_curve(mine)
        shares = [_share(cost_to_reach(curve, level, cost), whole[cost]) for cost in ("seconds", "tokens", "step")]
        rows.append([arm, *shares])
    heading = ["arm", "seconds", "tokens trained", "steps"]
    return (
        f"Cost to come to {level:.3f}, {what}, on the mean curve, as a share of all that the full batch spent:\n\n"
        + table(heading, rows)
    )


def _share(found: float | None, whole: float) -> str:
    return "never" if found is None else f"{found / whole:.2f}"


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def write_plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against tokens trained and wall time, of the mixture and of the small family; band: min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for line, (pick, text) in enumerate(
        [
            (lambda point: point["loss_mixture"], "held-out loss, mixture"),
            (
                lambda point: point["loss"][SMALL],
                f"held-out loss, {SMALL} ({100 * FAMILIES[SMALL][0]:g} % of the rows)",
            ),
        ]
    ):
        for column, cost in enumerate(("tokens", "seconds")):
            panel = panels[line][column]
            for arm in ARMS:
                mine = [run["points"] for run in runs if run["arm"] == arm]
                if not mine:
                    continue
                steps = list(zip(*mine, strict=True))
                at = [fmean(point[cost] for point in points) for points in steps]
                found = [[pick(point) for point in points] for points in steps]
                (drawn,) = panel.plot(at, [fmean(values) for values in found], label=f"{arm} ({len(mine)} seeds)")
                low, high = [min(values) for values in found], [max(values) for values in found]
                panel.fill_between(at, low, high, color=drawn.get_color(), alpha=0.12, lw=0)
            panel.set_yscale("log")
            panel.set_ylabel(text)
            panel.set_xlabel({"tokens": "tokens trained on", "seconds": "seconds, selection included"}[cost])
            panel.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report_command(args: argparse.Namespace) -> int:
    runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("*-*.json")) if path.name != "hardware.json"]
    text = render(runs, json.loads((args.out / "hardware.json").read_text()))
    (args.out / "learning.md").write_text(text)
    write_plot(runs, args.out / "learning.png")
    print(text)
    return 0


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    return int(args.function(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    learn = commands.add_parser("learn", help="every arm with every seed")
    run = commands.add_parser("run", help="one arm with one seed (what `learn` starts)")
    report = commands.add_parser("report", help="the tables and the plot of `learn` again")
    for sub, function in ((learn, learn_command), (run, run_command), (report, report_command)):
        sub.set_defaults(function=function)
        sub.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    for sub in (learn, run):
        sub.add_argument("--rows", type=int, default=20_000, help="rows of the training set")
        sub.add_argument("--batch", type=int, default=128, help="candidate rows of a step")
        sub.add_argument("--steps", type=int, default=200)
        sub.add_argument("--lr", type=float, default=2e-3)
        sub.add_argument("--width", type=int, default=96)
        sub.add_argument("--layers", type=int, default=3)
        sub.add_argument("--eval-every", type=int, default=20)
        sub.add_argument("--eval-size", type=int, default=512, help="held-out rows, the same number of each family")
    learn.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    learn.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    learn.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    run.add_argument("--arm", required=True)
    run.add_argument("--chain", required=True)
    run.add_argument("--seed", type=int, required=True)
    run.add_argument("--job", required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
