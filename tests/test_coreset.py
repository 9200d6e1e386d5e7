"""The maths of coresets: by hand on four rows, and the fast greedy against plain ones."""

import heapq

import numpy as np
import pytest
import torch

from siftrl.coreset import (
    adam_direction,
    budgets,
    facility_location,
    l1_similarity,
    medoid_weights,
    top_coordinates,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_greedy(similarity, budget):
    """Every candidate's gain from scratch at every pick; ties go to the lowest index."""
    s = similarity.double().T
    best, chosen = s.min(dim=1).values, []
    for _ in range(budget):
        gains = [-1.0 if c in chosen else float((s[:, c] - best).clamp(min=0).sum()) for c in range(len(s))]
        chosen.append(gains.index(max(gains)))
        best = torch.maximum(best, s[:, chosen[-1]])
    return chosen


def lazy_greedy(similarity, budget):
    """A heap of old gains, which are never below the new ones; a popped gain that is up to date is the largest."""
    s = similarity.double().numpy()
    best, chosen = s.min(axis=1), []
    heap = [(-np.maximum(s[:, c] - best, 0).sum(), c, 0) for c in range(len(s))]
    heapq.heapify(heap)
    while len(chosen) < budget:
        _, candidate, seen = heapq.heappop(heap)
        if seen == len(chosen):
            chosen.append(candidate)
            best = np.maximum(best, s[:, candidate])
        else:
            gain = np.maximum(s[:, candidate] - best, 0).sum()
            heapq.heappush(heap, (-gain, candidate, len(chosen)))
    return chosen


# ---- facility location


LINE = torch.tensor([[0.0], [1.0], [4.0], [9.0]])


def test_l1_similarity_by_hand():
    assert l1_similarity(LINE).tolist() == [[9, 8, 5, 0], [8, 9, 6, 1], [5, 6, 9, 4], [0, 1, 4, 9]]
    plane = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-1.0, 1.0]])  # distances 3, 2 and 5
    assert l1_similarity(plane).tolist() == [[5, 2, 3], [2, 5, 0], [3, 0, 5]]
    assert l1_similarity(torch.ones(3, 2)).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize("shift", [0.0, -100.0, 1000.0])
def test_facility_location_by_hand(shift):
    # Column sums 22 24 24 14: row 1 before row 2. Then gains 1, 6 and 8, then 1 and 3. A constant changes nothing.
    similarity = l1_similarity(LINE) + shift
    for budget, cluster in ((1, [0, 0, 0, 0]), (2, [0, 0, 0, 1]), (3, [0, 0, 2, 1]), (4, [3, 0, 2, 1])):
        chosen, served = facility_location(similarity, budget)
        assert chosen.tolist() == [1, 3, 2, 0][:budget] and served.tolist() == cluster
        assert chosen.dtype == served.dtype == torch.int64
    assert facility_location(similarity, 9)[0].tolist() == [1, 3, 2, 0]


def test_facility_location_leaves_its_argument_alone():
    for dtype in (torch.float32, torch.float64):
        similarity = l1_similarity(LINE).to(dtype)
        before = similarity.clone()
        facility_location(similarity, 2)
        assert torch.equal(similarity, before)


def test_facility_location_rows_serve_columns():
    # s_ji is how well j serves i: row 2 serves all others best, and nobody serves row 2.
    similarity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    chosen, cluster = facility_location(similarity, 2)
    assert chosen.tolist() == [2, 0] and cluster.tolist() == [0, 0, 0]
    assert facility_location(similarity.T, 1)[0].tolist() == [0]  # row sums 6 6 5


def test_equal_rows_that_are_all_chosen_serve_themselves():
    chosen, cluster = facility_location(torch.zeros(3, 3), 2)
    assert chosen.tolist() == [0, 1] and cluster.tolist() == [0, 1, 0]
    chosen, cluster = facility_location(l1_similarity(torch.tensor([[5.0], [5.0], [5.0], [0.0]])), 3)
    assert chosen.tolist() == [0, 3, 1] and cluster.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("num", [1, 2, 5, 17, 40, 64])
@pytest.mark.parametrize("kind", ["matrix", "small integers", "distances", "duplicates"])
def test_facility_location_is_the_greedy_choice(num, kind):
    rng = generator(num)
    features = torch.randn(num, 6, generator=rng)
    similarity = {
        "matrix": lambda: torch.rand(num, num, generator=rng),  # neither symmetric nor largest on the diagonal
        "small integers": lambda: torch.randint(0, 4, (num, num), generator=rng).float(),  # full of ties
        "distances": lambda: l1_similarity(features),
        "duplicates": lambda: l1_similarity(features[torch.randint(0, 1 + num // 3, (num,), generator=rng)].round()),
    }[kind]()
    chosen, cluster = facility_location(similarity, num)
    assert chosen.tolist() == naive_greedy(similarity, num)
    half = max(1, num // 2)
    chosen, cluster = facility_location(similarity, half)
    assert chosen.tolist() == naive_greedy(similarity, half)
    served = similarity.gather(0, chosen[cluster][None])[0]
    assert torch.equal(served, similarity[chosen].max(dim=0).values)


def test_facility_location_among_many_rows():
    features = torch.randn(1024, 8, generator=generator())
    similarity = l1_similarity(features)
    assert facility_location(similarity, 512)[0].tolist() == lazy_greedy(similarity, 512)


def test_gains_of_equal_rows_stay_equal_to_the_end():
    # 67 different rows, 8 copies of each, shuffled: one copy of each comes first, always the first copy, and then
    # nothing is left to gain, so the others follow in their order.
    different = torch.randn(67, 5, generator=generator(1))
    kind = torch.arange(67).repeat(8)[torch.randperm(536, generator=generator(2))]
    chosen, _ = facility_location(l1_similarity(different[kind]), 536)
    first = [kind.tolist().index(i) for i in range(67)]
    assert sorted(chosen[:67].tolist()) == sorted(first)
    assert chosen[67:].tolist() == sorted(set(range(536)) - set(first))


# ---- weights, budgets, coordinates


def test_medoid_weights_by_hand():
    cluster, chosen = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 2])
    assert medoid_weights(cluster, chosen).tolist() == [3, 1]
    assert medoid_weights(cluster, chosen, torch.tensor([10, 4, 5, 6])).tolist() == [20 / 4, 5 / 5]
    assert medoid_weights(cluster, chosen, torch.tensor([9, 0, 0, 6])).tolist() == [9 + 1 + 6, 1]
    assert medoid_weights(cluster, chosen, torch.ones(4)).tolist() == [3, 1]  # a mean over rows


@pytest.mark.parametrize("shares", [[3, 8, 1, 7, 4, 2], [1.0] * 6])
def test_medoid_weights_give_the_large_batchs_gradient(shares):
    cluster, chosen = torch.tensor([0, 1, 1, 0, 1, 2]), torch.tensor([3, 1, 5])
    shares = torch.tensor(shares)
    gradients = torch.randn(3, 4, generator=generator(), dtype=torch.float64)[cluster]  # alike inside a cluster
    weights = medoid_weights(cluster, chosen, shares).double() * shares[chosen]
    mean = (weights[:, None] * gradients[chosen]).sum(0) / weights.sum()
    whole = (shares[:, None] * gradients).sum(0) / shares.sum()
    assert torch.allclose(mean, whole, rtol=1e-6)


@pytest.mark.parametrize(
    "counts, keep, quotas",
    [
        ([8, 1, 1], 5, [4, 1, 0]),  # 4, 0.5, 0.5: the first of equals
        ([5, 3, 2], 4, [2, 1, 1]),  # 2, 1.2, 0.8
        ([1, 1, 98], 50, [1, 0, 49]),
        ([7, 0, 3], 9, [6, 0, 3]),  # 6.3, 0, 2.7
        ([2, 3], 5, [2, 3]),
        ([2, 3], 9, [2, 3]),
        ([2, 3], 0, [0, 0]),
        ([], 3, []),
        ([30, 30, 30], 9, [3, 3, 3]),
    ],
)
def test_budgets_by_hand(counts, keep, quotas):
    assert budgets(torch.tensor(counts, dtype=torch.int64), keep).tolist() == quotas
    named = {str(index): count for index, count in enumerate(counts)}
    assert budgets(named, keep) == {str(index): quota for index, quota in enumerate(quotas)}


def test_budgets_add_up_and_never_ask_too_much():
    rng = generator()
    for _ in range(200):
        counts = torch.randint(0, 20, (6,), generator=rng)
        keep = int(torch.randint(0, 80, (), generator=rng))
        quotas = budgets(counts, keep)
        assert quotas.sum() == min(keep, int(counts.sum())) and (quotas <= counts).all()
        exact = counts * min(1.0, keep / max(1, int(counts.sum())))
        assert ((quotas - exact).abs() < 1).all()


def test_top_coordinates_by_hand():
    mean = torch.tensor([0.5, -3.0, 0.0, 2.0, -0.5, 0.5])
    assert top_coordinates(mean, 2).tolist() == [1, 3]
    assert top_coordinates(mean, 3).tolist() == [0, 1, 3]  # 0, 4 and 5 are equal
    assert top_coordinates(mean, 4).tolist() == [0, 1, 3, 4]
    assert top_coordinates(mean, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert top_coordinates(torch.zeros(4), 2).tolist() == [0, 1]


# ---- Adam


def test_adam_direction_by_hand():
    m, v = torch.tensor([0.0, 0.2]), torch.tensor([0.0, 0.04])
    gradient = torch.tensor([[2.0, -0.2], [-4.0, 0.0]])
    # The first step from nothing: g / |g|. Betas 1/2 and 3/4, step 1.
    first = adam_direction(gradient, torch.zeros(2), torch.zeros(2), 1, (0.5, 0.75), eps=0.0)
    assert first[:, 0].tolist() == [1, -1] and float(first[0, 1]) == pytest.approx(-1)
    # Step 2: m_hat = (m/2 + g/2) / (3/4), v_hat = (3v/4 + g^2/4) / (7/16)
    second = adam_direction(gradient, m, v, 2, (0.5, 0.75), eps=0.0)
    assert float(second[0, 0]) == pytest.approx((1 / 0.75) / (1 / 0.4375) ** 0.5)
    assert float(second[0, 1]) == pytest.approx(0.0)
    assert float(second[1, 1]) == pytest.approx((0.1 / 0.75) / (0.03 / 0.4375) ** 0.5)
    assert float(adam_direction(gradient, m * 0, v * 0, 1, eps=2.0)[0, 0]) == pytest.approx(2 / (2 + 2))


def test_adam_direction_is_the_optimizers_step():
    rng = generator()
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.8, 0.95), eps=1e-3)
    m = v = torch.zeros(5, dtype=torch.float64)
    for step in range(1, 5):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(5, generator=rng, dtype=torch.float64)
        optimizer.step()
        direction = adam_direction(parameter.grad, m, v, step, (0.8, 0.95), 1e-3)
        assert torch.allclose(before - direction, parameter.detach())
        m, v = 0.8 * m + 0.2 * parameter.grad, 0.95 * v + 0.05 * parameter.grad.square()
