"""One call of a reward: its arguments are the reward's own, and its answer is checked.

The same in a worker process and in the trainer's. This module must stay free of torch: workers import it.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import itertools
import math
import traceback
import types
from collections.abc import Callable, Coroutine, Mapping, Set
from dataclasses import dataclass
from typing import Any

FLOAT32_MAX = 3.4028234663852886e38
"""The largest float32: rewards are summed in that type."""


class RewardError(RuntimeError):
    """A reward is at fault; the message names the reward, the row and its text."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a reward did wrong. trace: the traceback, as text; "" where there is none."""

    cause: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave: one value or Fault a row, and what it logged through TRL's `log_metric` and `log_extra`."""

    values: list[float | None | Fault]
    metrics: list[tuple[str, float]]
    extras: list[tuple[str, list[Any]]]


Columns = dict[str, Any]
"""A reward's arguments by name: a list with one item a row, or what TRL gives once a call."""


def call_reward(
    reward: Callable[..., Any], columns: Columns, wait: Callable[[Coroutine[Any, Any, Any]], Any]
) -> Answer | Fault:
    """Call `reward`: its answer, or the fault of the whole call.

    wait: runs a coroutine to its end, for a reward whose answer must be awaited.
    """
    logs = _Logs()
    try:
        answer = reward(**logs.put_into(columns))
        if inspect.isawaitable(answer) or hasattr(answer, "__aiter__"):
            answer = wait(_awaited(answer))
        return logs.answer(answer, columns)
    except BaseException as error:  # sys.exit and KeyboardInterrupt of a reward, too: they must not end a run quietly
        return raised(error)


async def call_async_reward(reward: Callable[..., Any], columns: Columns) -> Answer | Fault:
    """The same in an event loop that runs already."""
    logs = _Logs()
    try:
        return logs.answer(await _awaited(reward(**logs.put_into(columns))), columns)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return raised(error)


async def _awaited(answer: Any) -> Any:
    """The answer itself, or the list that an async generator yields."""
    if hasattr(answer, "__aiter__"):
        return [value async for value in answer]
    return await answer


class _Logs:
    """Stands in for the trainer's two log functions, which are told once the call has succeeded."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float]] = []
        self.extras: list[tuple[str, list[Any]]] = []

    def put_into(self, columns: Columns) -> Columns:
        functions: Columns = {
            "log_metric": lambda name, value: self.metrics.append((name, float(value))),
            "log_extra": lambda column, values: self.extras.append((column, list(values))),
        }
        return {name: functions.get(name, value) for name, value in columns.items()}

    def answer(self, answer: Any, columns: Columns) -> Answer | Fault:
        values = _values(answer, len(columns["completions"]))
        return values if isinstance(values, Fault) else Answer(values, self.metrics, self.extras)


def own_copy(columns: Columns) -> Columns:
    """Arguments that a reward may change without anybody else seeing it; environments stay what they are."""
    copies = {name: value if name == "environments" else _own(value) for name, value in columns.items()}
    if "trainer_state" in columns:
        copies["trainer_state"] = copy.copy(columns["trainer_state"])
    return copies


_UNCHANGING = {str, int, float, bool, bytes, type(None), types.FunctionType, types.MethodType}


def _own(value: Any) -> Any:
    if type(value) is list:
        return value[:] if set(map(type, value)) <= _UNCHANGING else [_own(item) for item in value]
    if type(value) in _UNCHANGING:
        return value
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, an open file: what cannot be copied is shared
        return value


def rows_of(columns: Columns, rows: list[int], num_rows: int) -> Columns:
    """The arguments of some rows alone."""
    return {
        name: [value[row] for row in rows] if isinstance(value, (list, tuple)) and len(value) == num_rows else value
        for name, value in columns.items()
    }


def joined(answers: list[Answer | Fault]) -> Answer:
    """The answers of single rows as the answer of one call: a metric is its mean over the rows that logged it."""
    metrics: dict[str, list[float]] = {}
    extras: dict[str, list[Any]] = {}
    for row, answer in enumerate(answers):
        if isinstance(answer, Fault):
            continue
        for name, figure in answer.metrics:
            metrics.setdefault(name, []).append(figure)
        for column, cells in answer.extras:  # a row that logged nothing has an empty cell
            extras.setdefault(column, [None] * len(answers))[row] = cells[0] if len(cells) == 1 else cells
    return Answer(
        [answer if isinstance(answer, Fault) else answer.values[0] for answer in answers],
        [(name, sum(figures) / len(figures)) for name, figures in metrics.items()],
        list(extras.items()),
    )


def bound_options(reward: Any) -> set[str]:
    """The options that are bound to a reward function: a data column of such a name would replace the option."""
    names: set[str] = set()
    while isinstance(reward, functools.partial):
        names |= reward.keywords.keys()
        reward = reward.func
    return names


def is_async(reward: Any) -> bool:
    """Whether calling the reward gives a coroutine, as TRL tells it."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def raised(error: BaseException) -> Fault:
    cause = f"raised {type(error).__name__}: {error}".removesuffix(": ")
    return Fault(cause, "".join(traceback.format_exception(error)))


def too_slow(limit: float | None) -> Fault:
    assert limit is not None
    return Fault(f"took longer than {limit:g} s")


def _values(answer: Any, num_rows: int) -> list[float | None | Fault] | Fault:
    """One value or Fault a row. What is lazy is made here, so inside the call's time limit."""
    wanted = f"not a list of {num_rows} numbers"
    unordered = isinstance(answer, (Mapping, Set))  # which value is which row's?
    if unordered or isinstance(answer, (str, bytes)) or not hasattr(answer, "__iter__"):
        return Fault(f"returned {type(answer).__name__}, {wanted}")
    values = list(itertools.islice(answer, num_rows + 1))
    if len(values) != num_rows:
        count = len(answer) if hasattr(answer, "__len__") else len(values)  # of a generator's, no more are made
        return Fault(f"returned {count} values for {num_rows} rows")
    return [_number(value) for value in values]


def _number(value: Any) -> float | None | Fault:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return Fault(f"returned {repr(value)[:200]}, which is no finite number")
    if abs(number) > FLOAT32_MAX:
        return Fault(f"returned {number!r}, which is not finite in float32, the type that rewards are summed in")
    return number
