"""What a run prints: one line at a time while it works, a short table at the end."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback

from siftrl import distributed
from siftrl.run import PARTS

_console = Console(highlight=False)


def say(text: str) -> None:
    """Print a line, on the main rank only."""
    if distributed.is_main():
        _console.print(text, markup=False)


def held_out(evals: dict[str, Any]) -> str:
    """What was measured on held-out rows before and after a stage, a line each: "reward 0.137 -> 0.252"."""
    before, after = evals.get("before", {}), evals.get("after", {})
    names = [name for name in ("loss", "accuracy", "reward") if name in after]
    return "\n".join(f"{name} {_number(before.get(name))} -> {_number(after[name])}" for name in names)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """A row a stage: steps, what was held out before and after, rollouts, and where the time went."""
    table = Table(title=f"{folder}")
    for heading in ("stage", "steps", "held out", "rollouts", "tokens", "seconds"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in summary["stages"]:
        evals, seconds = stage["eval"], stage["seconds"]
        table.add_row(
            f"{stage['name']} ({stage['kind']})",
            str(stage["steps"]),
            held_out(evals),
            f"{stage['rollouts']:,}" if stage["rollouts"] else "",
            f"{stage['tokens']:,}",
            f"{seconds['total']:.0f}",
        )
    _console.print(table)
    for stage in summary["stages"]:
        seconds = stage["seconds"]
        parts = ", ".join(f"{part.replace('_', ' ')} {seconds[part]:.1f}" for part in PARTS if seconds[part])
        say(f"{stage['name']}: seconds by part: {parts}")
        for text in stage.get("warnings", []):  # stages that an earlier version ran have none
            say(f"{stage['name']}: warning: {text}")
    say(f"model:   {folder / 'model'}\nrecords: {folder}/metrics.jsonl, selection.jsonl, samples.jsonl, summary.json")


class _AboveTheBar(logging.Handler):
    """Warnings on lines of their own while a bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


class Progress(TrainerCallback):
    """One bar a stage, with the figures one watches; everything else is in metrics.jsonl."""

    SHOWN = {"loss": "loss", "reward": "reward", "effective_ratio": "effective", "prompts/explained_variance": "EV"}

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: Any = None
        self.above = _AboveTheBar(logging.WARNING)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step", leave=True)
            logging.getLogger("siftrl").addHandler(self.above)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        shown = {short: f"{logs[key]:.3g}" for key, short in self.SHOWN.items() if logs.get(key) is not None}
        if "EV" in shown and logs["prompts/explained_variance"] < -1:
            shown["EV"] = "<-1"  # a constant would do far better; by how much says nothing
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            logging.getLogger("siftrl").removeHandler(self.above)
