"""DPO: TRL's trainer, which may train on the pairs worth it only; see `siftrl.trainers.selected_rows` for a step.

A row is a preference pair: a prompt, a chosen and a rejected completion. `siftrl.pairs` says what is measured of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig
from trl import DPOTrainer as TRLDPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from siftrl.batch_selection import Chain, Link, needs_of
from siftrl.origin import reference_loader
from siftrl.pairs import OF_THE_LOSS, PAIR_LOSSES, PairLoss, PairScorer, check_signals
from siftrl.parts import BY_STRUCTURE, PartNames
from siftrl.policy import scale_gradient
from siftrl.rollout import replaced
from siftrl.run import Recorder
from siftrl.scoring import Rows
from siftrl.trainers.base import SiftMixin
from siftrl.trainers.selected_rows import SelectedRowsMixin
from siftrl.types import BatchSelector, Signals


class DPOTrainer(SelectedRowsMixin, SiftMixin, TRLDPOTrainer):
    """TRL's `DPOTrainer` with `batch_selector=`; every other argument is TRL's.

    With a selector, `args` describes the candidate batch: per_device_train_batch_size x gradient_accumulation_steps x
    ranks pairs are read in a step, unless `candidates` says otherwise. The kept ones are trained on in micro-batches of
    at most per_device_train_batch_size pairs. The step's loss is their weighted mean, sum_i w_i L_i / k; the logged
    loss and TRL's other figures are their plain mean.

    Args:
        batch_selector: chooses the pairs of each step (see `siftrl.types.BatchSelector`), or a chain of (selector,
            keep) pairs, each choosing from what the one before kept; None: all pairs, in TRL's order.
        keep: a share of the candidate pairs (float), or their number over all ranks (int); for a chain, stated there.
        candidates: pairs read in a step, over all ranks.
        source_column: the data's column that names each pair's source, for selectors that keep a mixture balanced.
        scoring_batch_size: pairs of one forward pass of scoring; None: per_device_train_batch_size.
        parts: where the model's last block, V projection and head are, if its structure does not tell.
        max_overhead: share of a step's seconds that scoring and choosing may take (see `siftrl.budget`).
        recorder: where metrics and the audit log go besides `args.report_to`; None: `args.output_dir`, once a selector
            is on.

    Raises:
        ValueError: for a selector with bad settings, one whose signals pairs do not have, and what cannot work together
            with one.
    """

    columns_read = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    loss_hint = "completions and max_length"
    eval_figures = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}  # of the implicit reward

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
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
        wanted = args or DPOConfig()
        planned = self._plan_rows(wanted, batch_selector, keep, candidates)
        if self.chain:
            _check(self.chain, wanted)
            args = planned
        load = reference_loader(dpo_trainer.create_model_from_path, model)
        with replaced(dpo_trainer, "create_model_from_path", load):
            super().__init__(model, ref_model, args, *positional, **kwargs)
        self._init_sift(recorder)
        if self.chain:
            self._check_data()
            if not isinstance(self.data_collator, DataCollatorForPreference):
                raise ValueError("batch_selector needs pairs of text and TRL's own collator; remove data_collator")
            scorer = PairScorer(
                self.model,
                needs_of(self.chain),
                self._collate_for_scoring,
                micro_batch_size=scoring_batch_size or wanted.per_device_train_batch_size,
                device=self.accelerator.device,
                precision=self.accelerator.autocast,
                names=parts,
                init_kwargs=self.args.model_init_kwargs,
                loss=PairLoss(self.loss_types, self.loss_weights, self.beta, self.label_smoothing, wanted.discopop_tau),
            )
            self._set_up_rows("dpo", scorer, source_column, max_overhead)

    # -- a row -------------------------------------------------------------------------------------------------

    def describe_rows(self, rows: Rows) -> Signals:
        """A pair has the tokens of both its sequences; none that bear loss where one of the two has none."""
        num_tokens, num_all_tokens = [], []
        for row in rows:
            pair = self.data_collator([row])  # cuts it to max_length
            chosen, rejected = pair["completion_mask"][:, 1:].sum(1).tolist()
            num_tokens.append(chosen + rejected if chosen and rejected else 0)
            lengths = pair["attention_mask"].sum(1).tolist()
            num_all_tokens.append(sum(lengths))
            row["input_ids"] = pair["input_ids"][lengths.index(max(lengths))]  # what the scorer sorts by
        return Signals(torch.tensor(num_tokens), torch.tensor(num_all_tokens), shares=torch.ones(len(rows)))

    def collate_kept(self, rows: Rows, weights: Tensor, even: float) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.data_collator(rows)
        # TRL takes the mean over a micro-batch's pairs, then over micro-batches and ranks
        shares = weights * len(rows) / even
        if (shares != 1).any():
            batch["shares"] = shares
        return batch

    def num_eval_items(self, batch: dict[str, Any]) -> int:
        return len(batch["input_ids"]) // 2

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        shares = inputs.pop("shares", None)
        if shares is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def weighted(**model_inputs: Any) -> Any:
            output = model(**model_inputs)
            # a pair's loss depends on its own two sequences only, whatever the loss type
            output.log_probs = scale_gradient(output.log_probs, shares.repeat(2))
            return output

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    # -- scoring -----------------------------------------------------------------------------------------------

    def _collate_for_scoring(self, rows: Rows) -> dict[str, Tensor]:
        """See `siftrl.pairs.PairScorer`; the reference's log-probabilities as TRL gets them."""
        batch: dict[str, Tensor] = self.data_collator(rows)
        if any(isinstance(signal, OF_THE_LOSS) for signal in needs_of(self.chain)) and "ref_chosen_logps" not in batch:
            on_device = {name: value.to(self.accelerator.device) for name, value in batch.items()}
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, on_device)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        return batch


def _check(chain: list[Link], args: DPOConfig) -> None:
    """Refuse what cannot work together with a batch selector, before anything is loaded."""
    needs = needs_of(chain)
    check_signals(needs)
    if mixing := [name for name in args.loss_type if name not in PAIR_LOSSES]:
        raise ValueError(
            f"loss_type {mixing[0]} does not work with batch_selector: the loss of a pair depends on the pairs beside "
            f"it; take {', '.join(PAIR_LOSSES)}"
        )
    if any(isinstance(signal, OF_THE_LOSS) for signal in needs):
        usual = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
        for option, value in usual.items():
            if getattr(args, option) != value:
                raise ValueError(
                    f"{option} does not work with a batch_selector that measures the pairs' losses or gradients; "
                    "remove it, or take another selector"
                )
