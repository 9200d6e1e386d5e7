"""A coreset as an estimator: the policy gradient of few completions against that of all, in a small model's rollouts.

The rollouts and the comparison are those of `bench_policy_coreset.py`. The gradients that are compared are autograd's,
of the V projection, which the coreset sees, and of all parameters, which it does not.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_policy_coreset import GROUP, Rollout, against_all, judge, mean, roll_out

from siftrl.batch_selection import Link, choose
from siftrl.selectors.gradient_coreset import GradientCoreset
from siftrl.signals import ValueGradient

ROLLOUTS = 4
OURS = ("gradient_coreset", "gradient_coreset, history: false")
OTHERS = ("uniform_rows", "gradient_coreset, paper: true")


@pytest.fixture(scope="module")
def rollouts(tiny_model: str) -> list[Rollout]:
    return roll_out(tiny_model, ROLLOUTS, seed=0)


def test_the_signal_is_the_policy_gradient_of_v(rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        gradients = rollout.signals[ValueGradient()]
        dense = gradients.total(torch.eye(len(gradients))).double()
        assert torch.allclose(dense, rollout.value, rtol=1e-4, atol=1e-6)
        assert not dense[~rollout.usable].any() and dense[rollout.usable].any(1).all()


@pytest.mark.parametrize("keep", [0.5, 0.25])
@pytest.mark.parametrize("loss", ["rows", "tokens"])
def test_the_coreset_is_nearer_to_the_whole_gradient(rollouts: list[Rollout], loss: str, keep: float) -> None:
    given = [rollout.counting(loss) for rollout in rollouts]
    # The first rollout gives the history. Adam's step from nothing is the gradient's sign, where the size of an
    # advantage does not show: there the coreset is no better than random rows.
    found = {method: mean(judge(given, method, keep)[1:]) for method in (*OURS, *OTHERS)}
    for method in OURS:
        for other in OTHERS:
            assert found[method]["value_error"] < 0.6 * found[other]["value_error"], (method, other)
            assert found[method]["error"] < 0.85 * found[other]["error"], (method, other)
        assert found[method]["value_cosine"] > found["uniform_rows"]["value_cosine"]
        assert found[method]["cosine"] > found["uniform_rows"]["cosine"]


@pytest.mark.parametrize("loss", ["rows", "tokens"])
def test_completions_that_came_several_times_are_kept_once(rollouts: list[Rollout], loss: str) -> None:
    """Row i comes 1 + i % 3 times: with a place for each kind, nothing of the gradient is lost."""
    rollout = rollouts[0].counting(loss)
    kinds = rollout.usable.nonzero().flatten()
    rows = kinds.repeat_interleave(1 + torch.arange(len(kinds)) % 3)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    of_all, of_value = (products[rows][:, rows] for products in rollout.products)
    several = Rollout(rollout.signals.subset(rows), rollout.value[rows], (of_all, of_value))
    num_kinds = len(rollout.value[kinds].unique(dim=0))
    for history in (True, False):
        link = Link(GradientCoreset(history=history), num_kinds)
        selection = choose([link], several.signals, several.usable, torch.Generator())
        assert against_all(several, selection)["error"] < 1e-3
        assert selection.weights.max() > 2 * selection.weights.min()
        unweighted = replace(selection, weights=torch.ones(num_kinds))
        assert against_all(several, unweighted)["error"] > 0.1


def test_sources_of_completions(rollouts: list[Rollout]) -> None:
    """A small source's completions are all kept, as long as they have an advantage; the prompts name their source."""
    rollout = rollouts[0]
    prompt = rollout.signals.groups
    assert prompt is not None and rollout.usable[prompt == 0].all()
    source = ["rare" if number == 0 else "common" for number in prompt.tolist()]
    signals = replace(rollout.signals, source=source, source_sizes={"rare": 1, "common": 99})
    keep = int(rollout.usable.sum()) // 2
    selection = choose([Link(GradientCoreset(), keep)], signals, rollout.usable, torch.Generator())
    kept = selection.indices.tolist()
    assert kept[:GROUP] == list(range(GROUP)) and len(kept) == keep
    assert selection.reasons == ("small source",) * GROUP + ("medoid",) * (keep - GROUP)
    assert rollout.usable[kept].all()
