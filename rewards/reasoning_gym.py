"""The score of the reasoning-gym library's own scorer, for rows that it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from siftrl.gym_rows import score
from siftrl.reward_columns import column, completion_texts, tagged


@dataclass
class ReasoningGym:
    """The score of the reasoning-gym library's own scorer, for rows that it made (data: reasoning_gym)."""

    reads: ClassVar[tuple[str, ...]] = ("task", "task_config", "entry")
    row_by_row: ClassVar[bool] = True

    tag: str | None = None
    """The answer stands between <tag> and </tag>, the last such pair after the reasoning; without one the score is
    the scorer's for no answer. Null: the whole completion is the answer."""
    full_marks_only: bool = False
    """1 for the library's full score and 0 for less; many families give a little for a well-formed wrong answer."""

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        rows = [column(columns, name, "reasoning_gym") for name in ("task", "task_config", "entry")]
        answers = [
            text.strip() if self.tag is None else tagged(text, self.tag) for text in completion_texts(completions)
        ]
        scores = [score(answer, *row) for answer, *row in zip(answers, *rows, strict=True)]
        return [float(value >= 1.0) for value in scores] if self.full_marks_only else list(scores)
