"""One rank of an SFT run with batch selection on the tiny model; `tests/launch.py` starts it. Reports as JSON."""

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
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    config = common.open_group(args.deepspeed)

    from peft import LoraConfig

    from siftrl import plugins
    from siftrl.evaluate import evaluate_on_ranks
    from siftrl.rollout import Sampling
    from siftrl.trainers.held_out import held_out_loss, policy_engine
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
        eval_dataset=conftest.worded_sums().select(range(11)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
        batch_selector=chain,
        source_column="source",
        scoring_batch_size=3,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    summary = trainer.sift_summary()
    report = {"tokens": summary["tokens"], "selection": summary["selection"], "held_out": held_out_loss(trainer)}
    rows, tokenizer = conftest.worded_sums().select(range(11)), trainer.processing_class
    with policy_engine(trainer, tokenizer) as engine:
        found = evaluate_on_ranks(
            engine, tokenizer, rows, [conftest.digit_share], [1.0], Sampling(6, temperature=0.0), progress=False
        )
    common.finish(args.out, trainer, report | {"reward": found["reward"], "rewarded": found["rows"]})


if __name__ == "__main__":
    main()
