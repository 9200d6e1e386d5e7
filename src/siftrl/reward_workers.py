"""Rewards in processes of their own, so that one that hangs can be killed, with everything that it started.

A worker is a fresh Python process, never a fork: it builds one reward from its name and options, and judges what it is
sent. It imports neither torch nor the script that trains, sees no GPU and nothing of the launcher's ranks, and takes
one thread. It heads a process group that is killed with it, and that the kernel kills when the trainer is gone.
This module must stay free of torch: workers import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from multiprocessing.connection import wait as first_of
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from siftrl.reward_call import Answer, Columns, Fault, RewardError, joined, too_slow

logger = logging.getLogger(__name__)
CHUNK = 16
"""Rows that a worker is given at once. It tells of each one that it has judged."""
START_SECONDS = 600.0
"""A worker that is not built by then never will be."""
PATIENCE_SECONDS = 1.0
"""A call that takes longer gets another worker: most rewards never need a second one."""
GOODBYE_SECONDS = 2.0
"""For a worker at rest to write its files and leave by itself, at the end."""
_LAUNCHERS = re.compile(r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
"""What launchers write into the environment: a library in a worker would wait for the other ranks."""
_SET = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "") | dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)


class NoWorker(Exception):
    """The reward cannot be judged in a worker; the message says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker tells of the reward that it has built."""

    row_by_row: bool
    is_async: bool
    has_state: bool
    options: frozenset[str]
    """Bound to a reward function: they win over data columns of the same name."""
    stays: str = ""
    """Why it must be judged in the trainer's process; "": it need not."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker sends for each row, or for each call of a reward that judges calls."""

    answer: Answer | Fault
    state: bytes | None
    """The reward's state after it, pickled; None: it has none."""
    warning: str = ""


class Worker:
    """One process, and what it is doing."""

    def __init__(self, name: str, options: dict[str, Any], state: bytes | None) -> None:
        self.rows: deque[int] = deque()
        """The rows that it was given and has not told of; the first one is under way."""
        self.started = self.since = time.monotonic()
        """When it began with what it is doing."""
        self.common: bytes | None = None
        """What it was sent last that is the same for all rows of a call."""
        self.facts: Facts | None = None
        """Those of its reward, once it is built."""
        self._owner = os.getpid()
        self.connection, theirs = Pipe()
        lifeline, ours = os.pipe()  # never written to: its other end tells when this process is gone
        self._lifeline: int | None = ours
        path = [str(entry) for entry in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from siftrl.reward_process import serve; serve(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code, str(theirs.fileno()), str(lifeline)],
            env={name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)} | _SET,
            pass_fds=(theirs.fileno(), lifeline),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        os.close(lifeline)
        _ALIVE.add(self)
        self.send((name, options, state))

    def send(self, message: Any) -> bool:
        """Whether it went out: not to a process that has ended."""
        self.since = time.monotonic()
        try:
            self.connection.send_bytes(pickle.dumps(message))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self, limit: float | None = None) -> Reply | Facts | Fault | None:
        """Its next message, a Fault where its process ended instead; None after `limit` seconds without either."""
        try:
            if not self.connection.poll(limit):
                return None
            message = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            try:
                code = self.process.wait(GOODBYE_SECONDS)
            except subprocess.TimeoutExpired:
                return Fault("closed its process's connection to the trainer")
            return Fault(f"ended its process ({f'exit code {code}' if code >= 0 else signal.Signals(-code).name})")
        self.since = time.monotonic()
        if isinstance(message, Facts):
            self.facts = message
        return message

    def kill(self) -> None:
        """End it now, with all processes that it started."""
        if os.getpid() != self._owner:
            return
        children = _descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in children:  # those that left the group
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()
        self.let_go()

    def let_go(self) -> None:
        """Close this process's ends: where no other process holds them, the kernel ends the worker."""
        _ALIVE.discard(self)
        self.connection.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
        self._lifeline = None


def _descendants(pid: int) -> list[int]:
    """Linux: all processes below a process."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children = [int(child) for child in file.read_text().split()]
            found += children + [below for child in children for below in _descendants(child)]
    return found


_ALIVE: weakref.WeakSet[Worker] = weakref.WeakSet()


def _let_go_of_all() -> None:
    for worker in list(_ALIVE):
        worker.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)  # or the workers would live as long as the trainer's forks


class RewardPool:
    """The workers of one reward.

    A reward that judges row by row is given rows, by up to `most` workers. Every other reward has one worker, which is
    given whole calls. The state of a reward with `state_dict` comes back with each answer; a new worker goes on from
    there.
    """

    def __init__(self, name: str, options: dict[str, Any], *, most: int, time_limit: float | None, stop: bool) -> None:
        """Start the first worker; `facts` waits for it. time_limit: seconds for one row. stop: end at a fault."""
        self.name, self.options, self.most, self.time_limit, self.stop = name, options, most, time_limit, stop
        self._state: bytes | None = None
        self._pending: deque[int] = deque()
        self._start_seconds = 0.0
        self._workers = [Worker(name, options, None)]
        self.close = weakref.finalize(self, _end, self._workers)
        """End the workers; at the latest when the pool or this process ends."""

    def facts(self) -> Facts:
        """What the first worker tells. Raises NoWorker, and closes, where the reward cannot be judged in one."""
        told = self._workers[0].receive(START_SECONDS)
        if not isinstance(told, Facts) or told.stays:
            self.close()
            cause = told.cause if isinstance(told, Fault) else f"took longer than {START_SECONDS:g} s"
            raise NoWorker(told.stays if isinstance(told, Facts) else f"building it there {cause}")
        self._by_row = told.row_by_row and not told.is_async
        if not self._by_row or told.has_state:
            self.most = 1
        return told

    def state(self) -> Any:
        """The reward's state after the last answer, for a checkpoint; None: it has none, or has not judged yet."""
        return None if self._state is None else pickle.loads(self._state)

    def go_on_from(self, state: Any) -> None:
        self._state = pickle.dumps(state)
        self._drop(*self._workers)  # the next one begins there

    def run(self, columns: Columns, limit: float | None) -> Answer | Fault:
        """The answer to a call that may take `limit` seconds; None: any time. Rows have 2 `time_limit` more."""
        columns = _for_a_worker(columns)
        self._drop(*(worker for worker in self._workers if worker.process.poll() is not None))
        try:
            return self._rows(columns, limit) if self._by_row else self._call(columns, limit)
        except BaseException:  # an interrupt: what is under way would pass for the answer to the next call
            self._drop(*self._workers)
            raise

    async def run_async(self, columns: Columns, limit: float | None) -> Answer | Fault:
        """The same beside an event loop: async rewards wait for their answers at the same time."""
        outcome: Future[Answer | Fault] = Future()

        def work() -> None:
            try:
                outcome.set_result(self.run(columns, limit))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # a pool's threads would keep the interpreter from ending
        return await asyncio.wrap_future(outcome)

    def _call(self, columns: Columns, limit: float | None) -> Answer | Fault:
        if not self._workers:
            self._start()
        (worker,) = self._workers
        if worker.facts is None:
            self._built(worker, worker.receive(START_SECONDS))
        worker.send((None, self._pickled(columns), None))
        return self._answer(worker, worker.receive(limit), limit)

    def _rows(self, columns: Columns, limit: float | None) -> Answer:
        num_rows = len(columns["completions"])
        cells = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == num_rows}
        common = self._pickled({name: value for name, value in columns.items() if name not in cells})
        answers: list[Answer | Fault | None] = [None] * num_rows
        self._pending = deque(range(num_rows))
        budget = math.inf if limit is None or self.time_limit is None else limit + 2 * self.time_limit
        self._start_seconds = 0.0
        start = time.monotonic()
        stopped = False
        while not stopped and (self._pending or any(worker.rows for worker in self._workers)):
            self._deal(cells, common, late=time.monotonic() - start > PATIENCE_SECONDS)
            left = start + budget + self._starting() - time.monotonic()
            found = {row: answer for worker in self._speaking(left) for row, answer in self._heard(worker)}
            found |= self._late_rows()
            for row, answer in found.items():
                answers[row] = answer
            told = [value for answer in found.values() for value in getattr(answer, "values", [answer])]
            stopped = self.stop and any(isinstance(value, Fault) for value in told)
            if start + budget + self._starting() < time.monotonic():
                unreached = Fault(f"was not reached: {num_rows} rows took longer than {budget:g} s")
                answers = [answer or unreached for answer in answers]
                break
        self._drop(*(worker for worker in self._workers if worker.rows))
        return joined([answer or Answer([None], [], []) for answer in answers])

    def _deal(self, cells: Columns, common: bytes, *, late: bool) -> None:
        """Give rows to the workers at rest, and start another one where none is left or the call takes long.

        common: what is the same for all rows, such as the trainer's state, which may be large: sent once a call.
        """
        for worker in list(self._workers):
            if worker.facts is None or worker.rows or not self._pending:
                continue
            rows = [self._pending.popleft() for _ in range(min(CHUNK, len(self._pending)))]
            worker.rows.extend(rows)
            mine = self._pickled({name: [values[row] for row in rows] for name, values in cells.items()})
            if not worker.send((len(rows), mine, None if worker.common is common else common)):
                self._drop(worker)
            worker.common = common
        starting = any(worker.facts is None for worker in self._workers)
        if self._pending and not starting and (not self._workers or (late and len(self._workers) < self.most)):
            self._start()

    def _starting(self) -> float:
        """Seconds of this call that went into starting workers: they are not the reward's."""
        now = time.monotonic()
        return self._start_seconds + sum(now - worker.since for worker in self._workers if worker.facts is None)

    def _speaking(self, left: float) -> list[Worker]:
        """The workers that have something to tell, waited for until the next deadline; `left` seconds at most."""
        listening = {worker.connection: worker for worker in self._workers if worker.rows or worker.facts is None}
        left = min(left, PATIENCE_SECONDS)
        if self.time_limit is not None:
            late = [worker.since + self.time_limit for worker in listening.values() if worker.rows]
            left = min(left, *(moment - time.monotonic() for moment in late)) if late else left
        ready = first_of(list(listening), max(0.0, left))
        return [listening[connection] for connection in ready]  # type: ignore[index]

    def _heard(self, worker: Worker) -> Iterator[tuple[int, Answer | Fault]]:
        """The rows that a worker tells of, with their answers."""
        while worker in self._workers and worker.connection.poll():
            told = worker.receive()
            if worker.facts is None or isinstance(told, Facts):
                self._built(worker, told)
                self._start_seconds += worker.since - worker.started
            else:
                yield worker.rows.popleft(), self._answer(worker, told, self.time_limit)

    def _late_rows(self) -> dict[int, Answer | Fault]:
        """The rows that are beyond their time; their workers are killed."""
        late: dict[int, Answer | Fault] = {}
        for worker in list(self._workers):
            seconds = time.monotonic() - worker.since
            if worker.facts is None and seconds > START_SECONDS:
                self._built(worker, None)
            if worker.rows and self.time_limit is not None and seconds > self.time_limit:
                row = worker.rows.popleft()
                late[row] = self._answer(worker, None, self.time_limit)
        return late

    def _start(self) -> None:
        self._workers.append(Worker(self.name, self.options, self._state))

    def _built(self, worker: Worker, told: Reply | Facts | Fault | None) -> None:
        if not isinstance(told, Facts):
            cause = told.cause if isinstance(told, Fault) else f"took longer than {START_SECONDS:g} s"
            raise RewardError(f"reward {self.name!r}: its worker process could not be started again: it {cause}")

    def _answer(self, worker: Worker, told: Reply | Facts | Fault | None, limit: float | None) -> Answer | Fault:
        """What a worker told of a row or a call; None: nothing within `limit` seconds."""
        if isinstance(told, Reply):
            self._state = told.state
            if told.warning:
                logger.warning("reward %r: %s", self.name, told.warning)
            return told.answer
        self._drop(worker)
        return told if isinstance(told, Fault) else too_slow(limit)

    def _drop(self, *workers: Worker) -> None:
        """Kill workers; the rows that they have not told of are to be judged by others."""
        for worker in list(workers):
            self._pending.extendleft(reversed(worker.rows))
            self._workers.remove(worker)
            worker.kill()

    def _pickled(self, columns: Columns) -> bytes:
        try:
            return pickle.dumps(columns)
        except Exception as error:
            bad = next((name for name, value in columns.items() if not _can_be_sent(value)), "?")
            problem = f"column {bad!r} cannot be sent to a worker process ({type(error).__name__}: {error})"
            raise RewardError(f"reward {self.name!r}: {problem}; write `workers: 0` for this reward") from None


def _end(workers: list[Worker]) -> None:
    """Let workers at rest leave by themselves, and kill the others."""
    for worker in workers:
        worker.connection.close()
    until = time.monotonic() + GOODBYE_SECONDS
    for worker in workers:
        if worker.facts is not None and not worker.rows:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, until - time.monotonic()))
        worker.kill()
    workers.clear()


def _for_a_worker(columns: Columns) -> Columns:
    """Without what cannot leave this process; the trainer's state as a plain copy, which needs no library to read."""
    sent = {name: value for name, value in columns.items() if name != "environments"}
    sent |= {name: None for name in ("log_metric", "log_extra") if name in columns}  # the worker puts in its own
    if "trainer_state" in sent:
        fields = getattr(sent["trainer_state"], "__dict__", {})
        plain = (str, int, float, list, dict, type(None))
        sent["trainer_state"] = SimpleNamespace(
            **{
                name: value
                for name, value in fields.items()
                if isinstance(value, plain) and name != "stateful_callbacks"
            }
        )
    return sent


def _can_be_sent(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
