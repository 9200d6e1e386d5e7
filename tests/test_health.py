"""The warnings of a run that learns nothing: when each comes, what it says, and that it comes once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from siftrl.health import CURRICULUM_LOOK_BACK, LOOK_BACK, Health
from siftrl.run import PARTS


def run(health: Health, steps: int, see: Callable[[int], None], **seconds: float) -> list[str]:
    """The warnings of `steps` steps that take `seconds` by part, each step's own figures brought by `see`."""
    found, passed = [], dict.fromkeys(PARTS, 0.0)
    for step in range(steps):
        see(step)
        passed = {part: passed[part] + seconds.get(part, 0.0) for part in PARTS}
        found += health.step(passed)
    return found


def rollout(health: Health, signal: bool = True, cut: float = 0.0, low: float = 0.0, high: float = 1.0) -> None:
    health.rollout(signal, cut, low, high)


def test_a_sound_run_says_nothing() -> None:
    health = Health(halt_on_no_signal=3)

    def see(step: int) -> None:
        rollout(health, signal=step % 3 > 0, cut=0.1)
        health.curriculum(is_uniform=step < 5, explained=0.3)
        health.chosen(offered=100, kept=50, run=50, scored=100)

    assert run(health, 60, see, policy_update=2.0, score=0.8, select=0.1) == []
    assert health.finish() == [] and health.halted is None


def test_completions_that_are_cut() -> None:
    health = Health()
    assert run(health, LOOK_BACK - 1, lambda step: rollout(health, cut=0.9)) == []
    said = run(health, 50, lambda step: rollout(health, cut=0.9))
    assert len(said) == 1 and said[0].startswith("90% of the completions end at their limit")
    assert "rollout.max_completion_tokens" in said[0] and health.warnings == said and health.finish() == []


def test_steps_without_a_signal() -> None:
    health = Health(halt_on_no_signal=12)

    def see(step: int) -> None:
        rollout(health, signal=step == 3, cut=0.25, low=0.0, high=0.0)

    assert run(health, 4 + LOOK_BACK - 1, see) == [] and health.halted is None
    said = run(health, 1, lambda step: rollout(health, signal=False, cut=0.25, high=0.0))
    assert len(said) == 1
    assert said[0].startswith("10 steps in a row changed the weights by no reward")
    assert "(every reward was 0)" in said[0] and "(25% are)" in said[0]
    run(health, 1, lambda step: rollout(health, signal=False, high=0.5))
    assert health.halted is None
    assert run(health, 1, lambda step: rollout(health, signal=False)) == []
    assert health.halted is not None and "12 steps in a row" in health.halted
    assert "(rewards were from 0 to 1)" in health.halted and "halt_on_no_signal: 12" in health.halted


def test_a_rollout_serves_many_steps_and_a_step_may_take_many_rollouts() -> None:
    health = Health(halt_on_no_signal=4)
    run(health, 8, lambda step: rollout(health, signal=step == 4) if step % 4 == 0 else None)
    assert health.halted is None  # four steps of a rollout without, four of one with a signal

    def two(step: int) -> None:
        rollout(health, signal=False)
        rollout(health, signal=step == 1)

    run(health, 3, two)
    run(health, 3, lambda step: rollout(health, signal=False))
    assert health.halted is not None and "4 steps in a row" in health.halted


def test_a_short_stage_is_judged_at_its_end() -> None:
    health = Health()
    assert run(health, 1, lambda step: rollout(health, signal=False, cut=1.0, low=1.0)) == []
    said = health.finish()
    assert [text.split()[0] for text in said] == ["100%", "1"] and "(every reward was 1)" in said[1]
    mixed = Health()
    run(mixed, 5, lambda step: rollout(mixed, signal=step == 0))
    assert mixed.finish() == []


def test_nothing_to_choose() -> None:
    health = Health()
    said = run(health, LOOK_BACK, lambda step: health.chosen(offered=30 + 10 * (step == 0), kept=32, run=30, scored=30))
    assert len(said) == 1 and "nothing to choose in 9 of the last 10 steps" in said[0]


@pytest.mark.parametrize(("explained", "figure"), [(None, "too few prompts"), (-0.2, "is -0.20"), (-385, "below -1")])
def test_a_curriculum_that_is_uniform(explained: float | None, figure: str) -> None:
    health = Health()
    said = run(health, CURRICULUM_LOOK_BACK, lambda step: health.curriculum(step > 1, explained))
    assert len(said) == 1 and "uniformly in 28 of the last 30 steps" in said[0] and figure in said[0]


@pytest.mark.parametrize(("score", "warns"), [(0.9, False), (1.6, True)])
def test_scoring_that_costs_more_than_it_saves(score: float, warns: bool) -> None:
    """Of 80 rows 40 are run in 1.5 s, so that the other 40 would take as long; the first step warms up."""
    health = Health()

    def see(step: int) -> None:
        health.chosen(offered=80, kept=40, run=40, scored=80)

    said = run(health, 20, see, score=score, policy_update=1.5)
    assert bool(said) is warns
    if warns:
        assert "takes 1.6 s a step, more than the passes that it saves (1.5 s)" in said[0]


def test_a_choice_that_serves_four_steps_saves_their_passes() -> None:
    health = Health()

    def see(step: int) -> None:
        if step % 4 == 0:
            health.chosen(offered=80, kept=40, run=40, scored=80)

    assert run(health, 80, see, score=0.3, policy_update=0.4) == []  # 1.2 s of each four steps, 1.6 s saved


def test_a_resumed_run_goes_on_and_repeats_nothing() -> None:
    health = Health(halt_on_no_signal=15)
    said = run(health, 12, lambda step: rollout(health, signal=False, cut=1.0))
    resumed = Health(halt_on_no_signal=15)
    resumed.load_state_dict(health.state_dict())
    assert resumed.warnings == said and len(said) == 2
    assert run(resumed, 3, lambda step: rollout(resumed, signal=False, cut=1.0)) == []
    assert resumed.halted is not None and "15 steps" in resumed.halted
