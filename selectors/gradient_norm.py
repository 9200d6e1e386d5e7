"""The rows that would move the model most.

GraNd, Paul et al., arXiv 2107.07075: score_i = ||grad_w L_i(w)||. Here w is the head's weight alone, the last layer, as
Katharopoulos and Fleuret (arXiv 1803.00942) look at the last layer alone: its gradient takes no backward pass,
grad_W L_i = 1/n_i sum_t (p_t - y_t) h_t^T, with h_t the hidden state, p_t the prediction and y_t the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from siftrl.signals import GradientNorm
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class LargeGradients(BatchSelector):
    """Keeps the rows whose mean loss has the largest gradient in the model's head; of equal ones the first."""

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({GradientNorm()})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        norms = signals[GradientNorm()]
        chosen = norms.argsort(descending=True, stable=True)[:keep]
        self._metrics = {"kept_norm": float(norms[chosen].mean()), "mean_norm": float(norms.mean())}
        return Selection.of(chosen, len(signals), scores=norms)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_norm`, the mean over the rows kept, and `mean_norm`, over all of them."""
        return dict(self._metrics)
