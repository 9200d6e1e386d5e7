from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from siftrl.lengths import ExpectedLength, deal_prompts, idle_tail, makespan


def test_before_anything_is_known_the_prompts_order_is_that_of_their_tokens() -> None:
    tokens = torch.tensor([30, 10, 20])
    expected = ExpectedLength().predict(torch.tensor([0, 1, 2]), tokens, torch.tensor([0.1, 0.9, 0.5]))
    assert expected.dtype == torch.float64
    assert expected.argsort().tolist() == [1, 2, 0]


def test_one_feature_by_hand() -> None:
    """Tokens 1, 2, 3 with lengths 10, 20, 60, nothing else known: x_bar 2, y_bar 30, C = 2/3, c = 100/3.

    Without ridge w = 50 / 1; with ridge 3 (as many as there are prompts) C counts twice, so w = 25. For 5 tokens:
    30 + 3 · 25 and 30 + 3 · 12.5.
    """
    ids, tokens, lengths = torch.arange(3), torch.tensor([1, 2, 3]), torch.tensor([10.0, 20.0, 60.0])
    for ridge, slope in ((0.0, 25.0), (3.0, 12.5)):
        model = ExpectedLength(ridge=ridge)
        model.observe(ids, tokens, None, lengths)
        new = model.predict(torch.tensor([7]), torch.tensor([5]), None)
        torch.testing.assert_close(new, torch.tensor([30 + 3 * slope], dtype=torch.float64))


def test_older_steps_count_less() -> None:
    """The same tokens throughout, so only the mean counts: lengths 10, then 40, discount 0.5: (5 + 40) / 1.5 = 30."""
    model = ExpectedLength(discount=0.5)
    for length in (10.0, 40.0):
        model.observe(torch.tensor([0, 1]), torch.tensor([8, 8]), None, torch.tensor([length, length]))
    new = model.predict(torch.tensor([5]), torch.tensor([8]), None)
    torch.testing.assert_close(new, torch.tensor([30.0], dtype=torch.float64))


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()


def rollout(ids: Tensor, growth: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts whose completions are the longer, the more tokens and the less reward; and one in two twice that."""
    tokens = 20 + ids * 7 % 31
    predicted = (ids * 5 % 11) / 10
    return tokens, predicted, growth * (2.0 * tokens + 60 * (1 - predicted)) * (1 + ids % 2)


def test_the_reward_and_the_last_length_each_make_it_better() -> None:
    """Correlation of predicted and true lengths on 64 prompts, with what is known growing from left to right."""
    seen, new = torch.arange(64), torch.arange(64, 128)
    tokens, predicted, lengths = rollout(seen)
    with_tokens, with_reward = ExpectedLength(), ExpectedLength()
    for _ in range(2):  # the second time each prompt has a last length
        with_tokens.observe(seen, tokens, None, lengths)
        with_reward.observe(seen, tokens, predicted, lengths)
    tokens, predicted, lengths = rollout(new)
    plain = correlation(with_tokens.predict(new, tokens, None), lengths)
    rewarded = correlation(with_reward.predict(new, tokens, predicted), lengths)
    tokens, predicted, lengths = rollout(seen)
    known = correlation(with_reward.predict(seen, tokens, predicted), lengths)
    assert 0.1 < plain < rewarded - 0.05 and rewarded < known - 0.2 and known > 0.99


def test_lengths_that_grow_as_the_policy_learns_are_followed() -> None:
    model, ids = ExpectedLength(discount=0.7), torch.arange(32)
    for step in range(12):
        tokens, predicted, lengths = rollout(ids, growth=1 + step / 10)
        model.observe(ids, tokens, predicted, lengths)
    tokens, predicted, lengths = rollout(ids, growth=2.2)
    assert 0.8 < (model.predict(ids, tokens, predicted).mean() / lengths.mean()).item() < 1.0
    assert correlation(model.predict(ids, tokens, predicted), lengths) > 0.99


def test_no_completion_is_expected_to_be_shorter_than_a_token() -> None:
    model, ids = ExpectedLength(ridge=0.0), torch.arange(2)
    model.observe(ids, torch.tensor([10, 20]), None, torch.tensor([50.0, 10.0]))
    assert model.predict(torch.tensor([5]), torch.tensor([40]), None).tolist() == [1.0]


def test_state_goes_on_exactly() -> None:
    ids = torch.arange(16)
    tokens, predicted, lengths = rollout(ids)
    model, other = ExpectedLength(), ExpectedLength()
    model.observe(ids, tokens, predicted, lengths)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for one in (model, other):
        one.observe(ids[:8], tokens[:8], predicted[:8], lengths[:8] + 3)
    assert torch.equal(model.predict(ids, tokens, predicted), other.predict(ids, tokens, predicted))
    fresh = ExpectedLength()
    fresh.observe(ids[:8], tokens[:8], predicted[:8], lengths[:8] + 3)
    assert not torch.equal(model.predict(ids, tokens, predicted), fresh.predict(ids, tokens, predicted))


def test_prompts_go_to_the_rank_with_the_fewest_tokens_and_room() -> None:
    """9 -> 0, 7 -> 1, 6 -> 1 (13), 5 -> 0 (14), 4 -> 1 (17, full), 1 -> 0 (15)."""
    assert deal_prompts(torch.tensor([1.0, 9.0, 6.0, 7.0, 4.0, 5.0]), 2) == [[1, 5, 0], [3, 2, 4]]


def test_a_rank_that_is_full_gets_no_more() -> None:
    """After 10 -> 0 rank 1 has the fewest tokens all along, but only two places."""
    assert deal_prompts(torch.tensor([10.0, 1.0, 1.0, 1.0]), 2) == [[0, 3], [1, 2]]


def test_dealing_evens_out_long_tailed_lengths() -> None:
    """Of 16 prompts a rank, none is much above the mean, unless it holds the longest and the 15 shortest prompts."""
    torch.manual_seed(0)
    for _ in range(20):
        expected = torch.distributions.LogNormal(5.0, 0.8).sample((64,)).double()
        dealt = deal_prompts(expected, 4)
        assert sorted(prompt for rank in dealt for prompt in rank) == list(range(64))
        assert {len(rank) for rank in dealt} == {16}
        assert all(expected[rank].tolist() == sorted(expected[rank].tolist(), reverse=True) for rank in dealt)
        slowest = max(expected[rank].sum().item() for rank in dealt)
        unavoidable = expected.max() + expected.sort().values[:15].sum()
        assert slowest <= max(1.07 * expected.sum() / 4, 1.0001 * unavoidable)
        assert slowest < expected.view(4, 16).sum(1).max()


@pytest.mark.parametrize(
    ("lengths", "slots", "steps", "idle"),
    [
        ([8, 2, 2, 4], 4, 8, 1 - 16 / 32),  # all side by side: the longest decides
        ([8, 2, 2, 4], 100, 8, 1 - 16 / 32),  # slots that no request could take do not count
        ([8, 2, 2, 4], 2, 8, 0.0),  # 8 | 2 + 2 + 4
        ([2, 2, 4, 8], 2, 10, 1 - 16 / 20),  # 2 + 4 | 2 + 8: the longest started last
        ([8, 4, 2, 2], 2, 8, 0.0),
        ([3, 5], 1, 8, 0.0),
        ([], 4, 0, 0.0),
        ([0, 0], 4, 0, 0.0),
    ],
)
def test_idle_slots_by_hand(lengths: list[int], slots: int, steps: int, idle: float) -> None:
    assert makespan(lengths, slots) == steps
    assert idle_tail(lengths, slots) == pytest.approx(idle)
