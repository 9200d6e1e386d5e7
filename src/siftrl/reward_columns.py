"""What reward plugins share: reading completions and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siftrl.recipe_text import near

TRL_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)
"""What TRL gives to every reward besides the data's columns."""


def completion_texts(completions: list[Any]) -> list[str]:
    """The text of each completion: itself, or the contents of its messages in order."""
    return [
        completion if isinstance(completion, str) else "\n".join(message["content"] or "" for message in completion)
        for completion in completions
    ]


def column(columns: Mapping[str, Any], name: str, reward: str, *, option: str | None = None) -> list[Any]:
    """The data's column `name`; ValueError where there is none. option: the reward's key that holds the name."""
    if name in columns:
        return columns[name]
    known = sorted(columns.keys() - TRL_ARGUMENTS)
    advice = f"; set rewards.options.{option}" if option else ""
    raise ValueError(
        f"{reward}: the data has no column {name!r}{near(name, known)}; "
        f"its columns are {', '.join(known) or 'none besides the prompt'}{advice}"
    )
