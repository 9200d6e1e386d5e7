"""What a worker process runs: it builds one reward, and judges what `siftrl.reward_workers` sends.

This module must stay free of torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import inspect
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from siftrl.reward_call import Answer, Columns, Fault, bound_options, call_reward, is_async, raised
from siftrl.reward_workers import Facts, Reply

_F_SETSIG = 10
"""Linux's fcntl: which signal tells that a pipe has changed."""


def serve(connection: str, lifeline: str) -> None:
    """Judge until the trainer closes its end. connection, lifeline: numbers of open files."""
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the trainer's; a reward's own processes keep theirs
    for number in (connection, lifeline):
        os.set_inheritable(int(number), False)
    _end_with_the_trainer(int(lifeline))
    gone = contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError)  # the trainer's end is closed
    with gone, Connection(int(connection)) as trainer, asyncio.Runner() as runner:
        name, options, state = pickle.loads(trainer.recv_bytes())
        judge = _Judge(runner)
        trainer.send_bytes(pickle.dumps(judge.build(name, options, state)))
        common: Columns | Fault = {}
        while True:
            num_rows, sent, sent_once = pickle.loads(trainer.recv_bytes())
            columns = _read(sent)
            common = _read(sent_once) if sent_once is not None else common
            for call in _calls(num_rows, columns, common):
                trainer.send_bytes(judge.reply(call))


def _calls(num_rows: int | None, columns: Columns | Fault, common: Columns | Fault) -> Iterator[Columns | Fault]:
    """The arguments of each call: one a row with what all rows have in common, or (None) one for all of them."""
    fault = next((part for part in (columns, common) if isinstance(part, Fault)), None)
    for row in range(num_rows or 1):
        if fault or num_rows is None:
            yield fault or columns
        else:
            yield {name: [cells[row]] for name, cells in columns.items()} | common  # type: ignore[union-attr, operator]


def _read(sent: bytes) -> Columns | Fault:
    try:
        return pickle.loads(sent)
    except Exception as error:
        return Fault(f"cannot be sent its rows ({type(error).__name__}: {error}); write `workers: 0`")


def _end_with_the_trainer(lifeline: int) -> None:
    """Kill this process and all of its group when no process holds the other end of the pipe any more.

    On Linux the kernel does it, whatever this process is doing. Elsewhere a thread does it, when it gets to run.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        poll = select.poll()
        poll.register(lifeline, 0)
        if poll.poll(0):  # it was gone before
            os.killpg(0, signal.SIGKILL)
        return

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class _Judge:
    """The reward, and its state after the last answer."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.state: bytes | None = None
        self.looked = False  # for a model, after the first answer

    def build(self, name: str, options: dict[str, Any], state: bytes | None) -> Facts | Fault:
        try:
            from siftrl import plugins

            self.reward = plugins.load("reward", name, options)
            inner = self.reward
            has_state = hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict")
            if has_state:
                if state is not None:
                    inner.load_state_dict(pickle.loads(state))
                self.state = pickle.dumps(inner.state_dict())
            stays = "it reads `environments`" if "environments" in inspect.signature(inner).parameters else ""
            return Facts(
                row_by_row=getattr(inner, "row_by_row", False) is True,
                is_async=is_async(inner),
                has_state=has_state,
                options=frozenset(bound_options(inner)),
                stays=stays or ("it holds a model" if _holds_a_model() else ""),
            )
        except BaseException as error:
            return raised(error)

    def reply(self, columns: Columns | Fault) -> bytes:
        """The pickled Reply to a call, which may be of one row."""
        answer: Answer | Fault = columns if isinstance(columns, Fault) else self._answer(columns)
        warning = ""
        if not self.looked:
            self.looked = True
            if _holds_a_model():
                warning = "it loaded a model in its worker process, on the CPU; write `workers: 0` if it needs a GPU"
        try:
            return pickle.dumps(Reply(answer, self.state, warning))
        except Exception as error:
            return pickle.dumps(Reply(Fault(f"logged what cannot be sent: {error}; write `workers: 0`"), self.state))

    def _answer(self, columns: Columns) -> Answer | Fault:
        answer = call_reward(self.reward, columns, self.runner.run)
        answer = self._with_state(answer) if self.state is not None else answer
        if isinstance(answer, Fault) and any(word in answer.cause for word in ("CUDA", "cuda", "HIP")):
            return Fault(f"{answer.cause} (a worker process sees no GPU: write `workers: 0`)", answer.trace)
        return answer

    def _with_state(self, answer: Answer | Fault) -> Answer | Fault:
        """Keep the state after an answer; a call at fault leaves no trace in it."""
        assert self.state is not None
        try:
            if isinstance(answer, Fault):
                self.reward.load_state_dict(pickle.loads(self.state))
            else:
                self.state = pickle.dumps(self.reward.state_dict())
        except BaseException as error:
            return raised(error)
        return answer


def _holds_a_model() -> bool:
    """Whether a torch module with weights is alive in this process (libraries keep some that have none)."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    modules = [item for item in gc.get_objects() if issubclass(type(item), torch.nn.Module)]
    return any(next(module.parameters(), None) is not None for module in modules)
