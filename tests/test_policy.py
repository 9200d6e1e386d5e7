"""The policy loss of single rows by hand, and what weighs their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from siftrl.policy import (
    as_row,
    collate,
    counts_rows,
    engine_corrections,
    row_losses,
    row_scale,
    scale_gradient,
)


def test_row_losses_by_hand() -> None:
    """Two rows of two and one tokens: -A c logp + beta (exp(ref - logp) - (ref - logp) - 1), mean over tokens."""
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    advantages, corrections = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.5], [1.0, 9.0]])
    reference = torch.tensor([[-1.0, -1.0], [-3.5, 9.0]])
    plain = row_losses(log_probs, mask, advantages, corrections)
    assert plain.tolist() == [(2 * 1 * 1 + 2 * 0.5 * 2) / 2, -3.0]
    (gradient,) = torch.autograd.grad(plain.sum(), log_probs)
    assert gradient.tolist() == [[-1.0, -0.5], [1.0, 0.0]]
    kl = [math.exp(0) - 0 - 1, math.exp(1) - 1 - 1, math.exp(-0.5) + 0.5 - 1]
    with_kl = row_losses(log_probs, mask, advantages, corrections, reference, beta=0.1)
    assert with_kl.tolist() == pytest.approx([2.0 + 0.1 * (kl[0] + kl[1]) / 2, -3.0 + 0.1 * kl[2]])
    (gradient,) = torch.autograd.grad(with_kl.sum(), log_probs)
    slopes = [0.0, 1 - math.exp(1), 1 - math.exp(-0.5)]  # of KL in log p
    expected = [-1 + 0.05 * slopes[0], -0.5 + 0.05 * slopes[1], 1 + 0.1 * slopes[2], 0]
    assert gradient.flatten().tolist() == pytest.approx(expected)
    corrected = row_losses(log_probs, mask, advantages, corrections, reference, beta=0.1, correct_kl=True)
    (gradient,) = torch.autograd.grad(corrected.sum(), log_probs)
    expected = [-1 + 0.05 * (slopes[0] + kl[0]), -0.5 + 0.05 * (slopes[1] + kl[1]), 1 + 0.1 * (slopes[2] + kl[2]), 0]
    assert gradient.flatten().tolist() == pytest.approx(expected)


def test_rows_are_collated_each_thing_at_its_tokens_place() -> None:
    def made(prompt: list[int], completion: list[int], mask: list[int], **more: Any) -> dict[str, torch.Tensor]:
        row = {"prompt_ids": torch.tensor(prompt), "completion_ids": torch.tensor(completion)}
        return row | {"completion_mask": torch.tensor(mask), "advantages": torch.tensor(0.5)} | more

    tool = {"tool_mask": torch.tensor([1, 0])}
    reference = [{"ref_per_token_logps": torch.tensor(values)} for values in ([-1.0, -2.0], [-3.0])]
    rows = [
        as_row(made([5, 6], [7, 8], [1, 1], **tool, **reference[0])),
        as_row(made([9], [4], [1], **reference[1])),
    ]
    batch = collate(rows, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 4, -100, -100]]
    assert batch["reference"].tolist() == [[0, 0, -1, -2], [0, -3, 0, 0]]
    assert batch["advantages"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("kind", "expected"), [("grpo", 2 * 4 / 10), ("luspo", 2 * 4 / 10), ("bnpo", 7 * 4 / 50), ("dapo", 1.0)]
)
def test_row_scale_by_hand(kind: str, expected: float) -> None:
    """A micro-batch of 2 rows with 7 tokens, one of 4 of a step of 10 rows and 50 weighted tokens."""
    scale = row_scale(kind, torch.tensor([3, 4]), step_rows=10, step_tokens=50.0, micro_batches=4)
    assert scale == pytest.approx(expected)


def test_which_losses_count_rows() -> None:
    kinds = ("grpo", "sapo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo")
    assert [kind for kind in kinds if counts_rows(kind)] == ["grpo", "sapo"]


def test_only_the_gradient_is_scaled() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    scaled = scale_gradient(values, torch.tensor([2.0, 0.0]))
    assert torch.equal(scaled, values)
    (gradient,) = torch.autograd.grad((scaled**2).sum(), values)
    assert gradient.tolist() == [[4.0, 8.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [1.0, 3.0, 1.0]]),
        ("token_mask", [[2.0, 0.5, 1.0], [1.0, 0.0, 1.0]]),
        ("sequence_truncate", [[1.0], [3.0]]),
        ("sequence_mask", [[1.0], [0.0]]),
    ],
)
def test_engine_corrections_by_hand(mode: str, expected: list[list[float]]) -> None:
    """Ratios 2, 1/2 and 9 (no loss) in the first row; unknown, 4 and 1 in the second; at most 3."""
    ratios = torch.tensor([[2.0, 0.5, 9.0], [1.0, 4.0, 1.0]])
    sampling = torch.full((2, 3), -1.0)
    sampling[1, 0] = float("nan")
    mask = torch.tensor([[True, True, False], [True, True, True]])
    log_probs = (ratios.log() - 1).requires_grad_()
    found = engine_corrections(log_probs, sampling, mask, mode, None, 3.0)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad
