"""What shows that a run learns nothing, or pays for what brings nothing.

Pure: the trainer brings a step's figures (`see`), asks once a step (`step`) and once at the end (`finish`), and gets
the warnings that are new. Each is said once. A stage that is shorter than the steps that a warning looks back on is
judged at its end, by what there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOOK_BACK = 10
"""Steps that a warning looks back on."""
CURRICULUM_LOOK_BACK = 30
"""The same for the curriculum, whose first steps are uniform until V has been judged."""
MOST_CUT = 0.5
"""Share of completions that may end at the limit of their length."""
MOST_IDLE = 0.9
"""Share of steps from which on a selector that had nothing to choose, or chose uniformly, is said to be idle."""
LEAST_COST = 0.05
"""Share of a step's seconds below which scoring is too cheap to speak of."""


class Health:
    """Watches one stage.

    Args:
        halt_on_no_signal: after so many optimizer steps in a row without a prompt whose completions' rewards differ,
            `halted` says why to stop; None: never.
    """

    def __init__(self, halt_on_no_signal: int | None = None) -> None:
        self.halt_on_no_signal = halt_on_no_signal
        self.warnings: list[str] = []
        self._said: set[str] = set()
        self._recent: dict[str, deque[float]] = {}
        self._counts: dict[str, int] = {}  # figures seen, of each name
        self._silent: int | None = None  # steps in a row without a signal; None: no rollout yet
        self._has_signal: bool | None = None  # whether the rollout that the steps now use has one
        self._is_new = True  # whether the next rollout is the first of its step
        self._rewards = (float("inf"), float("-inf"))  # lowest and highest since the last signal
        self._seconds: dict[str, float] | None = None  # at the last step's end; None: the next step warms up
        self._rows: list[int] | None = None  # of this step: could be chosen, are run, were measured
        self._choice: tuple[dict[str, float], list[int]] | None = None  # the last one, with the seconds then

    # -- figures ------------------------------------------------------------------------------------------------

    def rollout(self, has_signal: bool, cut: float, lowest: float, highest: float) -> None:
        """See a rollout: whether the rewards of some prompt's completions differ, which share of its completions ended
        at the limit of their length, its lowest and highest reward."""
        self._add("cut", cut)
        self._has_signal = has_signal or (bool(self._has_signal) and not self._is_new)
        self._is_new = False
        low, high = self._rewards
        self._rewards = (min(low, lowest), max(high, highest))

    def curriculum(self, is_uniform: bool, explained: float | None) -> None:
        """See a choice of prompts. explained: V's explained variance of what is ranked by, once it is known."""
        self._add("uniform", float(is_uniform))
        if explained is not None:
            self._add("explained", explained)

    def chosen(self, offered: int, kept: int, run: int, scored: int) -> None:
        """See a choice of rows: how many could be chosen, are to be kept, are trained on, and were measured."""
        self._add("idle", float(offered <= kept))
        self._rows = [old + new for old, new in zip(self._rows or [0, 0, 0], (offered, run, scored), strict=True)]

    def step(self, seconds: dict[str, float]) -> list[str]:
        """An optimizer step is done. seconds: by part, of the stage so far. Returns the warnings that are new."""
        if self._has_signal is not None:
            self._silent = 0 if self._has_signal else (self._silent or 0) + 1
            self._add("silent", float(self._silent))
            if self._silent == 0:
                self._rewards = (float("inf"), float("-inf"))
        self._is_new = True
        if self._rows is not None:  # what was chosen before has served its last step
            if self._choice is not None:
                self._weigh(*self._choice)
            self._choice = None if self._seconds is None else (self._seconds, self._rows)
        self._seconds, self._rows = dict(seconds), None
        return self._new_warnings(at_end=False)

    def _weigh(self, began: dict[str, float], rows: list[int]) -> None:
        """The price of a choice of rows against the passes that it saved. began: seconds when its first step began."""
        assert self._seconds is not None
        spent = {part: now - began[part] for part, now in self._seconds.items()}
        offered, run, scored = rows
        if scored:
            self._add("cost", spent["score"] + spent["select"])
            self._add("saved", spent["policy_update"] / max(run, 1) * max(offered - run, 0))
            self._add("whole", sum(spent.values()))

    def finish(self) -> list[str]:
        """The stage has ended: the warnings that are new."""
        return self._new_warnings(at_end=True)

    @property
    def halted(self) -> str | None:
        """Why the run is to stop, if so."""
        if self.halt_on_no_signal is None or self._silent is None or self._silent < self.halt_on_no_signal:
            return None
        return f"{self._no_signal()}; stopped by halt_on_no_signal: {self.halt_on_no_signal}"

    # -- warnings -----------------------------------------------------------------------------------------------

    def _new_warnings(self, at_end: bool) -> list[str]:
        found = []
        for rule in _RULES:
            seen = self._counts.get(rule.figure, 0)
            is_due = seen >= rule.look_back or (at_end and seen >= rule.least)
            if is_due and rule.figure not in self._said and (text := rule.text(self)) is not None:
                self._said.add(rule.figure)
                found.append(text)
        self.warnings += found
        return found

    def _add(self, name: str, figure: float) -> None:
        self._recent.setdefault(name, deque(maxlen=CURRICULUM_LOOK_BACK)).append(figure)
        self._counts[name] = self._counts.get(name, 0) + 1

    def _last(self, name: str, steps: int = LOOK_BACK) -> list[float]:
        return list(self._recent.get(name, ()))[-steps:]

    def _mean(self, name: str, steps: int = LOOK_BACK) -> float:
        last = self._last(name, steps)
        return sum(last) / len(last) if last else 0.0

    def _cut(self) -> str | None:
        share = self._mean("cut")
        if share < MOST_CUT:
            return None
        return (
            f"{share:.0%} of the completions end at their limit and not by themselves, so that most answers are cut: "
            "raise rollout.max_completion_tokens, or ask for shorter answers, or see that the model knows its end token"
        )

    def _no_signal(self) -> str:
        low, high = self._rewards
        rewards = f"every reward was {low:g}" if low == high else f"rewards were from {low:g} to {high:g}"
        steps = "1 step" if self._silent == 1 else f"{self._silent} steps"
        return (
            f"{steps} in a row changed the weights by no reward: no prompt had completions whose rewards differ "
            f"({rewards}). Likely causes: prompts that are all too hard or all too easy; a reward that does not find "
            "the answer (samples.jsonl shows completions with their rewards); answers that are cut at "
            f"max_completion_tokens ({self._mean('cut'):.0%} are)"
        )

    def _silence(self) -> str | None:
        is_silent = self._silent is not None and self._silent >= min(LOOK_BACK, self._counts["silent"])
        return self._no_signal() if is_silent else None

    def _idle(self) -> str | None:
        last = self._last("idle")
        if sum(last) < MOST_IDLE * len(last):
            return None
        return (
            f"the batch selectors had nothing to choose in {sum(last):.0f} of the last {len(last)} steps: no more rows "
            "could be chosen (in grpo: have an advantage, those that are the same counted once) than are kept. Lower "
            "`keep`, or leave batch_selector out; in grpo selection.skip_zero_advantage: true trains on the same rows"
        )

    def _uniform(self) -> str | None:
        last, explained = self._last("uniform", CURRICULUM_LOOK_BACK), self._last("explained", 1)
        if sum(last) < MOST_IDLE * len(last):
            return None
        figure = "too few prompts were judged to tell how much its value model explains"
        if explained:
            figure = "its value model's explained variance is " + figure_text(explained[0])
            figure += ", and must be above 0"
        return (
            f"the curriculum chose uniformly in {sum(last):.0f} of the last {len(last)} steps: {figure}. Train V more "
            "(prompt_selector.value.lr, updates) or on more steps, or leave the selector out: uniform prompts cost less"
        )

    def _costly(self) -> str | None:
        cost, saved, whole = (self._mean(name) for name in ("cost", "saved", "whole"))
        if "idle" in self._said or cost <= saved or cost < LEAST_COST * whole:
            return None
        return (
            f"scoring and choosing rows takes {cost:.2g} s a step, more than the passes that it saves ({saved:.2g} s): "
            "unless the choice itself is what you want, take a selector that needs no signal, keep fewer rows, or set "
            "selection.max_overhead"
        )

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "warnings": list(self.warnings),
            "said": sorted(self._said),
            "recent": {name: list(figures) for name, figures in self._recent.items()},
            "counts": dict(self._counts),
            "signal": [self._silent, self._has_signal, list(self._rewards)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warnings, self._said = list(state["warnings"]), set(state["said"])
        self._recent = {name: deque(figures, CURRICULUM_LOOK_BACK) for name, figures in state["recent"].items()}
        self._counts = dict(state["counts"])
        self._silent, self._has_signal, rewards = state["signal"]
        self._rewards = (rewards[0], rewards[1])
        self._seconds = self._rows = self._choice = None


@dataclass(frozen=True, slots=True)
class _Rule:
    """A warning: the figure that it is about, how many of them it looks back on, the fewest that it says it by at the
    stage's end, and its text, None where all is well."""

    figure: str
    text: Callable[[Health], str | None]
    look_back: int = LOOK_BACK
    least: int = 1


_RULES = (
    _Rule("cut", Health._cut),
    _Rule("silent", Health._silence),
    _Rule("idle", Health._idle),
    _Rule("uniform", Health._uniform, look_back=CURRICULUM_LOOK_BACK),
    _Rule("cost", Health._costly, least=3),
)


def figure_text(explained_variance: float) -> str:
    """An explained variance for people: far below 0 it only says that a constant would do better."""
    return f"{explained_variance:.2f}" if explained_variance > -1 else "below -1"
