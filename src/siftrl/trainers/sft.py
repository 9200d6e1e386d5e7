"""SFT: TRL's trainer, which may train on the rows worth it only; see `siftrl.trainers.selected_rows` for a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from siftrl import batch_selection
from siftrl.batch_selection import Chain, needs_of
from siftrl.parts import BY_STRUCTURE, PartNames
from siftrl.run import Recorder
from siftrl.scoring import Rows, Scorer
from siftrl.trainers.base import SiftMixin
from siftrl.trainers.selected_rows import SelectedRowsMixin
from siftrl.types import BatchSelector, Selection, Signals


class SFTTrainer(SelectedRowsMixin, SiftMixin, TRLSFTTrainer):
    """TRL's `SFTTrainer` with `batch_selector=`; every other argument is TRL's.

    With a selector, `args` describes the candidate batch: per_device_train_batch_size x gradient_accumulation_steps x
    ranks rows are read in a step, unless `candidates` says otherwise. The kept ones are trained on in micro-batches of
    at most per_device_train_batch_size rows: memory is what it was, and a dropped row costs nothing after its scoring.

    Args:
        batch_selector: chooses the rows of each step (see `siftrl.types.BatchSelector`), or a chain of (selector, keep)
            pairs, each choosing from what the one before kept; None: all rows, in TRL's order.
        keep: a share of the candidate rows (float), or their number over all ranks (int); for a chain, stated there.
        candidates: rows read in a step, over all ranks.
        source_column: the data's column that names each row's source, for selectors that keep a mixture balanced.
        scoring_batch_size: rows of one forward pass of scoring; None: per_device_train_batch_size.
        parts: where the model's last block, V projection and head are, if its structure does not tell.
        max_overhead: share of a step's seconds that scoring and choosing may take (see `siftrl.budget`).
        recorder: where metrics and the audit log go besides `args.report_to`; None: `args.output_dir`, once a selector
            is on.

    Raises:
        ValueError: for a selector with bad settings, and what cannot work together with one.
    """

    columns_read = ("input_ids", "labels")
    loss_hint = "completions, max_length and completion_only_loss"

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *positional: Any,
        batch_selector: BatchSelector | Chain | None = None,
        keep: float | int = 0.5,
        candidates: int | None = None,
        source_column: str | None = None,
        scoring_batch_size: int | None = None,
        parts: PartNames = BY_STRUCTURE,
        max_overhead: float | None = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> None:
        wanted = args or SFTConfig()
        planned = self._plan_rows(wanted, batch_selector, keep, candidates)
        if self.chain:
            _check(self.chain, wanted, kwargs.get("compute_loss_func"))
            args = planned
        super().__init__(model, args, *positional, **kwargs)
        self._init_sift(recorder)
        if self.chain:
            self._check_data()
            collator = self.data_collator
            if not isinstance(collator, DataCollatorForLanguageModeling):
                raise ValueError("batch_selector needs rows of text and TRL's own collator; remove data_collator")
            if getattr(wanted, "packing", False):
                # TRL packs the data set before training; here the kept rows of a step are packed
                self.padding_free = collator.padding_free = True
            scorer = Scorer(
                self.model,
                needs_of(self.chain),
                dataclasses.replace(collator, padding_free=False),
                micro_batch_size=scoring_batch_size or wanted.per_device_train_batch_size,
                device=self.accelerator.device,
                precision=self.accelerator.autocast,
                names=parts,
                init_kwargs=self.args.model_init_kwargs,
            )
            self._set_up_rows("sft", scorer, source_column, max_overhead)

    # -- a row -------------------------------------------------------------------------------------------------

    def describe_rows(self, rows: Rows) -> Signals:
        labels: list[list[int]] = [row.get("labels") or row["input_ids"] for row in rows]
        return Signals(
            num_tokens=torch.tensor([sum(label != -100 for label in row[1:]) for row in labels]),
            num_all_tokens=torch.tensor([len(row["input_ids"]) for row in rows]),
        )

    def collate_kept(self, rows: Rows, weights: Tensor, even: float) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.data_collator(rows)
        if self._is_weighted:
            lengths = [len(row["input_ids"]) for row in rows]
            batch["token_weights"] = batch_selection.token_weights(weights, lengths, batch["input_ids"])
        return batch

    def muted(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {"labels": [-100] * len(row["input_ids"])}

    def num_items(self, signals: Signals, selection: Selection) -> Tensor:
        """The kept loss-bearing tokens over all ranks and micro-batches, each counted with its row's weight."""
        num_tokens = signals.num_tokens[selection.indices]
        return (num_tokens * selection.weights).sum() if self._is_weighted else num_tokens.sum()

    def num_eval_items(self, batch: dict[str, Any]) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = inputs.pop("token_weights", None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def weighted(**model_inputs: Any) -> Any:
            output = model(**model_inputs)
            output.log_probs = output.log_probs * weights.to(output.log_probs)
            return output

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)


def _check(chain: list[batch_selection.Link], args: Any, compute_loss_func: Any) -> None:
    """Refuse what cannot work together with a batch selector, before anything is loaded."""
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise ValueError("batch_selector needs average_tokens_across_devices: the loss is a mean over all kept tokens")
    weighted = [type(link.selector).__name__ for link in chain if link.selector.weighted]
    if weighted and (getattr(args, "loss_type", "nll") != "nll" or args.label_smoothing_factor or compute_loss_func):
        raise ValueError(
            f"{weighted[0]} weights its rows, which loss_type dft, label smoothing and a compute_loss_func cannot; "
            "remove those, or write `weights: none` for the selector"
        )
