"""What a run prints while it works."""

from __future__ import annotations

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
