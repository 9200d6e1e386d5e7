"""One rank of a GRPO run on the tiny model; `tests/launch.py` starts it. Writes what the tests compare as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import conftest
from datasets import Dataset


def main() -> None:
    parser = common.parser(steps=4)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--body", default="own")
    parser.add_argument("--selector", default="prompt_curriculum")
    args = parser.parse_args()
    config = common.open_group(args.deepspeed)

    from siftrl import plugins
    from siftrl.rollout import Sampling
    from siftrl.trainers.grpo import GRPOTrainer

    pairs = [(a, b) for a in range(8) for b in range(6)]
    data = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs]})
    options = {} if args.selector != "prompt_curriculum" else {"fallback": False, "value": {"body": args.body}}
    if options and args.body == "policy":
        options["value"]["train"] = "head"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=conftest.digit_share,
        args=conftest.grpo_args(
            args.out,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=16 // (args.micro * world),
            max_steps=args.steps,
            lr_scheduler_type="constant",  # a run cut short must not have decayed faster
            deepspeed=config,
            use_vllm=args.vllm,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            save_strategy="steps" if args.checkpoint_at else "no",
            save_steps=args.checkpoint_at or 500,
        ),
        train_dataset=data,
        prompt_selector=plugins.load("selector", args.selector, options),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    # 33 rows on 2 ranks, 8 at a time: 17 rows in 3 batches on one rank, 16 rows in 2 on the other
    evaluation = trainer.evaluate_rewards(data.select(range(33)), Sampling(6, temperature=0.0), batch_size=8)
    history = trainer.state.log_history
    value_sum = None
    if trainer.value_model is not None:
        value_sum = sum(p.detach().double().sum().item() for p in trainer.value_model.parameters())
    report = {
        "drift": [entry["engine/logprob_drift"] for entry in history if "engine/logprob_drift" in entry],
        "value_loss": [entry["value/loss"] for entry in history if "value/loss" in entry],
        "value_sum": value_sum,
        "rollouts": trainer.rollouts,
        "evaluation": evaluation,
    }
    common.finish(args.out, trainer, report)


if __name__ == "__main__":
    main()
