"""The longest rows, or the shortest: the control for scores that grow with length.

Zhao et al., arXiv 2402.04833, fine-tune on the rows with the longest responses and find it hard to beat. Here the k
rows with the largest n_i of each batch are kept, n_i the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class RowsByLength(BatchSelector):
    """Keeps the longest rows, or the shortest; of equal ones the first.

    prefer: "long" or "short".
    count: "completion": the tokens that bear loss. "all": the prompt's too.
    """

    prefer: Literal["long", "short"] = "long"
    count: Literal["completion", "all"] = "completion"

    def __post_init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        lengths = signals.num_tokens if self.count == "completion" else signals.num_all_tokens
        assert lengths is not None
        chosen = lengths.argsort(descending=self.prefer == "long", stable=True)[:keep]
        self._metrics = {"kept_tokens": float(lengths[chosen].double().mean())}
        self._metrics["mean_tokens"] = float(lengths.double().mean())
        return Selection.of(chosen, len(signals), scores=lengths.float())

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_tokens`, the mean over the rows kept, and `mean_tokens`, over all of them."""
        return dict(self._metrics)
