"""1 where the completion has the wanted form: a regular expression, or tags in their order."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from siftrl.reward_columns import completion_texts


@dataclass
class ResponseFormat:
    """1 where the completion has the wanted form: a regular expression, or tags in their order."""

    reads: ClassVar[tuple[str, ...]] = ()
    row_by_row: ClassVar[bool] = True

    pattern: str | None = None
    """A regular expression that the whole completion must match, white space around it aside."""
    tags: list[str] = field(default_factory=list)
    """Names of tags, for example [think, answer]: each opened and closed exactly once, one after the other."""
    partial: bool = False
    """With `tags`: score the share of tags that are opened and closed exactly once when not all is right, below 1."""

    def __post_init__(self) -> None:
        if (self.pattern is None) == (not self.tags):
            raise ValueError("give one of `pattern` and `tags`, for example tags: [think, answer]")
        if self.pattern is not None and self.partial:
            raise ValueError("partial: a pattern matches or does not; remove `partial`, or give `tags`")
        try:
            between = r"\s*".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in self.tags)
            self._form = re.compile(between if self.pattern is None else self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        return [self._score(text.strip()) for text in completion_texts(completions)]

    def _score(self, text: str) -> float:
        once = [text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in self.tags]
        if all(once) and self._form.fullmatch(text):
            return 1.0
        # in the wrong order, or with text around: all tags are there, yet the form is not
        return min(sum(once) / len(once), 1 - 1 / (2 * len(once))) if self.partial else 0.0
