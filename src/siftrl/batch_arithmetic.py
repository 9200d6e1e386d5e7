"""How a step's rows are dealt to ranks and micro-batches."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from siftrl import plugin_facts
from siftrl.recipe_text import Key, RecipeError, dotted

if TYPE_CHECKING:
    from siftrl.recipe import AnyStage, DPOStage, GRPOStage, SFTStage


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """The numbers of one step. A row is a completion (grpo), an example (sft) or a pair (dpo).

    With a batch selector `rows` are read (grpo: generated), `rows_kept` of them are trained on, and the micro-batches
    are those of the rows that are trained on: micro_batch_size x micro_batches_per_rank x world_size = rows_kept.
    """

    world_size: int
    rows: int
    """Rows of one step over all ranks; grpo: prompts_kept x completions_per_prompt."""
    rows_per_rank: int
    micro_batch_size: int
    """The stage's, or the rows that a rank trains on in one optimizer step where those are fewer."""
    micro_batches_per_rank: int
    gradient_accumulation_steps: int
    """Micro-batches of one optimizer step on one rank."""
    rows_kept: int | None = None
    """With a batch selector: rows of one step that are trained on, over all ranks."""
    kept_per_rank: int | None = None
    prompts_proposed: int | None = None
    """grpo: candidates drawn before the prompt selector chooses; None where only the selector itself can say."""
    prompts_kept: int | None = None
    completions_per_prompt: int | None = None
    steps_per_generation: int | None = None
    """grpo: micro-batches that one rollout is trained on, on one rank, TRL's option."""
    optimizer_steps: int | None = None
    """Over the whole stage; None where the number of rows is not known."""
    rollouts: int | None = None
    """grpo: rollout steps over the whole stage."""


def world_size() -> int:
    """Number of processes, as the launchers tell it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_arithmetic(stage: AnyStage, world_size: int, num_rows: int | None = None) -> BatchArithmetic:
    """Divide a step over ranks and micro-batches.

    num_rows: rows of the training set, where known; only used for the number of steps.
    Raises RecipeError with the key (relative to the stage) and values that would divide.
    """
    if stage.kind == "grpo":
        return _grpo(stage, world_size, num_rows)
    return _rows(stage, world_size, num_rows)


def kept_rows(rows: int, keeps: Sequence[float | int]) -> list[int]:
    """How many rows each batch selector of a chain keeps; the first is given `rows`, each other what the last kept.

    keeps: for each a share of the rows that it is given (a float; rounded to whole rows, halves up, at least 1), or a
    number of rows (an int).
    Raises RecipeError, key (index, "keep"), where a number is larger than what is given.
    """
    kept: list[int] = []
    for index, keep in enumerate(keeps):
        given = kept[-1] if kept else rows
        if isinstance(keep, float):
            # Rounded twice, so that a half is a half: 0.29 * 50 is 14.499999999999998.
            keep = max(1, math.floor(round(keep * given, 9) + 0.5))
        if keep > given:
            raise RecipeError(
                f"{keep} rows are more than the {given} to choose from; write {given} or less", index, "keep"
            )
        kept.append(keep)
    return kept


def _rows(stage: SFTStage | DPOStage, world: int, num_rows: int | None) -> BatchArithmetic:
    rows, micro = stage.rows_per_step, stage.micro_batch_size
    if rows % world:
        raise RecipeError(f"{rows} rows do not divide over {_ranks(world)}; {_multiples(rows, world)}", "rows_per_step")
    if stage.batch_selectors:
        return _rows_selected(stage, world, num_rows)
    per_rank = rows // world
    if per_rank % micro:
        raise RecipeError(
            f"{micro} does not divide the {per_rank} rows a rank (rows_per_step {rows} over {_ranks(world)}); "
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


def _rows_selected(stage: SFTStage | DPOStage, world: int, num_rows: int | None) -> BatchArithmetic:
    kept = _kept_over_ranks(stage, stage.rows_per_step, world)
    kept_per_rank = kept // world
    micro = min(stage.micro_batch_size, kept_per_rank)
    steps = _option(stage, "max_steps", -1)
    if steps <= 0 and num_rows:  # rows are chosen before they are packed, and every step reads as many
        steps = math.ceil(_option(stage, "num_train_epochs", 3.0) * math.ceil(num_rows / stage.rows_per_step))
    return BatchArithmetic(
        world_size=world,
        rows=stage.rows_per_step,
        rows_per_rank=stage.rows_per_step // world,
        micro_batch_size=micro,
        micro_batches_per_rank=kept_per_rank // micro,
        gradient_accumulation_steps=kept_per_rank // micro,
        rows_kept=kept,
        kept_per_rank=kept_per_rank,
        optimizer_steps=int(steps) if steps > 0 else None,
    )


def _kept_over_ranks(stage: AnyStage, rows: int, world: int) -> int:
    """Rows of a step (of `rows`) that the stage's batch selectors leave.

    Raises RecipeError, with the key of a `keep`, where they do not divide over ranks and micro-batches, and with
    optimizer_steps_per_rollout (grpo) where that does not divide their micro-batches.
    """
    keeps, micro = [selector.keep for selector in stage.batch_selectors], stage.micro_batch_size
    keys: list[Key] = [(*key, "keep") for key in stage.batch_selector_keys]
    updates = stage.optimizer_steps_per_rollout if stage.kind == "grpo" else 1
    try:
        given, kept = [rows, *kept_rows(rows, keeps)][-2:]
    except RecipeError as error:
        raise RecipeError(error.problem, *keys[int(error.key[0])]) from None
    if given < world:  # so there is one before the last: the first is given `rows`
        raise RecipeError(f"leaves {given} rows for {_ranks(world)}; keep {world} or more", *keys[-2])

    def nearest(updates: int) -> list[float | int]:
        """What to write as the last `keep`: the counts next to `kept` that divide."""
        counts = _next_to([count for count in range(1, given + 1) if _divides(count, world, micro, updates)], kept)
        return [_share(count, given) if isinstance(keeps[-1], float) else count for count in counts]

    if _divides(kept, world, micro, updates):
        return kept
    of, per_rank = f"{kept} of {given} rows over {_ranks(world)}", kept // world
    if _divides(kept, world, micro):
        steps = [n for n in range(1, per_rank + 1) if _both_divide(rows, kept, world, micro, n)]
        sizes = [size for size in range(1, micro) if _both_divide(rows, kept, world, size, updates)]
        either = [_or(_next_to(steps, updates))]
        if sizes:
            either.append(f"micro_batch_size {sizes[-1]}")
        elif keeps_that_do := nearest(updates):
            either.append(f"{dotted(keys[-1])} {_or(keeps_that_do)}")
        problem = f"{updates} steps do not divide the {per_rank} rows that a rank trains on ({of}) into micro-batches"
        raise RecipeError(f"{problem} of {micro}; write {', or '.join(either)}", "optimizer_steps_per_rollout")
    problem = f"{kept} of {given} rows do not divide over {_ranks(world)}"
    if not kept % world:
        problem = f"micro_batch_size {micro} does not divide the {per_rank} rows that a rank trains on ({of})"
    raise RecipeError(f"{problem}; write {_or(nearest(updates) or nearest(1))}", *keys[-1])


def _divides(rows: int, world: int, micro: int, updates: int = 1) -> bool:
    """Whether rows divide over ranks and optimizer steps, and each step's into micro-batches of at most `micro`."""
    per_step, rest = divmod(rows, world * updates)
    size = min(micro, per_step)
    return not rest and size > 0 and not per_step % size


def _both_divide(rows: int, kept: int, world: int, micro: int, updates: int) -> bool:
    """Whether the rows of a rollout make equal micro-batches of `micro` for each optimizer step, and the kept ones."""
    return not rows % (world * micro * updates) and _divides(kept, world, micro, updates)


def _share(count: int, given: int) -> float:
    """The shortest share of `given` rows that keeps `count`."""
    shares = (round(count / given, digits) for digits in range(1, 17))
    return next(share for share in shares if 0 < share <= 1 and kept_rows(given, [share]) == [count])


def _grpo(stage: GRPOStage, world: int, num_rows: int | None) -> BatchArithmetic:
    prompts, group, micro = stage.prompts_per_step, stage.completions_per_prompt, stage.micro_batch_size
    updates = stage.optimizer_steps_per_rollout
    rows = prompts * group
    made = f"prompts_per_step {prompts} x completions_per_prompt {group} = {rows} completions over {_ranks(world)}"
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
    kept = kept_per_rank = None
    if stage.batch_selectors:
        kept = _kept_over_ranks(stage, rows, world)
        kept_per_rank = kept // world
        micro = min(micro, kept_per_rank // updates)
        micro_batches = kept_per_rank // micro
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
        rows_kept=kept,
        kept_per_rank=kept_per_rank,
        prompts_proposed=_proposed(stage),
        prompts_kept=prompts,
        completions_per_prompt=group,
        steps_per_generation=micro_batches,
        optimizer_steps=int(steps) if steps > 0 else None,
        rollouts=math.ceil(steps / steps_per_rollout) if steps > 0 else None,
    )


def _proposed(stage: GRPOStage) -> int | None:
    selector, prompts = stage.prompt_selector, stage.prompts_per_step
    return plugin_facts.num_candidates(selector.name, selector.options, prompts) if selector else prompts


def _ranks(world: int) -> str:
    return f"{world} rank{'s' * (world > 1)}"


def _option(stage: AnyStage, name: str, default: float) -> float:
    value = stage.trainer.get(name)
    return default if value is None else value


def _divisors(total: int, wanted: int) -> str:
    """The divisors of `total` next to `wanted`."""
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    return f"write {_or(_next_to(sorted({*small, *(total // d for d in small)}), wanted))}"


def _or(values: Sequence[float | int]) -> str:
    return " or ".join(map(str, values))


def _next_to(numbers: Sequence[int], wanted: int) -> list[int]:
    """Of ascending numbers the last below `wanted` and the first above it."""
    return [n for n in numbers if n < wanted][-1:] + [n for n in numbers if n > wanted][:1]


def _multiples(wanted: int, of: int) -> str:
    """The multiples of `of` next to `wanted`."""
    below = wanted // of * of
    return f"write {_or([m for m in (below, below + of) if m])}"
