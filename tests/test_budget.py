"""The budget in simulated runs: the test plays the trainer and says what a step took."""

from __future__ import annotations

import itertools
import random

import pytest

from siftrl.budget import Budget

ROWS, KEEP = 64, 32  # the middle is 48


def simulate(
    budget: Budget, steps: int, row_seconds: float, other: float = 1.0, fixed: float = 0.0, noise: float = 0.0
) -> list[tuple[int, float, float]]:
    """(rows scored, seconds of the selection, of the rest) of each step.

    A scored row costs `row_seconds`, choosing by score `fixed` seconds, and taking rows at random next to nothing.
    """
    draw = random.Random(0)
    past = []
    for _ in range(steps):
        rows = budget.plan(ROWS, KEEP)
        seconds = (rows * row_seconds + fixed) * draw.lognormvariate(0, noise) if rows else 1e-4
        past.append((rows, seconds, other * draw.lognormvariate(0, noise)))
        budget.observe(*past[-1])
    return past


def rows_of(past: list[tuple[int, float, float]]) -> list[int]:
    return [rows for rows, _, _ in past]


def test_without_a_limit_all_rows_are_scored() -> None:
    budget = Budget(None)
    assert rows_of(simulate(budget, 20, row_seconds=10.0)) == [ROWS] * 20
    assert budget.message() is None
    assert budget.share == pytest.approx(640 / 641)


def test_within_the_limit_all_rows_are_scored() -> None:
    """64 rows take 0.1 s of 1.1 s: a share of 0.09."""
    budget = Budget(0.1)
    assert set(rows_of(simulate(budget, 50, row_seconds=0.1 / 64))) == {ROWS}
    assert budget.message() is None
    assert budget.share == pytest.approx(0.1 / 1.1)


def test_somewhat_above_the_limit_fewer_rows_are_scored_each_step() -> None:
    """A fifth may be spent, so 0.25 s a step; at 1/219 s a row that is 54 rows, between the middle and all."""
    budget = Budget(0.2)
    # all rows in the step that warms up and in the one that is measured
    assert rows_of(simulate(budget, 300, row_seconds=1 / 219)) == [ROWS] * 2 + [54] * 298
    assert budget.share == pytest.approx(0.2, abs=0.003)
    message = budget.message()
    assert message is not None and "takes 23% of a step, more than 20%: from now on about 54 of 64 rows" in message
    assert budget.message() is None


def test_far_above_the_limit_the_middle_is_scored_every_few_steps() -> None:
    """0.1 may be spent, so 1/9 s a step; the 48 rows of the middle take 0.48 s: one step in 4.32."""
    budget = Budget(0.1)
    planned = rows_of(simulate(budget, 440, row_seconds=0.01))[10:]
    assert set(planned) == {0, 48}
    scored = [step for step, rows in enumerate(planned) if rows]
    assert {after - before for before, after in itertools.pairwise(scored)} == {4, 5}
    assert len(planned) / len(scored) == pytest.approx(4.32, abs=0.05)
    message = budget.message()
    assert message is not None and "48 of 64 rows are scored in one step of 5" in message


@pytest.mark.parametrize("row_seconds", [0.001, 0.002, 0.003, 0.01, 0.1])
def test_the_mean_share_converges_to_at_most_the_limit(row_seconds: float) -> None:
    """Even where seconds are noisy, and where half of a scoring's cost does not depend on its rows."""
    budget = Budget(0.1)
    past = simulate(budget, 1000, row_seconds / 2, fixed=ROWS * row_seconds / 2, noise=0.3)[5:]
    selection, other = sum(seconds for _, seconds, _ in past), sum(seconds for _, _, seconds in past)
    wanted = ROWS * row_seconds / (1 + ROWS * row_seconds)
    assert 0.95 * min(0.1, wanted) < selection / (selection + other) < 1.002 * 0.1


def test_scoring_that_gets_cheap_scores_all_rows_again() -> None:
    budget = Budget(0.1)
    assert set(rows_of(simulate(budget, 100, row_seconds=0.01))[2:]) == {0, 48}
    assert set(rows_of(simulate(budget, 40, row_seconds=0.0005))[-20:]) == {ROWS}


def test_one_slow_step_does_not_end_the_selection() -> None:
    """A minute's hiccup is not what a row costs; of its debt a part is forgiven, so rows are soon chosen again."""
    budget = Budget(0.1)
    simulate(budget, 20, row_seconds=0.001)
    budget.observe(ROWS, 60.0, 1.0)
    planned = rows_of(simulate(budget, 20, row_seconds=0.001))
    assert planned[0] == 0 and set(planned[-10:]) == {ROWS}
    assert budget.share > 0.5  # but what it took is told


def test_what_is_saved_up_in_cheap_steps_is_limited() -> None:
    """1000 cheap steps do not pay for long dear ones: at most two full scorings are saved up."""
    budget = Budget(0.1)
    simulate(budget, 1000, row_seconds=0.0001)
    assert sum(rows > 0 for rows in rows_of(simulate(budget, 30, row_seconds=0.01))) < 8


def test_rows_that_are_all_kept_are_all_scored_or_none_is() -> None:
    budget = Budget(0.1)
    planned = set()
    for _ in range(100):
        rows = budget.plan(10, 10)
        budget.observe(rows, rows * 0.1, 1.0)
        planned.add(rows)
    assert planned == {0, 10}


def test_state_goes_on_and_the_first_step_after_it_warms_up_again() -> None:
    budget = Budget(0.1)
    simulate(budget, 100, row_seconds=0.01)
    other = Budget(0.1)
    other.load_state_dict(budget.state_dict())
    assert other.share == budget.share
    planned = []
    while 48 not in planned:
        planned.append(budget.plan(ROWS, KEEP))
        assert other.plan(ROWS, KEEP) == planned[-1]
        before = other.share
        for one in (budget, other):
            one.observe(planned[-1], 100.0 if planned[-1] else 1e-4, 1.0)
    assert other.share == before and budget.share > 0.5
    assert len(planned) > 1  # so the steps before, without scores, are seen and do count


@pytest.mark.parametrize("limit", [0.0, 1.0, 10.0, -0.1])
def test_a_limit_is_a_share(limit: float) -> None:
    with pytest.raises(ValueError, match=f"max_overhead: {limit:g} is no share of a step's seconds; write a number"):
        Budget(limit)
