"""A chain of batch selectors at work in a trainer: it scores rows, chooses, keeps to its budget, and gives account."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from siftrl import batch_selection, distributed, plugins
from siftrl.batch_arithmetic import kept_rows
from siftrl.batch_selection import Link
from siftrl.budget import Budget
from siftrl.run import Clock, Recorder
from siftrl.scoring import Scorer
from siftrl.signals import LossWeight
from siftrl.types import BatchSelector, Selection, Signals

logger = logging.getLogger(__name__)
Figures = dict[str, float]


class RowSelection:
    """What a trainer with `batch_selector=` holds. Every rank calls `choose` with the same rows and gets the same,
    which the trainer checks of what it trains on (`distributed.check_same`).

    Args:
        chain: the selectors with what each keeps; empty: all rows that may be chosen are.
        scorer: measures rows.
        seed: of the random choices.
        clock: the trainer's; "score" and "select" are this one's parts.
        max_overhead: see `siftrl.budget.Budget`.
        warn: takes the budget's message, once.
    """

    def __init__(
        self,
        chain: Sequence[Link],
        scorer: Scorer,
        *,
        seed: int,
        clock: Clock,
        recorder: Recorder | None,
        max_overhead: float | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self.warn = warn
        self.chain, self.scorer, self.clock, self.recorder = chain, scorer, clock, recorder
        self.generator = torch.Generator().manual_seed(seed)
        self.budget = Budget(max_overhead)
        self.rows_read = self.rows_trained = self.rows_scored = 0
        self._scored_last: int | None = None  # None before the first step
        self._seconds_then = dict(clock.seconds)
        self._seconds_at_log = dict(clock.seconds)

    @property
    def is_weighted(self) -> bool:
        return any(link.selector.weighted for link in self.chain)

    def choose(
        self,
        step: int,
        row: Callable[[int], dict[str, Any]],
        signals: Signals,
        usable: Tensor,
        notes: Sequence[str | None],
        ids: Sequence[int] | None,
        complete: Callable[[Selection], Selection] | None = None,
    ) -> tuple[Selection, Figures]:
        """Choose among B rows for optimizer step `step`. Returns the selection, and figures for the log.

        row: a row by its place, as the scorer takes it. usable: bool [B], which may be chosen; none: none is. notes:
        for the audit log, B reasons why not. ids: the rows' places in the data set, where a row comes again. complete:
        adds rows to what the selectors chose.
        """
        scored = finite = torch.zeros(len(signals), dtype=torch.bool)
        finite, masked = ~finite, finite.clone()

        def score(places: Tensor) -> tuple[dict[Hashable, Any], Tensor]:
            seed = int(torch.randint(2**31, (), generator=self.generator))
            its_ids = None if ids is None else [ids[place] for place in places.tolist()]
            with self.clock("score"):
                tensors, good = self.scorer.score([row(place) for place in places.tolist()], its_ids, seed)
            scored[places], finite[places] = True, good
            if not good.any():
                names = " or ".join(type(signal).__name__ for signal in self.scorer.needs)
                raise FloatingPointError(
                    f"step {step}: every candidate row has a NaN or infinite {names}: the "
                    "model diverged, or the data breaks it; lower learning_rate. The last checkpoint is untouched"
                )
            weights = tensors.pop(LossWeight(), None)
            if weights is not None:
                masked[places] = good & (weights == 0)
                if (good & (weights != 0)).any():  # else nothing is left to choose from but rows without a weight
                    good = good & (weights != 0)
            return tensors, good

        limit = self._affordable(len(signals), usable)
        selection = Selection.of(torch.empty(0, dtype=torch.int64), len(signals))
        if usable.any():
            selection = batch_selection.choose(self.chain, signals, usable, self.generator, score, limit)
        selection = complete(selection) if complete is not None else selection
        self._scored_last = int(scored.sum())
        self.rows_scored += self._scored_last
        figures = self._account(signals, selection, scored, finite)
        if masked.any():
            figures["no_weight"] = float(masked.sum())
        if self.recorder is not None and distributed.is_main():
            state = zip(notes, finite.tolist(), masked.tolist(), strict=True)
            why = ["not finite" if not good else "no weight" if zero else note for note, good, zero in state]
            self.recorder.batch(step, signals, selection, why)
        return selection, figures

    def _affordable(self, num_rows: int, usable: Tensor) -> int | None:
        """How many rows the budget lets be scored in this step; None: all."""
        if self.budget.max_overhead is None or not self.chain:  # without a selector nothing is scored
            return None
        spent = {part: now - self._seconds_then[part] for part, now in self.clock.seconds.items()}
        self._seconds_then = dict(self.clock.seconds)
        selecting = spent["score"] + spent["select"]
        rest = sum(spent.values()) - selecting
        # one decision for all ranks: the slowest one's seconds
        selecting, rest = distributed.max_number(selecting), distributed.max_number(rest)
        if self._scored_last is not None:
            self.budget.observe(self._scored_last, selecting, rest)
        offered = int(usable.sum())
        limit = self.budget.plan(offered, min(kept_rows(num_rows, [link.keep for link in self.chain])[-1], offered))
        if message := self.budget.message():
            self.warn(message)
        return limit

    def _account(self, signals: Signals, selection: Selection, scored: Tensor, finite: Tensor) -> Figures:
        chosen, num_tokens = selection.indices, signals.num_tokens
        self.rows_read += len(signals)
        self.rows_trained += len(chosen)
        figures = {
            "rows_read": float(len(signals)),
            "rows_scored": float(scored.sum()),
            "rows_trained": float(len(chosen)),
            "tokens_kept": (num_tokens[chosen].sum() / num_tokens.sum().clamp(min=1)).item(),
            "no_tokens": float((num_tokens == 0).sum()),
            "not_finite": float((~finite).sum()),
        }
        if self.is_weighted:
            figures["largest_weight"] = selection.weights.max().item() if len(chosen) else 1.0
        for link in self.chain:
            prefix = f"{name_of(link.selector)}/" if len(self.chain) > 1 else ""
            figures |= {prefix + name: figure for name, figure in link.selector.metrics().items()}
        return figures

    def shares_since_log(self) -> Figures:
        """Scoring and choosing as a share of the seconds since the last call, if anything was chosen."""
        now = dict(self.clock.seconds)
        spent = {part: now[part] - self._seconds_at_log[part] for part in now}
        self._seconds_at_log = now
        return {"batch/share_of_time": _share(spent)} if spent["select"] else {}

    def summary(self) -> dict[str, Any]:
        return {
            "rows_read": self.rows_read,
            "rows_scored": self.rows_scored,
            "rows_trained": self.rows_trained,
            "share_of_time": _share(self.clock.seconds),
        }

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "selectors": [[name_of(link.selector), link.selector.state_dict()] for link in self.chain],
            "rows": [self.rows_read, self.rows_scored, self.rows_trained],
            "budget": self.budget.state_dict(),
            "scored_last": self._scored_last,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.generator.set_state(saved["generator"])
        for link, (_, selector_state) in zip(self.chain, saved["selectors"], strict=True):
            link.selector.load_state_dict(selector_state)
        self.rows_read, self.rows_scored, self.rows_trained = saved["rows"]
        self.budget.load_state_dict(saved["budget"])
        self._scored_last = saved["scored_last"]
        self._seconds_then = dict(self.clock.seconds)
        self._seconds_at_log = dict(self.clock.seconds)


def sources_of(data: Any, column: str | None) -> tuple[list[str | None] | None, dict[str | None, int] | None]:
    """Each row's source, and how many rows of the data set each source has; None, None without a column.

    Raises ValueError for data that cannot be indexed, or has no such column.
    """
    if not isinstance(data, Dataset):
        raise ValueError("batch_selector needs a data set that can be indexed: load it without streaming")
    if column is None:
        return None, None
    if column not in data.column_names:
        raise ValueError(f"source_column: there is no column {column!r} in the training data")
    sources = [None if value is None else str(value) for value in data[column][:]]
    return sources, dict(Counter(sources))


def check_selectors(chain: Sequence[Link], args: Any) -> None:
    """Refuse bad settings, and options of any trainer that cannot work together with a batch selector."""
    for link in chain:
        if dataclasses.is_dataclass(link.selector):
            plugins.check(link.selector)
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size does not work with batch_selector: set per_device_train_batch_size")
    if args.world_size > 1 and getattr(args, "parallelism_config", None) is not None:
        raise ValueError("batch_selector does not work with parallelism_config: a rank must hold whole rows")


def check_chain(selection: RowSelection | None, saved: dict[str, Any] | None) -> None:
    """Raises ValueError where a checkpoint was written with other selectors than those that are to go on from it."""
    before = [name for name, _ in saved["selectors"]] if saved else []
    now = [name_of(link.selector) for link in selection.chain] if selection else []
    if before != now or (saved is None) != (selection is None):
        raise ValueError(
            f"the checkpoint was written with batch_selector {' -> '.join(before) or 'none'}, this run has "
            f"{' -> '.join(now) or 'none'}: resume with the recipe that it was made with"
        )


def name_of(selector: BatchSelector) -> str:
    """A selector's name is its file's."""
    return type(selector).__module__.rpartition(".")[2]


def _share(seconds: dict[str, float]) -> float:
    """Scoring and choosing, as a share of the whole step."""
    selection = seconds["score"] + seconds["select"]
    whole = sum(seconds.values())
    return selection / whole if whole else 0.0
