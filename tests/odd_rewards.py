"""Rewards that misbehave, for tests: what a completion says is what the reward does. Workers import this file."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar


def obey(text: str) -> Any:
    """The number that a text holds, or what it tells to do."""
    match text.split():
        case ["hang"]:
            time.sleep(600)
        case ["sleep", number]:
            time.sleep(0.05)
            return float(number)
        case ["spin"]:  # never lets go of the interpreter
            re.match("(a+)+$", "a" * 60 + "b")
        case ["child", file, session]:
            child = subprocess.Popen(["sleep", "600"], start_new_session=session == "own")
            with open(file, "a") as out:
                out.write(f"{child.pid}\n")
            time.sleep(600)
        case ["raise"]:
            raise KeyError("no such word")
        case ["exit"]:
            sys.exit(0)
        case ["interrupt"]:
            raise KeyboardInterrupt
        case ["die"]:
            os._exit(0)
        case ["crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["none"]:
            return None
    return float(text)


def whole(completions: list[str], *, factor: float = 1.0, **columns: Any) -> list[float]:
    return [factor * obey(text) for text in completions]


@dataclass
class RowByRow:
    row_by_row: ClassVar[bool] = True

    def __call__(self, completions: list[str], **columns: Any) -> list[Any]:
        if "log_metric" in columns:
            columns["log_metric"]("length", len(completions[0]))
            columns["log_extra"]("text", completions)
        return [obey(text) for text in completions]


def about(completions: list[str], log_extra: Any = None, trainer_state: Any = None, **columns: Any) -> Iterator[float]:
    """Logs what it sees of its process, and changes all that it is given."""
    facts = {
        "torch": "torch" in sys.modules,
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "environment": {name: os.environ.get(name) for name in ("RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")},
        "group": os.getpgrp() == os.getpid(),
        "main_thread": threading.current_thread() is threading.main_thread(),
        "pid": os.getpid(),
        "step": trainer_state.global_step if trainer_state else None,
    }
    log_extra("facts", [json.dumps(facts)] * len(completions))
    completions[:] = ["changed"] * len(completions)
    for value in columns.values():
        if isinstance(value, list):
            value[0].append("changed") if isinstance(value[0], list) else value.clear()
    return (0.5 for _ in completions)


async def awaited(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [obey(text) for text in completions]


@dataclass
class Counting:
    """The number of rows that it has judged so far."""

    def __post_init__(self) -> None:
        self.seen = 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        for text in completions:
            self.seen += 1
            obey(text)
        return [float(self.seen)] * len(completions)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def reads_environments(completions: list[str], environments: Any = None, **columns: Any) -> list[float]:
    return [float(os.getpid())] * len(completions)
