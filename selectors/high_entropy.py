"""The rows that the model is least sure of.

Uncertainty sampling: of B rows keep the k with the largest mean entropy of the next token,
H_i = -1/n_i sum_t sum_v p_tv log p_tv, in nats, over the n_i positions that bear loss. The right answer is not looked
at, so a row may be kept that the model gets right, and one dropped that it gets wrong with confidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from siftrl.signals import Entropy
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class HighEntropy(BatchSelector):
    """Keeps the rows of highest mean entropy; of equal ones the first."""

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({Entropy()})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        entropies = signals[Entropy()]
        chosen = entropies.argsort(descending=True, stable=True)[:keep]
        self._metrics = {"kept_entropy": float(entropies[chosen].mean()), "mean_entropy": float(entropies.mean())}
        return Selection.of(chosen, len(signals), scores=entropies)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_entropy`, the mean over the rows kept, and `mean_entropy`, over all of them."""
        return dict(self._metrics)
