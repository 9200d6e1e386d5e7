"""Keeps scoring and choosing rows within a share of a step's seconds.

With a budget b, scoring and choosing may take b / (1 - b) of the seconds that the rest of the step takes. An account
is kept: each step pays that in, and what scoring and choosing really took is drawn from it. So the mean share stays
within the budget even where the cost of a row was guessed wrong. Seconds are gross: choosing is in them, not only the
forward passes. There is no clock in here: the trainer brings the seconds, and the same on every rank.

With a budget the choice of rows depends on measured time, so a run is not reproducible bit by bit.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

_NUM_RECENT = 5  # steps whose median is taken: one hiccup does not move it
_DISCOUNT = 0.98  # of the reported share, a step
_MOST_SAVED, _MOST_OWED = 2.0, 8.0  # limits of the account, in costs of scoring all rows


class Budget:
    """Plans how many rows each step may score.

    Fewer rows first, down to the middle between those kept and all; where even that is too much, the middle is scored
    every few steps only. The first step that scores is left out of all figures, since it warms up; so is the first one
    after a resume.

    Args:
        max_overhead: the share of a step's seconds, above 0 and below 1; None: no limit.
    """

    def __init__(self, max_overhead: float | None) -> None:
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise ValueError(
                f"max_overhead: {max_overhead:g} is no share of a step's seconds; write a number above 0 and below 1, "
                "such as 0.1, or null for no limit"
            )
        self.max_overhead = max_overhead
        self._row_seconds: deque[float] = deque(maxlen=_NUM_RECENT)  # one number for each step that scored
        self._other_seconds: deque[float] = deque(maxlen=_NUM_RECENT)
        self._account = math.inf  # as full as it may be: else a run well within its budget would begin with a pause
        self._spent = (0.0, 0.0)  # discounted seconds: of the selection, of everything else
        self._is_warm = self._is_limiting = False
        self._message: str | None = None

    @property
    def share(self) -> float:
        """Measured share of the last steps' seconds (about 50) that scoring and choosing took."""
        selection, other = self._spent
        return selection / (selection + other) if selection else 0.0

    def plan(self, num_rows: int, keep: int) -> int:
        """How many of `num_rows` rows, of which `keep` are kept, this step may score: call it once a step.

        `num_rows`: all; fewer: that many, drawn at random; 0: none, so this step takes its rows at random.
        """
        if self.max_overhead is None or not self._row_seconds:
            return num_rows
        row, other = median(self._row_seconds), median(self._other_seconds)
        everything = num_rows * row
        self._account = max(min(self._account, _MOST_SAVED * everything), -_MOST_OWED * everything)
        middle = (keep + num_rows + 1) // 2
        each_step, now = self._paid_in(other) / row, self._account / row
        rows = min(num_rows, max(middle, math.floor(each_step)), math.floor(now))
        if each_step < num_rows and not self._is_limiting:
            self._is_limiting = True
            what = f"{math.floor(each_step)} of {num_rows} rows are scored a step"
            if each_step < middle:
                what = f"{middle} of {num_rows} rows are scored in one step of {math.ceil(middle / each_step)}"
                what += ", and the others take theirs at random"
            self._message = (
                f"max_overhead: scoring and choosing among all rows takes {everything / (everything + other):.0%} of "
                f"a step, more than {self.max_overhead:.0%}: from now on about {what}. This follows the measured "
                "seconds, so another run of the same recipe chooses other rows"
            )
        return rows if rows >= middle else 0

    def observe(self, scored: int, selection_seconds: float, other_seconds: float) -> None:
        """See what a step took: rows scored, seconds of scoring and choosing, seconds of everything else."""
        if not self._is_warm and scored:
            self._is_warm = True
            return
        if scored:
            self._row_seconds.append(selection_seconds / scored)
        self._other_seconds.append(other_seconds)
        if self.max_overhead is not None:
            self._account += self._paid_in(other_seconds) - selection_seconds
        selection, other = self._spent
        self._spent = _DISCOUNT * selection + selection_seconds, _DISCOUNT * other + other_seconds

    def message(self) -> str | None:
        """What the budget does, once: at the first step that it limits."""
        message, self._message = self._message, None
        return message

    def _paid_in(self, other_seconds: float) -> float:
        """Seconds that scoring and choosing may take in a step whose rest takes `other_seconds`."""
        assert self.max_overhead is not None
        return self.max_overhead / (1 - self.max_overhead) * other_seconds

    def state_dict(self) -> dict[str, Any]:
        return {
            "row_seconds": list(self._row_seconds),
            "other_seconds": list(self._other_seconds),
            "account": self._account,
            "spent": list(self._spent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row_seconds = deque(state["row_seconds"], maxlen=_NUM_RECENT)
        self._other_seconds = deque(state["other_seconds"], maxlen=_NUM_RECENT)
        self._account, self._spent = state["account"], tuple(state["spent"])
        self._is_warm = False  # another process: its first step warms up again
