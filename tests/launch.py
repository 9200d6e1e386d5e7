"""Start a worker script on several real processes, the way a user would, and read what its ranks wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"


BINARIES = Path(sys.executable).parent


def launch_command(ranks: int, *, deepspeed: bool) -> list[str]:
    """The launcher and its options, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if deepspeed:
        return [str(BINARIES / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port]
    return [str(BINARIES / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port]


def launch_environment() -> dict[str, str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
    return subprocess.run(command, capture_output=True, text=True, env=launch_environment(), timeout=500)


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
