"""What is measured of each row of a candidate batch, in one forward pass before anything is trained on.

In GRPO a signal is that of the row's policy loss, so that it knows about the advantage (`Signal.of_policy`).

A signal is a frozen dataclass: a selector lists those that it needs and finds each one's values under it,
`signals[Loss()]`. Its `of` takes what it needs from a `ScoredBatch`, where everything is computed when first asked
for, and once. So a selector that needs hidden states only never pays for the head, and only a value gradient takes a
backward pass, through the last block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import linear

from siftrl import logits

if TYPE_CHECKING:
    from siftrl.gradients import RowGradient
    from siftrl.scoring import ScoredBatch

Tokens = Literal["completion", "all"]
"""Which positions count: those that predict a token that bears loss, or those of all tokens."""


class Signal(ABC):
    """One figure, vector or gradient a row."""

    takes_output: ClassVar[bool] = False
    """Whether it takes the head's answer; hidden states come without it."""

    @abstractmethod
    def of(self, batch: ScoredBatch) -> Any:
        """A tensor with first dimension B (finite unless the row is bad), or a list of B `RowGradient`s."""
        ...

    def of_policy(self, batch: ScoredBatch, advantages: Tensor) -> Any:
        """The same of completions (grpo): what the policy loss makes of it, A (float [B]) times the row's own.

        A figure counts by |A|: how much there is to learn, in either direction. A vector turns with A's sign.
        """
        values = self.of(batch)
        return values * (advantages.abs() if values.dim() == 1 else advantages[:, None])


@dataclass(frozen=True)
class Loss(Signal):
    """float32 [B]: the row's loss, the mean over its loss-bearing tokens."""

    takes_output: ClassVar[bool] = True

    def of(self, batch: ScoredBatch) -> Tensor:
        return batch.token_mean(-batch.output.log_probs.detach())


@dataclass(frozen=True)
class Entropy(Signal):
    """float32 [B]: mean entropy of the next token's distribution, in nats, where a token bears loss."""

    takes_output: ClassVar[bool] = True

    def of(self, batch: ScoredBatch) -> Tensor:
        return batch.token_mean(batch.output.entropy.detach())


@dataclass(frozen=True)
class NuclearNorm(Signal):
    """float32 [B]: the sum of the singular values of the row's logits Z (counted positions x vocabulary).

    UDS (Zou et al., arXiv 2510.16882). Without building Z, where the logits are linear in the hidden states.
    """

    tokens: Tokens = "completion"

    def of(self, batch: ScoredBatch) -> Tensor:
        mask = batch.counted(self.tokens)
        if batch.head.is_linear:
            return batch.head.scale * logits.nuclear_norms(batch.hidden, mask, batch.head.gram())
        return logits.direct_nuclear_norms(batch.logits, mask)


@dataclass(frozen=True)
class Embedding(Signal):
    """float32 [B, rows * columns]: a random projection of the row's logits Z on both sides.

    UDS (Zou et al., arXiv 2510.16882); see `siftrl.logits.Projection`.
    """

    tokens: Tokens = "completion"
    rows: int = 8
    columns: int = 128
    positions: int = 512
    seed: int = 0
    isometric: bool = True

    def of(self, batch: ScoredBatch) -> Tensor:
        mask, projection = batch.counted(self.tokens), batch.head.projection(self)
        if batch.head.is_linear:
            return batch.head.scale * projection.embed(batch.hidden, mask, batch.head.folded(self))
        return projection.embed_logits(batch.logits, mask)


@dataclass(frozen=True)
class LossWeight(Signal):
    """float32 [B]: what the loss multiplies the row by (`Scorer`'s `row_weights`); rows at 0 are not chosen."""

    takes_output: ClassVar[bool] = True

    def of(self, batch: ScoredBatch) -> Tensor:
        assert batch.scorer.row_weights is not None
        return batch.scorer.row_weights(batch)

    def of_policy(self, batch: ScoredBatch, advantages: Tensor) -> Tensor:
        return self.of(batch)


@dataclass(frozen=True)
class GradientNorm(Signal):
    """float32 [B]: the norm of the gradient of the row's mean loss with respect to the head's weight; exact."""

    def of(self, batch: ScoredBatch) -> Tensor:
        if not batch.head.is_linear:
            raise ValueError(
                "gradient_norm needs logits that are linear in the hidden states, and this model's are not: it "
                "soft-caps them or its head has an adapter; choose another batch_selector, for example high_loss"
            )
        scale, hidden = batch.head.scale, batch.hidden
        # The weight, gathered once a chunk where it is sharded: calls of the head, one a row, would not be as many on
        # each rank. In training's precision: a norm may answer in float32 where the weight is bfloat16.
        with batch.head.weights() as (weight, bias), batch.scorer.precision():
            norms = logits.last_layer_gradient_norms(
                hidden, lambda states: scale * linear(states, weight, bias), batch.shifted_labels, batch.num_tokens
            )
        return scale * norms


@dataclass(frozen=True)
class ReferenceLoss(Signal):
    """float32 [B]: the row's loss under a reference model, which does not change: each row is measured once.

    model: a folder or a hub name.
    """

    model: str

    def of(self, batch: ScoredBatch) -> Tensor:
        return batch.reference_losses(self.model)


@dataclass(frozen=True)
class ValueGradient(Signal):
    """B `RowGradient`s: of the row's loss with respect to the last block's V projection (or its LoRA matrices).

    CoLM (Nguyen et al., arXiv 2407.19580). "exact": one backward pass through the last block. "spsa": slopes along
    `perturbations` random directions (`shared`: the same for all rows, as published), two passes of the last block
    each, `epsilon` apart on either side.
    """

    estimate: Literal["exact", "spsa"] = "exact"
    perturbations: int = 1
    epsilon: float = 1e-3
    shared: bool = False

    takes_output: ClassVar[bool] = True

    def of(self, batch: ScoredBatch) -> list[RowGradient]:
        if self.estimate == "exact":
            return batch.exact_gradients
        return batch.spsa_gradients(self)

    def of_policy(self, batch: ScoredBatch, advantages: Tensor) -> list[RowGradient]:
        return self.of(batch)  # the advantage is in the loss already, which the KL penalty may be part of too
