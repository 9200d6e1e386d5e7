"""Run a recipe under a launcher; the arguments are those of `siftrl train`.

deepspeed --num_gpus 8 scripts/train.py recipes/grpo-qwen3-4b-zero2-vllm.yaml [key=value ...] [--resume]
torchrun --nproc-per-node 8 scripts/train.py recipes/...
accelerate launch --num_processes 8 scripts/train.py recipes/...
"""

from __future__ import annotations

import os
import sys

from siftrl.cli import main


def training_arguments(arguments: list[str]) -> list[str]:
    """The arguments without the launcher's --local_rank, which goes to the environment where that lacks it."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(rest, "0"))
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main(["train", *training_arguments(sys.argv[1:])]))
