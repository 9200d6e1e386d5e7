"""1 where the completion's mathematical answer equals the row's, as judged by the math-verify library."""

from __future__ import annotations

import functools
import logging
import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from siftrl.answers import Answer, read_answer, same_number, same_time
from siftrl.final_answer import boxed, final_answer
from siftrl.reward_columns import column, compiled, completion_texts, gold_text, report_unread, tagged

_MAX_DIGITS = 10_000
_PLUS_MINUS = r"\pm"


@dataclass
class MathVerify:
    """1 where the completion's mathematical answer equals the row's, else 0 (math-verify library).

    Both are read as a whole or not at all. A row whose own answer cannot be read has no reward; the share of such rows
    is logged.
    """

    reads: ClassVar[tuple[str, ...]] = ("{column}|answer|solution",)
    row_by_row: ClassVar[bool] = True

    column: str | None = None
    """The column that holds the right answer, LaTeX or plain; null: "answer", or else "solution"."""
    gold: str | None = None
    r"""A regular expression whose first group (or whole match) is the answer in that column; the last match counts.
    Null: the last \boxed{...}, or what follows `####` in the last line (GSM8K), or else the whole cell."""
    tag: str | None = None
    """The answer stands between <tag> and </tag>, the last such pair after the reasoning; without one the score is 0.
    Null: all that follows the reasoning is looked through."""
    boxed_only: bool = False
    r"""Take \boxed{...} alone for the completion's answer."""
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._gold = compiled("gold", self.gold)
        # the library warns at each call without a time limit of its own; the reward's `time_limit` is the limit
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        name = self.column or ("solution" if "answer" not in columns and "solution" in columns else "answer")
        cells = column(columns, name, "math_verify", option="column")
        golds = [self._read_gold(cell, name) for cell in cells]
        unread = [cell for cell, gold in zip(cells, golds, strict=True) if gold is None and str(cell or "").strip()]
        self._warned = report_unread("math_verify", name, unread, len(cells), columns, warned=self._warned)
        return [
            None if gold is None else float(self._is_right(gold, text))
            for gold, text in zip(golds, completion_texts(completions), strict=True)
        ]

    def _read_gold(self, cell: Any, name: str) -> Answer | None:
        text = gold_text(cell, self._gold, "math_verify", name)
        if text is None:
            return None
        box = None if self._gold is not None else boxed(text)
        answer = read_answer(text if box is None else box[1])
        if answer is None or answer.number or answer.clock or answer.words:
            return answer
        return None if _parsed(answer.latex) is None else answer

    def _is_right(self, gold: Answer, text: str) -> bool:
        found_in = text if self.tag is None else tagged(text, self.tag)
        found = None if found_in is None else final_answer(found_in, boxed_only=self.boxed_only)
        if found is None:
            return False
        # one answer in two forms: 3/4, or 75%
        forms = [read_answer(form) for form in re.split(r",? or ", found.latex)]
        said_again = len(forms) > 1 and all(form is not None and same_answer(gold, form) for form in forms)
        return said_again or same_answer(gold, found)


def same_answer(gold: Answer, found: Answer) -> bool:
    """Whether two answers are equal: as words, times, numbers, or else for the library."""
    if gold.words or found.words:
        return gold.words == found.words
    if gold.clock and found.clock:
        return same_time(gold.clock, found.clock)
    if gold.number and found.number:
        return same_number(gold.number, found.number)
    if not (gold.latex and found.latex):
        return False
    wanted, answer = _parsed(gold.latex), _parsed(found.latex)
    if wanted is None or answer is None:
        return False
    if not (_is_computable(wanted) and _is_computable(answer)):
        return bool(wanted == answer)  # as they are written
    if _are_far_apart(wanted, answer):
        return False
    from math_verify import verify

    return verify(wanted, answer, timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _parsed(latex: str) -> Any:
    """sympy's expression for LaTeX; None where the library cannot read it."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # units and boxes are seen to before; the library's own rule for units takes 2c for 2
    as_is = NormalizationConfig(True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=as_is)
    # its own time limits use signal.alarm, which works in the main thread only
    found = parse(f"${latex}$", extraction_config=[config], fallback_mode="no_fallback", parsing_timeout=None)
    if not found and _PLUS_MINUS in latex:  # inside a fraction, say
        return _parsed(f"{latex.replace(_PLUS_MINUS, '+')}, {latex.replace(_PLUS_MINUS, '-')}")
    return found[0] if found else None


def _are_far_apart(wanted: Any, answer: Any) -> bool:
    """Whether two constants differ visibly; the library would simplify their difference, some 20 ms a row."""
    from sympy import Expr, UnevaluatedExpr

    if not all(
        isinstance(value, Expr) and value.is_number and not value.has(UnevaluatedExpr) for value in (wanted, answer)
    ):
        return False  # UnevaluatedExpr: a percentage, which has two values
    difference, size = abs((wanted - answer).evalf(15)), abs(wanted.evalf(15))
    return bool(difference.is_Float and size.is_Float and difference > 1e-4 * max(1, size))


def _is_computable(expression: Any) -> bool:
    return _digits(expression) <= _MAX_DIGITS


def _digits(expression: Any) -> float:
    """At most the decimal logarithm of an expression's value; infinite where computing it may take for ever."""
    from sympy import Integral, Limit, Pow, Product, Rational, Sum, Symbol, factorial

    if isinstance(expression, Rational):
        return math.log10(max(abs(expression.p), expression.q))
    inner = [_digits(argument) for argument in getattr(expression, "args", ())]
    if isinstance(expression, (Pow, factorial)):
        exponent = inner[-1]
        return math.inf if exponent > 9 else 10**exponent * inner[0]
    if isinstance(expression, (Sum, Product, Integral, Limit)):
        return math.inf
    return sum(inner) if inner else 50.0 if isinstance(expression, Symbol) else 1.0
