"""SFT: TRL's trainer, which may train on the rows worth it only.

One optimizer step, top to bottom (`get_batch_samples`):
    draw candidate rows -> score them in one forward pass -> each selector of the chain keeps some -> deal the kept rows
    to ranks and micro-batches, packed or padded anew -> TRL's forward and backward passes on those.
Without a selector every hook below hands over to TRL unchanged, and the losses are TRL's bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from siftrl import batch_selection, distributed, plugins, state
from siftrl.batch_arithmetic import kept_rows
from siftrl.parts import BY_STRUCTURE, PartNames
from siftrl.run import Recorder
from siftrl.scoring import Rows, Scorer
from siftrl.trainers.base import SiftMixin
from siftrl.types import BatchSelector, Selection, Signals

Chain = Sequence[tuple[BatchSelector, float | int]]


class SFTTrainer(SiftMixin, TRLSFTTrainer):
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
        recorder: where metrics and the audit log go besides `args.report_to`; None: `args.output_dir`, once a selector
            is on.

    Raises:
        ValueError: for a selector with bad settings, and what cannot work together with one.
    """

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
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> None:
        self.chain = [] if batch_selector is None else batch_selection.links(batch_selector, keep)
        wanted = args or SFTConfig()
        if self.chain:
            _check(self.chain, wanted, kwargs.get("compute_loss_func"))
            self.rows_read_per_step = candidates or _rows_per_step(wanted)
            args = _for_kept_rows(wanted, self.chain, self.rows_read_per_step)
        super().__init__(model, args, *positional, **kwargs)
        self._init_sift(recorder)
        self.rows_read = self.rows_trained = 0
        if self.chain:
            rows = scoring_batch_size or wanted.per_device_train_batch_size
            self._set_up_selection(getattr(wanted, "packing", False), source_column, rows, parts)

    def _set_up_selection(
        self, packing: bool, source_column: str | None, scoring_batch_size: int, parts: PartNames
    ) -> None:
        data, collator = self.train_dataset, self.data_collator
        if not isinstance(data, Dataset):
            raise ValueError("batch_selector needs a data set that can be indexed: load it without streaming")
        if not isinstance(collator, DataCollatorForLanguageModeling):
            raise ValueError("batch_selector needs rows of text and TRL's own collator; remove data_collator")
        if len(data) < self.rows_read_per_step:
            raise ValueError(
                f"a step reads {self.rows_read_per_step} candidate rows, but the data set has {len(data)}: lower "
                "per_device_train_batch_size or gradient_accumulation_steps (rows_per_step in a recipe), or add data"
            )
        if packing:  # TRL packs the data set before training; here the kept rows of a step are packed
            self.padding_free = collator.padding_free = True
        self._columns = data.select_columns([name for name in ("input_ids", "labels") if name in data.column_names])
        self._sources: list[str | None] | None = None
        if source_column is not None:
            if source_column not in data.column_names:
                raise ValueError(f"source_column: there is no column {source_column!r} in the training data")
            self._sources = [None if value is None else str(value) for value in data[source_column]]
        self._source_sizes = None if self._sources is None else dict(Counter(self._sources))
        if self.recorder is None:
            self.recorder = Recorder(Path(self.args.output_dir), "sft")
        self.row_stream = state.PromptStream(len(data), self.args.seed)
        self.selection_generator = torch.Generator().manual_seed(self.args.seed + 1)
        self.scorer = Scorer(
            self.model,
            frozenset().union(*(link.selector.needs for link in self.chain)),
            dataclasses.replace(collator, padding_free=False),
            micro_batch_size=scoring_batch_size,
            device=self.accelerator.device,
            precision=self.accelerator.autocast,
            names=parts,
        )
        self._clock_at_log = dict(self.clock.seconds)

    # -- one step's rows ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if not self.chain:
            return super().get_train_dataloader()
        # the loader only keeps time: rows are drawn when they are needed, so that the scores are never stale
        steps = -(-len(self.train_dataset) // self.rows_read_per_step)
        ticks: Any = range(steps * self.args.gradient_accumulation_steps)
        return DataLoader(ticks, batch_size=1, collate_fn=lambda tick: tick)

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.train_dataset) if self.chain else super().num_examples(dataloader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if not self.chain:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        for _ in range(num_batches):
            next(epoch_iterator)
        with self.clock("score"):
            rows, signals, usable = self.score_candidates()
        with self.clock("select"):
            selection = batch_selection.choose(self.chain, signals, usable, self.selection_generator)
            distributed.check_same(selection.indices, f"the rows of step {self.state.global_step + 1}")
            self._record(signals, usable, selection)
            return self._micro_batches(rows, signals, selection, num_batches)

    def score_candidates(self) -> tuple[Rows, Signals, Tensor]:
        """Draw the next candidates and score them with the model as it is now.

        Returns the B rows, their signals, and which of them may be chosen (bool [B]); the same on every rank.
        """
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the optimizer's step is not the selection's cost
        ids = self.row_stream.draw(self.rows_read_per_step)
        columns = self._columns[ids.tolist()]
        rows: Rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        lengths = [len(row["input_ids"]) for row in rows]
        labels: list[list[int]] = [row.get("labels") or row["input_ids"] for row in rows]
        num_tokens = torch.tensor([sum(label != -100 for label in row[1:]) for row in labels])
        some, sources = num_tokens > 0, self._sources
        usable = some.clone()
        signals = Signals(
            num_tokens=num_tokens,
            num_all_tokens=torch.tensor(lengths),
            ids=ids,
            source=None if sources is None else [sources[row] for row in ids.tolist()],
            source_sizes=self._source_sizes,
        )
        seed = int(torch.randint(2**31, (), generator=self.selection_generator))
        if self.scorer.needs:
            tensors, finite = self.scorer.score(rows, ids.tolist(), seed)
            signals.tensors.update(tensors)
            usable &= finite
        step = self.state.global_step + 1
        if not some.any():
            raise ValueError(
                f"step {step}: none of the {len(rows)} candidate rows has a token that bears loss; look at the "
                "completions, max_length and completion_only_loss"
            )
        if not usable.any():
            names = " or ".join(type(signal).__name__ for signal in self.scorer.needs)
            raise FloatingPointError(
                f"step {step}: every candidate row has a NaN or infinite {names}: the "
                "model diverged, or the data breaks it; lower learning_rate. The last checkpoint is untouched"
            )
        return rows, signals, usable

    def _micro_batches(
        self, rows: Rows, signals: Signals, selection: Selection, num_batches: int
    ) -> tuple[list[Any], Tensor]:
        """This rank's micro-batches of kept rows, and what their losses are divided by: the kept loss-bearing tokens
        over all ranks and micro-batches, each counted with its row's weight."""
        chosen = selection.indices.tolist()
        lengths = [len(rows[row]["input_ids"]) for row in chosen]
        dealt = batch_selection.deal(lengths, distributed.world_size(), num_batches)[distributed.rank()]
        batches, padded = [], 0
        for places in dealt:
            kept = [rows[chosen[place]] for place in places]
            if not kept:  # too few usable rows: a row without labels, so that this rank takes part in the step
                kept = [rows[chosen[0]] | {"labels": [-100] * len(rows[chosen[0]]["input_ids"])}]
            batch = self.data_collator(kept)
            padded += batch["input_ids"].numel()
            if self._is_weighted:
                weights = selection.weights[places] if places else torch.ones(1)
                kept_lengths = [len(row["input_ids"]) for row in kept]
                batch["token_weights"] = batch_selection.token_weights(weights, kept_lengths, batch["input_ids"])
            batches.append(batch)
        counts = torch.tensor([float(padded), float(sum(lengths)) / distributed.world_size()])
        distributed.sum_([counts])
        self._log_figures({"padding": 1 - (counts[1] / counts[0]).item()})
        num_tokens = signals.num_tokens[selection.indices]
        total = (num_tokens * selection.weights).sum() if self._is_weighted else num_tokens.sum()
        return batches, total.to(self.accelerator.device)

    @property
    def _is_weighted(self) -> bool:
        return any(link.selector.weighted for link in self.chain)

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

    # -- records -----------------------------------------------------------------------------------------------

    def _record(self, signals: Signals, usable: Tensor, selection: Selection) -> None:
        self.rows_read += len(signals)
        self.rows_trained += len(selection.indices)
        num_tokens, chosen = signals.num_tokens, selection.indices
        without = int((num_tokens == 0).sum())
        figures = {
            "rows_read": float(len(signals)),
            "rows_trained": float(len(chosen)),
            "tokens_kept": (num_tokens[chosen].sum() / num_tokens.sum()).item(),
            "no_tokens": float(without),
            "not_finite": float(len(signals) - int(usable.sum()) - without),
        }
        if self._is_weighted:
            figures["largest_weight"] = selection.weights.max().item()
        self._log_figures(figures)
        for link in self.chain:
            prefix = f"{_name(link.selector)}/" if len(self.chain) > 1 else ""
            self._log_figures({prefix + name: figure for name, figure in link.selector.metrics().items()})
        if self.recorder is not None and distributed.is_main():
            self.recorder.batch(self.state.global_step + 1, signals, usable, selection)

    def _log_figures(self, figures: dict[str, float]) -> None:
        for name, figure in figures.items():
            self._metrics["train"][f"batch/{name}"].append(figure)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.chain and self.model.training:
            now = dict(self.clock.seconds)
            spent = {part: now[part] - self._clock_at_log[part] for part in now}
            if spent["score"]:
                logs["batch/share_of_time"] = _selection_share(spent)
            self._clock_at_log = now
        super().log(logs, start_time)

    def sift_summary(self) -> dict[str, Any]:
        summary = super().sift_summary() | {"tokens": int(self._total_train_tokens)}
        if self.chain:
            summary["selection"] = {
                "rows_read": self.rows_read,
                "rows_trained": self.rows_trained,
                "share_of_time": _selection_share(self.clock.seconds),
            }
        return summary

    # -- checkpoints -------------------------------------------------------------------------------------------

    def sift_state(self) -> dict[str, Any]:
        saved = super().sift_state() | {"tokens": self._total_train_tokens}
        if self.chain:
            saved |= {
                "stream": self.row_stream.state_dict(),
                "generator": self.selection_generator.get_state(),
                "selectors": [[_name(link.selector), link.selector.state_dict()] for link in self.chain],
                "rows": [self.rows_read, self.rows_trained],
            }
        return saved

    def load_sift_state(self, saved: dict[str, Any]) -> None:
        super().load_sift_state(saved)
        self._total_train_tokens = saved["tokens"]
        before, now = [name for name, _ in saved.get("selectors", [])], [_name(link.selector) for link in self.chain]
        if before != now:
            raise ValueError(
                f"the checkpoint was written with batch_selector {' -> '.join(before) or 'none'}, this run has "
                f"{' -> '.join(now) or 'none'}: resume with the recipe that it was made with"
            )
        if not self.chain:
            return
        self.row_stream.load_state_dict(saved["stream"])
        self.selection_generator.set_state(saved["generator"])
        for link, (_, selector_state) in zip(self.chain, saved["selectors"], strict=True):
            link.selector.load_state_dict(selector_state)
        self.rows_read, self.rows_trained = saved["rows"]
        self._clock_at_log = dict(self.clock.seconds)


# ------------------------------------------------------------------------------------------- before the run starts


def _rows_per_step(args: TrainingArguments) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _for_kept_rows(args: Any, chain: list[batch_selection.Link], candidates: int) -> Any:
    """`args` for the rows that are trained on: fewer micro-batches, or smaller ones where there is only one."""
    kept = kept_rows(candidates, [link.keep for link in chain])[-1]
    world, micro = args.world_size, args.per_device_train_batch_size
    if kept % world or (kept // world > micro and kept // world % micro):
        step = world * micro
        near = " or ".join(str(rows) for rows in (kept // step * step, kept // step * step + step) if rows)
        raise ValueError(
            f"batch_selector: {kept} of {candidates} rows are kept, which do not divide over {world} ranks in "
            f"micro-batches of {micro} (per_device_train_batch_size); keep {near}"
        )
    micro = min(micro, kept // world)
    # anew, not changed in place: DeepSpeed's settings are derived from these numbers
    return dataclasses.replace(
        args,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=kept // world // micro,
        **({"packing": False} if getattr(args, "packing", False) else {}),
    )


def _check(chain: list[batch_selection.Link], args: Any, compute_loss_func: Any) -> None:
    """Refuse what cannot work together with a batch selector, before anything is loaded."""
    for link in chain:
        if dataclasses.is_dataclass(link.selector):
            plugins.check(link.selector)
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size does not work with batch_selector: set per_device_train_batch_size")
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise ValueError("train_sampling_strategy does not work with batch_selector: the order of rows is its own")
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise ValueError("batch_selector needs average_tokens_across_devices: the loss is a mean over all kept tokens")
    if args.world_size > 1 and getattr(args, "parallelism_config", None) is not None:
        raise ValueError("batch_selector does not work with parallelism_config: a rank must hold whole rows")
    weighted = [type(link.selector).__name__ for link in chain if link.selector.weighted]
    if weighted and (getattr(args, "loss_type", "nll") != "nll" or args.label_smoothing_factor or compute_loss_func):
        raise ValueError(
            f"{weighted[0]} weights its rows, which loss_type dft, label smoothing and a compute_loss_func cannot; "
            "remove those, or write `weights: none` for the selector"
        )


def _name(selector: BatchSelector) -> str:
    """A selector's name is its file's."""
    return type(selector).__module__.rpartition(".")[2]


def _selection_share(seconds: dict[str, float]) -> float:
    """Scoring and choosing, as a share of the whole step."""
    selection = seconds["score"] + seconds["select"]
    whole = selection + seconds["policy_update"]
    return selection / whole if whole else 0.0
