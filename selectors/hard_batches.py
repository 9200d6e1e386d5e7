"""Mini-batches that are hard by the standard of the last ones.

Keeping or skipping by the rank of a loss among the recent losses is the idea of selective backpropagation (Jiang et
al., arXiv 1910.00762), here on whole mini-batches: of the candidates, cut into mini-batches b of consecutive rows with
mean loss L_b, those are hard of which fewer than delta * R of the R recent mini-batch losses are larger than L_b, this
step's included. A step trains on as many rows as it is asked for, so the hard ones, highest first, are cut off at
that, or else filled up with the other rows of highest loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from siftrl.fields import Count, Share
from siftrl.signals import Loss
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class HardBatches(BatchSelector):
    """Keeps whole mini-batches whose mean loss is among the highest of the recent ones, then rows of highest loss.

    batch: rows of a mini-batch; the last one of a step may have fewer.
    share: delta, the share of the recent mini-batches that counts as hard.
    window: R, how many of the last mini-batch losses are recent; this step's count.
    """

    batch: Count = 8
    share: Share = 0.25
    window: Count = 256

    def __post_init__(self) -> None:
        self._recent: list[float] = []  # the last mini-batch losses, oldest first
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({Loss()})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        losses = signals[Loss()].double().cpu()
        batch_of = torch.arange(len(losses)) // self.batch
        means = batch_of.bincount(losses) / batch_of.bincount()
        self._recent = [*self._recent, *means.tolist()][-self.window :]
        recent = torch.tensor(self._recent, dtype=torch.float64)
        num_larger = (recent > means[:, None]).sum(1)
        is_hard = num_larger < round(self.share * len(recent), 9)  # rounded: 0.1 * 30 is 3.0000000000000004

        is_hard_row = is_hard[batch_of]
        scores = torch.where(is_hard_row, means[batch_of], losses)
        hard, others = is_hard_row.nonzero().flatten(), (~is_hard_row).nonzero().flatten()
        ordered = [rows[scores[rows].argsort(descending=True, stable=True)] for rows in (hard, others)]
        chosen = torch.cat(ordered)[:keep]
        num_hard = min(len(hard), keep)
        reasons = ("hard batch",) * num_hard + ("fill",) * (len(chosen) - num_hard)
        self._metrics = {
            "kept_loss": float(losses[chosen].mean()),
            "mean_loss": float(losses.mean()),
            "hard_batches": float(is_hard.double().mean()),
            "filled": 1 - num_hard / len(chosen),
        }
        return Selection.of(chosen, len(losses), scores=scores.float(), reasons=reasons)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_loss`, the mean over the rows kept, `mean_loss`, over all of them, `hard_batches`,
        the share of hard mini-batches, and `filled`, the share of kept rows from others."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent = list(state["recent"])
