"""1 where the completion is the row's answer, else 0."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from siftrl.answers import plain_number
from siftrl.reward_columns import column, compiled, completion_texts, gold_text, last_match, report_unread


@dataclass
class ExactMatch:
    """1 where the completion is the row's answer, else 0; a row without an answer has no reward."""

    reads: ClassVar[tuple[str, ...]] = ("{column}",)
    row_by_row: ClassVar[bool] = True

    column: str = "answer"
    """The column that holds the right answer."""
    gold: str | None = None
    """A regular expression whose first group (or whole match) is the answer in that column; the last match counts, and
    a row without one has no reward. Null: what follows `####` in the last line (GSM8K), or else the whole cell."""
    strip: bool = True
    """Ignore white space around both."""
    ignore_case: bool = False
    numbers: bool = True
    """Compare numbers by value: 43 is 43.0, and 1,000 is 1000; codes such as 007 stay text."""
    extract: str | None = None
    r"""A regular expression whose first group (or whole match) is the answer in the completion, for example
    "<answer>(.*?)</answer>"; the last match counts, and no match scores 0. Null: the whole completion."""
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._extract, self._gold = compiled("extract", self.extract, re.DOTALL), compiled("gold", self.gold)

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        cells = column(columns, self.column, "exact_match", option="column")
        golds = [gold_text(cell, self._gold, "exact_match", self.column) for cell in cells]
        unread = [cell for cell, gold in zip(cells, golds, strict=True) if gold is None and cell is not None]
        self._warned = report_unread("exact_match", self.column, unread, len(cells), columns, warned=self._warned)
        return [
            None if gold is None else float(self._equal(gold, self._find(text), cell))
            for gold, text, cell in zip(golds, completion_texts(completions), cells, strict=True)
        ]

    def _find(self, text: str) -> str | None:
        return text if self._extract is None else last_match(self._extract, text)

    def _equal(self, gold: str, found: str | None, cell: Any) -> bool:
        if found is None:
            return False
        if self.strip:
            gold, found = gold.strip(), found.strip()
        if self.ignore_case or isinstance(cell, bool):  # JSON's true is Python's True
            gold, found = gold.casefold(), found.casefold()
        if gold == found or not self.numbers:
            return gold == found
        value = plain_number(gold)
        return value is not None and value == plain_number(found)
