"""A batch selector for tests of trainers, and what their logs say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from siftrl.signals import Loss
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class First(BatchSelector):
    """Keeps the first rows that it is given, with weights 1, 2, 3, ... where asked for; remembers both.

    wants: the signals that it asks for.
    """

    weigh: bool = False
    wants: Sequence[Any] = (Loss(),)

    def __post_init__(self) -> None:
        self.seen: list[Signals] = []
        self.kept: list[Selection] = []

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset(self.wants)

    @property
    def weighted(self) -> bool:
        return self.weigh

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        self.seen.append(signals)
        weights = torch.arange(1.0, keep + 1) if self.weigh else None
        self.kept.append(Selection.of(torch.arange(keep), len(signals), weights=weights))
        return self.kept[-1]


@dataclass
class Unmeasured(First):
    """The same, of rows that nothing is measured of."""

    wants: Sequence[Any] = ()


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[f"batch/{name}"] for entry in trainer.state.log_history if f"batch/{name}" in entry]
