"""What SFT and DPO share: a step reads candidate rows, trains on the chosen ones, and keeps account of it.

One optimizer step, top to bottom (`get_batch_samples`):
    draw candidate rows -> score them in one forward pass -> each selector of the chain keeps some -> deal the kept rows
    to ranks and micro-batches, collated anew -> TRL's forward and backward passes on those.
Without a selector every hook below hands over to TRL unchanged, and the losses are TRL's bit for bit.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from siftrl import batch_selection, distributed, state
from siftrl.batch_arithmetic import kept_rows
from siftrl.batch_selection import Chain, Link
from siftrl.health import Health
from siftrl.row_selection import RowSelection, check_selectors, sources_of
from siftrl.run import Clock, Recorder
from siftrl.scoring import Rows, Scorer
from siftrl.trainers.base import settle
from siftrl.types import BatchSelector, Selection, Signals


class SelectedRowsMixin(ABC):
    """Put before `SiftMixin` in the bases. The trainer says what its rows are: see the methods under "a row".

    Before TRL's constructor call `_plan_rows`, and after it `_init_sift` and, where there is a chain, `_set_up_rows`.
    """

    columns_read: tuple[str, ...]
    """The data set's columns that a row is read from, where they are there."""
    loss_hint: str
    """Where to look when no row bears loss."""
    eval_figures: ClassVar[Mapping[str, str]] = {}
    """What is measured on held-out rows besides the loss: name -> TRL's name."""

    args: Any
    accelerator: Any
    clock: Clock
    health: Health
    model: Any
    recorder: Recorder | None
    row_selection: RowSelection | None
    state: Any
    train_dataset: Any
    warn: Any
    _metrics: dict[str, Any]
    _total_train_tokens: Any

    def _plan_rows(
        self, args: Any, batch_selector: BatchSelector | Chain | None, keep: float | int, candidates: int | None
    ) -> Any:
        """`args` as TRL's trainer gets them: those of the rows that are kept."""
        self.chain = [] if batch_selector is None else batch_selection.links(batch_selector, keep)
        if not self.chain:
            return args
        _check(self.chain, args)
        self.rows_read_per_step = candidates or _rows_per_step(args)
        return _for_kept_rows(args, self.chain, self.rows_read_per_step)

    def _check_data(self) -> None:
        data = self.train_dataset
        sources_of(data, None)
        if len(data) < self.rows_read_per_step:
            raise ValueError(
                f"a step reads {self.rows_read_per_step} candidate rows, but the data set has {len(data)}: lower "
                "per_device_train_batch_size or gradient_accumulation_steps (rows_per_step in a recipe), or add data"
            )

    def _set_up_rows(self, kind: str, scorer: Scorer, source_column: str | None, max_overhead: float | None) -> None:
        data = self.train_dataset
        self._columns = data.select_columns([name for name in self.columns_read if name in data.column_names])
        self._sources, self._source_sizes = sources_of(data, source_column)
        if self.recorder is None:
            self.recorder = Recorder(Path(self.args.output_dir), kind)
        self.row_stream = state.PromptStream(len(data), self.args.seed)
        self.row_selection = RowSelection(
            self.chain,
            scorer,
            seed=self.args.seed + 1,
            clock=self.clock,
            recorder=self.recorder,
            max_overhead=max_overhead,
            warn=self.warn,
        )

    # -- a row -------------------------------------------------------------------------------------------------

    @abstractmethod
    def describe_rows(self, rows: Rows) -> Signals:
        """What is known of the rows without the model: tokens, and what they count in the loss."""

    @abstractmethod
    def collate_kept(self, rows: Rows, weights: Tensor, even: float) -> dict[str, Tensor]:
        """A micro-batch of kept rows, for TRL's `compute_loss`.

        weights: float [n]. even: rows of a micro-batch, were all of the step's micro-batches equal.
        """

    def muted(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as one that bears no loss; its weight is 0, too."""
        return row

    def num_items(self, signals: Signals, selection: Selection) -> Tensor | None:
        """What TRL divides the step's losses by; None: by the rows of each micro-batch."""
        return None

    @abstractmethod
    def num_eval_items(self, batch: dict[str, Any]) -> int:
        """What the loss of a held-out batch is a mean over."""

    # -- one step's rows ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if not self.chain:
            return super().get_train_dataloader()  # type: ignore[misc]
        # the loader only keeps time: rows are drawn when they are needed, so that the scores are never stale
        steps = -(-len(self.train_dataset) // self.rows_read_per_step)
        ticks: Any = range(steps * self.args.gradient_accumulation_steps)
        return DataLoader(ticks, batch_size=1, collate_fn=lambda tick: tick)

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.train_dataset) if self.chain else super().num_examples(dataloader)  # type: ignore[misc]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if not self.chain:
            return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        assert self.row_selection is not None
        for _ in range(num_batches):
            next(epoch_iterator)
        with self.clock("policy_update"):
            settle(self.accelerator.device)  # the optimizer's last step is not the selection's cost
        with self.clock("select"):
            rows, signals = self.draw_candidates()
            some, step = signals.num_tokens > 0, self.state.global_step + 1
            if not some.any():
                raise ValueError(
                    f"step {step}: none of the {len(rows)} candidate rows has a token that bears loss; look at the "
                    f"{self.loss_hint}"
                )
            notes = [None if has_tokens else "no tokens" for has_tokens in some.tolist()]
            assert signals.ids is not None
            selection, figures = self.row_selection.choose(
                step, rows.__getitem__, signals, some, notes, signals.ids.tolist()
            )
            distributed.check_same(selection.indices, f"the rows of step {step}", selection.weights)
            self._log_figures(figures)
            keep = kept_rows(len(rows), [link.keep for link in self.chain])[-1]
            self.health.chosen(int(some.sum()), keep, len(selection.indices), int(figures["rows_scored"]))
            return self._micro_batches(rows, signals, selection, num_batches)

    def draw_candidates(self) -> tuple[Rows, Signals]:
        """The next B rows of the data set, and what is known of them without the model; the same on every rank."""
        ids = self.row_stream.draw(self.rows_read_per_step)
        columns = self._columns[ids.tolist()]
        rows: Rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        sources = None if self._sources is None else [self._sources[row] for row in ids.tolist()]
        signals = dataclasses.replace(
            self.describe_rows(rows), ids=ids, source=sources, source_sizes=self._source_sizes
        )
        return rows, signals

    def _micro_batches(
        self, rows: Rows, signals: Signals, selection: Selection, num_batches: int
    ) -> tuple[list[Any], Tensor | None]:
        """This rank's micro-batches of kept rows, and what their losses are divided by (see `num_items`)."""
        assert signals.num_all_tokens is not None
        chosen, world = selection.indices.tolist(), distributed.world_size()
        lengths = signals.num_all_tokens[selection.indices].tolist()
        dealt = batch_selection.deal(lengths, world, num_batches)[distributed.rank()]
        batches, padded = [], 0
        for places in dealt:
            # too few usable rows: one that counts for nothing, so that this rank takes part in the step
            kept = [rows[chosen[place]] for place in places] or [self.muted(rows[chosen[0]])]
            weights = selection.weights[places] if places else torch.zeros(1)
            batches.append(self.collate_kept(kept, weights, len(chosen) / (world * num_batches)))
            padded += batches[-1]["input_ids"].numel()
        counts = torch.tensor([float(padded), float(sum(lengths)) / world])
        distributed.sum_([counts])
        self._log_figures({"padding": 1 - (counts[1] / counts[0]).item()})
        total = self.num_items(signals, selection)
        return batches, None if total is None else total.to(self.accelerator.device)

    @property
    def _is_weighted(self) -> bool:
        return self.row_selection is not None and self.row_selection.is_weighted

    # -- records -----------------------------------------------------------------------------------------------

    @property
    def rows_read(self) -> int:
        return self.row_selection.rows_read if self.row_selection else 0

    @property
    def rows_trained(self) -> int:
        return self.row_selection.rows_trained if self.row_selection else 0

    def _log_figures(self, figures: dict[str, float]) -> None:
        for name, figure in figures.items():
            self._metrics["train"][f"batch/{name}"].append(figure)

    def sift_summary(self) -> dict[str, Any]:
        return super().sift_summary() | {"tokens": int(self._total_train_tokens)}  # type: ignore[misc, no-any-return]

    # -- checkpoints -------------------------------------------------------------------------------------------

    def sift_state(self) -> dict[str, Any]:
        saved = super().sift_state() | {"tokens": self._total_train_tokens}  # type: ignore[misc]
        if self.row_selection is not None:
            saved["stream"] = self.row_stream.state_dict()
        return saved

    def load_sift_state(self, saved: dict[str, Any]) -> None:
        super().load_sift_state(saved)  # type: ignore[misc]
        self._total_train_tokens = saved["tokens"]
        if self.row_selection is not None:
            self.row_stream.load_state_dict(saved["stream"])


# ------------------------------------------------------------------------------------------- before the run starts


def _rows_per_step(args: TrainingArguments) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _for_kept_rows(args: Any, chain: Sequence[Link], candidates: int) -> Any:
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


def _check(chain: Sequence[Link], args: Any) -> None:
    """Refuse what cannot work together with a batch selector, before anything is loaded."""
    check_selectors(chain, args)
    for link in chain:
        if link.selector.reads_rewards:
            raise ValueError(
                f"batch_selector {type(link.selector).__name__} reads rewards, which these rows have none of: it is "
                "for GRPOTrainer; here take, for example, high_loss"
            )
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise ValueError("train_sampling_strategy does not work with batch_selector: the order of rows is its own")
