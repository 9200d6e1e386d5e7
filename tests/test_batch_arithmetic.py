"""The arithmetic of a step: how rows divide over ranks and micro-batches, and what is proposed where they do not."""

from __future__ import annotations

import re

import pytest

from siftrl.batch_arithmetic import kept_rows
from siftrl.recipe import GRPOStage, RecipeError, SFTStage, batch_arithmetic
from siftrl.recipe_text import parse_yaml


def grpo(**keys: object) -> GRPOStage:
    return GRPOStage.model_validate({"kind": "grpo", "completions_per_prompt": 8, "micro_batch_size": 4, **keys})


def test_grpo_arithmetic() -> None:
    # 12 prompts x 8 completions = 96 a step; on 2 ranks 48 each, 12 micro-batches of 4, 3 optimizer steps of 4.
    stage = grpo(
        prompts_per_step=12,
        optimizer_steps_per_rollout=3,
        prompt_selector={"name": "prompt_curriculum", "candidates": 5},
        trainer={"max_steps": 20, "num_iterations": 2},
    )
    numbers = batch_arithmetic(stage, 2)
    assert (numbers.prompts_proposed, numbers.prompts_kept, numbers.rows) == (60, 12, 96)
    assert (numbers.rows_per_rank, numbers.micro_batches_per_rank, numbers.steps_per_generation) == (48, 12, 12)
    assert numbers.gradient_accumulation_steps == 4
    assert (numbers.optimizer_steps, numbers.rollouts) == (20, 4)  # 6 optimizer steps a rollout; the last is cut short


def test_steps_follow_from_epochs_where_the_rows_are_known() -> None:
    stage = grpo(prompts_per_step=12, trainer={"num_train_epochs": 2})
    assert batch_arithmetic(stage, 1).optimizer_steps is None
    assert batch_arithmetic(stage, 1, num_rows=100).optimizer_steps == 2 * (100 // 12)
    sft = SFTStage.model_validate(
        {"kind": "sft", "rows_per_step": 8, "micro_batch_size": 2, "trainer": {"num_train_epochs": 1.5}}
    )
    # 100 rows on 2 ranks: 25 batches of 2 x 2, 2 batches a step: 13 steps an epoch.
    assert batch_arithmetic(sft, 2, num_rows=100).optimizer_steps == 20


@pytest.mark.parametrize(
    ("keys", "ranks", "key", "proposals"),
    [
        ({"prompts_per_step": 6, "micro_batch_size": 5}, 1, "micro_batch_size", "write 4 or 6"),
        ({"prompts_per_step": 6, "micro_batch_size": 50}, 1, "micro_batch_size", "write 48"),
        ({"prompts_per_step": 6}, 5, "prompts_per_step", "write 5 or 10"),
        ({"prompts_per_step": 3}, 16, "prompts_per_step", "write 2 or 4"),
        ({"prompts_per_step": 8, "optimizer_steps_per_rollout": 5}, 1, "optimizer_steps_per_rollout", "write 4 or 8"),
    ],
)
def test_proposed_values_do_divide(keys: dict[str, int], ranks: int, key: str, proposals: str) -> None:
    with pytest.raises(RecipeError) as caught:
        batch_arithmetic(grpo(**keys), ranks)
    assert caught.value.key == (key,)
    assert caught.value.problem.endswith(proposals)
    for proposal in re.findall(r"\d+", proposals):
        stage = grpo(**{**keys, key: int(proposal), **({"micro_batch_size": 1} if ranks > 1 else {})})
        batch_arithmetic(stage, ranks)


@pytest.mark.parametrize(
    ("rows", "keeps", "kept"),
    [
        (64, [], []),
        (64, [0.5], [32]),
        (64, [0.75, 32], [48, 32]),
        (64, [1], [1]),
        (64, [1.0], [64]),
        (64, [0.75, 1.0, 0.25, 1], [48, 48, 12, 1]),
        (10, [0.25], [3]),  # 2.5: halves go up
        (10, [0.24], [2]),
        (50, [0.29], [15]),  # 14.5, which is 14.499999999999998 in floating point
        (10, [0.01, 0.01], [1, 1]),  # at least one
    ],
)
def test_what_each_selector_of_a_chain_keeps(rows: int, keeps: list[float | int], kept: list[int]) -> None:
    assert kept_rows(rows, keeps) == kept


def test_no_selector_keeps_more_than_it_is_given() -> None:
    with pytest.raises(RecipeError, match="33 rows are more than the 32 to choose from; write 32 or less") as caught:
        kept_rows(64, [0.5, 33])
    assert caught.value.key == (1, "keep")


def sift(selectors: object, rows: int = 64, micro: int = 8, **trainer: object) -> SFTStage:
    keys = {"rows_per_step": rows, "micro_batch_size": micro, "batch_selector": selectors, "trainer": trainer}
    return SFTStage.model_validate({"kind": "sft", **keys})


def test_sft_arithmetic_with_a_batch_selector() -> None:
    # 64 rows read, 48 after the first, 32 after the second: on 2 ranks 16 each, in 2 micro-batches of 8.
    stage = sift([{"name": "high_loss", "keep": 0.75}, {"name": "uniform_rows", "keep": 32}], num_train_epochs=2)
    numbers = batch_arithmetic(stage, 2, num_rows=100)
    assert (numbers.rows, numbers.rows_per_rank, numbers.rows_kept, numbers.kept_per_rank) == (64, 32, 32, 16)
    assert (numbers.micro_batch_size, numbers.micro_batches_per_rank) == (8, 2)
    assert numbers.gradient_accumulation_steps == 2
    assert numbers.optimizer_steps == 4  # two an epoch, the second filled up
    # Rows are chosen before they are packed, so packing leaves the number of steps known.
    assert batch_arithmetic(sift("high_loss", packing=True, num_train_epochs=1), 1, num_rows=65).optimizer_steps == 2
    assert batch_arithmetic(sift("high_loss", max_steps=7), 1, num_rows=100).optimizer_steps == 7
    plain = batch_arithmetic(sift(None), 2)
    assert (plain.rows_kept, plain.kept_per_rank, plain.micro_batches_per_rank) == (None, None, 4)


def test_fewer_rows_than_a_micro_batch_are_one_micro_batch() -> None:
    # 30 rows do not divide into micro-batches of 8, but only the 10 kept have to: 5 on each of 2 ranks.
    numbers = batch_arithmetic(sift({"name": "high_loss", "keep": 10}, rows=30), 2)
    assert (numbers.kept_per_rank, numbers.micro_batch_size, numbers.gradient_accumulation_steps) == (5, 5, 1)


@pytest.mark.parametrize(
    ("selectors", "ranks", "micro", "key", "problem"),
    [
        ({"keep": 31}, 2, 8, "keep", "31 of 64 rows do not divide over 2 ranks; write 16 or 32"),
        ({"keep": 9}, 2, 8, "keep", "9 of 64 rows do not divide over 2 ranks; write 8 or 10"),
        ({"keep": 0.48}, 2, 8, "keep", "31 of 64 rows do not divide over 2 ranks; write 0.25 or 0.5"),
        ({"keep": 0.15}, 4, 8, "keep", "10 of 64 rows do not divide over 4 ranks; write 0.12 or 0.19"),
        ({"keep": 3}, 4, 8, "keep", "3 of 64 rows do not divide over 4 ranks; write 4"),
        ({"keep": 63}, 1, 8, "keep", "the 63 rows that a rank trains on (63 of 64 rows over 1 rank); write 56 or 64"),
        ([{"keep": 48}, {"keep": 20}], 1, 8, "1.keep", "trains on (20 of 48 rows over 1 rank); write 16 or 24"),
        ([{"keep": 21}, {"keep": 1.0}], 2, 16, "1.keep", "21 of 21 rows do not divide over 2 ranks; write 0.95"),
        ([{"keep": 3}, {"keep": 1.0}], 4, 8, "0.keep", "leaves 3 rows for 4 ranks; keep 4 or more"),
    ],
)
def test_kept_rows_divide_over_ranks_and_micro_batches(
    selectors: dict | list[dict], ranks: int, micro: int, key: str, problem: str
) -> None:
    def named(proposal: float | int | None) -> list[dict] | dict:
        chain = selectors if isinstance(selectors, list) else [selectors]
        chain = [{"name": "high_loss", **one} for one in chain]
        if proposal is not None:
            chain[int(key[0]) if "." in key else 0]["keep"] = proposal
        return chain if isinstance(selectors, list) else chain[0]

    with pytest.raises(RecipeError) as caught:
        batch_arithmetic(sift(named(None), micro=micro), ranks)
    assert ".".join(map(str, caught.value.key)) == f"batch_selector.{key}"
    assert caught.value.problem.endswith(problem)
    for proposal in re.findall(r"[\d.]+", re.split("; (?:write|keep) ", problem)[1]):
        numbers = batch_arithmetic(sift(named(parse_yaml(proposal)), micro=micro), ranks)
        assert numbers.micro_batch_size * numbers.gradient_accumulation_steps * ranks == numbers.rows_kept


def grpo_sift(selectors: object, prompts: int = 8, **keys: object) -> GRPOStage:
    return grpo(prompts_per_step=prompts, batch_selector=selectors, **keys)


def test_grpo_arithmetic_with_a_batch_selector() -> None:
    # 12 prompts x 8 completions = 96, of which 64 and then 48 are kept: on 2 ranks 24 each, 6 micro-batches of 4, and
    # 3 optimizer steps of 2 of them.
    stage = grpo_sift(
        [{"name": "high_loss", "keep": 64}, {"name": "uniform_rows", "keep": 0.75}],
        prompts=12,
        optimizer_steps_per_rollout=3,
        trainer={"max_steps": 20},
    )
    numbers = batch_arithmetic(stage, 2)
    assert (numbers.rows, numbers.rows_per_rank, numbers.prompts_kept) == (96, 48, 12)
    assert (numbers.rows_kept, numbers.kept_per_rank, numbers.micro_batch_size) == (48, 24, 4)
    assert (numbers.micro_batches_per_rank, numbers.steps_per_generation) == (6, 6)
    assert numbers.gradient_accumulation_steps == 2
    assert (numbers.optimizer_steps, numbers.rollouts) == (20, 7)  # as many rollouts as without a selector
    plain = batch_arithmetic(grpo(prompts_per_step=12, optimizer_steps_per_rollout=3, trainer={"max_steps": 20}), 2)
    assert (plain.rows_kept, plain.kept_per_rank, plain.steps_per_generation, plain.rollouts) == (None, None, 12, 7)


def test_fewer_completions_than_a_micro_batch_are_one_micro_batch() -> None:
    numbers = batch_arithmetic(grpo_sift({"name": "high_loss", "keep": 6}), 2)
    assert (numbers.kept_per_rank, numbers.micro_batch_size, numbers.gradient_accumulation_steps) == (3, 3, 1)
    two_steps = batch_arithmetic(grpo_sift({"name": "high_loss", "keep": 12}, optimizer_steps_per_rollout=2), 2)
    assert (two_steps.kept_per_rank, two_steps.micro_batch_size, two_steps.micro_batches_per_rank) == (6, 3, 2)
    assert two_steps.gradient_accumulation_steps == 1


KEEP, MICRO, STEPS = "batch_selector.keep", "micro_batch_size", "optimizer_steps_per_rollout"


@pytest.mark.parametrize(
    ("keep", "updates", "micro", "key", "problem"),
    [
        # 64 completions on 2 ranks: 32 each
        (30, 1, 4, KEEP, "the 15 rows that a rank trains on (30 of 64 rows over 2 ranks); write 24 or 32"),
        (31, 1, 4, KEEP, "31 of 64 rows do not divide over 2 ranks; write 24 or 32"),
        (0.45, 2, 4, KEEP, "29 of 64 rows do not divide over 2 ranks; write 0.25 or 0.5"),
        (31, 16, 2, KEEP, "31 of 64 rows do not divide over 2 ranks; write 32"),
        # 12 rows of an optimizer step make no micro-batches of 8, but of 4; and 6 rows make one of 6
        (48, 2, 8, STEPS, "trains on (48 of 64 rows over 2 ranks) into micro-batches of 8; write 1 or 4, or {MICRO} 4"),
        # 3 rows a rank are never 2 equal micro-batches
        (6, 2, 8, STEPS, "trains on (6 of 64 rows over 2 ranks) into micro-batches of 8; write 1, or {KEEP} 4 or 8"),
        (0.1, 4, 8, STEPS, "trains on (6 of 64 rows over 2 ranks) into micro-batches of 8; write 1, or {KEEP} 0.12"),
    ],
)
def test_kept_completions_divide_over_ranks_micro_batches_and_optimizer_steps(
    keep: float | int, updates: int, micro: int, key: str, problem: str
) -> None:
    def stage(changes: dict) -> GRPOStage:
        keys = {KEEP: keep, MICRO: micro, STEPS: updates, **changes}
        return grpo_sift({"name": "high_loss", "keep": keys.pop(KEEP)}, **keys)

    with pytest.raises(RecipeError) as caught:
        batch_arithmetic(stage({}), 2)
    assert ".".join(map(str, caught.value.key)) == key
    assert caught.value.problem.endswith(problem.format(KEEP=KEEP, MICRO=MICRO))
    name = key
    for word in re.findall(r"[\w.]+", problem.format(KEEP=KEEP, MICRO=MICRO).split("; write ")[1]):
        if word in (KEEP, MICRO):
            name = word
        elif word != "or":
            value = parse_yaml(word)
            numbers = batch_arithmetic(stage({name: value}), 2)
            assert numbers.micro_batch_size * numbers.micro_batches_per_rank * 2 == numbers.rows_kept
            num_updates = value if name == STEPS else updates
            assert numbers.gradient_accumulation_steps * num_updates == numbers.micro_batches_per_rank


def test_a_chain_s_error_names_the_selector_whose_keep_it_is() -> None:
    with pytest.raises(RecipeError, match="40 rows are more than the 32 to choose from") as caught:
        batch_arithmetic(grpo_sift(["high_loss", {"name": "high_loss", "keep": 40}]), 2)
    assert caught.value.key == ("batch_selector", 1, "keep")
