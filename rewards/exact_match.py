"""1 where the completion is the row's answer, else 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from siftrl.reward_columns import column, completion_texts


@dataclass
class ExactMatch:
    """1 where the completion is the row's answer, else 0; a row without an answer has no reward."""

    reads: ClassVar[tuple[str, ...]] = ("{column}",)
    row_by_row: ClassVar[bool] = True

    column: str = "answer"
    """The column that holds the right answer."""
    strip: bool = True
    """Ignore white space around both."""
    ignore_case: bool = False
    extract: str | None = None
    r"""A regular expression whose first group (or whole match) is the answer in the completion, for example
    "<answer>(.*?)</answer>"; the last match counts, and no match scores 0. Null: the whole completion."""

    def __post_init__(self) -> None:
        if self.extract is not None:
            try:
                self._extract = re.compile(self.extract, re.DOTALL)
            except re.error as error:
                raise ValueError(f"extract: {self.extract!r} is no regular expression: {error}") from error

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        answers = column(columns, self.column, "exact_match", option="column")
        return [
            None if answer is None else float(self._normal(found) == self._normal(str(answer)))
            for found, answer in zip(map(self._find, completion_texts(completions)), answers, strict=True)
        ]

    def _find(self, text: str) -> str | None:
        if self.extract is None:
            return text
        matches = list(self._extract.finditer(text))
        if not matches:
            return None
        return matches[-1].group(1 if self._extract.groups else 0)

    def _normal(self, text: str | None) -> str | None:
        if text is None:
            return None
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
