"""Kept completions on their way to micro-batches, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import grpo_args

from siftrl.trainers import completions
from siftrl.types import Selection, Signals

Row = dict[str, torch.Tensor]


def row(prompt: int, completion: int, advantage: float = 1.0, reward: float = 1.0, id_: int = 0) -> Row:
    """A row with so many tokens of each; the prompt's are 1, 2, ..."""
    return {
        "prompt_ids": torch.arange(1, prompt + 1),
        "prompt_mask": torch.ones(prompt, dtype=torch.int64),
        "completion_ids": torch.full((completion,), 7),
        "completion_mask": torch.ones(completion, dtype=torch.int64),
        "advantages": torch.tensor(advantage),
        "rewards": torch.tensor(reward),
        "ids": torch.tensor(id_),
    }


def test_describe() -> None:
    rows = [row(2, 3, 0.5, 1.0, id_=4), row(2, 1, -0.5, 0.0, id_=4), row(1, 4, id_=0), row(1, 4, id_=0)]
    rows[1]["tool_mask"] = torch.tensor([0])
    signals = completions.describe(rows, 2, "dapo", ["a", "b", "c", "d", None], {"a": 1})
    assert signals.num_tokens.tolist() == [3, 0, 4, 4] and signals.num_all_tokens.tolist() == [5, 3, 5, 5]
    assert signals.shares.tolist() == [3, 0, 4, 4]
    assert completions.describe(rows, 2, "grpo").shares.tolist() == [1, 1, 1, 1]
    assert signals.groups.tolist() == [0, 0, 1, 1]
    assert signals.source == [None, None, "a", "a"] and signals.source_sizes == {"a": 1}
    assert signals.rewards.tolist() == [1, 0, 1, 1] and signals.advantages.tolist() == [0.5, -0.5, 1, 1]


def test_what_teaches() -> None:
    """Groups of 3: one all the same up to rounding, one with a reward at its mean, one with a row without tokens."""
    rewards = torch.tensor([0.1, 0.1 + 1e-8, 0.1, 0.0, 0.5, 1.0, 1.0, 0.0, float("nan")])
    advantages = torch.tensor([1e-4, -2e-4, 1e-4, -1.0, 0.0, 1.0, 1.0, -1.0, 0.0])
    num_tokens = torch.tensor([5, 5, 5, 5, 5, 5, 5, 0, 5])
    signals = Signals(num_tokens, rewards=rewards, advantages=advantages)
    assert completions.teaches(signals, 3).tolist() == [False] * 3 + [True, False, True] + [True, False, False]
    assert completions.teaches(signals, 3, of_totals=False).tolist()[:3] == [True] * 3


def test_copies() -> None:
    """Two prompts with four completions each; the same tokens, loss mask and advantage make a copy."""
    rows = [row(2, 3), row(2, 3), row(2, 3, -1.0), row(2, 3)] + [row(2, 3), row(2, 2), row(2, 3), row(2, 2)]
    rows[3]["tool_mask"] = torch.tensor([1, 0, 1])
    signals = completions.describe(rows, 4, "dapo")
    teaching = torch.tensor([True] * 7 + [False])
    found = completions.with_copies(rows, signals, teaching)
    assert found.copies.tolist() == [2, 0, 1, 1, 2, 1, 0, 1]
    assert found.shares.tolist() == [6, 0, 3, 2, 6, 2, 0, 2]
    assert completions.with_copies(rows, signals, torch.zeros(8, dtype=torch.bool)).copies.tolist() == [1] * 8


def test_fill() -> None:
    generator, same = torch.Generator().manual_seed(0), torch.ones(8, dtype=torch.int64)
    chosen = Selection.of(torch.tensor([4, 2]), 8, weights=torch.tensor([1.0, 3.0]), reasons="score")
    assert completions.fill(chosen, torch.tensor([0, 1]), 2, same, generator) is chosen
    filled = completions.fill(chosen, torch.tensor([0, 1, 3]), 4, same, generator)
    assert filled.indices.tolist()[:2] == [4, 2] and len({0, 1, 3} & set(filled.indices.tolist()[2:])) == 2
    assert filled.weights.tolist() == [0.5, 1.5, 1, 1] and filled.reasons == ("score", "score", "fill", "fill")
    same[2] = 3  # the two stand for four rows, which weigh 2 together
    assert completions.fill(chosen, torch.tensor([0, 1, 3]), 4, same, generator) is chosen
    assert completions.fill(chosen, torch.tensor([0, 1, 3]), 5, same, generator).weights.tolist() == [0.5, 1.5, 0.5]


def test_the_step_is_as_long_as_that_of_all_rows() -> None:
    """6 rows with 1, ..., 6 tokens, of which 0, 1, 2, 3 teach: 4/6 of the rows, 10/21 of the tokens."""
    signals = completions.describe([row(1, n) for n in range(1, 7)], 2, "grpo")
    teaching = torch.tensor([True] * 4 + [False] * 2)

    def scale(indices: list[int], loss_type: str, weights: list[float] | None = None) -> float:
        weighed = None if weights is None else torch.tensor(weights)
        selection = Selection.of(torch.tensor(indices), 6, weights=weighed)
        return completions.step_scale(signals, selection, teaching, loss_type)

    for loss_type in ("grpo", "dr_grpo", "sapo", "luspo"):
        assert scale([0, 1], loss_type) == scale([3, 2], loss_type, [3.0, 1.0]) == pytest.approx(4 / 6)
        # one more fills up: the loss is divided by 5 rows, that of all by 6
        assert scale([0, 1, 2, 3, 4], loss_type) == pytest.approx(5 / 6)
        assert scale([0, 1, 2, 3, 4, 5], loss_type) == pytest.approx(1)
        assert scale([0, 4], loss_type, [3.0, 1.0]) == pytest.approx(4 / 6 * 4 / 3)
    for loss_type in ("dapo", "bnpo", "cispo", "vespo"):
        assert scale([0, 1], loss_type) == pytest.approx(10 / 21)
        assert scale([0, 1, 2, 3, 4], loss_type) == pytest.approx(15 / 21)  # tokens of the kept, of all
        assert scale([0, 4], loss_type, [3.0, 1.0]) == pytest.approx(10 / 21 * (3 * 1 + 5) / 3)
    assert scale([4, 5], "grpo") == 1


def test_micro_batches_by_hand() -> None:
    """5 of 6 rows are kept and one of them is not run: 4 on 2 ranks, longest first; denominators count 5."""
    rows = [row(1, n) for n in (9, 3, 8, 4, 5, 6)]
    signals = completions.describe(rows, 2, "grpo")
    selection = Selection.of(torch.tensor([0, 1, 2, 3, 5]), 6, weights=torch.tensor([1.0, 1.0, 2.0, 0.5, 0.5]))
    runs = torch.tensor([True, True, True, True, True, False])
    layout = completions.Layout(updates=1, micro_batches=1, ranks=2)
    dealt = completions.micro_batches(rows, signals, selection, runs, layout, "grpo", torch.Generator())
    lengths = [[[len(one["completion_ids"]) for one in part] for part, _ in rank] for rank in dealt]
    assert lengths == [[[9, 3]], [[8, 4]]]
    scales = [[factors.tolist() for _, factors in rank] for rank in dealt]
    each = 2 * 2 / 5  # 2 rows of a micro-batch, 2 micro-batches over all ranks, 5 rows of the step
    assert scales == [[pytest.approx([each, each])], [pytest.approx([2 * each, 0.5 * each])]]
    padded = 2 * (1 + 9) + 2 * (1 + 8)
    assert completions.padding_share(dealt) == pytest.approx(1 - (10 + 4 + 9 + 5) / padded)


def test_ranks_without_a_row_run_one_that_counts_for_nothing() -> None:
    rows = [row(1, 2), row(1, 3)]
    signals = completions.describe(rows, 2, "grpo")
    selection = Selection.of(torch.tensor([0, 1]), 2)
    layout = completions.Layout(updates=1, micro_batches=2, ranks=2)
    runs = torch.tensor([False, True])
    dealt = completions.micro_batches(rows, signals, selection, runs, layout, "grpo", torch.Generator())
    factors = [[scales.tolist() for _, scales in rank] for rank in dealt]
    assert factors == [[[2.0], [0.0]], [[0.0], [0.0]]]  # 1 row, 4 micro-batches, 2 rows of the step
    assert all(len(part) == 1 for rank in dealt for part, _ in rank)


def test_each_row_is_in_one_optimizer_step() -> None:
    rows = [row(1, n) for n in range(1, 13)]
    signals = completions.describe(rows, 2, "dapo")
    layout = completions.Layout(updates=3, micro_batches=2, ranks=2)
    dealt = completions.micro_batches(
        rows, signals, Selection.of(torch.arange(12), 12), torch.ones(12, dtype=torch.bool), layout, "dapo",
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [len(rank) for rank in dealt] == [6, 6]
    lengths = [[len(part[0]["completion_ids"]) for part, _ in rank] for rank in dealt]
    assert sorted(lengths[0] + lengths[1]) == list(range(1, 13))
    steps = [sorted(lengths[0][at : at + 2] + lengths[1][at : at + 2]) for at in (0, 2, 4)]
    assert steps != [[9, 10, 11, 12], [5, 6, 7, 8], [1, 2, 3, 4]]  # a step's rows are drawn, not sorted by length


@pytest.mark.parametrize(
    ("options", "keep", "expected"),
    [
        # rows of a micro-batch, micro-batches of an optimizer step and of a rollout
        ({}, 0.5, (8, 1, 1)),
        ({}, 0.25, (4, 1, 1)),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 0.5, (8, 1, 2)),
        ({"gradient_accumulation_steps": 8, "steps_per_generation": 4}, 0.5, (8, 4, 2)),
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}, 12, (4, 3, 3)),
    ],
)
def test_the_rollouts_arguments_become_those_of_kept_rows(
    tmp_path: Path, options: dict[str, Any], keep: float | int, expected: tuple[int, int, int]
) -> None:
    args = grpo_args(tmp_path, **options)
    made = completions.for_kept_rows(args, [keep])
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps, made.steps_per_generation) == expected
    assert made.generation_batch_size == args.generation_batch_size
    assert (made.num_generations, made.num_generations_eval) == (4, args.num_generations_eval)
    assert completions.for_kept_rows(args, [1.0]) is args


def test_fewer_rows_than_optimizer_steps_leave_some_without_any() -> None:
    rows = [row(1, 2), row(1, 3)]
    signals = completions.describe(rows, 2, "bnpo")
    layout = completions.Layout(updates=3, micro_batches=1, ranks=1)
    runs = torch.ones(2, dtype=torch.bool)
    (dealt,) = completions.micro_batches(
        rows, signals, Selection.of(torch.arange(2), 2), runs, layout, "bnpo", torch.Generator()
    )
    assert [scales.tolist() for _, scales in dealt] == [[1.0], [1.0], [0.0]]
