"""Per-row gradients of one matrix, spread over the ranks that computed them.

For a linear layer y_t = W x_t the gradient of a row's loss is sum_t delta_t x_t^T, with delta_t the gradient of the
loss with respect to y_t. A row keeps either that matrix or its factors (delta, x), whichever is smaller. SPSA
(simultaneous perturbation, as CoLM uses it, arXiv 2407.19580) knows a row's gradient only along random directions.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siftrl import distributed

_BLOCK = 2**22
"""Numbers of rows' gradients that are worked on at once (16 MiB)."""


class RowGradient(ABC):
    """The gradient of one row, D numbers."""

    @abstractmethod
    def dense(self) -> Tensor:
        """float32 [D]."""

    def at(self, coordinates: Tensor) -> Tensor:
        """float32 [K]: the entries at `coordinates` (int64 [K])."""
        return self.dense()[coordinates]

    @property
    @abstractmethod
    def is_finite(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Dense(RowGradient):
    """values: float32 [D]."""

    values: Tensor

    def dense(self) -> Tensor:
        return self.values

    @property
    def is_finite(self) -> bool:
        return bool(self.values.isfinite().all())


@dataclass(frozen=True, slots=True)
class Factored(RowGradient):
    """The matrices sum_t delta_t x_t^T, flattened one after another.

    pairs: for each matrix delta float [T, out] and x float [T, in].
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]

    def dense(self) -> Tensor:
        return torch.cat([(delta.T @ x).flatten() for delta, x in self.pairs])

    def at(self, coordinates: Tensor) -> Tensor:
        values = torch.zeros(len(coordinates), device=self.pairs[0][0].device)
        first = 0
        for delta, x in self.pairs:
            size = delta.shape[1] * x.shape[1]
            here = (coordinates >= first) & (coordinates < first + size)
            place = coordinates[here] - first
            values[here] = (delta[:, place // x.shape[1]] * x[:, place % x.shape[1]]).sum(0)
            first += size
        return values

    @property
    def is_finite(self) -> bool:
        return all(bool(part.isfinite().all()) for pair in self.pairs for part in pair)


@dataclass(frozen=True, slots=True)
class Perturbed(RowGradient):
    """SPSA: mean over n perturbations of slope_k z_k, where z_k is drawn anew from its seed.

    slopes: float32 [n], (loss(+eps z_k) - loss(-eps z_k)) / (2 eps). seeds: n seeds. shapes: of the matrices.
    """

    slopes: Tensor
    seeds: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]

    def dense(self) -> Tensor:
        total = torch.zeros(sum(a * b for a, b in self.shapes), device=self.slopes.device)
        for slope, seed in zip(self.slopes, self.seeds, strict=True):
            total += slope * torch.cat([z.flatten() for z in direction(seed, self.shapes)]).to(total.device)
        return total / len(self.seeds)

    @property
    def is_finite(self) -> bool:
        return bool(self.slopes.isfinite().all())


@functools.lru_cache(maxsize=4)  # rows that share a perturbation come one after another
def direction(seed: int, shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """Standard normal matrices, the same on every rank and device: drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def factored(pairs: Sequence[tuple[Tensor, Tensor]]) -> RowGradient:
    """The smaller of a row's factors and its matrix; see `Factored`."""
    row = Factored(tuple((delta.float(), x.float()) for delta, x in pairs))
    size = sum(delta.shape[1] * x.shape[1] for delta, x in pairs)
    kept = sum(delta.numel() + x.numel() for delta, x in pairs)
    return row if kept < size else Dense(row.dense())


class RowGradients:
    """The gradients of B rows; each rank holds some of them, and every method is a collective.

    mine: row -> gradient, for the rows (numbered as they were scored) that this rank scored.
    rows: int64 [B], the scored row behind each row of this view.
    size: D.
    """

    def __init__(self, mine: dict[int, RowGradient], rows: Tensor, size: int, device: torch.device) -> None:
        self.mine, self.rows, self.size, self.device = mine, rows, size, device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> RowGradients:
        """The view of the rows at `rows` (int64 [b])."""
        return RowGradients(self.mine, self.rows[rows], self.size, self.device)

    def total(self, weights: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """float32 [S, D]: sum_i weights[s, i] * transform(g_i), over all ranks' rows.

        weights: float [S, B]. transform: [n, D] -> [n, D]. Summed in float64, so that the number of ranks does not
        show in the result.
        """
        weights = weights.to(self.device, torch.float64)
        sums = torch.zeros(len(weights), self.size, dtype=torch.float64, device=self.device)
        counted = set(weights.any(0).nonzero().flatten().tolist())
        mine = [(row, index) for row, index in self._local() if index in counted]
        at_once = max(1, _BLOCK // self.size)
        for first in range(0, len(mine), at_once):
            block = mine[first : first + at_once]
            gradients = torch.stack([row.dense() for row, _ in block])
            gradients = gradients if transform is None else transform(gradients)
            sums += weights[:, [index for _, index in block]] @ gradients.double()
        distributed.sum_([sums])
        return sums.float()

    def at(self, coordinates: Tensor, rows: Tensor) -> Tensor:
        """float32 [R, K]: the entries at `coordinates` (int64 [K]) of the rows at `rows` (int64 [R])."""
        values = torch.zeros(len(rows), len(coordinates), device=self.device)
        for place, row in enumerate(self.rows[rows].tolist()):
            if row in self.mine:
                values[place] = self.mine[row].at(coordinates.to(self.device))
        distributed.sum_([values])  # each row is one rank's; the others add zeros
        return values

    def is_finite(self) -> Tensor:
        """bool [B]."""
        flags = torch.zeros(len(self))
        for row, index in self._local():
            flags[index] = float(row.is_finite)
        distributed.sum_([flags])
        return flags > 0

    def _local(self) -> list[tuple[RowGradient, int]]:
        """This rank's rows in this view, with their places in it."""
        return [(self.mine[row], index) for index, row in enumerate(self.rows.tolist()) if row in self.mine]
