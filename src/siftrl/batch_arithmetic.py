"""How a step's rows are dealt to ranks and micro-batches."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from siftrl.recipe_text import RecipeError

if TYPE_CHECKING:
    from siftrl.recipe import GRPOStage, SFTStage


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """The numbers of one step. A row is a completion (grpo) or an example (sft)."""

    world_size: int
    rows: int
    """Rows of one step over all ranks; grpo: prompts_kept x completions_per_prompt."""
    rows_per_rank: int
    micro_batch_size: int
    micro_batches_per_rank: int
    gradient_accumulation_steps: int
    prompts_proposed: int | None = None
    """grpo: candidates drawn before the prompt selector chooses."""
    prompts_kept: int | None = None
    completions_per_prompt: int | None = None
    steps_per_generation: int | None = None
    """grpo: micro-batches of one rollout on one rank, TRL's option."""
    optimizer_steps: int | None = None
    """Over the whole stage; None where the number of rows is not known."""
    rollouts: int | None = None
    """grpo: rollout steps over the whole stage."""


def world_size() -> int:
    """Number of processes, as the launchers tell it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_arithmetic(stage: SFTStage | GRPOStage, world_size: int, num_rows: int | None = None) -> BatchArithmetic:
    """Divide a step over ranks and micro-batches.

    num_rows: rows of the training set, where known; only used for the number of steps.
    Raises RecipeError with the key (relative to the stage) and values that would divide.
    """
    if stage.kind == "sft":
        return _sft(stage, world_size, num_rows)
    return _grpo(stage, world_size, num_rows)


def _sft(stage: SFTStage, world: int, num_rows: int | None) -> BatchArithmetic:
    rows, micro = stage.rows_per_step, stage.micro_batch_size
    ranks = f"{world} rank{'s' * (world > 1)}"
    if rows % world:
        raise RecipeError(f"{rows} rows do not divide over {ranks}; {_multiples(rows, world)}", "rows_per_step")
    per_rank = rows // world
    if per_rank % micro:
        raise RecipeError(
            f"{micro} does not divide the {per_rank} rows a rank (rows_per_step {rows} over {ranks}); "
            f"{_divisors(per_rank, micro)}",
            "micro_batch_size",
        )
    accumulation = per_rank // micro
    steps = _option(stage, "max_steps", -1)
    if steps <= 0 and num_rows and not stage.trainer.get("packing"):
        batches = math.ceil(num_rows / (micro * world))
        steps = math.ceil(_option(stage, "num_train_epochs", 3.0) * math.ceil(batches / accumulation))
    return BatchArithmetic(
        world_size=world,
        rows=rows,
        rows_per_rank=per_rank,
        micro_batch_size=micro,
        micro_batches_per_rank=accumulation,
        gradient_accumulation_steps=accumulation,
        optimizer_steps=int(steps) if steps > 0 else None,
    )


def _grpo(stage: GRPOStage, world: int, num_rows: int | None) -> BatchArithmetic:
    prompts, group, micro = stage.prompts_per_step, stage.completions_per_prompt, stage.micro_batch_size
    updates = stage.optimizer_steps_per_rollout
    rows = prompts * group
    ranks = f"{world} rank{'s' * (world > 1)}"
    made = f"prompts_per_step {prompts} x completions_per_prompt {group} = {rows} completions over {ranks}"
    if rows % world:
        need = world // math.gcd(world, group)
        raise RecipeError(f"{made} do not divide; {_multiples(prompts, need)}", "prompts_per_step")
    per_rank = rows // world
    if per_rank % micro:
        raise RecipeError(
            f"{micro} does not divide the {per_rank} completions a rank ({made}); {_divisors(per_rank, micro)}",
            "micro_batch_size",
        )
    micro_batches = per_rank // micro
    if micro_batches % updates:
        raise RecipeError(
            f"{updates} does not divide the {micro_batches} micro-batches a rank ({made}, micro_batch_size {micro}); "
            f"{_divisors(micro_batches, updates)}",
            "optimizer_steps_per_rollout",
        )
    options = stage.prompt_selector.options if stage.prompt_selector else {}
    steps_per_rollout = updates * _option(stage, "num_iterations", 1)
    steps = _option(stage, "max_steps", -1)
    if steps <= 0 and num_rows:
        steps = math.ceil(_option(stage, "num_train_epochs", 3.0) * max(num_rows // prompts, 1) * steps_per_rollout)
    return BatchArithmetic(
        world_size=world,
        rows=rows,
        rows_per_rank=per_rank,
        micro_batch_size=micro,
        micro_batches_per_rank=micro_batches,
        gradient_accumulation_steps=micro_batches // updates,
        prompts_proposed=prompts * options.get("candidates", 1),
        prompts_kept=prompts,
        completions_per_prompt=group,
        steps_per_generation=micro_batches,
        optimizer_steps=int(steps) if steps > 0 else None,
        rollouts=math.ceil(steps / steps_per_rollout) if steps > 0 else None,
    )


def _option(stage: SFTStage | GRPOStage, name: str, default: float) -> float:
    value = stage.trainer.get(name)
    return default if value is None else value


def _divisors(total: int, wanted: int) -> str:
    """The divisors of `total` next to `wanted`."""
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    divisors = {*small, *(total // d for d in small)}
    next_to = [max(d for d in divisors if d < wanted)] + sorted(d for d in divisors if d > wanted)[:1]
    return "write " + " or ".join(str(d) for d in next_to)


def _multiples(wanted: int, of: int) -> str:
    """The multiples of `of` next to `wanted`."""
    below = wanted // of * of
    return "write " + " or ".join(str(m) for m in (below, below + of) if m)
