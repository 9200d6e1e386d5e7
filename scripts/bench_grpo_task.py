"""The task of `bench_grpo_selection.py`, the start that all of its runs share, and one run of GRPO.

Chains of sums from reasoning-gym. A right completion ends with the total: "14" and "5;14" both answer "8-3+9=". The
start can add small numbers step by step, but was last fine-tuned on terse answers, which it gets wrong: GRPO has to
bring the steps back. Sums of small numbers, few of the prompts, can teach it that; those of large numbers are hopeless.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ALPHABET = "0123456789+-=;"
Mixture = dict[str, tuple[float, dict[str, int]]]
"""Kind -> (its share of the rows, settings of reasoning-gym's chain_sum)."""


def chains(share: float, terms: tuple[int, int], digits: int) -> tuple[float, dict[str, int]]:
    low, high = terms
    return share, {"min_terms": low, "max_terms": high, "min_digits": digits, "max_digits": digits}


PROMPTS: Mixture = {"small": chains(0.2, (3, 5), 1), "large": chains(0.8, (3, 5), 3)}
HELD_OUT: Mixture = {f"{terms} terms": chains(1 / 3, (terms, terms), 1) for terms in (3, 4, 5)}
"""What the runs are judged on: small numbers, since large ones stay out of reach."""
STEP_BY_STEP: Mixture = {
    "short": chains(0.75, (2, 3), 1),
    "long": chains(0.15, (4, 6), 1),
    "large": chains(0.1, (2, 4), 2),
}
TERSE: Mixture = {"short": chains(0.4, (2, 3), 1), "long": chains(0.6, (4, 6), 1)}
"""The rows of the two stages of the warm-up."""
TERSE_SHARE = 0.8
"""Share of the second stage's rows that are answered with the total alone."""


def running_totals(expression: str) -> str:
    """The answer to a sum, step by step: "8 - 3 + 9" -> "5;14"."""
    terms = expression.replace(" ", "").replace("-", "+-").split("+")
    totals = [int(terms[0])]
    for term in terms[1:]:
        totals.append(totals[-1] + int(term))
    return ";".join(map(str, totals[1:]))


def make_rows(size: int, seed: int, mixture: Mixture, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Rows with prompt, answer, steps, kind and question, in random order, none whose question is in `exclude`."""
    from siftrl import gym_rows
    from siftrl.recipe import ReasoningGymConfig, ReasoningGymTask

    tasks = [ReasoningGymTask(name="chain_sum", weight=share, config=config) for share, config in mixture.values()]
    config = ReasoningGymConfig(tasks=tasks, size=size, seed=seed)
    by_settings = {json.dumps(config, sort_keys=True): kind for kind, (_, config) in mixture.items()}
    rows = []
    for row in gym_rows.make_rows(config, size=size, seed=seed, exclude=exclude):
        expression = row["metadata"]["expression"]
        rows.append(
            {
                "prompt": expression.replace(" ", "") + "=",
                "answer": row["answer"],
                "steps": running_totals(expression),
                "kind": by_settings[row["task_config"]],
                "question": row["question"],
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------------- start


def warm_up(args: Namespace, folder: Path) -> None:
    """Make the model that every run starts from, by SFT from random weights: steps first, then terse answers."""
    from siftrl import models
    from siftrl.recipe import ScratchConfig

    scratch = ScratchConfig(
        hidden_size=args.width,
        num_layers=args.layers,
        num_heads=4,
        intermediate_size=3 * args.width,
        max_positions=128,
        alphabet=ALPHABET,
    )
    models.save_scratch_model(scratch, folder / "scratch", 0)
    size = args.warm_up_rows
    rows = make_rows(min(args.warm_up_steps * size, 40_000), 1, STEP_BY_STEP)
    steps = [(row["prompt"], row["steps"]) for row in rows]
    _fine_tune(folder / "scratch", folder / "steps", steps, size, args.warm_up_steps, 2e-3, "linear")
    rows = make_rows(args.terse_steps * size, 2, TERSE)
    terse = round(TERSE_SHARE * len(rows))
    mixed = [(row["prompt"], row["answer"] if i < terse else row["steps"]) for i, row in enumerate(rows)]
    _fine_tune(folder / "steps", folder / "model", mixed, size, args.terse_steps, 2e-4, "constant_with_warmup")


def _fine_tune(
    start: Path, end: Path, rows: list[tuple[str, str]], size: int, steps: int, rate: float, schedule: str
) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    from siftrl import SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        SFTConfig(
            output_dir=str(end),
            per_device_train_batch_size=size,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type=schedule,
            warmup_steps=min(50, steps // 2),
            adam_beta2=0.98,
            logging_steps=max(steps // 10, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    trainer.save_model(str(end))


# ------------------------------------------------------------------------------------------------------- one run


def run(args: Namespace, arm: dict[str, Any], start: Path, out: Path) -> None:
    """Train one arm with one seed. Writes a line of JSON an evaluation to `out`, and one at the end.

    Seconds are those of training alone: start-up and evaluation are left out.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig

    from siftrl import plugins
    from siftrl.rewards.exact_match import ExactMatch
    from siftrl.rollout import RolloutOptions
    from siftrl.trainers.grpo import GRPOTrainer

    held_out = make_rows(args.eval_size, 10_001, HELD_OUT)
    rows = make_rows(args.rows, 3, PROMPTS, frozenset(row["question"] for row in held_out))
    tokenizer = AutoTokenizer.from_pretrained(start)

    class Counting(GRPOTrainer):
        """Counts what goes through forward and backward passes."""

        rows_run = rows_with_advantage = tokens_run = positions_run = 0

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
            advantages, mask = inputs["advantages"], inputs["completion_mask"]
            self.rows_run += len(mask)
            self.rows_with_advantage += int((advantages.abs() > 1e-6).sum())
            self.tokens_run += int(mask.sum())
            self.positions_run += inputs["prompt_ids"].numel() + mask.numel()
            return super().compute_loss(model, inputs, *more, **options)

    options: dict[str, Any] = {}
    if arm.get("chain"):
        chain = [(plugins.load("selector", name, keys), keep) for name, keys, keep in arm["chain"]]
        options |= {"batch_selector": chain, "scoring_batch_size": args.scoring_batch}
    if arm.get("skip"):
        options["skip_zero_advantage"] = True
    prompts = arm.get("prompts")
    batches = args.prompts * args.completions // args.micro_batch
    trainer = Counting(
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        ExactMatch(extract=r"-?\d+$"),
        GRPOConfig(
            output_dir=str(out.with_suffix("")),
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=batches // args.updates,
            steps_per_generation=batches,
            num_generations=args.completions,
            num_iterations=args.iterations,
            max_completion_length=args.max_tokens,
            temperature=args.temperature,
            max_steps=args.steps * args.updates * args.iterations,
            learning_rate=args.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            adam_beta2=0.99,
            scale_rewards="none",
            loss_type="grpo",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(rows).remove_columns("question"),
        processing_class=tokenizer,
        prompt_selector=plugins.load("selector", prompts[0], prompts[1]) if prompts else None,
        rollout=RolloutOptions(seeded=True),  # the same way of drawing for all
        **options,
    )
    evaluate = held_out_evaluation(held_out, trainer, args)
    effective: list[float] = []
    updates = args.updates * args.iterations  # optimizer steps of a rollout

    def write(line: dict[str, Any]) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    class Watch(TrainerCallback):
        seconds = cpu_seconds = since = cpu_since = 0.0

        def begin(self) -> None:
            self.since, self.cpu_since = time.perf_counter(), time.process_time()

        def point(self, step: int) -> None:
            write(
                {
                    "step": step,
                    "seconds": self.seconds,
                    "cpu_seconds": self.cpu_seconds,
                    "generated": trainer.generated_tokens,
                    "trained": trainer.tokens_run,
                    "positions": trainer.positions_run,
                    "rows": trainer.rows_run,
                    "rows_with_advantage": trainer.rows_with_advantage,
                    "effective": effective[-args.eval_every :],
                    "parts": dict(trainer.clock.seconds),
                    **evaluate(),
                }
            )

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.point(0)
            self.begin()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "effective_ratio" in logs:
                effective.append(logs["effective_ratio"])

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            step, rest = divmod(state.global_step, updates)
            if rest or (step % args.eval_every and step != args.steps):
                return
            self.seconds += time.perf_counter() - self.since
            self.cpu_seconds += time.process_time() - self.cpu_since
            self.point(step)
            self.begin()

    trainer.add_callback(Watch())
    trainer.train()
    write({"end": True, "effective": effective})


def held_out_evaluation(rows: Sequence[dict[str, str]], trainer: Any, args: Namespace) -> Callable[[], dict[str, Any]]:
    """Accuracy on held-out rows, in all and by kind: of two completions a row, drawn as in the rollouts; and greedy."""
    from datasets import Dataset

    from siftrl.rollout import Sampling

    kinds = {kind: Dataset.from_list([row for row in rows if row["kind"] == kind]) for kind in HELD_OUT}

    def evaluate() -> dict[str, Any]:
        trainer.model.eval()
        report: dict[str, Any] = {}
        for name, temperature, samples in (("accuracy", args.temperature, 2), ("greedy", 0.0, 1)):
            for kind, mine in kinds.items():
                sampling = Sampling(args.max_tokens, temperature)
                found = trainer.evaluate_rewards(mine, sampling, samples=samples, batch_size=512)
                report[f"{name}/{kind}"] = found["reward"]
            report[name] = sum(report[f"{name}/{kind}"] * len(mine) for kind, mine in kinds.items()) / len(rows)
        trainer.model.train()
        return report

    return evaluate
