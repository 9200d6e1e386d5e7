"""Reads a short answer as people and models write it: a number, a clock time, words, or LaTeX for a library.

An answer is read as a whole or not at all: what follows a number may be a unit, which is dropped, but never a part of
the answer. Pure functions on text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_LENGTH = 500
"""Characters of an answer; a longer one is not read, since a parser's time grows quickly with the length."""
_MAX_DEPTH = 10  # nested parentheses; the library needs seconds for more
_MAX_WORDS = 6
_MAX_EXPONENT = 400


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written."""

    value: Fraction
    decimals: int = 0
    """Digits behind the point; 0 for fractions, too."""
    digits: int = 0
    """Significant digits where there is a point."""
    is_decimal: bool = True
    """Written with digits and a point alone, not as a fraction."""
    percent: bool = False
    base: int | None = None
    """Of a number such as 52_8; the value then has the digits as they stand."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day. seconds: since midnight or noon where `half` is None, since midnight otherwise."""

    seconds: int
    half: str | None = None
    """"a" or "p", where it is written or the hour tells it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was read. latex: what a mathematics library is asked to parse; "" where it is words."""

    latex: str
    number: Number | None = None
    clock: Clock | None = None
    words: str = ""


# -------------------------------------------------------------------------------------------------- characters

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‐‑﹣－", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u3000\t\n\r", " "),
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/"},
        **{"π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt", "°": r"^\circ ", "º": r"^\circ ", "±": r"\pm "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
        **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8"},
        **{character: f"^{power}" for power, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{character: "$" for character in "€£¥₹₽₩₫₺₦₱"},
        **{"“": '"', "”": '"', "’": "'", "‘": "'", "，": ",", "．": ".", "：": ":", "％": "%"},
        **{chr(ord("０") + digit): str(digit) for digit in range(10)},
    }
)
_DASH_AS_SIGN = re.compile(r"(?<![\w)}])–(?=\s?[\d.\\(])")


def plain_characters(text: str) -> str:
    """Text with typographic signs as the keyboard's; an en dash between digits (5–7) is a range and stays."""
    return _DASH_AS_SIGN.sub("-", text).translate(_CHARACTERS)


# ----------------------------------------------------------------------------------------------------- numbers

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_PLAIN_NUMBER = re.compile(rf"([+-]?)({_UNSIGNED})(?:[eE]([+-]?\d{{1,9}}))?")
_FRACTION = re.compile(
    r"([+-]?)\s*(?:(\d+)\s*)??(?:\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d)(?!\d))"
    r"|(?<!\d)(\d+)\s*/\s*(\d+))"
)
_REPEATING = re.compile(r"([+-]?)(\d+)\.(\d*)\\overline\s*\{(\d+)\}")
_BASE = re.compile(r"(.+)_\s*\{?\s*(?:\\text\{)?(\d{1,2})\}?\}?")


def plain_number(text: str) -> Decimal | None:
    """The value of a number in digits: 43, -0.5, 1,000, 1e-5; None for other text, and for codes such as 007."""
    match = _PLAIN_NUMBER.fullmatch(text.replace("−", "-"))
    if match is None or re.match(r"0\d", match[2]):
        return None
    return Decimal(match[1] + match[2].replace(",", "") + (f"e{match[3]}" if match[3] else ""))


def _number(text: str) -> Number | None:
    """text: prepared."""
    if match := re.fullmatch(r"(.*?)\s*\\?%", text):
        number = _number(match[1])
        return None if number is None else _replace(number, percent=True)
    if (match := _BASE.fullmatch(text)) and re.fullmatch(r"[+-]?\d+", match[1].strip()):
        return Number(Fraction(match[1].strip()), base=int(match[2]))
    compact = re.sub(r"^([+-]) +", r"\1", text)
    if match := _PLAIN_NUMBER.fullmatch(compact):
        if abs(int(match[3] or 0)) > _MAX_EXPONENT:
            return None
        written = Decimal(match[1] + match[2].replace(",", ""))
        decimals = -int(written.as_tuple().exponent)
        value = Fraction(written) * Fraction(10) ** int(match[3] or 0)
        digits = len(written.as_tuple().digits) if decimals else 0
        return Number(value, decimals if match[3] is None else 0, digits)
    if match := _REPEATING.fullmatch(compact):
        sign, whole, fixed, repeated = match.groups()
        value = Fraction(
            int(whole + fixed + repeated) - int(whole + fixed), 10 ** len(fixed + repeated) - 10 ** len(fixed)
        )
        return Number(-value if sign == "-" else value, is_decimal=False)
    if match := _FRACTION.fullmatch(text):
        sign, whole, *parts = match.groups()
        top, bottom = (int(part) for part in parts if part is not None)
        if bottom == 0 or (whole is not None and top < 0):
            return None
        value = int(whole or 0) + Fraction(top, bottom)
        return Number(-value if sign == "-" else value, is_decimal=False)
    return None


def _replace(number: Number, *, percent: bool) -> Number:
    return Number(number.value, number.decimals, number.digits, number.is_decimal, percent, number.base)


def same_number(gold: Number, found: Number) -> bool:
    """Whether both are the same value.

    A decimal of at least five places stands for all that round to it (3.33333 for 10/3), one of at least two places
    for a fraction that no decimal equals (0.33 for 1/3), and an answer of at least six places is right where the gold
    rounds to it. A percentage is its number or its hundredth (50% is 50 and 0.5), unless both are percentages.
    """
    if gold.base is not None and found.base is not None and gold.base != found.base:
        return False
    wanted, values = {gold.value}, {found.value}
    if gold.percent != found.percent:
        wanted |= {gold.value / 100} if gold.percent else set()
        values |= {found.value / 100} if found.percent else set()
    if wanted & values:
        return True
    return any(_rounds(gold, right, found, value) for right in wanted for value in values)


def _rounds(gold: Number, right: Fraction, found: Number, value: Fraction) -> bool:
    if right == gold.value and gold.decimals:
        is_rounded = gold.decimals >= 5 and gold.digits >= 5
        is_rounded |= gold.decimals >= 2 and not found.is_decimal and not _terminates(value)
        if is_rounded and _round(value, gold.decimals) == right:
            return True
    enough = found.decimals >= 6 and found.digits >= 6 and value == found.value
    return enough and _round(right, found.decimals) == value


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _round(value: Fraction, decimals: int) -> Fraction:
    return Fraction(round(value * 10**decimals), 10**decimals)


# ------------------------------------------------------------------------------------------------ clock times

_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE)


def _clock(text: str) -> Clock | None:
    match = _CLOCK.fullmatch(text)
    if match is None or int(match[1]) > 24 or not (match[2] or match[4]):
        return None
    hour, half = int(match[1]), (match[4] or "").lower() or None
    if hour > 12 or hour == 0:
        half = "p" if 12 < hour < 24 else "a"
    return Clock(hour % 12 * 3600 + int(match[2] or 0) * 60 + int(match[3] or 0), half)


def same_time(gold: Clock, found: Clock) -> bool:
    """Whether both are the same time; a.m. and p.m. count where both say which."""
    return gold.seconds == found.seconds and (None in (gold.half, found.half) or gold.half == found.half)


# ----------------------------------------------------------------------------------------------------- answers

_FUNCTIONS = "sqrt|pi|arcsin|arccos|arctan|sin|cos|tan|cot|csc|log|ln|exp|theta|alpha|beta|gamma|lambda|phi|infty"
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:! ]|q?quad(?![A-Za-z]))|~")
_TEXT = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|textnormal|mathrm|operatorname|rm)\s*\{([^{}]*)\}")
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|underline|displaystyle|mathit)\s*(?:\{([^{}]*)\})?")
_LEADING = re.compile(
    r"^(?:(?:approximately|about|around|roughly|nearly|exactly|only|just|equal to|to be|a total of)\b|\\approx|=)\s*",
    re.IGNORECASE,
)
_SHORT_UNITS = "cm|mm|km|dm|kg|mg|ml|cl|dl|kl|oz|lb|ft|in|yd|mi|hr|ms|km/h|kmh|mph|kph|sq|cu|rs"
# words that change the number they follow, and products of letters
_NO_UNIT = r"(?!(?:and|or|than|times|plus|minus|divided|out|over|squared|cubed|half|halves|not|mod|if|abc|xyz)\b)"
_WORD = rf"(?:{_NO_UNIT}[A-Za-z][A-Za-z'’-]{{2,}}\.?|(?:{_SHORT_UNITS})\b\.?)"
_MORE_WORDS = rf"(?:\s+(?:{_WORD}|a|an|of|in|on|at|to)\b\.?){{0,4}}"
_POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
_PER = rf"(?:\s*/\s*(?:{_WORD}|[smhgl]\b){_POWER})?"
_UNIT = re.compile(
    rf"^(?P<value>.*(?:[\d)}}\]%]|\\pi))"
    rf"(?:\s*\(\s*[A-Za-z][A-Za-z .'’-]*\)"  # 9 (apples)
    rf"|(?:\s+|(?={_SHORT_UNITS})|(?=[A-Za-z]{{4}})){_WORD}{_POWER}{_MORE_WORDS}{_POWER}{_PER}"  # 12 apples, 12cm^2
    rf"|\s+[smhglLCF]{_POWER}{_PER}"  # 12 m/s
    rf"|\s*\^\s*\{{?\s*\\circ\s*\}}?\s*[CF]?)$"  # 90^\\circ
)
_ORDINAL = re.compile(r"(\d+)\s*(?:st|nd|rd|th)\b")
_KNOWN_WORDS = re.compile(r"\b(?:and|or)\b")
_WORDS_ALONE = re.compile(r"(?:^|\s)(?:is|it|of|to|no|at|if|so|am|pm)(?=[\s.,]|$)", re.IGNORECASE)
# words of four letters and more, or of three that stand alone, but no points (ABCD) and no products (abc = 6)
_PROSE = re.compile(
    r"(?![A-Z]+(?![^\W\d_]))(?:[^\W\d_]{4}"
    r"|(?<![^\s(])(?<![=+*/<>-] )[^\W\d_]{3}(?!\s*(?:[=+*/^<>]|-(?!\d)))(?![^\s.,)]))"
)
_DROPPED = re.compile(r"\\(?:l|c|v|d)?dots|\.\.|\\[pb]?mod|…|\?|[–—]|\d\s*_")  # the library leaves these out
_TWO_NUMBERS = re.compile(rf"(?<!_)\d\s*(?:\b(?:{_SHORT_UNITS}|[smhgl]))?\s+[\d.]|\d(?:{_SHORT_UNITS})\s*\d")
_LARGE_BINOMIAL = re.compile(r"\\[dt]?binom.*(?:\d{5}|\^|!)")


def read_answer(text: str) -> Answer | None:
    """The answer that the whole of `text` is; None where it is none, or where only a part of it could be read."""
    prepared = _prepared(text) if len(text) <= MAX_LENGTH else ""
    if not prepared:
        return None
    if _is_words(prepared):
        return _words(prepared)
    unit = _UNIT.match(prepared)
    for value in [prepared] if unit is None else [prepared, unit["value"].strip()]:
        if (clock := _clock(value)) is not None:
            return Answer("" if clock.half else value, clock=clock)
        if (number := _number(value)) is not None:
            return Answer(_latex(number, value), number=number)
    return Answer(value) if _is_mathematics(value) else None


def _latex(number: Number, written: str) -> str:
    if number.is_decimal and re.fullmatch(r"[+-]?[\d,.]+", written):
        return written.replace(",", "")
    fraction = rf"{number.value.numerator}/{number.value.denominator}"
    return fraction + (r"\%" if number.percent else "")


def _prepared(text: str) -> str:
    """Text as LaTeX: markdown, dollars, spaces for the eye and digit groups undone, functions with a backslash."""
    text = plain_characters(text).strip()
    text = re.sub(r"(?<=\d)\s*\{,\}\s*(?=\d{3}(?!\d))|(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\*\*|__|`|\\?\$|(?<!\\)\\[()\[\]](?!\w*matrix)", "", text)
    text = re.sub(r"^\*(.*)\*$|^_(.*)_$", r"\1\2", text.strip())
    text = _SPACES.sub(" ", text)
    for pattern, replacement in ((_TEXT, r" \1 "), (_BOLD, r" \1 ")):
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d])", lambda match: match[1].replace(" ", ""), text)
    text = re.sub(r"(?<![\d.])(\d{1,3}(?:\.\d{3}){2,})(?![.\d])", lambda match: match[1].replace(".", ""), text)
    text = re.sub(r"\s*\b(?:percent|per cent|pct)\b", r"\\%", text)
    text = re.sub(r"(?i)\binf(?:inity)?\b", "infty", text)
    text = re.sub(r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt(?=\d)", r"\\sqrt ", text)
    text = re.sub(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"^\(?[A-Ea-e]\)\s+(?=[-\\\d])", "", text)  # a choice's letter
    text = re.sub(r"(\d+) dollars? and (\d\d?) cents?", lambda match: f"{match[1]}.{match[2]:0>2}", text)
    text = re.sub(r"(\d) and a half\b", r"\1 1/2", text)
    text = re.sub(rf"({_UNSIGNED}) (hundred|thousand|million|billion|trillion|dozen)\b", _multiplied, text)
    text = re.sub(r"\\([dtc]?frac)\s+(\d)\s+(\d)", r"\\\1{\2}{\3}", text)
    text = _ORDINAL.sub(r"\1", text.strip(" \"'"))
    while (shorter := _LEADING.sub("", text)) != text:
        text = shorter
    if not re.search(r"\b[ap]\.\s*m\.$", text, re.IGNORECASE):
        text = re.sub(r"[\s.,;:]+$", "", text)
    text = re.sub(r"(?<=\d)\s*\((?=-?[\d.]+\))", r" \\cdot (", text)
    text = re.sub(rf"({_UNSIGNED})\s*[eE]([+-]?\d+)\b(?!\s*[A-Za-z])", _power_of_ten, text)
    return re.sub(r"\s+", " ", text).strip()


_MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _multiplied(match: re.Match[str]) -> str:
    product = Decimal(match[1].replace(",", "")) * _MULTIPLES[match[2]]
    return f"{product:f}".rstrip("0").rstrip(".") if product % 1 else f"{int(product)}"


def _power_of_ten(match: re.Match[str]) -> str:
    whole = match.string.strip()
    return match[0] if match.start() <= 1 and match.end() >= len(whole) else rf"{match[1]}\times 10^{{{match[2]}}}"


def _bare(text: str) -> str:
    """Text without LaTeX's commands, so that letters that are left stand for themselves."""
    return re.sub(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+", " ", text)


def _is_words(text: str) -> bool:
    bare = _bare(text)
    if "\\" in text or re.search(r"[\d=+*/^_<>{}\[\]|]", bare) or len(bare.split()) > _MAX_WORDS:
        return False
    return re.search(r"[^\W\d_]{3}", _KNOWN_WORDS.sub(" ", bare)) is not None or bool(_WORDS_ALONE.search(bare))


def _words(text: str) -> Answer | None:
    normal = " ".join(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.casefold()))
    return Answer("", words=normal) if normal else None


def _is_mathematics(text: str) -> bool:
    bare = _KNOWN_WORDS.sub(" ", _bare(text))
    if _DROPPED.search(text) or _TWO_NUMBERS.search(text) or _LARGE_BINOMIAL.search(text):
        return False
    if _PROSE.search(bare) or _WORDS_ALONE.search(bare):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([|") - (character in ")]")
        deepest = max(deepest, depth)
    return deepest <= _MAX_DEPTH
