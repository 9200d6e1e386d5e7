"""What reward plugins share: reading completions, columns and the answers in their cells."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from siftrl.recipe_text import near

TRL_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)
"""What TRL gives to every reward besides the data's columns."""

_REASONING_BEGINS = re.compile(r"<(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_REASONING_ENDS = re.compile(r"</(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_GSM8K = re.compile(r"(?:^|\n)####[ \t]*([^\n]+?)\s*\Z")
_SHOWN = 80
logger = logging.getLogger(__name__)


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


def after_reasoning(text: str) -> str:
    """What follows the last `</think>` (or thinking, reasoning, thought); "" where one was opened and never closed."""
    rest = _REASONING_ENDS.split(text)[-1]
    return "" if _REASONING_BEGINS.search(rest) else rest


def tagged(text: str, tag: str) -> str | None:
    """What stands between the last <tag> and its </tag>, after the reasoning; None where there is no such pair."""
    _, opened, rest = after_reasoning(text).rpartition(f"<{tag}>")
    inner, closed, _ = rest.partition(f"</{tag}>")
    return inner.strip() if opened and closed else None


def compiled(option: str, pattern: str | None, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str] | None:
    """A reward's option as a regular expression. Raises ValueError that names the option."""
    try:
        return None if pattern is None else re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{option}: {pattern!r} is no regular expression: {error}") from error


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group (or all) of the pattern's last match; None where there is no match."""
    matches = list(pattern.finditer(text))
    return matches[-1].group(1 if pattern.groups else 0) if matches else None


def gold_text(cell: Any, pattern: re.Pattern[str] | None, reward: str, name: str) -> str | None:
    """The answer in a cell of the column `name`, as text; None for a null cell, or one that `pattern` does not match.

    Without a pattern it is what follows `####` in the last line (GSM8K), or else the whole cell.
    Raises ValueError for a list or a mapping.
    """
    if cell is None:
        return None
    if isinstance(cell, (list, tuple, dict, set)):
        kind = "a mapping" if isinstance(cell, dict) else "a list"
        raise ValueError(
            f"{reward}: column {name!r} holds {kind}, not an answer: {str(cell)[:_SHOWN]}; write one answer a row"
        )
    text = str(cell)
    if pattern is not None:
        return last_match(pattern, text)
    marked = _GSM8K.search(text)
    return marked[1] if marked else text


def report_unread(
    reward: str, name: str, unread: list[Any], num_rows: int, columns: Mapping[str, Any], *, warned: bool
) -> bool:
    """Report the cells of the column `name` that hold no answer that could be read: rows without a reward.

    Their share is logged where the trainer takes metrics; the first such cell is one warning, unless `warned`.
    Returns whether a warning was given, now or before.
    """
    if "log_metric" in columns:  # always, so that all ranks log the same names
        columns["log_metric"](f"rewards/{reward}/unread_answers", len(unread) / max(num_rows, 1))
    if unread and not warned:
        text = str(unread[0])
        logger.warning(
            "%s: the answer %r in column %r cannot be read as a whole, so its row has no reward, and others like it "
            "have none (metric rewards/%s/unread_answers); write the answer alone into the column, or set the option "
            "`gold` to a regular expression that finds it",
            *(reward, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", name, reward),
        )
    return warned or bool(unread)
