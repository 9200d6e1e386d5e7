"""What a run prints while it works."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from siftrl.report import Progress


@pytest.mark.parametrize(("explained", "shown"), [(0.3421, "0.342"), (-0.5, "-0.5"), (-385.2, "<-1")])
def test_the_bar_does_not_say_how_much_worse_than_a_constant(explained: float, shown: str) -> None:
    bar = Progress("grpo")
    seen: list[Any] = []
    bar.bar = SimpleNamespace(set_postfix=seen.append)
    bar.on_log(None, None, None, {"loss": 0.1, "prompts/explained_variance": explained})
    bar.on_log(None, None, None, {"loss": 0.1})
    assert seen == [{"loss": "0.1", "EV": shown}, {"loss": "0.1"}]


def test_warnings_stand_above_the_bar_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = Progress("grpo")
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=1)
    progress.on_train_begin(None, state, None)
    logging.getLogger("siftrl.trainers.base").warning("nothing was %s", "learned")
    progress.on_train_end(None, state, None)
    assert "warning: nothing was learned\n" in capsys.readouterr().err
    logging.getLogger("siftrl.trainers.base").warning("after it")
    assert "warning: after it" not in capsys.readouterr().err
