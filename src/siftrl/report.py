"""What a run prints: one line at a time while it works, a short table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from siftrl import distributed
from siftrl.run import PARTS

_console = Console(highlight=False)


def say(text: str) -> None:
    """Print a line, on the main rank only."""
    if distributed.is_main():
        _console.print(text, markup=False)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """A row a stage: steps, held-out reward before and after, rollouts, and where the time went."""
    table = Table(title=f"{folder}")
    for heading in ("stage", "steps", "held-out reward", "rollouts", "tokens", "seconds", "of which"):
        table.add_column(heading, justify="right" if heading in ("steps", "rollouts", "tokens", "seconds") else "left")
    for stage in summary["stages"]:
        evals, seconds = stage["eval"], stage["seconds"]
        reward = f"{evals['before']['reward']:.3f} -> {evals['after']['reward']:.3f}" if "after" in evals else ""
        parts = ", ".join(f"{part.replace('_', ' ')} {seconds[part]:.0f}" for part in PARTS if seconds[part] >= 0.5)
        table.add_row(
            f"{stage['name']} ({stage['kind']})",
            str(stage["steps"]),
            reward,
            f"{stage['rollouts']:,}" if stage["rollouts"] else "",
            f"{stage['tokens']:,}",
            f"{seconds['total']:.0f}",
            parts,
        )
    _console.print(table)
    _console.print(f"model: {folder / 'model'}   records: {folder / 'metrics.jsonl'}, selection.jsonl, samples.jsonl")
