"""Rewards from a recipe, guarded: what a faulty reward does is named, and never reaches the training unseen.

A reward (TRL's contract: `reward(completions, **columns) -> list[float | None]`) is at fault when it raises, takes
longer than its time limit, returns another number of values than there are rows, or returns something that is
neither None nor a finite number.
"""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from siftrl import plugins
from siftrl.row_shapes import shorten, text_of

if TYPE_CHECKING:
    from siftrl.recipe import RewardConfig

Values = list[float | None]


class RewardError(RuntimeError):
    """A reward is at fault; the message names the reward, the row and its text."""


@dataclass(frozen=True, slots=True)
class _Fault:
    cause: str
    error: BaseException | None = None


_Call = tuple[dict[str, Any], float | None]
"""Arguments for the reward, and how many seconds it may take."""


def load_rewards(configs: Sequence[RewardConfig]) -> tuple[list[Callable[..., Any]], list[float]]:
    """The guarded rewards of a recipe, and their weights."""
    rewards: list[Callable[..., Any]] = [
        guard(
            plugins.load("reward", config.name, config.options),
            config.name,
            time_limit=config.time_limit,
            on_error=config.on_error,
        )
        for config in configs
    ]
    return rewards, [config.weight for config in configs]


def guard(
    reward: Callable[..., Any],
    name: str,
    *,
    time_limit: float | None = 60.0,
    on_error: Literal["stop", "missing"] = "stop",
) -> GuardedReward | AsyncGuardedReward:
    """A reward with the same signature that checks what `reward` does; an async reward stays async.

    time_limit: seconds that one call may take; None: no limit, and the call runs in the calling thread. With a limit
        it runs in a daemon thread, where `signal.alarm` does not work, and which is left behind when it hangs. Code
        that never lets go of the interpreter (a runaway regular expression, a huge power) cannot be left behind:
        the process then ends, with a traceback of the reward, after twice the limit and a second.
    on_error: "stop" raises RewardError; "missing" scores the rows at fault as None, counts them in `.missing`, and
        logs their share through the trainer's `log_metric`.

    After a fault of the whole call, the reward is called row by row, to tell the rows at fault from the sound ones
    (which get the value that they got alone), until the first one ("stop") or for at most twice the limit
    ("missing": rows not reached are missing). So a call waits for at most three times its limit.
    """
    inner = reward
    while isinstance(inner, functools.partial):
        inner = inner.func
    is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)
    return (AsyncGuardedReward if is_async else GuardedReward)(reward, name, time_limit, on_error)


class _Guarded:
    """The decisions, without the calls: `_steps` yields a call to make and is sent its outcome."""

    def __init__(self, reward: Callable[..., Any], name: str, time_limit: float | None, on_error: str) -> None:
        self.reward, self.__name__, self.time_limit, self.on_error = reward, name, time_limit, on_error
        self.missing = 0

    def _steps(self, columns: dict[str, Any]) -> Generator[_Call, Any, Values]:
        num_rows = len(columns["completions"])
        outcome = _checked((yield columns, self.time_limit), num_rows)
        if isinstance(outcome, _Fault):
            values = yield from self._row_by_row(columns, num_rows, outcome)
        else:
            values = outcome
        faults = {i: value for i, value in enumerate(values) if isinstance(value, _Fault)}
        if faults and self.on_error == "stop":
            row, fault = next(iter(faults.items()))
            raise RewardError(self._message(columns, row, fault)) from fault.error
        self.missing += len(faults)
        if self.on_error == "missing" and "log_metric" in columns:  # always, so that all ranks log the same names
            columns["log_metric"](f"rewards/{self.__name__}/missing", len(faults) / num_rows)
        return [None if isinstance(value, _Fault) else value for value in values]

    def _row_by_row(
        self, columns: dict[str, Any], num_rows: int, whole: _Fault
    ) -> Generator[_Call, Any, list[float | None | _Fault]]:
        values: list[float | None | _Fault] = [_Fault(f"not reached, after the whole call: {whole.cause}")] * num_rows
        end = math.inf if self.time_limit is None else time.monotonic() + 2 * self.time_limit
        for row in range(num_rows):
            left = end - time.monotonic()
            if left <= 0:
                break
            limit = None if self.time_limit is None else min(self.time_limit, left)
            outcome = _checked((yield _row(columns, row, num_rows), limit), 1)
            values[row] = outcome if isinstance(outcome, _Fault) else outcome[0]
            if self.on_error == "stop" and isinstance(values[row], _Fault):
                return values[: row + 1]
        if self.on_error == "stop":  # a fault of the whole call that no row shows on its own
            problem = f"reward {self.__name__!r}: {whole.cause}, for {num_rows} rows at once; no row alone is at fault"
            raise RewardError(problem) from whole.error
        return values

    def _message(self, columns: dict[str, Any], row: int, fault: _Fault) -> str:
        texts = {key[:-1]: columns[key][row] for key in ("prompts", "completions") if key in columns}
        shown = "; ".join(f"{key}: {shorten(text_of(text))!r}" for key, text in texts.items())
        return f"reward {self.__name__!r}: row {row}: {fault.cause}; {shown}"


class GuardedReward(_Guarded):
    def __call__(self, completions: list[Any], **columns: Any) -> Values:
        """completions, columns: one item a row; the values come back in the same order."""
        steps = self._steps({"completions": completions, **columns})
        outcome = None
        while True:
            try:
                arguments, limit = steps.send(outcome)
            except StopIteration as stop:
                return stop.value
            outcome = _run(lambda arguments=arguments: self.reward(**arguments), limit)  # type: ignore[misc]


class AsyncGuardedReward(_Guarded):
    async def __call__(self, completions: list[Any], **columns: Any) -> Values:
        """completions, columns: one item a row; the values come back in the same order."""
        steps = self._steps({"completions": completions, **columns})
        outcome: Any = None
        while True:
            try:
                arguments, limit = steps.send(outcome)
            except StopIteration as stop:
                return stop.value
            try:
                outcome = await asyncio.wait_for(self.reward(**arguments), limit)
            except TimeoutError:
                outcome = _too_slow(limit)
            except Exception as error:
                outcome = _raised(error)


def _run(call: Callable[[], Any], limit: float | None) -> Any:
    """The call's result, or a _Fault."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(_raised(error))

    if limit is None:
        work()
        return outcome[0]
    context, grad = contextvars.copy_context(), torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work_as_caller() -> None:  # gradient mode and current device belong to a thread
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(grad):
            context.run(work)

    thread = threading.Thread(target=work_as_caller, daemon=True)
    faulthandler.dump_traceback_later(2 * limit + 1, exit=True, file=2)  # type: ignore[arg-type]  # works without the GIL
    try:
        thread.start()
        thread.join(limit)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return outcome[0] if outcome else _too_slow(limit)


def _row(columns: dict[str, Any], row: int, num_rows: int) -> dict[str, Any]:
    """The arguments of one row alone; it logs nothing, since the whole call may have logged it already."""
    silent: dict[str, Any] = {"log_metric": lambda name, value: None, "log_extra": lambda name, values: None}
    return {
        key: [value[row]] if isinstance(value, (list, tuple)) and len(value) == num_rows else silent.get(key, value)
        for key, value in columns.items()
    }


def _checked(outcome: Any, num_rows: int) -> _Fault | list[float | None | _Fault]:
    """One value or _Fault a row, or the _Fault of the whole call."""
    if isinstance(outcome, _Fault):
        return outcome
    try:
        values = list(outcome)
    except TypeError:
        return _Fault(f"returned {type(outcome).__name__}, not a list of {num_rows} numbers")
    if len(values) != num_rows:
        return _Fault(f"returned {len(values)} values for {num_rows} rows")
    return [_number(value) for value in values]


def _number(value: Any) -> float | None | _Fault:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return number if math.isfinite(number) else _Fault(f"returned {value!r}, which is no finite number")


def _raised(error: Exception) -> _Fault:
    return _Fault(f"raised {type(error).__name__}: {error}", error)


def _too_slow(limit: float | None) -> _Fault:
    assert limit is not None
    return _Fault(f"took longer than {limit:g} s")
