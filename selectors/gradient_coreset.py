"""Few rows whose gradient matches that of the whole batch, chosen source by source.

Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures (CoLM), Nguyen et al., arXiv
2407.19580. All rows of small sources are kept; the others share the rest of the budget in proportion to their
candidates. Row i's gradient g_i (of the last block's V projection) becomes the step that Adam would take with it,
    m_i = b1 m + (1 - b1) g_i,  v_i = b2 v + (1 - b2) g_i^2,  x_i = m_hat_i / (sqrt(v_hat_i) + eps),
then it is cut to its source's `coordinates` of largest |mean_i x_i|; in each source the medoids S of the L1 distance
are kept, greedily maximising sum_i max_{j in S} (max distance - |x_i - x_j|_1). The paper's exact variant is
`paper: true`, with the small sources' names in `small`.

Added here: exact gradients; one perturbation a row, or several, for SPSA; small sources found by their share of the
data; weights, by which the kept rows' gradient estimates that of the batch: the mean over tokens, or the mean over rows
where that is what the loss is. Of completions (grpo) the gradient is that of the row's policy loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from siftrl.coreset import adam_direction, budgets, facility_location, l1_similarity, medoid_weights, top_coordinates
from siftrl.fields import Count, Positive, Share
from siftrl.recipe_text import choose
from siftrl.signals import ValueGradient
from siftrl.types import BatchSelector, Selection, Signals

if TYPE_CHECKING:
    from siftrl.gradients import RowGradients

OURS = {"estimate": "exact", "shared": False, "weights": "clusters"}
"""What null stands for; with spsa the weights are "none"."""
PUBLISHED = {"estimate": "spsa", "shared": True, "weights": "none", "perturbations": 1, "history": True}
"""What the paper's variant fixes."""


@dataclass
class GradientCoreset(BatchSelector):
    """Keeps medoids of the rows' gradients in each large source, and all rows of small sources.

    estimate: "exact": each row's gradient from one backward pass through the last block; "spsa": from two forward
        passes a perturbation. null: exact, with `paper` spsa.
    perturbations: random directions a row, for spsa.
    epsilon: how far the weights are moved along them, for spsa.
    shared: all rows share the directions, for spsa. Then with one direction the gradients differ in one number only.
        null: false, with `paper` true.
    small: a source is small when it has less than this share of the data set's rows; or the names of the small
        sources. When their rows alone are more than the budget, they share it as large ones do.
    coordinates: entries of the gradient that are compared, in each source those with the largest mean.
    beta1, beta2, eps: Adam's, for the comparison only.
    history: compare what Adam would make of the gradients, given those of the rows kept so far; false: the gradients.
    weights: "clusters": a kept row weighs as much as the rows that it stands for, by their tokens where the loss is a
        mean over tokens; "none": all kept rows weigh the same. null: clusters for exact gradients, none for spsa, whose
        clusters are too noisy to weigh.
    paper: the published variant: spsa with one shared direction, no weights, history of large sources only.
    """

    estimate: Literal["exact", "spsa"] | None = None
    perturbations: Count = 1
    epsilon: Positive = 1e-3
    shared: bool | None = None
    small: Share | list[str] = 0.05
    coordinates: Count = 2560
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Positive = 1e-8
    history: bool = True
    weights: Literal["none", "clusters"] | None = None
    paper: bool = False

    def __post_init__(self) -> None:
        for name, value in PUBLISHED.items() if self.paper else ():
            given = getattr(self, name)
            if given not in (None, value):
                raise ValueError(
                    f"gradient_coreset: {name}: {str(given).lower()} contradicts paper: true; write"
                    f" {name}: {str(value).lower()}, or paper: false"
                )
        for name, default in (("perturbations", 1), ("epsilon", 1e-3), ("shared", False)):
            if self._setting("estimate") == "exact" and getattr(self, name) not in (None, default):
                raise ValueError(
                    f"gradient_coreset: {name} is for spsa and the estimate is exact; write estimate: spsa, or leave"
                    f" {name} out"
                )
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise ValueError(f"gradient_coreset: {name} must be below 1; write the optimizer's own, such as 0.9")
        self._signal = ValueGradient(
            self._setting("estimate"), self.perturbations, self.epsilon, self._setting("shared")
        )
        self._m: Tensor | None = None  # float32 [D]; None before the first step, as v
        self._v: Tensor | None = None
        self._step = 0
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({self._signal})

    @property
    def weighted(self) -> bool:
        return self._setting("weights") == "clusters"

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        gradients: RowGradients = signals[self._signal]
        num, groups = len(signals), _groups(signals)
        shares = signals.num_tokens if signals.shares is None else signals.shares
        small = self._small_sources(signals)
        quotas = _quotas({source: len(rows) for source, rows in groups.items()}, small, keep)
        is_small, is_whole = torch.zeros(2, num, dtype=torch.bool)
        for source, rows in groups.items():
            is_small[rows], is_whole[rows] = source in small, quotas[source] == len(rows)
        sizes, weights = is_whole.float(), is_whole.float()  # a row kept whole stands for itself
        divided = [source for source, rows in groups.items() if 0 < quotas[source] < len(rows)]
        covered = []
        for source, features in zip(divided, self._features(gradients, [groups[s] for s in divided], num), strict=True):
            rows, similarity = groups[source], l1_similarity(features)
            medoids, cluster = facility_location(similarity, quotas[source])
            covered.append(_covered(similarity, medoids[cluster]))
            medoids, cluster = medoids.cpu(), cluster.cpu()
            sizes[rows[medoids]] = medoid_weights(cluster, medoids)
            weights[rows[medoids]] = medoid_weights(cluster, medoids, shares[rows])
        kept = sizes.nonzero().flatten()  # in the batch's order
        if self.history:
            # Ours holds all rows that are trained on, as Adam's own moments do; the paper's leaves small sources out.
            self._remember(gradients, kept[~is_small[kept]] if self.paper else kept, num)
        reasons = tuple("small source" if whole else "medoid" for whole in (is_small & is_whole)[kept].tolist())
        self._metrics = _measure(len(groups), is_small[kept], sizes[kept], reasons, covered)
        return Selection.of(
            kept,
            num,
            weights=weights[kept] if self.weighted else None,
            scores=sizes,  # how many candidates the row stands for: its cluster's size; 0 where it is not kept
            probability=(sizes > 0).float(),
            reasons=reasons,
        )

    def metrics(self) -> dict[str, float]:
        """Of the last step: `sources` (how many), `small_share` (of the kept rows, those of small sources),
        `mean_cluster` and `largest_cluster` (rows that a medoid stands for), `coverage` (mean over the rows of divided
        sources of their similarity to their medoid, 1 where it is equal to it; 0: as far apart as two rows are)."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        m, v = (None if moment is None else moment.cpu() for moment in (self._m, self._v))
        return {"m": m, "v": v, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._m, self._v, self._step = state["m"], state["v"], state["step"]

    def _setting(self, name: str) -> Any:
        """A field's value, or what null stands for."""
        given = getattr(self, name)
        if given is None and name == "weights" and self._setting("estimate") == "spsa":
            return "none"
        return (PUBLISHED if self.paper else OURS)[name] if given is None else given

    def _small_sources(self, signals: Signals) -> set[str | None]:
        """Names of the small sources, of the whole data set."""
        sizes = signals.source_sizes
        if not isinstance(self.small, list):
            total = sum(sizes.values()) if sizes else 0
            return {source for source, size in (sizes or {}).items() if size < self.small * total}
        for name in self.small:
            if sizes is None:
                raise ValueError(
                    f"gradient_coreset: small names the source {name!r}, and the rows have no source; name their column"
                    " in data.source, or leave small out"
                )
            if name not in sizes:
                known = [source for source in sizes if source is not None]
                raise ValueError(f"gradient_coreset: small: no row has the source {name!r}{choose(name, known)}")
        return set(self.small)

    def _features(self, gradients: RowGradients, groups: list[Tensor], num: int) -> Iterator[Tensor]:
        """For each group of rows, float32 [n, K]: their normalised gradients where the group's mean is largest."""
        if not groups:
            return
        shares = torch.zeros(len(groups), num)
        for share, rows in zip(shares, groups, strict=True):
            share[rows] = 1 / len(rows)
        for mean, rows in zip(gradients.total(shares, self._normalised), groups, strict=True):
            coordinates = top_coordinates(mean, self.coordinates)
            yield self._normalised(gradients.at(coordinates, rows), coordinates)

    def _normalised(self, gradient: Tensor, where: Tensor | slice = slice(None)) -> Tensor:
        """float [n, K]: the gradients (float [n, K], at the coordinates `where`) as Adam would step along them."""
        if not self.history:
            return gradient
        # Zeros before the first step. They lie where the gradients do, except in the first step of a resumed run.
        m, v = (
            torch.zeros_like(gradient[0]) if moment is None else moment.to(gradient.device)[where]
            for moment in (self._m, self._v)
        )
        return adam_direction(gradient, m, v, self._step + 1, (self.beta1, self.beta2), self.eps)

    def _remember(self, gradients: RowGradients, rows: Tensor, num: int) -> None:
        """m <- b1 m + (1 - b1) mean g_i, v <- b2 v + (1 - b2) mean g_i^2: means over the `rows`, if there are any."""
        if not len(rows):
            return
        share = torch.zeros(1, num)
        share[0, rows] = 1 / len(rows)
        for name, beta, transform in (("_m", self.beta1, None), ("_v", self.beta2, torch.square)):
            mean, moment = gradients.total(share, transform)[0], getattr(self, name)
            before = torch.zeros_like(mean) if moment is None else moment.to(mean.device)
            setattr(self, name, beta * before + (1 - beta) * mean)
        self._step += 1


def _groups(signals: Signals) -> dict[str | None, Tensor]:
    """Source -> its rows, int64 [n], sources in the order in which they come; one group where there are no sources."""
    groups: dict[str | None, list[int]] = {}
    for row, source in enumerate(signals.source or [None] * len(signals)):
        groups.setdefault(source, []).append(row)
    return {source: torch.tensor(rows) for source, rows in groups.items()}


def _quotas(counts: dict[str | None, int], small: set[str | None], keep: int) -> dict[str | None, int]:
    """Rows to keep of each source: small ones come first, and the others share what they leave."""
    quotas = budgets({source: count for source, count in counts.items() if source in small}, keep)
    rest = {source: count for source, count in counts.items() if source not in small}
    return quotas | budgets(rest, keep - sum(quotas.values()))


def _covered(similarity: Tensor, served_by: Tensor) -> Tensor:
    """float [n]: each row's similarity to the row that serves it (int64 [n]), as a share of the largest there is."""
    largest = similarity.max()
    served = similarity.gather(1, served_by[:, None])[:, 0]
    return torch.where(largest > 0, served / largest, 1.0).cpu()  # 0/0 where all rows are equal


def _measure(
    num_sources: int, is_small: Tensor, sizes: Tensor, reasons: tuple[str, ...], covered: list[Tensor]
) -> dict[str, float]:
    """is_small: bool [k], sizes: float [k], reasons: k; of the kept rows. covered: of the rows that were clustered."""
    medoids = [size for size, reason in zip(sizes.tolist(), reasons, strict=True) if reason == "medoid"] or [1.0]
    return {
        "sources": float(num_sources),
        "small_share": float(is_small.float().mean()),
        "mean_cluster": sum(medoids) / len(medoids),
        "largest_cluster": max(medoids),
        "coverage": float(torch.cat(covered).mean()) if covered else 1.0,
    }
