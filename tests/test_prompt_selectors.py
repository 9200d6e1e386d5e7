"""Every prompt selector: its maths by hand on four rows, and what all of them promise the trainer."""

import copy
import io

import pytest
import torch

from siftrl.calibration import group_statistics
from siftrl.selectors.difficulty_pools import DifficultyPools, _largest_remainder
from siftrl.selectors.dynamic_sampling import DynamicSampling
from siftrl.selectors.posterior_sampling import PosteriorSampling
from siftrl.selectors.prompt_curriculum import PromptCurriculum
from siftrl.selectors.static_filter import StaticFilter
from siftrl.selectors.uniform import Uniform
from siftrl.types import Candidates, Prediction, Selection

NAN = float("nan")
ALL = {
    "curriculum": lambda: PromptCurriculum(window=8, explore=0.5),
    "curriculum by spread": lambda: PromptCurriculum(rank_by="spread", fallback=False),
    "uniform": Uniform,
    "dynamic": DynamicSampling,
    "posterior": PosteriorSampling,
    "pools": lambda: DifficultyPools(easy=0.25, normal=0.5, hard=0.25),
    "static": StaticFilter,
}
EVERY_SELECTOR = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def candidates(ids, mean=None, spread=None, dtype=torch.float32, rates=None):
    ids = list(ids)
    value = None
    if mean is not None or spread is not None:
        value = Prediction(
            mean=torch.tensor([0.5] * len(ids) if mean is None else mean, dtype=dtype),
            spread=torch.tensor([0.1] * len(ids) if spread is None else spread, dtype=dtype),
        )
    rows = [{"prompt": f"row {i}"} for i in ids]
    if rates is not None:
        rows = [row | {"pass_rate": rate} for row, rate in zip(rows, rates, strict=True)]
    return Candidates(torch.tensor(ids), rows, value)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observed(selector, ids, rewards, **columns):
    """Shows the selector the rewards (a list of groups) of the candidates `ids`, all of them chosen."""
    drawn = candidates(ids, **columns)
    whole = Selection.of(torch.arange(len(drawn)), len(drawn), probability=torch.ones(len(drawn)))
    selector.observe(drawn, whole, torch.tensor(rewards))
    return selector


class World:
    """1000 prompts with known success rates; half are always or never solved, as in a real data set."""

    def __init__(self, noise=0.15):
        rng = generator(99)
        rates = torch.rand(1000, generator=rng)
        self.rates = torch.where(torch.rand(1000, generator=rng) < 0.5, (rates > 0.5).float(), rates)
        self.value = (self.rates + noise * torch.randn(1000, generator=rng)).clamp(0, 1)

    def step(self, selector, keep, rng):
        ids = torch.randperm(1000, generator=rng)[: selector.num_candidates(keep)]
        mean = self.value[ids]
        rows = [{"prompt": "", "pass_rate": float(self.rates[i])} for i in ids]
        drawn = Candidates(ids, rows, Prediction(mean, mean * (1 - mean)))
        selection = selector.propose(drawn, keep, rng)
        rates = self.rates[ids[selection.indices]]
        rewards = torch.bernoulli(rates[:, None].expand(-1, 8), generator=rng)
        selector.observe(drawn, selection, rewards)
        return drawn, selection, rewards


# ---- what every selector promises


@EVERY_SELECTOR
def test_a_selection_is_m_distinct_candidates_with_their_chances(make):
    selector, world, rng = make(), World(), generator()
    for _ in range(4):
        drawn, selection, _ = world.step(selector, 8, rng)
        assert selection.indices.dtype == torch.int64
        assert len(selection.indices.unique()) == len(selection.reasons) == len(selection.weights) == 8
        assert selection.weights.mean() == 1
        assert len(selection.scores) == len(selection.probability) == len(drawn)
        # the chances of all candidates add up to the number kept, and no chosen one had none
        assert float(selection.probability.sum()) == pytest.approx(8, abs=1e-4)
        assert (selection.probability[selection.indices] > 0).all()


@EVERY_SELECTOR
def test_same_generator_same_choice(make):
    runs = []
    for seed in (5, 5, 6):
        selector, world, rng = make(), World(), generator(seed)
        runs.append([world.step(selector, 8, rng)[1].indices.tolist() for _ in range(4)])
    assert runs[0] == runs[1]
    order_is_the_draw = make in (Uniform, DynamicSampling)
    assert runs[0] != runs[2] or order_is_the_draw


@EVERY_SELECTOR
def test_a_saved_selector_goes_on_as_if_never_stopped(make):
    selector, world, rng = make(), World(), generator()
    for _ in range(3):
        world.step(selector, 8, rng)
    file = io.BytesIO()
    torch.save(selector.state_dict(), file)
    file.seek(0)
    rng_state = rng.get_state()
    went_on = [world.step(selector, 8, rng)[:2] for _ in range(3)]

    resumed, rng = make(), generator()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rng.set_state(rng_state)
    for drawn, selection in went_on:
        again, same, _ = world.step(resumed, 8, rng)
        assert torch.equal(again.ids, drawn.ids)
        assert torch.equal(same.indices, selection.indices) and same.reasons == selection.reasons
        assert torch.equal(same.probability, selection.probability)
        assert torch.equal(same.scores.nan_to_num(-1), selection.scores.nan_to_num(-1))
    assert resumed.metrics() == selector.metrics()


@EVERY_SELECTOR
def test_a_state_dict_is_a_snapshot(make):
    selector, world, rng = make(), World(), generator()
    world.step(selector, 8, rng)
    state = selector.state_dict()
    before = copy.deepcopy(state)
    for _ in range(3):
        world.step(selector, 8, rng)
    assert str(state) == str(before)


@EVERY_SELECTOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unscored_group_teaches_nothing_and_breaks_nothing(make, dtype):
    columns = {"mean": [0.5, 0.4], "spread": [0.2, 0.1], "dtype": dtype, "rates": [0.5, 0.5]}
    selector = observed(make(), [1, 2], [[NAN, NAN], [NAN, NAN]], **columns)
    fresh = make()
    if not isinstance(selector, DynamicSampling):  # which counts what was rolled out, scored or not
        assert str(selector.state_dict()) == str(fresh.state_dict())
    assert selector.metrics()["effective_ratio"] == 0 and "observed_mean" not in selector.metrics()
    drawn = candidates(range(4), mean=[0.1, 0.5, 0.6, 0.9], dtype=dtype, rates=[0.1, 0.5, 0.6, 0.9])
    first, second = (one.propose(drawn, 2, generator()).indices for one in (selector, fresh))
    assert torch.equal(first, second)


# ---- prompt_curriculum


def exact(**keys):
    return PromptCurriculum(**{"explore": 0.0, "fallback": False, **keys})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curriculum_keeps_the_nearest_to_the_target(dtype):
    drawn = candidates([10, 11, 12, 13], mean=[0.9, 0.45, 0.0, 0.6], dtype=dtype)
    selection = exact().propose(drawn, 2, generator())
    assert selection.indices.tolist() == [1, 3]  # |V - 1/2| = 0.4, 0.05, 0.5, 0.1
    assert selection.scores.tolist() == pytest.approx([0.4, 0.05, 0.5, 0.1], abs=1e-6)
    assert selection.probability.tolist() == [0, 1, 0, 1]
    assert selection.reasons == ("score", "score")
    assert exact(target=0.9).propose(drawn, 1, generator()).indices.tolist() == [0]


def test_curriculum_draws_k_candidates_a_prompt():
    assert PromptCurriculum(candidates=4).num_candidates(16) == 64


def test_curriculum_ties_go_to_the_first_candidates():
    drawn = candidates(range(8), mean=[0.25, 0.75] * 4)
    assert exact().propose(drawn, 3, generator()).indices.tolist() == [0, 1, 2]


def test_curriculum_explores_outside_the_best():
    selector = PromptCurriculum(explore=0.5, fallback=False)
    drawn = candidates(range(8), mean=[0.5, 0.5, 0.1, 0.0, 0.9, 1.0, 0.0, 1.0])
    found = set()
    for seed in range(60):
        selection = selector.propose(drawn, 4, generator(seed))
        assert selection.indices[:2].tolist() == [0, 1]
        assert selection.reasons == ("score", "score", "explore", "explore")
        assert selection.probability.tolist() == pytest.approx([1, 1] + [2 / 6] * 6)
        found |= set(selection.indices[2:].tolist())
    assert found == {2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    "explore, keep, num",
    [(0.125, 16, 2), (0.125, 12, 2), (0.125, 11, 1), (0.01, 16, 1), (0.0, 16, 0), (0.125, 1, 0), (1.0, 5, 5)],
)
def test_curriculum_rounds_the_explored_share(explore, keep, num):
    selector = PromptCurriculum(explore=explore, fallback=False)
    drawn = candidates(range(4 * keep), mean=[0.5] * (4 * keep))
    assert selector.propose(drawn, keep, generator()).reasons.count("explore") == num


def test_curriculum_keeps_all_where_no_more_are_there():
    selection = PromptCurriculum(explore=0.5, fallback=False).propose(
        candidates(range(4), mean=[0.1, 0.2, 0.5, 0.6]), 4, generator()
    )
    assert sorted(selection.indices.tolist()) == [0, 1, 2, 3] and selection.probability.tolist() == [1] * 4


def test_curriculum_ranks_by_spread_once_a_third_reward_is_seen():
    drawn = candidates(range(4), mean=[0.5, 0.9, 0.1, 0.5], spread=[0.01, 0.3, 0.2, 0.0])
    selector = observed(exact(), [0], [[0.0, 1.0]], mean=[0.5])
    assert selector.propose(drawn, 2, generator()).indices.tolist() == [0, 3]
    observed(selector, [0], [[0.5, 1.0]], mean=[0.5])
    selection = selector.propose(drawn, 2, generator())
    assert selection.indices.tolist() == [1, 2]
    assert selection.scores.tolist() == pytest.approx([-0.01, -0.3, -0.2, 0.0])
    assert exact(rank_by="spread").propose(drawn, 2, generator()).indices.tolist() == [1, 2]
    mean = observed(exact(rank_by="mean"), [0], [[0.0, 0.5, 1.0]], mean=[0.5])
    assert mean.propose(drawn, 2, generator()).indices.tolist() == [0, 3]


def test_curriculum_target_is_the_success_rate_between_two_rewards():
    drawn = candidates(range(4), mean=[0.5, 0.0, -0.9, 0.9])
    selector = observed(exact(), [7], [[-1.0, 1.0]], mean=[0.0])
    selection = selector.propose(drawn, 1, generator())
    assert selection.indices.tolist() == [1]  # half of -1 and 1 is 0
    assert selection.scores.tolist() == pytest.approx([0.5, 0, 0.9, 0.9])


def test_curriculum_float_noise_is_no_third_reward():
    selector = observed(exact(), [0], [[0.1 + 0.2, 0.3, 0.0]], mean=[0.5])
    assert selector.state_dict()["values"] == [0.0, 0.3]


def test_curriculum_is_uniform_until_the_value_model_has_shown_itself():
    selector = PromptCurriculum(window=4, explore=0.0)
    drawn = candidates(range(4), mean=[0.9, 0.5, 0.0, 0.6])
    selection = selector.propose(drawn, 2, generator())
    assert selection.reasons == ("uniform", "uniform") and selection.probability.tolist() == [0.5] * 4
    groups = [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]  # means 0, 1/2, 1/2, 1
    observed(selector, range(3), groups[:3], mean=[0.0, 0.5, 0.5])
    assert selector.propose(drawn, 2, generator()).reasons == ("uniform", "uniform")  # 3 judged of 4
    observed(selector, range(4), groups, mean=[0.1, 0.4, 0.6, 0.8])
    assert selector.propose(drawn, 2, generator()).reasons == ("score", "score")
    observed(selector, range(4), groups, mean=[1.0, 0.5, 0.5, 0.0])  # upside down: worse than a constant
    assert selector.propose(drawn, 2, generator()).reasons == ("uniform", "uniform")
    never = PromptCurriculum(window=4, fallback=False)
    assert "uniform" not in never.propose(drawn, 2, generator()).reasons


def test_curriculum_is_judged_by_what_it_ranks_by():
    selector = PromptCurriculum(window=4, explore=0.0, rank_by="spread")
    groups = [[0.0, 0.0], [0.0, 1.0], [0.4, 0.6], [1.0, 1.0]]  # variances 0, 0.5, 0.02, 0
    observed(selector, range(4), groups, mean=[0.0, 0.5, 0.5, 1.0], spread=[0.5, 0.0, 0.5, 0.5])
    assert selector.metrics()["explained_variance"] == pytest.approx(1)
    assert selector.metrics()["spread_explained_variance"] < 0
    drawn = candidates(range(4), mean=[0.5] * 4, spread=[0.1, 0.4, 0.3, 0.2])
    assert selector.propose(drawn, 2, generator()).reasons == ("uniform", "uniform")
    observed(selector, range(4), groups, mean=[0.9] * 4, spread=[0.0, 0.4, 0.1, 0.0])
    assert selector.propose(drawn, 2, generator()).indices.tolist() == [1, 2]


def test_curriculum_tells_no_figure_of_the_value_model_before_enough_is_judged():
    """One success among 24 completions: an explained variance of -27 would say nothing."""
    selector, groups = PromptCurriculum(window=100, fallback=False), [[0.0, 0.0]] * 11 + [[0.0, 1.0]]
    for _ in range(5):
        observed(selector, range(12), groups, mean=[0.5] * 12)
        assert {"explained_variance", "brier", "equivalent_rollouts"}.isdisjoint(selector.metrics())
    observed(selector, range(12), groups, mean=[0.5] * 12)  # 72 judged
    assert {"explained_variance", "brier", "equivalent_rollouts"} <= selector.metrics().keys()


def test_curriculum_metrics_by_hand():
    selector = PromptCurriculum(window=3, fallback=False)
    drawn = candidates([3, 4, 5, 6], mean=[0.0, 0.5, 0.75, 1.0])
    selection = Selection.of(
        torch.tensor([1, 2, 0]),
        4,
        probability=torch.tensor([0.5, 1.0, 1.0, 0.5]),
        reasons=("score", "score", "explore"),
    )
    # means 1/2, 1 and 0 of the scored ones; V said 1/2, 3/4, 0
    selector.observe(drawn, selection, torch.tensor([[0.0, 1.0], [1.0, NAN], [0.0, 0.0]]))
    figures = selector.metrics()
    # weights 1, 1, 2: weighted mean 3/8; deviations 1/64 + 25/64 + 2 * 9/64 = 44/64; error 1/16
    assert figures["explained_variance"] == pytest.approx(1 - (1 / 16) / (44 / 64))
    assert figures["brier"] == pytest.approx((1 / 16) / 4)
    assert figures["rank_correlation"] == pytest.approx(1)
    # groups of two: within variance 1/2 and 0 with weights 1 and 2: s2 = 1/6, error 0 - s2/2 < 0: the cap
    assert figures["equivalent_rollouts"] == 1000
    assert figures["effective_ratio"] == pytest.approx(1 / 3)
    assert figures["explored"] == pytest.approx(1 / 3) and figures["fallback"] == 0
    assert figures["predicted_mean"] == pytest.approx(1.25 / 3)
    assert figures["observed_mean"] == pytest.approx(1.5 / 3)


def test_curriculum_window_holds_whole_steps():
    selector = PromptCurriculum(window=4)
    for _ in range(4):
        observed(selector, range(3), [[0.0, 1.0]] * 3, mean=[0.5] * 3)
    assert [len(step) for step in selector.state_dict()["steps"]] == [3, 3]  # 3 are fewer than 4, 6 are enough


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("field", ["mean", "spread"])
def test_curriculum_refuses_predictions_that_are_no_numbers(bad, field):
    drawn = candidates([7, 8, 9], **{"mean": [0.5] * 3, field: [0.5, bad, bad]})
    with pytest.raises(ValueError, match=rf"{field} of {bad} for row 8 .*2 of 3.*prompt_selector.value.lr"):
        PromptCurriculum().propose(drawn, 1, generator())


def test_curriculum_finds_effective_groups():
    ratio = {}
    for name, selector in (("uniform", Uniform()), ("curriculum", PromptCurriculum(window=64))):
        world, rng = World(), generator(1)
        steps = [world.step(selector, 16, rng)[2] for _ in range(40)]
        ratio[name] = float(group_statistics(torch.cat(steps[10:])).effective().double().mean())
    assert ratio["uniform"] < 0.5 and ratio["curriculum"] > ratio["uniform"] + 0.3


def test_curriculum_judges_as_if_all_candidates_had_been_rolled_out():
    world, rng = World(noise=0.3), generator(2)
    selector = PromptCurriculum(window=100_000, fallback=False)
    for _ in range(300):
        world.step(selector, 16, rng)
    figures = selector.metrics()
    means = torch.bernoulli(world.rates[:, None].expand(-1, 8), generator=rng).mean(dim=1)
    truth = 1 - (means - world.value).square().mean() / means.var()
    assert figures["explained_variance"] == pytest.approx(float(truth), abs=0.05)
    judged = torch.cat(selector.state_dict()["steps"])
    predicted, mean = judged[:, 0], judged[:, 2]
    naive = 1 - (mean - predicted).square().mean() / mean.var()
    assert naive < truth - 0.2  # the chosen are all alike in V: without the weights V looks far worse than it is


# ---- the controls


def test_uniform_keeps_all_in_order():
    selection = Uniform().propose(candidates([4, 2, 9]), 3, generator())
    assert selection.indices.tolist() == [0, 1, 2] and selection.probability.tolist() == [1, 1, 1]
    assert selection.reasons == ("uniform",) * 3 and Uniform().num_candidates(3) == 3


def test_dynamic_sampling_accepts_groups_with_spread():
    selector = DynamicSampling()
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, NAN], [0.3, 0.3 + 1e-7], [NAN, NAN], [0.3, 0.31]])
    assert selector.accept(rewards).tolist() == [False, True, False, False, False, True]
    assert DynamicSampling(tolerance=0.1).accept(rewards).tolist() == [False, True, *[False] * 4]
    assert selector.max_rounds == 4 and selector.num_candidates(5) == 5


def test_dynamic_sampling_counts_its_price():
    selector = DynamicSampling()
    observed(selector, [0, 1], [[0.0, 1.0], [1.0, 1.0]])
    observed(selector, [2, 3], [[0.0, 0.0], [1.0, 1.0]])
    assert selector.metrics()["accepted"] == 0
    assert selector.metrics()["accepted_overall"] == 1 / 4


def test_posterior_by_hand():
    selector = PosteriorSampling(discount=0.5, prior=1.0)
    observed(selector, [3, 7], [[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, NAN, 0.5]])
    # 3: alpha 1 + 3, beta 1 + 1; 7: alpha 1 + 1/2, beta 1 + 5/2
    assert selector.state_dict()["posterior"] == {3: (4.0, 2.0), 7: (1.5, 3.5)}
    observed(selector, [3], [[0.0, 0.0]])
    # alpha 4/2 + 1/2 + 0, beta 2/2 + 1/2 + 2
    assert selector.state_dict()["posterior"][3] == (2.5, 3.5)
    assert selector.metrics()["predicted_mean"] == pytest.approx(4 / 6)  # before these two were seen
    assert selector.metrics()["prompts_known"] == 2


def test_posterior_maps_rewards_to_successes():
    selector = PosteriorSampling(failure=-1.0, success=1.0, discount=1.0)
    observed(selector, [0], [[-1.0, 0.0, 1.0, 3.0]])
    assert selector.state_dict()["posterior"] == {0: (1 + 2.5, 1 + 1.5)}
    assert selector.metrics()["clamped"] == 1 / 4
    with pytest.raises(ValueError, match="failure.*below success"):
        PosteriorSampling(failure=1.0, success=1.0)


def test_posterior_keeps_prompts_believed_near_the_target():
    selector = PosteriorSampling(discount=1.0)
    observed(selector, range(4), [[1.0] * 400, [0.0, 1.0] * 200, [0.0] * 400, [0.0, 1.0, 1.0, 1.0] * 100])
    selection = selector.propose(candidates(range(4)), 2, generator())
    assert selection.indices.tolist() == [1, 3]
    assert selection.scores.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.25], abs=0.1)


def test_posterior_draws_are_beta():
    selector = PosteriorSampling(prior=2.0, target=0.0)  # the score is the draw itself
    selector.load_state_dict({"posterior": {i: (2.0, 6.0) for i in range(4000)}})
    draws = selector.propose(candidates(range(4000)), 1, generator()).scores
    assert float(draws.mean()) == pytest.approx(2 / 8, abs=0.01)
    assert float(draws.var()) == pytest.approx(2 * 6 / (8 * 8 * 9), rel=0.1)


def test_pools_by_hand():
    selector = DifficultyPools(easy=0.25, normal=0.5, hard=0.25, candidates=2)
    observed(selector, range(6), [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, NAN], [0.5, 0.5]])
    drawn = candidates([0, 1, 2, 3, 4, 5, 6, 7])  # easy 0 3, normal 1 5 and unseen 6 7, hard 2 4
    selection = selector.propose(drawn, 4, generator())
    assert selection.indices.tolist() == [1, 5, 0, 2]
    assert selection.reasons == ("normal", "normal", "easy", "hard")
    assert selection.probability.tolist() == [0.5] * 8
    assert selection.scores[:6].tolist() == [1, 0.5, 0, 1, 0, 0.5] and selection.scores[6:].isnan().all()


def test_pools_fill_from_the_others():
    selector = DifficultyPools(easy=0.25, normal=0.5, hard=0.25)
    observed(selector, [0, 1], [[1.0, 1.0], [1.0, 1.0]])
    drawn = candidates([0, 1, 5, 6, 7, 8])  # 2 easy, 4 normal, none hard: one place left, five wait
    selection = selector.propose(drawn, 4, generator())
    assert selection.indices.tolist() == [2, 3, 0, 1]
    assert selection.reasons == ("normal", "normal", "easy", "fill")
    # 2 of 4 normal, 1 of 2 easy, then one of the three left
    assert selection.probability.tolist() == pytest.approx([0.5 + 0.5 / 3] * 6)
    selector.observe(drawn, selection, torch.zeros(4, 2))
    assert selector.metrics()["filled"] == 1 / 4 and selector.metrics()["hard_known"] == 4


@pytest.mark.parametrize(
    "shares, total, quotas",
    [
        ([0.8, 0.1, 0.1], 16, [13, 2, 1]),  # 12.8, 1.6, 1.6
        ([0.8, 0.1, 0.1], 10, [8, 1, 1]),
        ([1 / 3] * 3, 4, [2, 1, 1]),
        ([0.0, 0.5, 0.5], 3, [0, 2, 1]),
        ([0.7, 0.2, 0.1], 30, [21, 6, 3]),
        ([0.5, 0.5, 0.0], 0, [0, 0, 0]),
    ],
)
def test_quotas_add_up(shares, total, quotas):
    assert _largest_remainder(shares, total) == quotas


def test_pools_refuse_shares_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"easy \+ normal \+ hard must be 1, not 1.1"):
        DifficultyPools(easy=0.2)
    with pytest.raises(ValueError, match="hard_below .* must be below easy_above"):
        DifficultyPools(hard_below=0.8)


def test_static_filter_by_hand():
    drawn = candidates([5, 6, 7, 8], rates=[0.95, 0.1, 0.0, 0.6])
    selection = StaticFilter().propose(drawn, 2, generator())
    assert selection.indices.tolist() == [1, 3] and selection.reasons == ("uniform", "uniform")
    assert selection.scores.tolist() == pytest.approx([0.05, 0, 0.1, 0])
    assert selection.probability.tolist() == [0, 1, 0, 1]
    assert StaticFilter().propose(drawn, 1, generator()).probability.tolist() == [0, 0.5, 0, 0.5]


def test_static_filter_fills_with_the_nearest():
    selector, drawn = StaticFilter(), candidates([5, 6, 7, 8], rates=[1, 0.5, 0.0, 0.95])
    selection = selector.propose(drawn, 2, generator())
    assert selection.indices.tolist() == [1, 3] and selection.reasons == ("uniform", "fill")
    selector.observe(drawn, selection, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    figures = selector.metrics()
    assert figures["inside"] == 1 / 4 and figures["filled"] == 1 / 2 and figures["effective_ratio"] == 1 / 2


def test_static_filter_says_how_to_measure_a_pass_rate():
    with pytest.raises(ValueError, match=r"no column 'pass_rate' \(it has prompt\).*siftrl eval.*mean_reward"):
        StaticFilter().propose(candidates([1, 2]), 1, generator())
    with pytest.raises(ValueError, match="'pass_rate' of row 2 of the data holds None"):
        StaticFilter().propose(candidates([1, 2], rates=[0.5, None]), 1, generator())
    with pytest.raises(ValueError, match=r"low \(0.9\) must not be above high \(0.1\)"):
        StaticFilter(low=0.9, high=0.1)
