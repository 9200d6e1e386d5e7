"""What a selector of one's own answers is checked, with its class named; and what ranks compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import digit_share
from grpo_runs import build, run

from siftrl import distributed
from siftrl.selection_checks import check_accepted, check_selection
from siftrl.types import Candidates, PromptSelector, Selection


class Mine(PromptSelector):
    """Answers what it is told to."""

    def __init__(self, answer: Any = None, accepted: Any = None) -> None:
        self.answer, self.accepted = answer, accepted

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        return Selection.of(torch.arange(keep), len(candidates)) if self.answer is None else self.answer

    def accept(self, rewards: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(rewards), dtype=torch.bool) if self.accepted is None else self.accepted


def answer(indices: Any, weights: Any = None, **changes: Any) -> Selection:
    """Of 4 prompts."""
    indices = torch.tensor(indices)
    whole = Selection.of(indices, 4, weights=None if weights is None else torch.tensor(weights))
    return Selection(**{name: changes.get(name, getattr(whole, name)) for name in Selection.__dataclass_fields__})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (answer([1, 1]), r"propose must return 2 different prompts of the 4 that it is given, it returned 2 \(1"),
        (answer([0, 1, 2]), r"propose must return 2 different prompts .*it returned 3"),
        (answer([0, 4]), r"2 different prompts .*\(1 different"),
        (answer([3, -1]), r"2 different prompts .*\(1 different"),
        (answer([0.0, 1.0]), r"the indices must be an int64 tensor \[2\], not torch.float32 \[2\]"),
        (answer([[0], [1]]), r"the indices must be an int64 tensor \[2\], not torch.int64 \[2, 1\]"),
        (answer([0, 1], reasons=("score",)), r"2 weights and reasons, and 4 scores .* it returned 2, 1, 4, 4"),
        (answer([0, 1], weights=[1.0, 3.0]), "weights other than 1; prompts have none, so leave them out"),
        (answer([0, 1], weights=[1.0, float("nan")]), "weights other than 1"),
        ([0, 1], r"propose must return a Selection, it returned a list; write Selection.of\(...\)"),
    ],
)
def test_a_prompt_selectors_answer_is_checked(wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"prompt_selector Mine: .*{said}"):
        check_selection(wrong, 2, 4, Mine(), "prompt", weighted=False)
    check_selection(answer([3, 0]), 2, 4, Mine(), "prompt", weighted=False)


@pytest.mark.parametrize(
    "wrong", [torch.ones(3, dtype=torch.bool), torch.ones(2), torch.ones(2, 1, dtype=torch.bool), [True, True]]
)
def test_accept_says_yes_or_no_to_each_group(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt_selector Mine: accept must return a bool tensor \[2\], .*returned"):
        check_accepted(wrong, 2, Mine())


@pytest.mark.slow
@pytest.mark.parametrize(
    "selector", [Mine(answer=answer([1, 1])), Mine(accepted=torch.ones(3))], ids=["propose", "accept"]
)
def test_the_trainer_checks_them(tiny_model: str, sums: Any, tmp_path: Path, selector: Mine) -> None:
    with pytest.raises(ValueError, match="prompt_selector Mine: (propose|accept) must return"):
        run(build(tiny_model, tmp_path, sums, None, prompt_selector=selector, reward=digit_share))


def test_ranks_compare_rows_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weights = torch.tensor([3, 1]), torch.tensor([0.5, 1.5])
    other: list[Any] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, other[0] if other else mine])
    digest = distributed.check_same(rows, "the rows", weights)
    other[:] = [(digest, weights * (1 + 1e-5))]
    assert distributed.check_same(rows, "the rows", weights) == digest  # rounding
    other[:] = [(digest, weights.flip(0))]
    with pytest.raises(RuntimeError, match=r"disagree on the weights of the rows; .*\n.*0.5, 1.5.*\n.*1.5, 0.5"):
        distributed.check_same(rows, "the rows", weights)
    other[:] = [("another", weights)]
    with pytest.raises(RuntimeError, match="disagree on the rows;"):
        distributed.check_same(rows, "the rows", weights)
