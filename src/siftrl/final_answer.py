"""Finds the last answer in a completion: after its reasoning, marked as the answer, or else the last number or formula.

Pure functions on text.
"""

from __future__ import annotations

import re

from siftrl.answers import MAX_LENGTH, Answer, plain_characters, read_answer
from siftrl.reward_columns import after_reasoning

_BRACES = re.compile(r"(\\f?box(?:ed)?\s*\{)|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*\band\b|,?\s*\bor\b)[\s$]*")


def boxed(text: str) -> tuple[int, str] | None:
    r"""Where the last \boxed{...} begins, and what it holds; boxes that only "and", "or" or a comma part are one list.

    A last box that is never closed was cut off, and holds nothing.
    """
    boxes: list[tuple[int, int, int]] = []  # begin, begin and end of the content
    open_braces: list[tuple[int, int] | None] = []
    for match in _BRACES.finditer(text):
        if match[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None and not any(open_braces):  # a box inside a box is part of it
                boxes.append((*opened, match.start()))
        elif match[0].endswith("{") and not match[0].startswith("\\{"):
            open_braces.append((match.start(), match.end()) if match[1] else None)
    if cut_off := [opened for opened in open_braces if opened]:
        return cut_off[0][0], ""
    if not boxes:
        return None
    begin, first, last = boxes[-1]
    parts = [text[first:last]]
    for start, content, end in reversed(boxes[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text[end + 1 : begin]):
            break
        begin, parts = start, [text[content:end], *parts]
    return begin, ", ".join(parts)


_IS = r"(?:is|are|was|be|becomes|equals?)\b(?!\s+not\b)|="
_ANSWER = re.compile(
    rf"\b(?:answer|solution)s?\b[^.\n:=\d]{{0,60}}?(?:\s(?:{_IS})\s*:?|[*_\s]*[:=])[\s*_]*", re.IGNORECASE
)
_HASHES = re.compile(r"^[ \t]*#{4}[ \t]*(?=\S)", re.MULTILINE)
_CORRECTION = re.compile(
    r"\b(?:(?:no|wait|sorry|oops|actually|correction|scratch that)\s*[,.:;!—–-]+|no wait|wait no|actually)\s+"
    r"(?:(?:the answer|it|that)(?:'s| is| should be) |i mean |make that )?(?=[-$\\(]{0,3}[\d.])",
    re.IGNORECASE,
)
_PHRASE_ENDS = re.compile(
    r"\n|;|[.!?](?=[\s*_\"')]|$)(?<![\s\d][ap]\.)(?<![\s\d][ap]\.m\.)(?<!\bM[rs]\.)(?<!\bMrs\.)(?<!\bDr\.)"
    r"|[,;]?\s+\(?(?:because|since|which|where|so|as|but|not|instead|for|when)\b"
)
_RUN = re.compile(
    r"(?:\d{1,2}:[0-5]\d\s?[aApP]\.?[mM]\b\.?|\\(?:text|mbox|mathrm|textbf|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.|[.:](?=\d)|,(?=\s*[-\d\\(])"
    r"|(?<![A-Za-z\\'])[B-HJ-Zb-z](?![A-Za-z'])|[^\w\n.,;:!?\\]|\d)+"
)
_PLAIN = re.compile(r"(?<![\w.])-?\$?\d[\d,.]*(?<=\d)%?")
_MAX_MARKS = 20
_MAX_RUNS = 8


def final_answer(text: str, *, boxed_only: bool = False) -> Answer | None:
    r"""The last answer of a completion's text; None where there is none, or where only a part of it could be read.

    Of the answers that are marked as such the last counts: \boxed{...}, `#### ...`, "the answer is ...", and what
    directly follows a correction ("no, wait, 12"). Where nothing is marked it is the last line, if the whole of it is
    an answer, or else the last formula or number.
    """
    text = re.sub(r"<<[^<>\n]*>>", "", after_reasoning(text))  # GSM8K's calculator
    text = re.sub(r"</?[A-Za-z][A-Za-z_]{2,}>", "\n", text).strip()
    text = "\n".join(map(plain_characters, text.splitlines()))
    if "\n" in text:
        text = re.sub(r"^[ \t]*[-*•][ \t]+(?=\S)", "", text, flags=re.MULTILINE)
    box = boxed(text)
    if boxed_only:
        return None if box is None else read_answer(box[1])
    marks: list[tuple[int, str, str]] = [] if box is None else [(box[0], "box", box[1])]
    for kind, pattern in (("hashes", _HASHES), ("answer", _ANSWER), ("correction", _CORRECTION)):
        marks += [(match.start(), kind, _phrase(text, match.end())) for match in pattern.finditer(text)]
    words = None
    for _, kind, phrase in sorted(marks, reverse=True)[:_MAX_MARKS]:
        answer = read_answer(phrase)
        if answer is None and kind in ("hashes", "answer"):
            answer = _within(phrase, last="=" in phrase)
        if kind == "box" or (answer is not None and not answer.words):
            return answer
        words = words or answer
    if words is not None:
        return words
    answer = read_answer(text.rpartition("\n")[2])
    if answer is not None and not answer.words:
        return answer
    return _within(text, last=True) or answer


def _phrase(text: str, start: int) -> str:
    """What follows a mark, up to the end of the sentence or a word that begins an explanation."""
    text = text[start : start + MAX_LENGTH + 1]
    end = _PHRASE_ENDS.search(text)
    return text[: end.start()] if end else text


def _within(text: str, *, last: bool) -> Answer | None:
    """The first or last formula or number among the words of `text`."""
    runs = [match[0] for match in _RUN.finditer(text[-20 * MAX_LENGTH :]) if re.search(r"\d|\\[A-Za-z]", match[0])]
    for run in (runs[::-1] if last else runs)[:_MAX_RUNS]:
        run = re.sub(r"^[\s*:,]*(?:-\s+)?", "", run).rstrip(" -")
        answer = read_answer(run) or read_answer(run.rpartition("=")[2])
        if answer is None and not re.search(r"[\\^_()\[\]{}]", run) and (numbers := _PLAIN.findall(run)):
            answer = read_answer(numbers[-1 if last else 0])
        if answer is not None and not answer.words:
            return answer
    return None
