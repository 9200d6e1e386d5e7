"""Batch selectors that read rewards and advantages: their choice by hand, and against all subsets."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from siftrl import plugins
from siftrl.selectors.largest_advantage import LargestAdvantage
from siftrl.selectors.reward_variance import RewardVariance, most_spread
from siftrl.types import BatchSelector, Selection, Signals

NAN = float("nan")


def completions(groups: list[list[float]], numbers: list[int] | None = None, advantages: Any = None) -> Signals:
    """Signals of prompts with these rewards. numbers: the prompts' own. advantages: reward less the prompt's mean."""
    rewards = torch.tensor([reward for group in groups for reward in group])
    sizes = torch.tensor([len(group) for group in groups])
    means = torch.tensor([torch.tensor(group).nanmean() for group in groups]).repeat_interleave(sizes)
    return Signals(
        num_tokens=torch.ones(len(rewards), dtype=torch.int64),
        rewards=rewards,
        advantages=(rewards - means).nan_to_num() if advantages is None else torch.tensor(advantages),
        groups=torch.tensor(numbers or list(range(len(groups)))).repeat_interleave(sizes),
    )


def select(selector: BatchSelector, given: Signals, keep: int, seed: int = 0) -> Selection:
    return selector.select(given, keep, torch.Generator().manual_seed(seed))


def kept(selector: BatchSelector, given: Signals, keep: int, seed: int = 0) -> list[int]:
    return sorted(select(selector, given, keep, seed).indices.tolist())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------- the subset of a prompt


@pytest.mark.parametrize("kind", ["normal", "few values", "skewed", "far from zero"])
def test_no_subset_has_a_larger_variance(kind: str) -> None:
    rng = generator()
    for size in (1, 2, 3, 5, 8):
        rewards = {
            "normal": lambda n: torch.randn(n, generator=rng),
            "few values": lambda n: torch.randint(0, 3, (n,), generator=rng).float(),
            "skewed": lambda n: torch.randn(n, generator=rng).exp().square(),
            "far from zero": lambda n: 100 + 0.01 * torch.randn(n, generator=rng),
        }[kind](size)
        for keep in range(size + 1):
            places = most_spread(rewards, keep, generator(keep))
            assert len(set(places.tolist())) == keep and set(places.tolist()) <= set(range(size))
            if keep:
                subsets = torch.stack([*map(torch.stack, itertools.combinations(rewards.double(), keep))])
                largest = subsets.var(dim=1, correction=0).max()
                assert float(rewards[places].double().var(correction=0)) == pytest.approx(float(largest), rel=2e-6)


def test_the_extremes_are_not_halves() -> None:
    rewards = torch.tensor([8.0, 9.0, 0.0, 7.0, 9.0])
    assert sorted(most_spread(rewards, 3, generator()).tolist()) == [1, 2, 4]
    assert sorted(most_spread(9 - rewards, 3, generator()).tolist()) == [1, 2, 4]
    assert sorted(most_spread(rewards, 4, generator()).tolist()) == [0, 1, 2, 4]  # 0 and 8 9 9


def test_equal_rewards_and_equal_variances_are_drawn() -> None:
    """Four right, four wrong, three kept: two of either and one of the other, any of them."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    times, num_right = torch.zeros(8), Counter[int]()
    for seed in range(400):
        places = most_spread(rewards, 3, generator(seed))
        times[places] += 1
        num_right[int(rewards[places].sum())] += 1
        assert places.tolist() == most_spread(rewards, 3, generator(seed)).tolist()
    assert num_right.keys() == {1, 2} and abs(num_right[1] - 200) < 50  # standard deviation 10
    assert ((times - 150).abs() < 50).all()  # 3/8 of 400, standard deviation 9.7


@pytest.mark.parametrize(
    ("rewards", "keep"),
    [([0.1, 0.9, 0.9, 0.1, 0.1, 0.9], 3), ([0.2, 0.1, 0.3, 0.0], 3), ([0.3, 0.1, 0.7, 0.6], 1), ([0.3, 0.1, 0.7], 1)],
)
def test_ties_survive_rounding(rewards: list[float], keep: int) -> None:
    """Tenths are no sums of powers of two, and still three of them may be low, high, high or low, low, high."""
    middle = (min(rewards) + max(rewards)) / 2
    found = Counter[bool]()
    for seed in range(60):
        chosen = torch.tensor(rewards)[most_spread(torch.tensor(rewards), keep, generator(seed))]
        found[bool(chosen.mean() > middle)] += 1
    assert min(found[True], found[False]) > 10


@pytest.mark.parametrize("reward", [0.0, 0.1, -0.7, 1e5])
def test_equal_rewards_are_all_alike(reward: float) -> None:
    places = {tuple(sorted(most_spread(torch.full((7,), reward), 3, generator(seed)).tolist())) for seed in range(30)}
    assert len(places) > 10


# ---------------------------------------------------------------------------------------------------- reward variance


def test_reward_variance_by_hand() -> None:
    selector = RewardVariance()
    given = completions([[3.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 8.0]])
    selection = select(selector, given, 4)
    chosen = sorted(selection.indices.tolist())
    assert chosen[:2] == [0, 1] and chosen[3] == 7 and chosen[2] in (4, 5, 6)
    assert selection.scores.tolist() == given.rewards.tolist()  # type: ignore[union-attr]
    assert selection.reasons == ("score",) * 4 and selection.weights.tolist() == [1.0] * 4
    assert selector.metrics() == {
        "kept_variance": (2 * 1.5**2 + 2 * 4.0**2) / 4,
        "mean_variance": (2 * 1.5**2 + 2 * 0.5**2 + 3 * 2.0**2 + 6.0**2) / 8,
        "kept_reward": 11 / 4,
        "mean_reward": 14 / 8,
    }


def test_binary_rewards_give_as_many_right_as_wrong() -> None:
    given = completions([[1.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 0, 0, 0, 1, 1]])
    assert given.rewards is not None
    rewards = given.rewards[kept(RewardVariance(), given, 8)]
    assert rewards.sum() == 1 + 2, "4 a prompt: the only right one of the first, half of the second's"


def test_the_rows_are_dealt_in_proportion_to_what_is_on_offer() -> None:
    # Of prompt 7 two completions are left, of prompt 2 six: one and three of four places. The rows lie anywhere.
    given = completions([[6.0, 8.0], [0.0, 1, 2, 3, 4, 5]], numbers=[7, 2]).subset(
        torch.tensor([7, 0, 3, 1, 4, 2, 5, 6])
    )
    assert given.rewards is not None
    for seed in range(8):
        chosen = sorted(given.rewards[kept(RewardVariance(), given, 4, seed)].tolist())
        assert chosen[0] == 0 and chosen[1] in (1, 4) and chosen[2] == 5 and chosen[3] in (6, 8)


def test_one_of_a_prompt_is_its_highest_or_its_lowest() -> None:
    given = completions([[1.0, 0.5, 0.0], [0.5, 0.0, 1.0]])
    found = {tuple(kept(RewardVariance(), given, 2, seed)) for seed in range(40)}
    assert found == {(0, 4), (0, 5), (2, 4), (2, 5)}


def test_missing_rewards_come_last() -> None:
    selector = RewardVariance()
    given = completions([[NAN, 1.0, 0.0, NAN], [NAN, NAN, NAN, 2.0], [NAN] * 4, [NAN, 1.0, NAN, 0.0]])
    for keep in (2, 4, 5):
        assert set(kept(selector, given, keep)) <= {1, 2, 7, 13, 15}
    assert selector.metrics()["mean_reward"] == pytest.approx(4 / 5)
    selection = select(selector, given, 7)
    assert set(selection.indices.tolist()) > {1, 2, 7, 13, 15} and len(set(selection.indices.tolist())) == 7
    assert selection.reasons == ("score",) * 5 + ("fill",) * 2
    assert kept(selector, given, 16) == list(range(16))


# -------------------------------------------------------------------------------------------------- largest advantage


def test_largest_advantage_by_hand() -> None:
    selector = LargestAdvantage()
    given = completions([[0.0] * 3, [0.0] * 3], advantages=[-2.0, 0.5, 1.5, 0.25, -0.75, 0.5])
    selection = select(selector, given, 3)
    assert selection.indices.tolist() == [0, 2, 4]
    assert selection.scores.tolist() == [2.0, 0.5, 1.5, 0.25, 0.75, 0.5]
    assert selection.probability.tolist() == [1, 0, 1, 0, 1, 0]
    metrics = {"kept_advantage": 4.25 / 3, "mean_advantage": 5.5 / 6, "kept_positive": 1 / 3}
    assert selector.metrics() == pytest.approx(metrics)


def test_equal_advantages_are_drawn() -> None:
    """Right and wrong in equal numbers: every |A| is the same, and the first prompts have no advantage."""
    given = completions([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    times = torch.zeros(12)
    for seed in range(400):
        selection = select(LargestAdvantage(), given, 3, seed)
        times[selection.indices] += 1
        assert selection.indices.tolist() == select(LargestAdvantage(), given, 3, seed).indices.tolist()
    assert times[8:].sum() == 0 and ((times[:8] - 150).abs() < 50).all()  # standard deviation 9.7
    assert selection.probability.tolist() == [0.375] * 8 + [0.0] * 4


def test_the_chance_of_the_last_places_is_shared() -> None:
    given = completions([[0.0] * 5], advantages=[0.5, -1.0, 0.5, 0.0, -0.5])
    selection = select(LargestAdvantage(), given, 3)
    assert selection.indices[0] == 1
    assert selection.probability.tolist() == pytest.approx([2 / 3, 1, 2 / 3, 0, 2 / 3])


def test_every_prompt_keeps_its_share_within_groups() -> None:
    # A rare success has a large advantage, and so has its whole group: over the batch the first prompt takes all.
    advantages = [-0.6, 1.5, -0.6, 0.7, -0.4, 0.5, 0.5, -0.55]
    given = completions([[0.0] * 4, [0.0] * 4], numbers=[5, 3], advantages=advantages)
    assert kept(LargestAdvantage(), given, 4) == [0, 1, 2, 3]
    selector = LargestAdvantage(within="group")
    assert kept(selector, given, 2) == [1, 7]
    for seed in range(8):
        assert kept(selector, given, 4, seed) in ([1, 3, 5, 7], [1, 3, 6, 7])
    assert select(selector, given, 4).probability.tolist() == [0, 1, 0, 1, 0, 0.5, 0.5, 1]


# ------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("name", ["reward_variance", "largest_advantage"])
def test_they_are_well_formed_and_for_grpo_only(name: str) -> None:
    assert plugins.find("selector", name).role == "batch"
    selector = plugins.load("selector", name, {})
    assert type(selector).reads_rewards and not selector.needs and not selector.weighted
    given = completions(torch.randn(5, 4, generator=generator()).tolist())
    for keep in (1, 7, 20):
        selection = select(selector, given, keep)
        assert selection.indices.dtype == torch.int64 and len(set(selection.indices.tolist())) == keep
        assert selection.weights.tolist() == [1.0] * keep and len(selection.reasons) == keep
        assert selection.scores.shape == selection.probability.shape == (20,)
    assert selector.state_dict() == {}


def test_wrong_keys_are_named() -> None:
    with pytest.raises(plugins.PluginError, match="within: must be batch or group, not the text 'prompt'"):
        plugins.validate("selector", "largest_advantage", {"within": "prompt"})
    with pytest.raises(plugins.PluginError, match="within"):
        plugins.validate("selector", "reward_variance", {"within": "batch"})
