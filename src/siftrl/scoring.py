"""The scoring pass: runs the model over candidate rows and computes the signals that selectors need.

It runs in the precision of training, with dropout off and gradients only where a signal takes them. Rows are scored
in chunks of rows of like length, divided among the ranks; a chunk holds the same rows whatever the number of ranks, so
the signals do not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx

from siftrl import distributed, logits
from siftrl.gradients import Perturbed, RowGradient, RowGradients, direction, factored
from siftrl.origin import loading_options, whole_model
from siftrl.parts import BY_STRUCTURE, PartNames, Parts, check_adapters, evaluation_mode, find_parts
from siftrl.signals import Embedding, LossWeight, ReferenceLoss, Signal, ValueGradient

Rows = list[dict[str, Any]]
Collate = Callable[[Rows], dict[str, Tensor]]
"""Rows -> {"input_ids", "attention_mask", "labels"}, each int64 [B, T], padded on the right; and what a policy loss is
made of, see `siftrl.policy`."""


class Scorer:
    """Computes signals of rows; every rank calls `score` with the same rows.

    Args:
        model: the policy, with TRL's fused head (`add_fused_lm_head`), through PEFT's wrapper where there is one.
        needs: the signals to compute.
        micro_batch_size: rows in one forward pass.
        precision: the context that training computes its loss in (autocast).
        names: where the model's parts are, if its structure does not tell.
        row_losses: the loss whose gradient a row stands for, float32 [B]; None: the mean over its tokens.
        row_weights: what the loss multiplies each row by, float32 [B], measured as `LossWeight`; None: all the same.
        temperature: what the loss divides the logits by, as TRL's GRPO does.
        init_kwargs: what the model was loaded with, for reference models (`siftrl.origin.loading_options`).
    """

    def __init__(
        self,
        model: nn.Module,
        needs: Iterable[Signal],
        collate: Collate,
        *,
        micro_batch_size: int,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        names: PartNames = BY_STRUCTURE,
        row_losses: Callable[[ScoredBatch], Tensor] | None = None,
        row_weights: Callable[[ScoredBatch], Tensor] | None = None,
        temperature: float = 1.0,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.temperature = temperature
        self.row_losses, self.row_weights = row_losses or mean_losses, row_weights
        needs = [*needs, *([LossWeight()] if row_weights is not None else [])]
        self.needs = sorted(needs, key=repr)  # one order on all ranks: what follows are collectives
        self.model, self.collate = model, collate
        if self.needs:
            names_of_needs = ", ".join(type(signal).__name__ for signal in self.needs)
            check_adapters(model, f"a batch_selector reads signals of the model ({names_of_needs})")
        self.micro_batch_size, self.device, self.precision = micro_batch_size, device, precision
        self.names = names
        self.takes_output = any(signal.takes_output for signal in self.needs)
        self.gradients = [signal for signal in self.needs if isinstance(signal, ValueGradient)]
        self.backward = any(signal.estimate == "exact" for signal in self.gradients)
        references = [signal.model for signal in self.needs if isinstance(signal, ReferenceLoss)]
        self.references = {path: Reference(path, model, device, temperature, init_kwargs) for path in references}
        self.seed = 0  # of this pass's random directions
        self.shapes: dict[int, tuple[int, int]] = {}  # site -> its matrix's shape, known once it has run
        self._parts: Parts | None = None

    @property
    def parts(self) -> Parts:
        if self._parts is None:  # not before training begins: only then does a sharded model run
            self._parts = find_parts(self.model, self.names, need_value=bool(self.gradients))
            self.head = Head(self._parts, self.temperature)
        return self._parts

    def score(self, rows: Rows, ids: Sequence[int] | None, seed: int) -> tuple[dict[Hashable, Any], Tensor]:
        """Signals of B rows, and which rows have finite ones (bool [B]); the same on every rank.

        rows: as `collate` takes them, with "input_ids". ids: their places in the data set, None for completions,
        which never come again. seed: of the pass's random directions.
        """
        self.seed = seed
        order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]["input_ids"]), row))
        chunks = [order[at : at + self.micro_batch_size] for at in range(0, len(order), self.micro_batch_size)]
        found: dict[Signal, dict[int, Any]] = {signal: {} for signal in self.needs}
        with torch.no_grad(), _inference(self.model, self.parts):
            self.head.refresh()
            for first in range(0, len(chunks), distributed.world_size()):
                mine = first + distributed.rank()
                # a rank without a chunk of its own runs one all the same: sharded weights take all ranks
                chunk = chunks[mine] if mine < len(chunks) else chunks[0]
                its_ids = None if ids is None else [ids[row] for row in chunk]
                values = self._score_chunk(chunk, [rows[row] for row in chunk], its_ids)
                if mine < len(chunks):
                    for signal, per_row in values.items():
                        found[signal].update(zip(chunk, per_row, strict=True))
        signals: dict[Hashable, Any] = {
            signal: self._everyone(signal, per_row, len(rows)) for signal, per_row in found.items()
        }
        return signals, torch.stack([_finite(values) for values in signals.values()]).all(0)

    def _score_chunk(self, chunk: list[int], rows: Rows, ids: list[int] | None) -> dict[Signal, Sequence[Any]]:
        inputs = {name: value.to(self.device) for name, value in self.collate(rows).items()}
        batch = ScoredBatch(self, inputs, chunk, ids)
        if "advantages" in inputs:
            return {signal: signal.of_policy(batch, inputs["advantages"]) for signal in self.needs}
        return {signal: signal.of(batch) for signal in self.needs}

    def _everyone(self, signal: Signal, mine: dict[int, Any], num_rows: int) -> Any:
        """This rank's rows' values -> those of all rows, on the CPU; gradients stay where they are."""
        if isinstance(signal, ValueGradient):
            size = sum(a * b for a, b in self.shapes.values())
            return RowGradients(mine, torch.arange(num_rows), size, self.device)
        shapes = distributed.gather_objects([value.shape for value in mine.values()][:1])
        values = torch.zeros(num_rows, *next(shape for shapes_there in shapes for shape in shapes_there))
        for row, value in mine.items():
            values[row] = value.float()
        distributed.sum_([values])  # each row is one rank's; the others add zeros
        return values

    def forward(self, inputs: dict[str, Tensor], labels: Tensor) -> Any:
        with torch.no_grad(), self.precision():  # a hook may turn gradients on inside, for the last block
            return self.model(**inputs, labels=labels, fused_lm_head=True)


def mean_losses(batch: ScoredBatch) -> Tensor:
    """float32 [B]: the mean over each row's tokens that bear loss."""
    return batch.token_mean(-batch.output.log_probs)


def _finite(values: Tensor | RowGradients) -> Tensor:
    """bool [B], on the CPU."""
    return values.is_finite() if isinstance(values, RowGradients) else values.view(len(values), -1).isfinite().all(1)


class ScoredBatch:
    """A chunk of B rows on its way through the model; what is asked for is computed, once."""

    def __init__(
        self, scorer: Scorer, inputs: dict[str, Tensor], rows: Sequence[int], ids: Sequence[int] | None
    ) -> None:
        """rows: the rows' places among the candidates. ids: in the data set."""
        self.scorer, self.parts, self.head = scorer, scorer.parts, scorer.head
        self.rows, self.ids = rows, ids
        self.labels, self.given = inputs["labels"], inputs
        self.inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self._sites: dict[int, tuple[Tensor, Tensor]] = {}  # site -> what goes in, what comes out

    @functools.cached_property
    def output(self) -> Any:
        """The fused head's answer: log_probs and entropy, float [B, T - 1], zero where no token bears loss."""
        with ExitStack() as hooks:
            hooks.enter_context(self.parts.decoder.register_forward_hook(self._keep_hidden))
            if self.scorer.gradients:
                hooks.enter_context(self.parts.block.register_forward_pre_hook(self._enter_block, with_kwargs=True))
                for index, site in enumerate(self.parts.sites):
                    hooks.enter_context(site.module.register_forward_hook(functools.partial(self._keep_site, index)))
            return self.scorer.forward(self.inputs, self.labels)

    @functools.cached_property
    def hidden(self) -> Tensor:
        """[B, T, d]: hidden states after the last norm."""
        if self.scorer.takes_output:
            _ = self.output
            return self._hidden
        with self.scorer.precision():
            found: Tensor = self.parts.decoder(**self.inputs, use_cache=False).last_hidden_state
        return found

    @functools.cached_property
    def logits(self) -> Tensor:
        """[B, T, V]; for heads that are not linear."""
        with self.scorer.precision():
            found: Tensor = self.scorer.model(**self.inputs, use_cache=False).logits
        return found / self.scorer.temperature

    @functools.cached_property
    def losses(self) -> Tensor:
        """float32 [B], with a graph down to the V projection where a signal takes its gradient."""
        with torch.set_grad_enabled(self.scorer.backward):
            return self.scorer.row_losses(self)

    @functools.cached_property
    def num_tokens(self) -> Tensor:
        """int64 [B]: tokens that bear loss."""
        return (self.shifted_labels != -100).sum(1)

    @functools.cached_property
    def shifted_labels(self) -> Tensor:
        """int64 [B, T]: what position t predicts; -100 where that bears no loss."""
        return torch.cat([self.labels[:, 1:], torch.full_like(self.labels[:, :1], -100)], dim=1)

    def counted(self, tokens: str) -> Tensor:
        """bool [B, T]: the positions that count."""
        return self.inputs["attention_mask"].bool() if tokens == "all" else self.shifted_labels != -100

    def token_mean(self, values: Tensor) -> Tensor:
        """float32 [B]: the mean of `values` [B, T - 1], zero where no token bears loss, over those that do."""
        return values.float().sum(1) / self.num_tokens.clamp(min=1)

    def reference_losses(self, model: str) -> Tensor:
        return self.scorer.references[model].losses(self)

    # -- gradients of the V projection -------------------------------------------------------------------------

    @functools.cached_property
    def exact_gradients(self) -> list[RowGradient]:
        """One backward pass from the losses to the V projection's output; no weight gets a gradient."""
        losses = self.losses
        outputs = [self._sites[index][1] for index in range(len(self.parts.sites))]
        # a row's loss depends on its own tokens only, so one pass for the sum of all losses serves every row
        deltas = torch.autograd.grad(losses, outputs, torch.ones_like(losses))
        real = self.inputs["attention_mask"].bool()
        rows: list[RowGradient] = []
        for row in range(len(self.rows)):
            pairs = []
            for index, delta in enumerate(deltas):
                columns = self.parts.sites[index].columns
                mine = delta[row].flatten(0, -2)  # latent attention puts a dimension of 1 before T
                mine = mine if columns is None else mine[:, columns.to(delta.device)]
                pairs.append((mine[real[row]], self._sites[index][0][row][real[row]]))
            rows.append(factored(pairs))
        return rows

    def spsa_gradients(self, signal: ValueGradient) -> list[RowGradient]:
        """Slopes of the losses along random directions of the V projection: two passes of the last block each."""
        _ = self.output
        shapes = tuple(self.scorer.shapes[index] for index in range(len(self.parts.sites)))
        seeds = [self._seeds(row, signal) for row in self.rows]
        slopes = torch.zeros(len(self.rows), signal.perturbations, device=self.labels.device)
        for k in range(signal.perturbations):
            along = [direction(row_seeds[k], shapes) for row_seeds in seeds]
            rise = self._moved_losses(along, signal.epsilon) - self._moved_losses(along, -signal.epsilon)
            slopes[:, k] = rise / (2 * signal.epsilon)
        return [Perturbed(mine, drawn, shapes) for mine, drawn in zip(slopes, seeds, strict=True)]

    def _seeds(self, row: int, signal: ValueGradient) -> tuple[int, ...]:
        own = 0 if signal.shared else 1 + row
        return tuple((self.scorer.seed * 1_000_003 + own) * 1_009 + k for k in range(signal.perturbations))

    def _moved_losses(self, along: list[tuple[Tensor, ...]], epsilon: float) -> Tensor:
        """float32 [B]: the losses with row b's matrices moved by epsilon * along[b]."""

        def move(index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            z = torch.stack([matrices[index] for matrices in along]).to(output)
            shift = epsilon * torch.bmm(args[0].to(z).flatten(1, -2), z.transpose(1, 2))
            shift = shift.view(*output.shape[:-1], -1)
            columns = self.parts.sites[index].columns
            return output + shift if columns is None else output.index_add(-1, columns.to(output.device), shift)

        moved = ScoredBatch(self.scorer, self.given, self.rows, self.ids)
        with ExitStack() as hooks:
            hooks.enter_context(_only_last_block(self.parts))
            replay = self.parts.block.register_forward_pre_hook(lambda *_: self._block_input, with_kwargs=True)
            hooks.enter_context(replay)
            for index, site in enumerate(self.parts.sites):
                hooks.enter_context(site.module.register_forward_hook(functools.partial(move, index)))
            moved.__dict__["output"] = self.scorer.forward(self.inputs, self.labels)
        return moved.losses.detach()

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state.detach()

    def _enter_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._block_input = args, kwargs
        torch.set_grad_enabled(self.scorer.backward)

    def _keep_site(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        is_first = torch.is_grad_enabled() and not output.requires_grad
        if is_first:
            output.requires_grad_()
        self._sites[index] = args[0].detach().flatten(1, -2), output
        columns = self.parts.sites[index].columns
        self.scorer.shapes[index] = (output.shape[-1] if columns is None else len(columns)), args[0].shape[-1]
        return output.clone() if is_first else None  # OLMo clamps V in place, which a leaf does not allow


class Head:
    """The model's head, and what follows from its weights alone: computed at most once a scoring pass."""

    def __init__(self, parts: Parts, temperature: float) -> None:
        self.module = parts.head
        self.is_linear, self.scale = parts.linear_head, parts.logit_scale / temperature
        self._gram: Tensor | None = None
        self._folded: dict[Embedding, Tensor] = {}
        self._projections: dict[Embedding, logits.Projection] = {}
        self._is_trained = any(parameter.requires_grad for parameter in self.module.parameters())

    def refresh(self) -> None:
        """A new pass: forget what an optimizer step may have changed."""
        if self._is_trained:
            self._gram = None
            self._folded.clear()

    def gram(self) -> Tensor:
        if self._gram is None:
            with self.weights() as (weight, bias):
                self._gram = logits.head_gram(weight, bias)
        return self._gram

    def projection(self, signal: Embedding) -> logits.Projection:
        if signal not in self._projections:
            with self.weights() as (weight, _):
                self._projections[signal] = logits.Projection(
                    len(weight), signal.rows, signal.columns, signal.positions, signal.seed, signal.isometric
                )
        return self._projections[signal]

    def folded(self, signal: Embedding) -> Tensor:
        if signal not in self._folded:
            projection = self.projection(signal)
            with self.weights() as (weight, bias):
                self._folded[signal] = projection.fold(weight, bias)
        return self._folded[signal]

    @contextmanager
    def weights(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The whole weight and bias, also where ZeRO-3 has sharded them; every rank enters."""
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, Tensor)
        with maybe_gather_lm_head_ctx(weight, bias):
            yield weight.detach(), None if bias is None else bias.detach()


class Reference:
    """A frozen model whose losses rows are compared with; a row is measured when it is first a candidate."""

    def __init__(
        self,
        path: str,
        policy: nn.Module,
        device: torch.device,
        temperature: float,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        options = loading_options(policy, path, init_kwargs)
        with whole_model():
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
        ours, theirs = (m.config.get_text_config().vocab_size for m in (policy, self.model))  # type: ignore[union-attr, operator]
        if ours != theirs:
            raise ValueError(
                f"the reference model {path} has a vocabulary of {theirs} tokens, the trained model one of {ours}: "
                "its loss on the same tokens means nothing; write a reference with the same tokenizer"
            )
        self.model.requires_grad_(False).eval().to(device)
        add_fused_lm_head(self.model, temperature)
        self.known: dict[int, float] = {}

    def losses(self, batch: ScoredBatch) -> Tensor:
        """float32 [B]"""
        if batch.ids is None:
            output = self.model(**batch.inputs, labels=batch.labels, fused_lm_head=True)
            return batch.token_mean(-output.log_probs).detach()
        if any(row not in self.known for row in batch.ids):
            output = self.model(**batch.inputs, labels=batch.labels, fused_lm_head=True)
            self.known |= zip(batch.ids, batch.token_mean(-output.log_probs).tolist(), strict=True)
        return torch.tensor([self.known[row] for row in batch.ids])


# ---------------------------------------------------------------------------------------- the model while it is scored


@contextmanager
def _only_last_block(parts: Parts) -> Iterator[None]:
    """The decoder runs its last block alone; a hook gives it the hidden states that enter it."""
    blocks = getattr(parts.decoder, parts.layers_name)
    setattr(parts.decoder, parts.layers_name, nn.ModuleList([parts.block]))
    try:
        yield
    finally:
        setattr(parts.decoder, parts.layers_name, blocks)


@contextmanager
def _inference(model: nn.Module, parts: Parts) -> Iterator[None]:
    """Dropout off, and no weight of the last block or the head asks for a gradient; restored afterwards."""
    trained = {p: None for part in (parts.block, parts.head) for p in part.parameters() if p.requires_grad}
    with evaluation_mode(model):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
