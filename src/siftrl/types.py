"""The types that trainers, selectors and rewards meet at.

Shapes: N rows of the data set, C candidate prompts, P prompts kept, G completions a prompt, B rows of a batch,
k rows kept, T tokens, V vocabulary, d hidden width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the value model says of C prompts, before any rollout.

    mean: float [C], expected reward of one completion.
    spread: float [C], expected variance of the reward between completions of the prompt.
    """

    mean: Tensor
    spread: Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """C prompts that a prompt selector chooses from.

    ids: int64 [C], each prompt's row in the data set: its identity for the whole run.
    rows: the C data-set rows themselves ("prompt" and every other column).
    value: the value model's prediction, only for selectors whose `needs` holds "value".
    """

    ids: Tensor
    rows: list[dict[str, Any]]
    value: Prediction | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows chosen out of n, and why: what the trainer uses and what the audit log records.

    indices: int64 [k], positions among the n candidates, in the order they are trained on.
    weights: float [k], mean 1.
    scores: float [n], each candidate's score (NaN where it has none).
    probability: float [n], the chance that the candidate would be chosen, given the scores (NaN where unknown).
    reasons: for each of the k chosen rows, one word: "score", "explore", "uniform", "fill", ...
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor
    probability: Tensor
    reasons: tuple[str, ...]

    @staticmethod
    def of(
        indices: Tensor,
        num_candidates: int,
        *,
        weights: Tensor | None = None,
        scores: Tensor | None = None,
        probability: Tensor | None = None,
        reasons: str | tuple[str, ...] = "score",
    ) -> Selection:
        """A selection of `indices` (int64 [k]) out of `num_candidates`, with defaults for what is not given."""
        k = len(indices)
        unknown = torch.full((num_candidates,), float("nan"))
        return Selection(
            indices=indices,
            weights=torch.ones(k) if weights is None else weights * (k / weights.sum()),
            scores=unknown if scores is None else scores,
            probability=unknown if probability is None else probability,
            reasons=(reasons,) * k if isinstance(reasons, str) else reasons,
        )


class PromptSelector(Protocol):
    """Chooses prompts before the rollouts. Subclass it as a dataclass whose fields are its recipe keys.

    One step of the trainer: draw `num_candidates(P)` prompts, `propose` P of them, roll each out G times, `observe`
    the rewards; groups that `accept` refuses are replaced by another round, at most `max_rounds` in all.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Signals that come with the candidates: "value" (`Candidates.value`) or none."""
    max_rounds: int = 1

    def num_candidates(self, keep: int) -> int:
        """How many prompts to draw from the data set in order to keep `keep`; at least `keep`."""
        return keep

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        """Choose `keep` of the C candidates; all randomness comes from `generator` (on the CPU)."""
        ...

    def observe(self, candidates: Candidates, selection: Selection, rewards: Tensor) -> None:
        """See the rewards of the rollouts: float [P, G], row i for `selection.indices[i]`; NaN where missing."""

    def accept(self, rewards: Tensor) -> Tensor:
        """bool [P]: which groups of `rewards` (float [P, G]) are worth training on. Default: all."""
        return torch.ones(len(rewards), dtype=torch.bool)

    def metrics(self) -> dict[str, float]:
        """Figures of the last step, without a prefix; the trainer logs them under `prompts/`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the selector learned; plain containers, numbers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`'s answer."""


@dataclass(slots=True)
class Signals:
    """What is known of B rows inside a batch. `signals[Loss()]` is what a selector's `needs` asked for.

    num_tokens: int64 [B], tokens that bear loss. num_all_tokens: int64 [B], all tokens, the prompt's too.
    ids: int64 [B], each row's place in the data set: its identity for the whole run.
    source: B names (None where the row has none), or None without a source column.
    source_sizes: rows of each source in the whole data set.
    shares: float [B], what each row counts in the batch's loss: 1 where that is a mean over rows; None: its
        `num_tokens`, since it is a mean over tokens.
    copies: int64 [B], how many rows of the batch are the same as this one, itself included; it stands for them all, and
        `shares` counts them all. None: 1.
    rewards, advantages: float [B], of completions (grpo); the reward is NaN where it is missing. groups: int64 [B],
        completions of one prompt have the same number. None where rows are no completions.
    tensors: signal -> tensor with first dimension B, or `siftrl.gradients.RowGradients` of B rows.
    """

    num_tokens: Tensor
    num_all_tokens: Tensor | None = None
    ids: Tensor | None = None
    source: list[str | None] | None = None
    source_sizes: dict[str | None, int] | None = None
    shares: Tensor | None = None
    copies: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    groups: Tensor | None = None
    tensors: dict[Hashable, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, signal: Hashable) -> Any:
        return self.tensors[signal]

    def subset(self, rows: Tensor) -> Signals:
        """The rows at `rows` (int64 [b]), in that order."""

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return Signals(
            num_tokens=self.num_tokens[rows],
            num_all_tokens=of(self.num_all_tokens),
            ids=of(self.ids),
            source=None if self.source is None else [self.source[row] for row in rows.tolist()],
            source_sizes=self.source_sizes,
            shares=of(self.shares),
            copies=of(self.copies),
            rewards=of(self.rewards),
            advantages=of(self.advantages),
            groups=of(self.groups),
            tensors={signal: values[rows] for signal, values in self.tensors.items()},
        )


class BatchSelector(Protocol):
    """Chooses rows inside a batch, before backward: SFT rows or GRPO completions.

    Subclass it as a dataclass whose fields are its recipe keys. Every rank calls `select` with the same signals and
    must choose the same rows: all randomness comes from `generator`, and no state may differ between ranks.
    """

    reads_rewards: ClassVar[bool] = False
    """Whether it reads rewards, advantages or groups: then it is for grpo stages only."""

    @property
    def needs(self) -> frozenset[Any]:
        """The signals (of `siftrl.signals`) that are computed for it, and no others."""
        return frozenset()

    @property
    def weighted(self) -> bool:
        """Whether its selections carry weights other than 1."""
        return False

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        """Choose `keep` (at least 1, at most B) of the B rows that `signals` describes."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last step, without a prefix; the trainer logs them under `batch/`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the selector learned; plain containers, numbers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`'s answer."""


class Reward(Protocol):
    """TRL's contract: one number for each completion; None where the reward does not apply to the row."""

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]: ...
