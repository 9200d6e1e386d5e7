"""What a checkpoint must hold beyond the weights: the data order, the selector, the value model, the position.

A checkpoint folder is complete when `siftrl.json` is in it: that file is written last and lists every file with its
size, so a checkpoint cut short by a crash or a full disk is recognised and passed over.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
MANIFEST = "siftrl.json"


class PromptStream:
    """An endless stream of data-set rows: one shuffled pass after another, the same on every rank.

    No row comes twice within one draw, even where a draw runs over the end of a pass.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.passes = 0
        self.position = 0
        self._order = torch.randperm(num_rows, generator=self.generator)

    def draw(self, count: int) -> Tensor:
        """The next `count` rows: int64 [count]. Raises ValueError when the data set holds fewer."""
        if count > self.num_rows:
            raise ValueError(
                f"the prompt selector draws {count} candidates a step, but the data set has {self.num_rows} rows: "
                "lower prompts_per_step or the selector's `candidates`, or add data"
            )
        drawn = self._order[self.position : self.position + count]
        self.position += len(drawn)
        if len(drawn) < count:
            order = torch.randperm(self.num_rows, generator=self.generator)
            seen = torch.isin(order, drawn)  # rows of this draw go to the end of the new pass
            self._order = torch.cat([order[~seen], order[seen]])
            self.passes, self.position = self.passes + 1, count - len(drawn)
            drawn = torch.cat([drawn, self._order[: self.position]])
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "generator": self.generator.get_state(),
            "passes": self.passes,
            "position": self.position,
            "order": self._order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["num_rows"] != self.num_rows:
            raise ValueError(
                f"the checkpoint was made on a data set of {state['num_rows']} rows, this one has {self.num_rows}: "
                "resume with the same data, or start a new run from the checkpoint's weights"
            )
        self.generator.set_state(state["generator"])
        self.passes, self.position, self._order = state["passes"], state["position"], state["order"]


def save_file(path: Path, state: Any) -> None:
    """Write a torch file so that a crash leaves the old one or the new one, never half of one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_file(path: Path) -> Any:
    """Read what `save_file` wrote: tensors and plain containers only, so a checkpoint cannot run code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def seal(checkpoint: Path, **facts: Any) -> None:
    """Mark a checkpoint as complete: the list of its files with their sizes, and `facts`."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    temporary = checkpoint / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps({"files": sizes, **facts}, indent=1))
    os.replace(temporary, checkpoint / MANIFEST)


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None if all its files are there with their sizes."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, so it was not written to its end"
    for name, size in json.loads(manifest.read_text())["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints under `folder`, oldest first, complete or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`; incomplete ones are reported and passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("checkpoint %s is passed over: %s", checkpoint, reason)
    return None


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints past `step`: a resumed run writes them anew."""
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
