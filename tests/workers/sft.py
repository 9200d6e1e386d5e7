"""One rank of an SFT run with batch selection on the tiny model; `tests/launch.py` starts it. Reports as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest
import torch

from siftrl import distributed
from siftrl.deepspeed_config import deepspeed_config
from siftrl.recipe import DistributionConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deepspeed", default=None)
    parser.add_argument("--chain", required=True, help="JSON: a list of [selector's name, its options, keep]")
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpoint-at", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args()

    distributed.open_group(deepspeed=args.deepspeed is not None)
    config = None
    if args.deepspeed:
        config = deepspeed_config(SimpleNamespace(distribution=DistributionConfig(deepspeed=args.deepspeed)), cpu=True)

    from peft import LoraConfig

    from siftrl import plugins
    from siftrl.trainers.sft import SFTTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    chain = [(plugins.load("selector", name, options), keep) for name, options, keep in json.loads(args.chain)]
    trainer = SFTTrainer(
        model=args.model,
        args=conftest.sft_args(
            args.out,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=16 // (args.micro * world),
            max_steps=args.steps,
            deepspeed=config,
            save_strategy="steps" if args.checkpoint_at else "no",
            save_steps=args.checkpoint_at or 500,
        ),
        train_dataset=conftest.worded_sums(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
        batch_selector=chain,
        source_column="source",
        scoring_batch_size=3,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    history = trainer.state.log_history
    report = {
        "rank": distributed.rank(),
        "world": distributed.world_size(),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "tokens": trainer.sift_summary()["tokens"],
        "selection": trainer.sift_summary()["selection"],
    }
    (args.out / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
