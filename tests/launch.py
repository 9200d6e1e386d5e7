"""Start real processes the way a user would, on several ranks too, and read what they wrote.

Every command runs in the environment that the tests were started in, ends within its time or is shown where it hangs,
and leaves no process behind: one that spins on would slow all later tests down to their own limits.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ENVIRONMENT

WORKERS = Path(__file__).parent / "workers"


BINARIES = Path(sys.executable).parent


def run_command(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 240,
    grace: float = 20,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Fails the test if it takes more than `timeout` seconds, or if one of its processes is
    there `grace` seconds after it."""
    mark = uuid.uuid4().hex
    env = (env or ENVIRONMENT) | {"SIFTRL_TEST_COMMAND": mark, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(mark, signal.SIGABRT)  # each process writes its threads' stacks to stderr
        stdout, stderr = process.communicate()
        pytest.fail(f"not at its end after {timeout} s: {' '.join(command)}\n{stdout[-3000:]}\n{stderr[-9000:]}")
    finally:
        left = end(mark, signal.SIGKILL, grace=grace)
        if "--master_port" in command:  # DeepSpeed leaves 66 MiB a rank
            port = command[command.index("--master_port") + 1]
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                buffer.unlink(missing_ok=True)
    assert not left, f"outlived {' '.join(command)}: {left}"
    return subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)


def end(mark: str, how: signal.Signals, grace: float = 0) -> list[str]:
    """Signal the processes of a command that do not end by themselves within `grace` seconds; what they ran."""
    _, alive = psutil.wait_procs(_marked(mark), timeout=grace)
    commands = []
    for process in alive:
        try:
            commands.append(" ".join(process.cmdline())[:300])
            process.send_signal(how)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=20)
    return commands


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SIFTRL_TEST_COMMAND") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def launch_command(ranks: int, *, deepspeed: bool) -> list[str]:
    """The launcher and its options, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if deepspeed:
        return [str(BINARIES / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port]
    return [str(BINARIES / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port]


def launch_environment() -> dict[str, str]:
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{BINARIES}:{environment['PATH']}"  # DeepSpeed builds its ops with ninja
    return environment


def run_ranks(worker: str, ranks: int, out: Path, *args: str, deepspeed: bool = False) -> list[dict[str, Any]]:
    """Run tests/workers/<worker>.py on `ranks` processes: rank r's report is out/rank<r>.json."""
    done = start_ranks(worker, ranks, out, *args, deepspeed=deepspeed)
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def start_ranks(
    worker: str, ranks: int, out: Path, *args: str, deepspeed: bool = False
) -> subprocess.CompletedProcess[str]:
    """The same, whether it ends well or not."""
    out.mkdir(parents=True, exist_ok=True)
    command = [*launch_command(ranks, deepspeed=deepspeed), str(WORKERS / f"{worker}.py"), "--out", str(out), *args]
    return run_command(command, env=launch_environment())


def kept_prompts(out: Path) -> list[list[int]]:
    """For each step, the data-set rows that the audit log says were trained on, in order of their number."""
    lines = [json.loads(line) for line in (out / "selection.jsonl").read_text().splitlines()]
    return [sorted(c["id"] for c in line["candidates"] if c["chosen"]) for line in lines if "candidates" in line]


def kept_completions(out: Path) -> list[list[tuple[int, float, int]]]:
    """For each step, the prompt, advantage and tokens of each completion that was trained on, in order of these."""
    lines = [json.loads(line) for line in (out / "selection.jsonl").read_text().splitlines()]
    return [
        sorted((c["id"], round(c["advantage"], 3), c["tokens"]) for c in line["completions"] if c["chosen"])
        for line in lines
        if "completions" in line
    ]
