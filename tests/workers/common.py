"""What the workers share: their command line, DeepSpeed's settings for CPUs, the report at the end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from siftrl import distributed
from siftrl.deepspeed_config import deepspeed_config
from siftrl.recipe import DistributionConfig


def parser(*, steps: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--model", required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--deepspeed", default=None)
    made.add_argument("--micro", type=int, required=True)
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--checkpoint-at", type=int, default=0)
    made.add_argument("--resume", action="store_true")
    made.add_argument("--local_rank", type=int, default=-1)
    return made


def open_group(deepspeed: str | None) -> dict[str, Any] | None:
    """Join the launcher's processes; DeepSpeed's settings, None without it."""
    distributed.open_group(deepspeed=deepspeed is not None)
    return deepspeed_config(SimpleNamespace(distribution=DistributionConfig(deepspeed=deepspeed)), cpu=True)


def finish(out: Path, trainer: Any, report: dict[str, Any]) -> None:
    """Write this rank's report, the losses included, and leave together."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = {"rank": distributed.rank(), "world": distributed.world_size(), "losses": losses, **report}
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
