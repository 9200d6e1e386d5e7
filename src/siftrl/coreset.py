"""The maths of mini-batch coresets: few rows whose weighted gradient stands for that of many.

CoLM, Nguyen et al., Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures, arXiv
2407.19580: features are gradients divided as Adam would divide them (`adam_direction`), cut down to their largest
coordinates (`top_coordinates`), and the rows are medoids under the L1 distance (`l1_similarity`,
`facility_location`). Pure functions; they work on the device of their arguments.

Shapes: n rows to choose from, k rows chosen, D numbers of a gradient, K of them kept as features.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

Source = TypeVar("Source", bound=Hashable)


def facility_location(similarity: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The greedy maximiser of F(S) = sum_i max_{j in S} s_ji over sets S of `budget` rows.

    similarity: float [n, n], s_ji = how well row j stands for row i. budget: k >= 1; all n rows where it is larger.
    Returns chosen: int64 [k], rows in the order they were picked, each with the largest gain F(S + j) - F(S) (ties:
    the lowest index); and cluster: int64 [n], for each row the position in `chosen` of the row that stands for it,
    argmax_{j in S} s_ji (ties: the row itself, else the one picked first).

    Lazy greedy (Minoux, 1978), on the CPU: a gain only shrinks as S grows, so an old gain bounds the new one, and few
    candidates are looked at again for a pick.
    """
    s = similarity.detach().cpu().numpy()
    # With no medoid a row counts as served by its worst one. That shifts F by a constant, so no choice changes.
    best = s.min(axis=0)
    heap = [(-float((row - best).sum(dtype=np.float64)), candidate) for candidate, row in enumerate(s)]
    heapq.heapify(heap)
    cluster = np.zeros(len(s), dtype=np.int64)
    chosen: list[int] = []
    while len(chosen) < min(budget, len(s)):
        _, candidate = heapq.heappop(heap)
        row = s[candidate]
        fresh = (-float(np.maximum(row - best, 0).sum(dtype=np.float64)), candidate)
        if heap and fresh > heap[0]:
            heapq.heappush(heap, fresh)
            continue
        cluster[row > best] = len(chosen)
        best = np.maximum(best, row)
        if row[candidate] >= best[candidate]:
            cluster[candidate] = len(chosen)
        chosen.append(candidate)
    return torch.tensor(chosen, device=similarity.device), torch.from_numpy(cluster).to(similarity.device)


def l1_similarity(features: Tensor) -> Tensor:
    """float [n, n]: the largest L1 distance between two rows of `features` (float [n, K]), less their distance.

    s_ij = max_{a,b} |x_a - x_b|_1 - |x_i - x_j|_1, as in CoLM. Zero where all rows are equal.
    """
    distance = torch.cdist(features, features, p=1)
    return distance.max() - distance


def medoid_weights(cluster: Tensor, chosen: Tensor, shares: Tensor | None = None) -> Tensor:
    """float32 [k]: weights that make the chosen rows stand for all n.

    cluster (int64 [n]), chosen (int64 [k]): `facility_location`'s answer. shares: [n], s_i, what each row counts in
    the mean that is estimated, at least 1: its tokens, for a mean over tokens. None: the same for all.
    w_k = (shares of the cluster) / s_k, so that sum_k w_k s_k g_k / sum_k w_k s_k, the weighted mean of the chosen
    rows, estimates sum_i s_i g_i / sum_i s_i, that of all rows (g_i: gradient of row i's loss). With equal shares w_k
    is the size of the cluster. A row that counts less than 1, having no tokens, counts as 1.
    """
    if shares is None:
        return cluster.bincount(minlength=len(chosen)).float()
    shares = shares.clamp(min=1).double()  # sums of whole numbers: exact in any order
    return (cluster.bincount(weights=shares, minlength=len(chosen)) / shares[chosen]).float()


@overload
def budgets(counts: dict[Source, int], keep: int) -> dict[Source, int]: ...
@overload
def budgets(counts: Tensor, keep: int) -> Tensor: ...
def budgets(counts: dict[Source, int] | Tensor, keep: int) -> dict[Source, int] | Tensor:
    """Rows to keep of each source, in proportion to its `counts` (a mapping, or int64 [number of sources]).

    Hamilton's method: source s gets floor(keep * n_s / n), and what is left goes to the largest remainders (ties:
    the first source). No source gets more than it has; they add up to min(keep, n).
    """
    if isinstance(counts, Tensor):
        return counts.new_tensor(_largest_remainders(counts.tolist(), keep))
    return dict(zip(counts, _largest_remainders(list(counts.values()), keep), strict=True))


def _largest_remainders(counts: list[int], keep: int) -> list[int]:
    total = sum(counts)
    if keep >= total:
        return counts
    shares = [divmod(keep * count, total) for count in counts]
    quotas = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: -shares[i][1])  # stable
    for i in by_remainder[: keep - sum(quotas)]:
        quotas[i] += 1
    return quotas


def top_coordinates(mean: Tensor, k: int) -> Tensor:
    """int64 [min(k, D)], ascending: where |mean| (float [D]) is largest (ties: the lowest coordinates)."""
    magnitude = mean.abs()
    if k >= len(mean):
        return torch.arange(len(mean), device=mean.device)
    # topk alone breaks ties as it likes, and on a GPU not always alike.
    smallest = magnitude.topk(k, sorted=False).values.amin()
    above = (magnitude > smallest).nonzero().flatten()
    tied = (magnitude == smallest).nonzero().flatten()[: k - len(above)]
    return torch.cat([above, tied]).sort().values


def adam_direction(
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """float [..., K]: the direction in which Adam would move if each gradient were its next one.

    gradient: float [..., K]; m, v: float [K], moments after the steps before. step: the number of this step, from 1.
    m_i = b1 m + (1 - b1) g_i, v_i = b2 v + (1 - b2) g_i^2; the answer is m_hat / (sqrt(v_hat) + eps) with m_hat =
    m_i / (1 - b1^step) and v_hat = v_i / (1 - b2^step) (Kingma and Ba, arXiv 1412.6980, algorithm 1).
    """
    beta1, beta2 = betas
    first = (beta1 * m + (1 - beta1) * gradient) / (1 - beta1**step)
    second = (beta2 * v + (1 - beta2) * gradient.square()) / (1 - beta2**step)
    return first / (second.sqrt() + eps)
