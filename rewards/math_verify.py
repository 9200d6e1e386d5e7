"""1 where the completion's mathematical answer equals the row's, as judged by the math-verify library."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from siftrl.reward_columns import column, completion_texts


@dataclass
class MathVerify:
    """1 where the completion's mathematical answer equals the row's, else 0 (math-verify library).

    A row whose own answer cannot be read as mathematics has no reward.
    """

    reads: ClassVar[tuple[str, ...]] = ("{column}|answer|solution",)
    row_by_row: ClassVar[bool] = True

    column: str | None = None
    """The column that holds the right answer, LaTeX or plain; null: "answer", or else "solution"."""
    boxed_only: bool = False
    r"""Take \boxed{...} alone for the completion's answer; otherwise any LaTeX, or else a plain number, counts."""

    def __post_init__(self) -> None:
        # the library warns at each call without a time limit of its own; the reward's `time_limit` is the limit
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        name = self.column or ("solution" if "answer" not in columns and "solution" in columns else "answer")
        answers = column(columns, name, "math_verify", option="column")
        return [self._score(text, answer) for text, answer in zip(completion_texts(completions), answers, strict=True)]

    def _score(self, text: str, answer: Any) -> float | None:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        # its own time limits use signal.alarm, which works in the main thread only
        gold = [] if answer is None else self._parse_gold(str(answer))
        if not gold:
            return None
        latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not self.boxed_only)
        configs = [latex] if self.boxed_only else [latex, ExprExtractionConfig()]
        if self.boxed_only and "\\boxed" not in text:
            return 0.0
        found = parse(text, extraction_config=configs, parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))

    @staticmethod
    def _parse_gold(answer: str) -> list[Any]:
        """Data sets write answers as bare LaTeX (`\\frac{1}{3}`) as often as in dollars or boxes."""
        from math_verify import parse

        return parse(answer, parsing_timeout=None) or parse(f"${answer}$", parsing_timeout=None)
