"""Preference pairs as the rows of a batch: a pair's loss, and what each signal means of two sequences.

DPO (Rafailov et al., arXiv 2305.18290): with h(y) = log pi(y | x) - log ref(y | x), summed over the tokens of a
completion, a pair's loss is
    L = -log sigmoid(beta (h_chosen - h_rejected)),
and the batch's is the mean over pairs. TRL's other loss types are functions of h_chosen and h_rejected, too.

A pair is scored as two sequences of one forward pass, each of which bears half of the pair's loss: whatever is linear
in the loss is the sum over the two. So
    Loss: L itself.
    ValueGradient: the gradient of L, through both sequences.
    Entropy, NuclearNorm: the mean of the two completions' own; the preference is not in them.
    Embedding: that of the chosen sequence minus that of the rejected one: what the pair tells apart.
The other signals are those of a sequence's own loss, and have no such sum: they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from siftrl.gradients import Dense, Factored, Perturbed, RowGradient, factored
from siftrl.scoring import Rows, ScoredBatch, Scorer
from siftrl.signals import Embedding, Entropy, Loss, NuclearNorm, Signal, ValueGradient

OF_THE_LOSS = (Loss, ValueGradient)
"""Signals that take the pair's loss, and so the reference model's log-probabilities."""
OF_PAIRS = (*OF_THE_LOSS, Entropy, NuclearNorm, Embedding)
"""Signals that pairs have."""


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of single pairs. Called with chosen, rejected: float32 [B], h of the two completions; and num_chosen,
    num_rejected: int64 [B], their tokens. Returns float32 [B].

    types, weights: the loss is sum_i weights_i types_i, names as in `PAIR_LOSSES`. beta, label_smoothing,
    discopop_tau: as in TRL's DPOConfig.
    """

    types: Sequence[str] = ("sigmoid",)
    weights: Sequence[float] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __call__(self, chosen: Tensor, rejected: Tensor, num_chosen: Tensor, num_rejected: Tensor) -> Tensor:
        lengths = num_chosen.clamp(min=1), num_rejected.clamp(min=1)
        losses = [PAIR_LOSSES[name](self, chosen, rejected, *lengths) for name in self.types]
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(0)


def _sigmoid(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    return -logsigmoid(of.beta * (c - r))


def _sigmoid_norm(of: PairLoss, c: Tensor, r: Tensor, n: Tensor, m: Tensor) -> Tensor:
    return -logsigmoid(of.beta * (c / n - r / m))


def _hinge(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    return relu(1 - of.beta * (c - r))


def _ipo(of: PairLoss, c: Tensor, r: Tensor, n: Tensor, m: Tensor) -> Tensor:
    return (c / n - r / m - 1 / (2 * of.beta)) ** 2


def _exo_pair(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    margin, epsilon = of.beta * (c - r), torch.tensor(of.label_smoothing, device=c.device)
    won = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-epsilon))
    return won + (-margin).sigmoid() * (logsigmoid(-margin) - epsilon.log())


def _robust(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    margin, flipped = of.beta * (c - r), of.label_smoothing
    return (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)


def _discopop(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    margin = of.beta * (c - r)
    mixed = (margin / of.discopop_tau).sigmoid()
    return -logsigmoid(margin) * (1 - mixed) + torch.exp(-margin) * mixed


def _nca_pair(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    c, r = of.beta * c, of.beta * r
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


def _bco_pair(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    return -logsigmoid(of.beta * c) - logsigmoid(-of.beta * r)


def _sppo_hard(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    return (c - 0.5 / of.beta) ** 2 + (r + 0.5 / of.beta) ** 2


def _apo_zero(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    return 1 - (of.beta * c).sigmoid() + (of.beta * r).sigmoid()


def _apo_down(of: PairLoss, c: Tensor, r: Tensor, *_: Tensor) -> Tensor:
    return (of.beta * c).sigmoid() + 1 - (of.beta * (c - r)).sigmoid()


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "robust": _robust,
    "discopop": _discopop,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""TRL's loss types that are a mean over pairs. Not there: aot and aot_unpaired sort the pairs of a micro-batch, and sft
is a mean over its tokens; the loss of a pair then depends on the pairs beside it."""


class PairScorer(Scorer):
    """`Scorer` whose rows are pairs; `micro_batch_size` counts pairs.

    rows have "input_ids", a sequence as long as the pair's longer one, by which pairs of like length lie together.
    `collate` makes of B pairs 2B sequences, the chosen ones and then the rejected ones; with signals of the loss it
    gives "ref_chosen_logps" and "ref_rejected_logps", float [B], besides. `loss` is the pairs'.
    """

    def __init__(self, *args: Any, loss: PairLoss, **kwargs: Any) -> None:
        def halves(batch: ScoredBatch) -> Tensor:
            h = batch.output.log_probs.float().sum(1)
            h = h - torch.cat([batch.given["ref_chosen_logps"], batch.given["ref_rejected_logps"]])
            return (loss(*h.chunk(2), *batch.num_tokens.chunk(2)) / 2).repeat(2)

        super().__init__(*args, row_losses=halves, **kwargs)

    def _score_chunk(self, chunk: list[int], rows: Rows, ids: list[int] | None) -> dict[Signal, Sequence[Any]]:
        inputs = {name: value.to(self.device) for name, value in self.collate(rows).items()}
        # both sequences have their pair's place, and so its random directions
        batch = ScoredBatch(self, inputs, [*chunk, *chunk], None)
        return {signal: of_pairs(signal, batch) for signal in self.needs}


def of_pairs(signal: Signal, batch: ScoredBatch) -> Sequence[Any]:
    """The signal's values of B pairs, from a batch of their 2B sequences; see the module's text."""
    if isinstance(signal, Loss):
        return batch.losses.detach().view(2, -1).sum(0)  # type: ignore[return-value]
    values = signal.of(batch)
    if isinstance(values, list):
        return [_sum(*pair) for pair in zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True)]
    chosen, rejected = values.chunk(2)
    return chosen - rejected if isinstance(signal, Embedding) else (chosen + rejected) / 2


def check_signals(needs: Iterable[Signal]) -> None:
    """Raises ValueError for a signal that pairs do not have."""
    for signal in needs:
        if not isinstance(signal, OF_PAIRS):
            raise ValueError(
                f"batch_selector: {type(signal).__name__} is a figure of one sequence's own loss, which a preference "
                f"pair has none of; take a selector that needs {' or '.join(one.__name__ for one in OF_PAIRS)}, for "
                "example high_loss or gradient_coreset"
            )


def _sum(a: RowGradient, b: RowGradient) -> RowGradient:
    """a + b, in the smallest form."""
    if isinstance(a, Perturbed) and isinstance(b, Perturbed):  # along the same directions
        return Perturbed(a.slopes + b.slopes, a.seeds, a.shapes)
    if isinstance(a, Factored) and isinstance(b, Factored):
        sites = zip(a.pairs, b.pairs, strict=True)
        return factored([(torch.cat([mine[0], yours[0]]), torch.cat([mine[1], yours[1]])) for mine, yours in sites])
    return Dense(a.dense() + b.dense())
