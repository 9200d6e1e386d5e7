"""One rank of a DPO run with batch selection on the tiny model; `tests/launch.py` starts it. Reports as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import conftest


def main() -> None:
    parser = common.parser(steps=3)
    parser.add_argument("--chain", required=True, help="JSON: a list of [selector's name, its options, keep]")
    parser.add_argument("--data", required=True, help="a JSONL file of pairs")
    args = parser.parse_args()
    config = common.open_group(args.deepspeed)

    from datasets import Dataset
    from trl import DPOConfig

    from siftrl import DPOTrainer, plugins
    from siftrl.trainers.held_out import held_out_loss

    world = int(os.environ.get("WORLD_SIZE", "1"))
    chain = [(plugins.load("selector", name, options), keep) for name, options, keep in json.loads(args.chain)]
    options = conftest.SMALL_RUN | {
        "output_dir": str(args.out),
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": args.micro,
        "gradient_accumulation_steps": 16 // (args.micro * world),
        "max_steps": args.steps,
        "deepspeed": config,
    }
    data = Dataset.from_json(args.data)
    trainer = DPOTrainer(
        model=args.model,
        args=DPOConfig(**options),
        train_dataset=data,
        eval_dataset=data.select(range(7)),
        batch_selector=chain,
        source_column="source",
        scoring_batch_size=6,
    )
    trainer.train()
    common.finish(
        args.out, trainer, {"held_out": held_out_loss(trainer), "selection": trainer.sift_summary()["selection"]}
    )


if __name__ == "__main__":
    main()
