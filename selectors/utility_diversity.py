"""Rows whose logits are rich, and unlike those of the rows kept before.

Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning (UDS), Zou et al., arXiv 2510.16882. Row
i with logits Z_i (counted positions x vocabulary) has the embedding E_i = P1 Z_i P2, a random projection on both
sides, and the score
    s_i = ||Z_i||_* + alpha d_i,    d_i = mean over E in M of ||E_i - E||_2    (0 while M is empty),
where ||.||_* is the sum of the singular values and M holds the embeddings of the last 1,024 rows kept. The k rows of
highest score are kept. The paper's exact variant is `paper: true`; it counts the tokens of the prompt, too.

Added here: only tokens that bear loss count, and the rows are picked one by one. With C the rows picked so far in this
batch, row i's diversity is
    d_i = min(mean over E in M of ||E_i - E||_2, min over j in C of ||E_i - E_j||_2)    (an empty set drops out),
so the first pick is the published one, and a near-duplicate of a picked row has no diversity left: it is picked only
when its utility alone is more than the others' scores. (As one of 1,025 distances in the mean, it would hardly count.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from siftrl.fields import Count, NonNegative
from siftrl.signals import Embedding, NuclearNorm
from siftrl.types import BatchSelector, Selection, Signals

OURS: dict[str, Any] = {"alpha": 10.0, "tokens": "completion"}
"""What null stands for. On our scale of distances the published alpha is 2.5e-3 sqrt(512 V) / 2: 5.1 for a vocabulary
of V = 32,000, 10.1 for 128,000, 11.0 for 152,000."""
PUBLISHED: dict[str, Any] = {"alpha": 2.5e-3, "tokens": "all", "normalise": False}
"""What the paper's variant fixes."""


@dataclass
class UtilityDiversity(BatchSelector):
    """Keeps rows of high nuclear norm of their logits, far from the rows kept lately and from each other.

    alpha: weight of the diversity. null: 10, about the published balance; with `paper` 2.5e-3, on the paper's scale.
    tokens: whose logits count: "completion": those that predict the tokens that bear loss; "all": the prompt's, too.
        null: completion, with `paper` all.
    normalise: divide a row's nuclear norm by the number n of its counted tokens, and its embedding by sqrt(n), so that
        long rows have no advantage. The balance is another then; so is the best alpha.
    memory: how many of the last rows kept are remembered.
    rows, columns: size of an embedding.
    positions: counted tokens after which the projection along a row repeats.
    seed: of the projection.
    paper: the published variant: scores against the memory alone, with `tokens: all` and the paper's scale.
    """

    alpha: NonNegative | None = None
    tokens: Literal["completion", "all"] | None = None
    normalise: bool = False
    memory: Annotated[int, Ge(0)] = 1024
    rows: Count = 8
    columns: Count = 128
    positions: Count = 512
    seed: int = 0
    paper: bool = False

    def __post_init__(self) -> None:
        for name, value in PUBLISHED.items() if self.paper else ():
            given = getattr(self, name)
            if given not in (None, value):
                raise ValueError(
                    f"utility_diversity: {name}: {str(given).lower()} contradicts paper: true; leave {name} out, or"
                    " write paper: false"
                )
        defaults = PUBLISHED if self.paper else OURS
        self._alpha: float = defaults["alpha"] if self.alpha is None else self.alpha
        self._tokens: Literal["completion", "all"] = self.tokens or defaults["tokens"]
        self._norm = NuclearNorm(self._tokens)
        self._embedding = Embedding(
            self._tokens, self.rows, self.columns, self.positions, self.seed, isometric=not self.paper
        )
        self._memory = torch.empty(0, self.rows * self.columns)  # float32 [at most `memory`, D], oldest first
        self._metrics: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({self._norm, self._embedding})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        utility, embeddings = signals[self._norm].double().cpu(), signals[self._embedding].float().cpu()
        if self.normalise:
            counts = signals.num_tokens if self._tokens == "completion" else signals.num_all_tokens
            assert counts is not None
            counts = counts.cpu().clamp(min=1)
            utility, embeddings = utility / counts, embeddings / counts.sqrt()[:, None]
        keep = min(keep, len(utility))
        remembered = _distances(embeddings, self._memory).mean(dim=1) if len(self._memory) else None
        if self.paper:
            diversity = torch.zeros_like(utility) if remembered is None else remembered
            picked = (utility + self._alpha * diversity).argsort(descending=True, stable=True)[:keep]
        else:
            picked, diversity = self._pick(utility, remembered, _distances(embeddings, embeddings), keep)
        self._memory = torch.cat([self._memory, embeddings[picked]])
        self._memory = self._memory[max(len(self._memory) - self.memory, 0) :]
        self._metrics = {
            "kept_utility": float(utility[picked].mean()),
            "mean_utility": float(utility.mean()),
            "kept_diversity": float(diversity[picked].mean()),
            "mean_diversity": float(diversity.mean()),
            "memory": len(self._memory) / max(self.memory, 1),
        }
        return Selection.of(picked, len(utility), scores=utility + self._alpha * diversity)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `kept_utility` and `kept_diversity`, means over the rows kept (the diversity that a row had
        when it was picked), `mean_utility` and `mean_diversity`, over all of them (of the others, the diversity that
        they were left with), and `memory`, the share of the memory that is filled."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory = state["memory"].clone()

    def _pick(self, utility: Tensor, remembered: Tensor | None, between: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The greedy choice: int64 [keep], in order, and each row's diversity (float64 [B]) when it was picked or at
        the end.

        utility: float64 [B]. remembered: float64 [B], mean distance to the memory, None where it is empty. between:
        float64 [B, B], distances of the rows.
        """
        nearest = torch.full_like(utility, torch.inf) if remembered is None else remembered
        diversity = torch.zeros_like(utility) if remembered is None else remembered
        picked: list[int] = []
        waits = torch.ones_like(utility, dtype=torch.bool)
        for _ in range(keep):
            scores = (utility + self._alpha * diversity).masked_fill(~waits, -torch.inf)
            picked.append(int(scores.argmax()))  # of equal ones the first
            waits[picked[-1]] = False
            nearest = torch.minimum(nearest, between[picked[-1]])
            diversity = torch.where(waits, nearest, diversity)
        return torch.tensor(picked), diversity


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """float64 [n, m], L2, of a [n, D] and b [m, D]. In float64, where they come from a matrix product and still are
    below 1e-7 of the norms for equal rows."""
    return torch.cdist(a.double(), b.double())
