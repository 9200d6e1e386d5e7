"""One rank of a GRPO run on the tiny model; `tests/launch.py` starts it. Writes what the tests compare as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import conftest
from datasets import Dataset


def main() -> None:
    parser = common.parser(steps=4)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--body", default="own")
    parser.add_argument("--selector", default="prompt_curriculum")
    parser.add_argument("--chain", default="[]", help="JSON: a list of [batch selector's name, its options, keep]")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--disagree", action="store_true", help="let rank 1 choose rows of its own")
    args = parser.parse_args()
    config = common.open_group(args.deepspeed)

    from siftrl import distributed, plugins
    from siftrl.rollout import Sampling
    from siftrl.trainers.grpo import GRPOTrainer

    pairs = [(a, b) for a in range(8) for b in range(6)]
    data = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs]})
    options = {} if args.selector != "prompt_curriculum" else {"fallback": False, "value": {"body": args.body}}
    if options and args.body == "policy":
        options["value"]["train"] = "head"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chain = [(plugins.load("selector", name, its), keep) for name, its, keep in json.loads(args.chain)]
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=conftest.letter_sum if chain else conftest.digit_share,
        args=conftest.grpo_args(
            args.out,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=16 // (args.micro * world),
            max_steps=args.steps,
            num_iterations=args.iterations,
            beta=args.beta,
            lr_scheduler_type="constant",  # a run cut short must not have decayed faster
            deepspeed=config,
            use_vllm=args.vllm,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            max_completion_length=12 if chain else 6,
            save_strategy="steps" if args.checkpoint_at else "no",
            save_steps=args.checkpoint_at or 500,
        ),
        train_dataset=data,
        prompt_selector=plugins.load("selector", args.selector, options),
        batch_selector=chain or None,
        scoring_batch_size=3,
    )
    if args.disagree and distributed.rank() == 1:
        trainer.row_selection.generator.manual_seed(0)
    tokens: list[int] = []
    keep_completions = trainer._keep_completions

    def count_tokens(batch: Any) -> Any:
        kept = keep_completions(batch)
        tokens.append(sum(int(part["prompt_mask"].sum() + part["completion_mask"].sum()) for part in kept))
        return kept

    trainer._keep_completions = count_tokens
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
        "trained_tokens": tokens,
        "padding": [entry["batch/padding"] for entry in history if "batch/padding" in entry],
        "idle_tail": [entry["rollout/idle_tail"] for entry in history if "rollout/idle_tail" in entry],
    }
    common.finish(args.out, trainer, report)


if __name__ == "__main__":
    main()
