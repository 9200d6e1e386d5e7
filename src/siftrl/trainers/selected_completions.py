"""What GRPO does with a rollout before it trains on it: score the completions, keep some, and deal those.

From TRL's generation batch (`_keep_completions`):
    all ranks' completions -> those with an advantage are scored -> each selector of the chain keeps some -> dealt to
    optimizer steps, ranks and micro-batches by length -> TRL's loss of each, its rows' gradients weighted.
Without a selector every hook below hands over to TRL unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from siftrl import batch_selection, distributed, policy
from siftrl.batch_arithmetic import kept_rows
from siftrl.batch_selection import Chain
from siftrl.health import Health
from siftrl.parts import PartNames
from siftrl.rollout import replaced
from siftrl.row_selection import RowSelection, check_selectors, sources_of
from siftrl.run import Clock, Recorder
from siftrl.scoring import ScoredBatch, Scorer
from siftrl.signals import ValueGradient
from siftrl.trainers import completions
from siftrl.trainers import rows as row_ops
from siftrl.trainers.base import settle
from siftrl.types import BatchSelector, Selection

ROW: Any = 0
"""The key under which a row holds its place in the data set; taken out before a reward sees it. No column has it: their
names are text."""


class _Numbered(torch.utils.data.Dataset):
    """A data set whose rows know their place."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], ROW: index}


class SelectedCompletionsMixin:
    """Put before `SiftMixin` in the bases.

    Before TRL's constructor call `_plan_rows`, and after it `_init_sift` and, where there is a chain, `_set_up_rows`.
    """

    accelerator: Any
    args: Any
    clock: Clock
    health: Health
    model: Any
    recorder: Recorder | None
    row_selection: RowSelection | None
    state: Any
    train_dataset: Any
    warn: Any
    # TRL's
    aux_loss_enabled: bool
    beta: float
    epsilon_high: float
    get_gamma_weights: Any
    loss_type: str
    multi_objective_aggregation: str
    num_generations: int
    num_iterations: int
    ref_model: Any
    temperature: float
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: str
    _buffered_inputs: list[dict[str, Any]] | None
    _entropy_bonus_enabled: bool
    _get_dataloader: Any
    _get_train_sampler: Any
    _log_metric_value: Any
    _step: int
    _tokenizer: Any

    def _plan_rows(
        self,
        args: GRPOConfig,
        batch_selector: BatchSelector | Chain | None,
        keep: float | int,
        skip_zero_advantage: bool | None,
    ) -> GRPOConfig:
        """`args` as TRL's trainer gets them: those of the completions that are kept."""
        self.skip_zero_advantage = skip_zero_advantage
        self._rows_per_rank = args.generation_batch_size // args.world_size
        self._under_way: dict[str, Any] | None = None  # the micro-batch whose loss is computed
        self._kept: list[dict[str, Any]] | None = None
        self.chain = [] if batch_selector is None else batch_selection.links(batch_selector, keep)
        if not self.chain:
            return args
        _check(self.chain, args)
        planned = completions.for_kept_rows(args, [link.keep for link in self.chain])
        if planned is args:  # all are kept: TRL's own step
            self.chain = []
        return planned

    def _set_up_rows(
        self, source_column: str | None, scoring_batch_size: int, parts: PartNames, max_overhead: float | None
    ) -> None:
        self._sources, self._source_sizes = sources_of(self.train_dataset, source_column)
        if self.recorder is None:
            self.recorder = Recorder(Path(self.args.output_dir), "grpo")
        needs = batch_selection.needs_of(self.chain)
        scorer = Scorer(
            self.model,
            needs,
            lambda rows: policy.collate(rows, self._tokenizer.pad_token_id),
            micro_batch_size=scoring_batch_size,
            device=self.accelerator.device,
            precision=self.accelerator.autocast,
            names=parts,
            row_losses=self._row_losses,
            row_weights=self._row_weights if self._masks_rows and needs else None,
            temperature=self.temperature,
            init_kwargs=self.args.model_init_kwargs,
        )
        self.row_selection = RowSelection(
            self.chain,
            scorer,
            seed=self.args.seed + 2,  # the prompt selector's is seed + 1
            clock=self.clock,
            recorder=self.recorder,
            max_overhead=max_overhead,
            warn=self.warn,
        )

    def take_ids(self, data_rows: list[dict[str, Any]]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Places in the data set (int64 [n]) of rows that know theirs, and the rows without them."""
        ids = torch.tensor([row[ROW] for row in data_rows], device=self.accelerator.device)
        return ids, [{name: value for name, value in row.items() if name != ROW} for row in data_rows]

    # -- one rollout --------------------------------------------------------------------------------------------

    def _keep_completions(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """This rank's micro-batches of the completions worth training on, of all ranks' rollouts."""
        assert self.row_selection is not None
        settle(self.accelerator.device)  # the rollout's end is not the selection's cost
        with self.clock("select"):
            step, group = self.state.global_step + 1, self.num_generations
            rows = [row for part in distributed.gather_objects(row_ops.split(batch)) for row in part]
            signals = completions.describe(rows, group, self.loss_type, self._sources, self._source_sizes)
            of_totals = self.multi_objective_aggregation == "sum_then_normalize"
            teaches = completions.teaches(signals, group, of_totals)
            keep = kept_rows(len(rows), [link.keep for link in self.chain])[-1] if self.chain else len(rows)
            generator, others = self.row_selection.generator, (~teaches).nonzero().flatten()

            # a router's loss is not a sum over rows: there each copy is run
            signals = completions.with_copies(rows, signals, teaches & (not self.aux_loss_enabled))
            copies = signals.copies
            assert copies is not None

            def fill(selection: Selection) -> Selection:
                return completions.fill(selection, others, keep, copies, generator)

            # rows without an advantage never take the place of one that has one
            notes = ["no advantage" if not usable else None for usable in teaches.tolist()]
            notes = ["a copy" if count == 0 else note for note, count in zip(notes, copies.tolist(), strict=True)]
            selection, figures = self.row_selection.choose(
                step,
                lambda place: policy.as_row(rows[place]),
                signals,
                teaches & (copies > 0),
                notes,
                ids=None,
                complete=None if self._skips else fill,
            )
            whole = fill(selection)
            distributed.check_same(whole.indices, f"the rows of step {step}", whole.weights)
            length = completions.step_scale(signals, whole, teaches, self.loss_type)
            runs = teaches if self._skips else torch.ones_like(teaches)
            layout = completions.Layout(
                updates=max(self.args.steps_per_generation // self.args.gradient_accumulation_steps, 1),
                micro_batches=min(self.args.gradient_accumulation_steps, self.args.steps_per_generation),
                ranks=distributed.world_size(),
            )
            dealt = completions.micro_batches(rows, signals, whole, runs, layout, self.loss_type, generator)
            figures |= {
                "rows_run": float(runs[whole.indices].sum()),
                "copies": (copies == 0).float().mean().item(),
                "filled": whole.reasons.count("fill") / keep,
                "with_advantage": teaches.float().mean().item(),
                "step_scale": length,
                "padding": completions.padding_share(dealt),
            }
            for name, figure in figures.items():
                self._log_metric_value(f"batch/{name}", figure)
            if self.chain:
                offered = int((teaches & (copies > 0)).sum())
                self.health.chosen(offered, keep, int(figures["rows_run"]), int(figures["rows_scored"]))
            num_items = (signals.num_tokens[whole.indices] * whole.weights).sum()
            pad, device = self._tokenizer.pad_token_id, self.accelerator.device
            return [
                completions.as_batch(mine, scales, length, num_items, pad, device)
                for mine, scales in dealt[distributed.rank()]
            ]

    @property
    def _skips(self) -> bool:
        """Whether completions without an advantage are left out of the passes."""
        without_gradient = self.beta == 0 and not self._entropy_bonus_enabled and not self.aux_loss_enabled
        return without_gradient and self.skip_zero_advantage is not False

    # -- log-probabilities under the policy of the rollout, and under the reference model ------------------------

    @contextmanager
    def _without_old_passes(self) -> Iterator[None]:
        """TRL's rollout without its passes over all completions; `_add_log_probs` makes up for the kept ones.

        They find the log-probabilities under the policy that made them, for ratios and to correct for vLLM's own,
        and those under the reference model.
        """
        with ExitStack() as stack:
            stack.enter_context(replaced(self, "vllm_importance_sampling_correction", False))
            stack.enter_context(replaced(self.args, "gradient_accumulation_steps", self._passes_in_rollout))
            if not any(isinstance(signal, ValueGradient) for signal in batch_selection.needs_of(self.chain)):
                stack.enter_context(replaced(self, "beta", 0.0))  # else the KL penalty is in each row's signal
            yield

    def _add_log_probs(self, inputs: dict[str, Any]) -> None:
        """What TRL's loss looks for in a micro-batch of kept completions, and their rollout did not compute."""
        width = inputs["completion_ids"].size(1)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            # Where a rollout serves one optimizer step, its policy is the one that the loss is computed with
            if not self._one_step and "old_per_token_logps" not in inputs:
                old = self._get_per_token_logps_and_entropies(self.model, ids, mask, width)[0]
                inputs["old_per_token_logps"] = old
                if self._corrects_engine:
                    self._correct(inputs, old)
            if self.beta != 0 and "ref_per_token_logps" not in inputs:
                with self._reference() as model:
                    found = self._get_per_token_logps_and_entropies(model, ids, mask, width)
                inputs["ref_per_token_logps"] = found[0]

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The reference model, which is the policy without its adapter where that is all that is trained."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        whole = self.accelerator.unwrap_model(self.model)
        with use_adapter(whole, adapter_name="ref" if "ref" in whole.peft_config else None):
            yield self.model

    @property
    def _passes_in_rollout(self) -> int:
        """Training passes that each rollout serves, of all its optimizer steps."""
        passes: int = self.args.steps_per_generation * self.num_iterations
        return passes

    @property
    def _one_step(self) -> bool:
        """Whether each rollout serves one optimizer step."""
        return self.args.gradient_accumulation_steps % self._passes_in_rollout == 0  # type: ignore[no-any-return]

    @property
    def _corrects_engine(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    def _corrections(self, log_probs: Tensor, sampling: Tensor, mask: Tensor) -> Tensor:
        """float, [B, T] or [B, 1]: see `policy.engine_corrections`."""
        args = self.args
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        return policy.engine_corrections(log_probs, sampling, mask, self.vllm_importance_sampling_mode, low, high)

    @property
    def _masks_rows(self) -> bool:
        """Whether the correction may take a whole completion out of the loss."""
        return self._corrects_engine and self.vllm_importance_sampling_mode.endswith("_mask")

    def _row_weights(self, batch: ScoredBatch) -> Tensor:
        """float32 [B]: the largest correction of a row's tokens; at 0 the row has no gradient."""
        mask = policy.bears_loss(batch)
        corrections = self._corrections(batch.output.log_probs, batch.given["sampling"][:, 1:], mask)
        return (corrections * mask).amax(1)

    def _row_losses(self, batch: ScoredBatch) -> Tensor:
        """float32 [B]: the rows' policy losses in the scoring pass."""
        mask, corrections = policy.bears_loss(batch), torch.ones_like(batch.output.log_probs)
        if self._corrects_engine:
            corrections = self._corrections(batch.output.log_probs, batch.given["sampling"][:, 1:], mask)
        if self.loss_type == "cispo":
            corrections = corrections * min(1.0, self.epsilon_high)
        elif self.loss_type == "vespo" and self._corrects_engine:
            args = self.args
            corrections = self.get_gamma_weights(
                batch.given["advantages"][:, None],
                torch.zeros_like(corrections),
                mask,
                corrections.masked_fill(~mask, 1.0),
                args.vespo_k_pos,
                args.vespo_lambda_pos,
                args.vespo_k_neg,
                args.vespo_lambda_neg,
            )
        return policy.scored_losses(batch, self.beta, self.args.use_bias_correction_kl, corrections)

    def get_train_dataloader(self) -> DataLoader:
        if self.row_selection is None:
            return super().get_train_dataloader()  # type: ignore[misc, no-any-return]
        # TRL would read as many rows as are trained on
        loader: DataLoader = self._get_dataloader(
            dataset=_Numbered(self.train_dataset),
            description="Training",
            batch_size=self._rows_per_rank,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )
        return loader

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        if self._kept is not None:  # TRL has just generated, and buffered all completions
            self._buffered_inputs, self._kept = self._kept, None
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._under_way = inputs if "row_scales" in inputs else None
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._under_way = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        log_probs, entropies, aux_loss = found
        if (inputs := self._under_way) is not None:
            if self._corrects_engine and "importance_sampling_ratio" not in inputs:
                self._correct(inputs, log_probs.detach())
            log_probs = policy.scale_gradient(log_probs, inputs["row_scales"])
            entropies = policy.scale_gradient(entropies, inputs["row_scales"])
        return log_probs, entropies, aux_loss

    def _correct(self, inputs: dict[str, Any], log_probs: Tensor) -> None:
        """Put the correction for vLLM's probabilities where TRL's loss looks for it, and log how far off they are."""
        sampling, mask = inputs["sampling_per_token_logps"], policy.loss_mask(inputs)
        inputs["importance_sampling_ratio"] = ratios = self._corrections(log_probs, sampling, mask)
        gaps = torch.nan_to_num((log_probs.float() - sampling).abs() * mask, nan=0.0)
        self._log_masked(ratios, mask)
        if ratios.shape == mask.shape:  # token by token
            ratios, of = ratios * mask, mask.sum()
        else:
            of = torch.ones_like(ratios).sum()
        counts = torch.stack([gaps.sum(), mask.sum(), ratios.sum(), of]).float()
        distributed.sum_([counts])
        self._log_metric_value("sampling/sampling_logp_difference/mean", (counts[0] / counts[1].clamp(min=1)).item())
        self._log_metric_value("sampling/sampling_logp_difference/max", distributed.max_number(gaps.max().item()))
        self._log_metric_value("sampling/importance_sampling_ratio/mean", (counts[2] / counts[3].clamp(min=1)).item())

    def _log_masked(self, ratios: Tensor, mask: Tensor) -> None:
        """The share of completions that the correction takes out of the loss. ratios: float [B, T] or [B, 1]."""
        rows = mask.any(1)
        counts = torch.stack([(rows & ~((ratios != 0) & mask).any(1)).sum(), rows.sum()]).float()
        distributed.sum_([counts])
        self._log_metric_value("sampling/masked", (counts[0] / counts[1].clamp(min=1)).item())


def _check(chain: Sequence[batch_selection.Link], args: GRPOConfig) -> None:
    """Refuse what cannot work together with a batch selector, before anything is loaded."""
    check_selectors(chain, args)
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns does not work with batch_selector, which numbers the rows: leave it out"
        )
