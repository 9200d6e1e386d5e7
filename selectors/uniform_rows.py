"""Rows at random: training on a smaller batch, and the control for every other batch selector.

i_1, ..., i_k drawn from the B candidates without replacement, each with chance k / B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class UniformRows(BatchSelector):
    """Keeps rows at random. Nothing is measured of them."""

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        num = len(signals)
        chosen = torch.randperm(num, generator=generator)[:keep]
        chance = torch.full((num,), len(chosen) / num)
        return Selection.of(chosen, num, probability=chance, reasons="uniform")
