"""From signals to micro-batches: which rows of a candidate batch are trained on, with what weight, and where.

Pure functions: every rank calls them with the same signals and gets the same answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siftrl.batch_arithmetic import kept_rows
from siftrl.selection_checks import check_selection
from siftrl.types import BatchSelector, Selection, Signals

Score = Callable[[Tensor], tuple[dict[Hashable, Any], Tensor]]
"""Rows (int64 [n], places in the batch) -> their signals, in that order, and which have finite ones (bool [n])."""


@dataclass(frozen=True, slots=True)
class Link:
    """One selector of a chain. keep: a share of the rows that it is given, or a number of rows."""

    selector: BatchSelector
    keep: float | int = 0.5


Chain = Sequence[tuple[BatchSelector, float | int]]
"""Batch selectors, each with its `keep`, as a trainer's argument."""


def needs_of(chain: Sequence[Link]) -> frozenset[Any]:
    """The signals that the chain's selectors need."""
    return frozenset().union(*(link.selector.needs for link in chain))


def links(selector: BatchSelector | Chain, keep: float | int) -> list[Link]:
    """A selector with its `keep`, or a chain of (selector, keep) pairs, as links."""
    if isinstance(selector, Sequence):
        return [Link(one, its_keep) for one, its_keep in selector]
    return [Link(selector, keep)]


def choose(
    chain: Sequence[Link],
    signals: Signals,
    usable: Tensor,
    generator: torch.Generator,
    score: Score | None = None,
    max_scored: int | None = None,
) -> Selection:
    """Let each selector of the chain choose from what the one before kept.

    usable: bool [B]; the other rows are not offered to any selector. At least one must be.
    score: measures rows when the first selector needs it, so that those that went before cost nothing; None: the
        signals hold everything. max_scored: how many rows it may be asked for: rows above that are left out at random;
        0: what remains to be chosen is chosen at random.
    Returns a selection among the B rows: a row's score is the last one that it was given, the weights are multiplied,
        by the copies that a row stands for, too.
    """
    rows = usable.nonzero().flatten()
    scores = torch.full((len(signals),), float("nan"))
    probability = torch.full((len(signals),), float("nan"))
    weights = torch.ones(len(rows)) if signals.copies is None else signals.copies[rows].float()
    reasons = ("all",) * len(rows)
    offered = signals.subset(rows)
    wants = kept_rows(len(signals), [link.keep for link in chain])
    for link, wanted in zip(chain, wants, strict=True):
        if score is not None and link.selector.needs:
            if max_scored is not None and max_scored < len(rows):
                few = torch.randperm(len(rows), generator=generator)
                few = few[: max(max_scored, wanted) if max_scored else wants[-1]].sort().values
                rows, weights, offered = rows[few], weights[few], offered.subset(few)
                if not max_scored:
                    reasons = ("uniform",) * len(rows)
                    break
            tensors, finite = score(rows)
            good = finite.nonzero().flatten()
            offered.tensors.update(tensors)
            rows, weights, offered, score = rows[good], weights[good], offered.subset(good), None
        keep = min(wanted, len(rows))
        selection = link.selector.select(offered, keep, generator)
        check_selection(selection, keep, len(rows), link.selector, "batch", link.selector.weighted)
        scores[rows], probability[rows] = selection.scores.float().cpu(), selection.probability.float().cpu()
        chosen = selection.indices.cpu()
        rows, reasons, offered = rows[chosen], selection.reasons, offered.subset(chosen)
        weights = weights[chosen] * selection.weights.float().cpu()
    return Selection.of(rows, len(signals), weights=weights, scores=scores, probability=probability, reasons=reasons)


def deal(num_tokens: Sequence[int], num_ranks: int, num_batches: int) -> list[list[list[int]]]:
    """Deal k rows to ranks and micro-batches: equal counts, near-equal tokens, rows of like length together.

    num_tokens: for each of the k rows all of its tokens. Returns [rank][micro-batch] -> rows, as positions among the
    k; counts differ by at most one where k does not divide, and the last ones may be empty.

    Longest first: each micro-step takes the next rows in order of length, so that little is padded, and a row goes to
    the rank with the fewest tokens so far among those with room.
    """
    order = sorted(range(len(num_tokens)), key=lambda row: (-num_tokens[row], row))
    dealt: list[list[list[int]]] = [[[] for _ in range(num_batches)] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    bins = num_ranks * num_batches
    sizes = [len(order) // bins + (index < len(order) % bins) for index in range(bins)]
    waiting = iter(order)
    for batch in range(num_batches):
        room = sizes[batch * num_ranks : (batch + 1) * num_ranks]
        for row in itertools.islice(waiting, sum(room)):
            rank = min((r for r in range(num_ranks) if room[r]), key=lambda r: (tokens[r], r))
            dealt[rank][batch].append(row)
            tokens[rank] += num_tokens[row]
            room[rank] -= 1
    return dealt


def token_weights(weights: Tensor, lengths: Sequence[int], input_ids: Tensor) -> Tensor:
    """float32, shaped like the log-probabilities of `input_ids`' next tokens: each token's row's weight.

    weights: float32 [n]. lengths: the n rows' tokens. input_ids: [n, T], or [1, T] where all rows are in one sequence.
    """
    if len(input_ids) == len(weights):
        return weights[:, None].expand(-1, input_ids.shape[1] - 1)
    flat = torch.ones(input_ids.shape[1])
    flat[: sum(lengths)] = weights.repeat_interleave(torch.tensor(lengths))
    return flat[None, 1:]
