"""What siftrl asks of the logits of a row, without building them where they are linear in the hidden states.

Shapes: B rows of a batch, T positions, n counted positions of a row (`mask`), d hidden width, V vocabulary,
r1 x r2 the size of an embedding. H [n, d] are a row's hidden states after the last norm, W [V, d] the head's
weight, Z = H W^T [n, V] its logits. A bias b is folded in: H gets a column of ones, W the column b, and d' = d + 1
(d' = d without a bias). Counted positions are numbered 0, 1, ... in their order; the others take no part, whatever
they hold. Nothing here keeps a graph, and products in float32 are exact: neither TF32 nor autocast touches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 4096
"""Vocabulary entries that are widened to float32 or float64 at once."""
BLOCK = 256
"""Columns of a Gram matrix that are computed at once."""
LARGE_HEAD = 2**24
"""Numbers in a head from which on a GPU that is slow in float64 takes its Gram matrix from float32 products."""
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA compute capabilities with float64 at half the speed of float32, not at 1/32 or less."""
DOUBTFUL = 5e-6
"""Estimated relative error of a nuclear norm above which it is not taken from squared singular values."""


@torch.no_grad()
def head_gram(weight: Tensor, bias: Tensor | None) -> Tensor:
    """W^T W, float64 [d', d'], of weight [V, d] and bias [V] (any floating dtype), summed over chunks of V."""
    device = weight.device
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    dtype = torch.float32 if slow and weight.numel() > LARGE_HEAD else torch.float64
    width = weight.shape[1] + (bias is not None)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    with _exact_products(device):
        for _, chunk in _chunks(weight, bias):
            chunk = chunk.to(dtype)
            for start in range(0, width, BLOCK):  # the upper triangle, block by block: the rest is its mirror image
                gram[start : start + BLOCK, start:] += chunk[:, start : start + BLOCK].T @ chunk[:, start:]
    return gram.triu() + gram.triu(1).T


@torch.no_grad()
def nuclear_norms(hidden: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """||Z||_* = sum of the singular values of Z = H W^T, exactly, for each row: float32 [B].

    hidden: [B, T, d], any floating dtype. mask: bool [B, T], the positions that count. gram: `head_gram`'s answer,
    float64 [d', d'].

    With W^T W = R^T R, Z Z^T = (H R^T)(H R^T)^T: Z and H R^T [n, d'] have the same singular values. 0 for a row
    without counted positions, NaN for one that is not finite.
    """
    counted = _Counted(mask)
    factors = counted.take(hidden, torch.float64, ones=gram.shape[0] > hidden.shape[2]) @ _root(gram).T  # [B, n, d']
    bad = ~factors.isfinite().all(dim=2).all(dim=1)
    factors[bad] = 0
    tall = factors.shape[1] > factors.shape[2]
    squares = factors.mT @ factors if tall else factors @ factors.mT
    norms = _nuclear_norms_of_squares(squares, counted.counts, lambda row: factors[row])
    return norms.masked_fill(bad, torch.nan).float()


@torch.no_grad()
def direct_nuclear_norms(logits: Tensor, mask: Tensor) -> Tensor:
    """`nuclear_norms` from the logits themselves ([B, T, V]), for heads that are not linear: float32 [B]."""
    counted, vocabulary = _Counted(mask), logits.shape[2]
    tall = counted.num > vocabulary  # then M^T M is the smaller, and M small
    size, step = (vocabulary, vocabulary) if tall else (counted.num, CHUNK)
    squares = torch.zeros(len(logits), size, size, dtype=torch.float64, device=logits.device)
    for start in range(0, vocabulary, step):
        chunk = counted.take(logits, torch.float64, columns=slice(start, start + step))
        squares += chunk.mT @ chunk if tall else chunk @ chunk.mT
    bad = ~squares.isfinite().all(dim=2).all(dim=1)
    squares[bad] = 0
    norms = _nuclear_norms_of_squares(squares, counted.counts, lambda row: logits[row, mask[row]].double())
    return norms.masked_fill(bad, torch.nan).float()


@dataclass(frozen=True)
class Projection:
    """A random projection of a row's logits on both sides: E = P1 Z P2 [r1, r2], a fast Johnson-Lindenstrauss map.

    UDS (Zou et al., arXiv 2510.16882): random signs, real part of the FFT, subsampling, along V and along the row,

        P1[i, t] = s1 d1[t] cos(2 pi t idx1[i] / T0)      P2[v, j] = s2 d2[v] cos(2 pi v idx2[j] / V)

    with signs d1 [T0], d2 [V] and frequencies idx1 [r1], idx2 [r2], drawn uniformly and with replacement from
    `seed` alone, so they are the same on every rank and device.

    vocabulary: V, rows of the head's weight. rows, columns: r1 and r2. positions: T0; a row's counted position t is
    taken modulo T0. isometric: s1 = sqrt(2 / r1), s2 = sqrt(2 / r2), so that the mean of ||E||_F^2 over draws is
    ||Z||_F^2, except that t = 0 and T0 / 2, and v = 0 and V / 2, count twice (their cos^2 is always 1, not 1/2 on
    average). Otherwise as published: s1 = sqrt(T0 / r1), s2 = sqrt(V / r2); then E is sqrt(T0 V) / 2 times as large.
    """

    vocabulary: int
    rows: int = 8
    columns: int = 128
    positions: int = 512
    seed: int = 0
    isometric: bool = True

    @cached_property
    def draws(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d1 [T0], idx1 [r1], d2 [V], idx2 [r2]: int64, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(below: int, size: int) -> Tensor:
            return torch.randint(below, (size,), generator=generator)

        return (
            2 * uniform(2, self.positions) - 1,
            uniform(self.positions, self.rows),
            2 * uniform(2, self.vocabulary) - 1,
            uniform(self.vocabulary, self.columns),
        )

    def left(self, num: int, device: torch.device) -> Tensor:
        """P1 at the counted positions 0 ... num - 1: float32 [r1, num]."""
        signs, frequencies, _, _ = self.draws
        scale = math.sqrt((2 if self.isometric else self.positions) / self.rows)
        return scale * _signed_cosines(torch.arange(num) % self.positions, signs, frequencies).T.to(device)

    def right(self, start: int, stop: int, device: torch.device) -> Tensor:
        """P2 at the vocabulary entries start ... stop - 1: float32 [stop - start, r2]."""
        _, _, signs, frequencies = (draw.to(device) for draw in self.draws)
        scale = math.sqrt((2 if self.isometric else self.vocabulary) / self.columns)
        return scale * _signed_cosines(torch.arange(start, stop, device=device), signs, frequencies)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W^T P2, float32 [d', r2], of weight [V, d] and bias [V]: what `embed` needs of the head."""
        device, width = weight.device, weight.shape[1] + (bias is not None)
        folded = torch.zeros(width, self.columns, dtype=torch.float64, device=device)
        with _exact_products(device):
            for start, chunk in _chunks(weight, bias):
                folded += chunk.float().T @ self.right(start, start + len(chunk), device)
        return folded.float()

    @torch.no_grad()
    def embed(self, hidden: Tensor, mask: Tensor, folded: Tensor) -> Tensor:
        """E = (P1 H) (W^T P2) for each row: float32 [B, r1 * r2], r2 running fastest.

        hidden: [B, T, d], any floating dtype. mask: bool [B, T]. folded: `fold`'s answer, [d', r2].
        """
        counted = _Counted(mask)
        with _exact_products(hidden.device):
            states = counted.take(hidden, torch.float32, ones=folded.shape[0] > hidden.shape[2])
            return (self.left(counted.num, hidden.device) @ states @ folded).flatten(1)

    @torch.no_grad()
    def embed_logits(self, logits: Tensor, mask: Tensor) -> Tensor:
        """`embed` from the logits themselves ([B, T, V]), for heads that are not linear."""
        counted, device = _Counted(mask), logits.device
        left = self.left(counted.num, device)
        embedded = torch.zeros(len(logits), self.rows, self.columns, device=device)
        with _exact_products(device):
            for start in range(0, self.vocabulary, CHUNK):
                stop = min(start + CHUNK, self.vocabulary)
                chunk = counted.take(logits, torch.float32, columns=slice(start, stop))
                embedded += left @ chunk @ self.right(start, stop, device)
        return embedded.flatten(1)


@torch.no_grad()
def last_layer_gradient_norms(
    hidden: Tensor, logits_of: Callable[[Tensor], Tensor], labels: Tensor, divisor: Tensor
) -> Tensor:
    """||d loss / d W||_F for each row, exactly, without that [V, d] gradient: float32 [B].

    hidden: [B, T, d]. logits_of: the head, [n, d] -> [n, V], linear. labels: int64 [B, T], what position t predicts,
    -100 where that bears no loss. divisor: [B], n of the row's loss, (1 / n) sum_t cross-entropy_t.

    With e_t = softmax(z_t) - onehot(y_t), the gradient is (1 / n) sum_t e_t h_t^T, and its squared norm
    (1 / n^2) sum_{t,u} (e_t . e_u)(h_t . h_u). One row at a time, so that only one row's logits are held.
    """
    norms = []
    for states, targets, num in zip(hidden, labels, divisor.clamp(min=1), strict=True):
        bears_loss = targets != -100
        states, targets = states[bears_loss], targets[bears_loss]
        errors = logits_of(states).softmax(dim=-1, dtype=torch.float32)
        errors[torch.arange(len(targets), device=targets.device), targets] -= 1
        states = states.float()
        with _exact_products(hidden.device):
            products = (errors @ errors.T).double() * (states @ states.T)
        # A sum of squares, so never below 0 but for rounding.
        norms.append(products.sum().clamp(min=0).sqrt() / num)
    return torch.stack(norms).float()


class _Counted:
    """The counted positions of B rows, moved to the front, so that nothing is computed for the longest padding.

    counts: int64 [B]. num: the largest of them, at least 1.
    """

    def __init__(self, mask: Tensor) -> None:
        self.counts = mask.sum(dim=1)
        self.num = max(int(self.counts.max()), 1)
        self._positions = (~mask).int().argsort(dim=1, stable=True)[:, : self.num]
        self._beyond = ~mask.gather(1, self._positions)

    def take(self, values: Tensor, dtype: torch.dtype, *, ones: bool = False, columns: slice = slice(None)) -> Tensor:
        """[B, num, c]: `values` [B, T, c'] at the counted positions in order, then zeros, in `dtype`.

        ones: with a last column of ones at the counted positions. columns: of c'.
        """
        rows = torch.arange(len(values), device=values.device)[:, None]
        # Selected, not multiplied by the mask: what padding holds may be NaN.
        taken = values[:, :, columns][rows, self._positions].to(dtype)
        if ones:
            taken = torch.cat([taken, torch.ones_like(taken[:, :, :1])], dim=2)
        return taken.masked_fill(self._beyond[:, :, None], 0)


def _nuclear_norms_of_squares(squares: Tensor, counts: Tensor, factor: Callable[[int], Tensor]) -> Tensor:
    """float64 [B]: sums of the square roots of the eigenvalues of `squares` (float64 [B, s, s], M M^T or M^T M).

    counts: int64 [B], rows of M that are not zero. factor: row of the batch -> M.

    Measured on one CPU core, eigvalsh of the squares against svdvals of M: 3 times as fast for M of 256 x 512,
    1.5 times for 1024 x 1024, 4 times for 64 x 2048. It errs by less than a rounding unit of the *largest* square
    (a tenth of one was seen), so that hundreds of zero singular values beside a large one add up. Such rows, of
    many tokens and a rank near 1, take svdvals.
    """
    eigenvalues = torch.linalg.eigvalsh(squares).flip(1).clamp(min=0)  # descending
    counted = torch.arange(squares.shape[1], device=squares.device) < counts[:, None]
    values = eigenvalues.sqrt().masked_fill(~counted, 0)  # M's rank is at most its number of rows
    norms = values.sum(dim=1)
    error = torch.finfo(torch.float64).eps * eigenvalues[:, :1]
    # sqrt(x + error) - sqrt(x), bounded from above
    errors = (error / (values + error.sqrt())).masked_fill(~counted, 0).sum(dim=1)
    for row in (errors > DOUBTFUL * norms).nonzero().flatten().tolist():
        norms[row] = torch.linalg.svdvals(factor(row)).sum()
    return norms


def _root(gram: Tensor) -> Tensor:
    """R [d', d'] with R^T R = gram, float64; gram may be singular, as it is where V < d'."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed or not gram.isfinite().all():  # a head that diverged makes every row's norm NaN
        return lower.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.T


def _chunks(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(first vocabulary entry, [c, d'] of the head with its bias as last column), c <= CHUNK."""
    for start in range(0, len(weight), CHUNK):
        chunk = weight[start : start + CHUNK]
        if bias is not None:
            chunk = torch.cat([chunk, bias[start : start + CHUNK, None]], dim=1)
        yield start, chunk


def _signed_cosines(at: Tensor, signs: Tensor, frequencies: Tensor) -> Tensor:
    """float32 [a, f]: signs[a] cos(2 pi a frequency / period) at a (int64), where `signs` is one period long.

    The product is reduced in whole numbers: in float32, 150,000 * 150,000 turns would leave no angle.
    """
    period = len(signs)
    turns = (at[:, None] * frequencies % period).double() / period
    return (signs[at, None] * torch.cos(2 * math.pi * turns)).float()


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: without autocast, and without TF32 or bfloat16 inside them."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
