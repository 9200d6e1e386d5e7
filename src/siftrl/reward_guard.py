"""Rewards, guarded: what a faulty reward does is named, and never reaches the training unseen.

A reward (TRL's contract: `reward(completions, **columns) -> list[float | None]`) is at fault when it raises (sys.exit
and KeyboardInterrupt included), takes longer than its time limit, returns another number of values than there are rows,
or values in no order, or one that is neither None nor a number that is finite in float32. It gets its own copy of the
completions and columns, without those that are named like an option of its own: the option wins.
"""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from siftrl import plugins
from siftrl.reward_call import (
    FLOAT32_MAX,
    Answer,
    Columns,
    Fault,
    RewardError,
    bound_options,
    call_async_reward,
    call_reward,
    is_async,
    own_copy,
    rows_of,
    too_slow,
)
from siftrl.reward_workers import NoWorker, RewardPool
from siftrl.row_shapes import shorten, text_of

if TYPE_CHECKING:
    from siftrl.recipe import RewardConfig

__all__ = ["RewardError", "check_finite", "close_rewards", "guard", "load_rewards"]
logger = logging.getLogger(__name__)
Values = list[float | None]
ROWS_IN_LIMIT = 64
"""Rows that a reward judges within its `time_limit`; more rows get more time."""
MOST_WORKERS = 8
"""Of one reward on one rank, where the recipe does not say."""


def time_limit_of(time_limit: float | None, num_rows: int) -> float | None:
    """Seconds that a call with `num_rows` rows may take."""
    return None if time_limit is None else time_limit * max(1.0, num_rows / ROWS_IN_LIMIT)


def load_rewards(configs: Sequence[RewardConfig]) -> tuple[list[Callable[..., Any]], list[float]]:
    """The guarded rewards of a recipe, and their weights. `close_rewards` ends their worker processes."""
    pools = [
        RewardPool(
            config.name,
            config.options,
            most=config.workers or _default_workers(),
            time_limit=config.time_limit,
            stop=config.on_error == "stop",
        )
        if config.workers != 0
        else None
        for config in configs
    ]  # all are started before the first is waited for
    return [_load(config, pool) for config, pool in zip(configs, pools, strict=True)], [c.weight for c in configs]


def _load(config: RewardConfig, pool: RewardPool | None) -> GuardedReward | AsyncGuardedReward:
    reason = "`workers` is 0"
    if pool is not None:
        try:
            facts = pool.facts()
        except NoWorker as no_worker:
            reason = str(no_worker)
        else:
            if (config.workers or 1) > 1 and pool.most == 1:
                problem = "does not declare `row_by_row = True` (or has a state, or is async)"
                logger.warning("reward %r: has one worker, not %d: it %s", config.name, config.workers, problem)
            kind = AsyncGuardedReward if facts.is_async else GuardedReward
            return kind(pool, config.name, config.time_limit, config.on_error, facts.options)
    reward = plugins.load("reward", config.name, config.options)
    return _here(reward, config.name, config.time_limit, config.on_error, reason, usual=pool is None)


def _default_workers() -> int:
    """This rank's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"  # torchrun's name; DeepSpeed's
    return min(MOST_WORKERS, max(1, cores // int(ranks)))


def reward_states(rewards: Iterable[Any]) -> dict[str, Any]:
    """The states of those guarded rewards that have one, by place and name: plain containers, for a checkpoint."""
    states = {key: reward.place.state() for key, reward in _guarded(rewards).items()}
    return {key: state for key, state in states.items() if state is not None}


def load_reward_states(rewards: Iterable[Any], states: dict[str, Any]) -> None:
    """Go on from `reward_states`' answer; other rewards than those that made it begin at their beginning."""
    for key, reward in _guarded(rewards).items():
        if key in states:
            reward.place.go_on_from(states[key])


def _guarded(rewards: Iterable[Any]) -> dict[str, _Guarded]:
    return {f"{i} {reward.__name__}": reward for i, reward in enumerate(rewards) if isinstance(reward, _Guarded)}


def close_rewards(rewards: Iterable[Any]) -> None:
    """End the worker processes of those rewards that have some."""
    for reward in _guarded(rewards).values():
        reward.close()


def guard(
    reward: Callable[..., Any],
    name: str,
    *,
    time_limit: float | None = 60.0,
    on_error: Literal["stop", "missing"] = "stop",
) -> GuardedReward | AsyncGuardedReward:
    """A reward with the same signature that checks what `reward` does, in this process; an async reward stays async.

    time_limit: seconds that a call of up to 64 rows may take, and in proportion for more; None: no limit. A call runs
        in a daemon thread, where `signal.alarm` does not work, and which is left behind when it hangs. Code that
        never lets go of the interpreter (a runaway regular expression, a huge power) cannot be left behind: the
        process then ends, with a traceback of the reward, after twice the limit and a second. The rewards of a
        recipe have processes of their own, which are killed (`load_rewards`).
    on_error: "stop" raises RewardError; "missing" scores the rows at fault as None, counts them in `.missing`, and
        logs their share through the trainer's `log_metric`.

    After a fault of the whole call, the reward is called row by row, to tell the rows at fault from the sound ones
    (which get the value that they got alone), until the first one ("stop") or for at most twice the call's limit
    ("missing": rows not reached are missing). So a call waits for at most three times its limit.
    """
    return _here(reward, name, time_limit, on_error, "it is a Python object of a script's", usual=True)


def _here(
    reward: Callable[..., Any], name: str, time_limit: float | None, on_error: str, reason: str, *, usual: bool
) -> GuardedReward | AsyncGuardedReward:
    level = logging.INFO if usual else logging.WARNING
    logger.log(level, "reward %r: runs in the trainer's process: %s", name, reason)
    kind = AsyncGuardedReward if is_async(reward) else GuardedReward
    return kind(_Here(reward), name, time_limit, on_error, bound_options(reward))


class _Here:
    """The place of a reward in the trainer's process."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def state(self) -> Any:
        """What its `state_dict` tells; None for a reward without one, and for a model, whose weights are no state."""
        has_state = hasattr(self.reward, "state_dict") and hasattr(self.reward, "load_state_dict")
        return self.reward.state_dict() if has_state and not isinstance(self.reward, torch.nn.Module) else None

    def go_on_from(self, state: Any) -> None:
        self.reward.load_state_dict(state)

    def run(self, columns: Columns, limit: float | None) -> Answer | Fault:
        return _in_a_thread(lambda: call_reward(self.reward, own_copy(columns), asyncio.run), limit)

    async def run_async(self, columns: Columns, limit: float | None) -> Answer | Fault:
        """In the caller's event loop, which the reward's connections may belong to."""
        call = asyncio.ensure_future(call_async_reward(self.reward, own_copy(columns)))
        try:
            done, _ = await asyncio.wait({call}, timeout=limit)
        finally:
            call.cancel()
        if not done:
            return too_slow(limit)
        return Fault("raised CancelledError") if call.cancelled() else call.result()


_Call = tuple[Columns, float | None]
"""Arguments for the reward, and how many seconds it may take."""


class _Guarded:
    """The decisions, without the calls: `_steps` yields a call to make and is sent its outcome."""

    def __init__(
        self,
        place: _Here | RewardPool,
        name: str,
        time_limit: float | None,
        on_error: str,
        options: frozenset[str] | set[str],
    ) -> None:
        """options: those that are bound to the reward, and win over data columns of the same name."""
        self.place, self.__name__, self.time_limit, self.on_error, self.options = (
            place,
            name,
            time_limit,
            on_error,
            options,
        )
        self.missing = 0
        self._hidden: set[str] = set()

    def close(self) -> None:
        """End the worker processes, if there are some."""
        if isinstance(self.place, RewardPool):
            self.place.close()

    def _steps(self, columns: Columns) -> Generator[_Call, Answer | Fault, Values]:
        columns = self._without_hidden(columns)
        num_rows = len(columns["completions"])
        outcome = yield columns, time_limit_of(self.time_limit, num_rows)
        if isinstance(outcome, Fault):
            values = yield from self._row_by_row(columns, num_rows, outcome)
        else:
            values = outcome.values
            self._replay(columns, outcome)
        faults = {i: value for i, value in enumerate(values) if isinstance(value, Fault)}
        if faults and self.on_error == "stop":
            row, fault = next(iter(faults.items()))
            raise RewardError(self._message(columns, row, fault)) from _cause(fault)
        self.missing += len(faults)
        if self.on_error == "missing" and "log_metric" in columns:  # always, so that all ranks log the same names
            columns["log_metric"](f"rewards/{self.__name__}/missing", len(faults) / num_rows)
        return [None if isinstance(value, Fault) else value for value in values]

    def _without_hidden(self, columns: Columns) -> Columns:
        hidden = columns.keys() & self.options
        if hidden - self._hidden:
            self._hidden |= hidden
            names = ", ".join(map(repr, sorted(hidden)))
            problem = "is not given the data's column %s: it has an option of that name, which counts"
            logger.warning(f"reward %r: {problem}", self.__name__, names)
        return {name: value for name, value in columns.items() if name not in hidden}

    def _replay(self, columns: Columns, answer: Answer) -> None:
        """Tell the trainer what the reward logged; a reward that was given no log function has logged nothing."""
        for name, figure in answer.metrics:
            columns["log_metric"](name, figure)
        for column, cells in answer.extras:
            columns["log_extra"](column, cells)

    def _row_by_row(
        self, columns: Columns, num_rows: int, whole: Fault
    ) -> Generator[_Call, Answer | Fault, list[float | None | Fault]]:
        """After a fault of the whole call: the value or the fault of each row alone. What it logs is not told."""
        values: list[float | None | Fault] = [Fault(f"not reached, after the whole call: {whole.cause}")] * num_rows
        limit = time_limit_of(self.time_limit, num_rows)
        end = math.inf if limit is None else time.monotonic() + 2 * limit
        for row in range(num_rows):
            left = end - time.monotonic()
            if left <= 0:
                break
            outcome = yield (
                rows_of(columns, [row], num_rows),
                None if self.time_limit is None else min(self.time_limit, left),
            )
            values[row] = outcome if isinstance(outcome, Fault) else outcome.values[0]
            if self.on_error == "stop" and isinstance(values[row], Fault):
                return values[: row + 1]
        if self.on_error == "stop":  # a fault of the whole call that no row shows on its own
            problem = f"reward {self.__name__!r}: {whole.cause}, for {num_rows} rows at once; no row alone is at fault"
            raise RewardError(problem) from _cause(whole)
        return values

    def _message(self, columns: Columns, row: int, fault: Fault) -> str:
        texts = {key[:-1]: columns[key][row] for key in ("prompts", "completions") if key in columns}
        shown = "; ".join(f"{key}: {shorten(text_of(text))!r}" for key, text in texts.items())
        return f"reward {self.__name__!r}: row {row}: {fault.cause}; {shown}"


class GuardedReward(_Guarded):
    def __call__(self, completions: list[Any], **columns: Any) -> Values:
        """completions, columns: one item a row; the values come back in the same order."""
        steps = self._steps({"completions": completions, **columns})
        outcome: Any = None
        while True:
            try:
                arguments, limit = steps.send(outcome)
            except StopIteration as stop:
                return stop.value
            outcome = self.place.run(arguments, limit)


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
            outcome = await self.place.run_async(arguments, limit)


class _Traceback(Exception):
    """The traceback of a reward's error, as text."""


def _cause(fault: Fault) -> _Traceback | None:
    return _Traceback("\n" + fault.trace) if fault.trace else None


def _in_a_thread(call: Callable[[], Answer | Fault], limit: float | None) -> Answer | Fault:
    """The call's outcome. In a thread of its own, so that an interrupt in this one is the user's, not the reward's."""
    outcome: list[Answer | Fault] = []
    context, grad = contextvars.copy_context(), torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:  # gradient mode and current device belong to a thread
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(grad):
            outcome.append(context.run(call))

    thread = threading.Thread(target=work, daemon=True)
    if limit is not None:
        faulthandler.dump_traceback_later(2 * limit + 1, exit=True, file=2)  # type: ignore[arg-type]  # works without the GIL
    try:
        thread.start()
        thread.join(limit)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return outcome[0] if outcome else too_slow(limit)


def check_finite(per_reward: Tensor, weights: Tensor, names: Sequence[str]) -> None:
    """Raise RewardError where a reward, or its share in the weighted sum, is beyond float32.

    per_reward: float [m, rewards], NaN where missing. weights: float [rewards].
    """
    shares = per_reward.double() * weights.double()
    too_large = per_reward.isinf() | (shares.nan_to_num(0.0).abs() > FLOAT32_MAX)
    if too_large.any():
        row, reward = too_large.nonzero()[0].tolist()
        value, weight = per_reward[row, reward].item(), weights[reward].item()
        raise RewardError(
            f"reward {names[reward]!r}: row {row}: {value:g} x its weight {weight:g} is not finite in float32, the "
            "type that rewards are summed in"
        )
    if (shares.nansum(1).abs() > FLOAT32_MAX).any():
        raise RewardError(f"the weighted sum of the rewards {', '.join(names)} is not finite in float32")
