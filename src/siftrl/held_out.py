"""What a stage measures on its held-out rows, and when: before and after the stage, and every so many steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from siftrl import distributed
from siftrl.evaluate import evaluate_on_ranks
from siftrl.recipe import AnyStage, EvalConfig, Recipe
from siftrl.reward_guard import close_rewards, load_rewards
from siftrl.rollout import Sampling
from siftrl.run import write_json
from siftrl.trainers.held_out import held_out_loss, policy_engine

Measure = Callable[[], dict[str, Any]]


def measurement(recipe: Recipe, stage: AnyStage, trainer: Any, rows: Dataset, tokenizer: Any) -> Measure:
    """What measures the current policy on the held-out `rows`; every rank calls it together.

    grpo: the mean reward. sft: the loss, and the mean reward where the stage measures rewards. dpo: loss and accuracy.
    """
    settings, seed = stage.eval or EvalConfig(), recipe.seed
    options: dict[str, Any] = {"samples": settings.samples, "batch_size": settings.batch_size, "seed": seed}
    if stage.kind == "grpo":
        sampling, plain = Sampling(**stage.eval_sampling()), for_rewards(rows, stage.kind)
        return lambda: trainer.evaluate_rewards(plain, sampling, **options)
    if stage.kind == "dpo" or not recipe.measures_rewards(stage):
        return lambda: held_out_loss(trainer)
    sampling = Sampling(**stage.eval_sampling())
    options["progress"] = distributed.is_main() and not trainer.args.disable_tqdm

    def loss_and_rewards() -> dict[str, Any]:
        loss = held_out_loss(trainer)
        rewards, weights = load_rewards(recipe.rewards_of(stage))
        try:
            with policy_engine(trainer, tokenizer) as engine:
                given = options | {"trainer_state": trainer.state}
                return loss | evaluate_on_ranks(engine, tokenizer, rows, rewards, weights, sampling, **given)
        finally:
            close_rewards(rewards)

    return loss_and_rewards


def for_rewards(rows: Dataset, kind: str) -> Dataset:
    """The rows with the columns that the stage's rewards see: TRL's GRPO trainer keeps `completion` from them."""
    return rows if kind == "sft" else rows.remove_columns([c for c in ("completion",) if c in rows.column_names])


class HeldOut(TrainerCallback):
    """Measures before the first step, and every so many steps; `results` has the first and the last measurement."""

    def __init__(self, measure: Measure, every: int | None, trainer: Any) -> None:
        self.measure, self.every, self.trainer = measure, every, trainer
        self.results: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # here the model is on its device, and sharded where it will be
        if state.global_step == 0:
            self.results["before"] = self.record(0)
            if distributed.is_main():  # a resumed run cannot measure it any more
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                write_json(Path(args.output_dir) / "before.json", self.results["before"])

    def resume(self, checkpoints: Path) -> None:
        """Go on with what was measured before the first step."""
        if (before := checkpoints / "before.json").exists():
            self.results["before"] = json.loads(before.read_text(encoding="utf-8"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.record(state.global_step)

    def finish(self) -> None:
        self.results["after"] = self.record(self.trainer.state.global_step)

    def record(self, step: int) -> dict[str, Any]:
        result = self.measure()
        costs = self.trainer.sift_summary()
        if distributed.is_main() and self.trainer.recorder is not None:
            self.trainer.recorder.metrics(step, {"held_out": result, **costs})
        return result
