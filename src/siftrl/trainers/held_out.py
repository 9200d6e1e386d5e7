"""SFT and DPO on held-out rows: the loss, and the rewards of completions; neither leaves a trace in the training.

Shapes: N held-out rows, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from trl.models.utils import unwrap_model_for_generation

from siftrl import distributed
from siftrl.rollout import TransformersEngine


def rounds(num_rows: int, world: int, size: int) -> list[list[range]]:
    """The rows of each forward pass, for each of the W ranks: as many a rank, at most `size`, each row once.

    TRL gathers figures in every pass, so the ranks take as many passes, of as many rows. The fewer than W rows that are
    left at the end take a pass each, on all ranks alike.
    """
    passes, first = [], 0
    while num_rows - first >= world:
        rows = min(size, (num_rows - first) // world)
        passes.append([range(first + rank * rows, first + (rank + 1) * rows) for rank in range(world)])
        first += rows * world
    return passes + [[range(row, row + 1)] * world for row in range(first, num_rows)]


@torch.no_grad()
def held_out_loss(trainer: Any) -> dict[str, Any]:
    """The loss on the trainer's `eval_dataset`, the same whatever the ranks and batches (up to rounding).

    For SFT the mean over all tokens that bear loss, for DPO that over all pairs with TRL's other figures in
    `trainer.eval_figures`. There is no data loader: reading one draws from torch's generator, and so would change the
    training that goes on afterwards.

    Returns {"loss", the figures, "rows"}: the same on every rank. Raises ValueError where no row bears loss.
    """
    data, names = trainer.eval_dataset, list(trainer.eval_figures)
    data = data.select_columns([name for name in (*trainer.columns_read, "seq_lengths") if name in data.column_names])
    world, rank = distributed.world_size(), distributed.rank()
    sums = torch.zeros(2 + len(names), dtype=torch.float64)  # items, and the loss and figures times the items
    was_training = trainer.model.training
    trainer.model.eval()
    for everyone in rounds(len(data), world, trainer.args.per_device_eval_batch_size):
        mine = everyone[rank]
        batch = send_to_device(trainer.data_collator(list(data.select(mine))), trainer.accelerator.device)
        items = trainer.num_eval_items(batch) / (world if everyone[0] == everyone[-1] else 1)
        loss = trainer.compute_loss(trainer.model, batch).item()
        figures = [trainer._metrics["eval"][trainer.eval_figures[name]][-1] for name in names]
        sums += items * torch.tensor([1.0, loss, *figures], dtype=torch.float64)
    trainer._metrics["eval"].clear()
    trainer.model.train(was_training)
    distributed.sum_([sums])
    items, *totals = sums.tolist()
    if not items:
        problem = f"none of the {len(data)} held-out rows has a token that bears loss"
        raise ValueError(f"data.eval: {problem}; look at the {trainer.loss_hint}")
    return {**{name: total / items for name, total in zip(["loss", *names], totals, strict=True)}, "rows": len(data)}


@contextmanager
def policy_engine(trainer: Any, tokenizer: Any) -> Iterator[TransformersEngine]:
    """An engine with the policy's current weights; every rank enters and leaves together."""
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        yield TransformersEngine(model, tokenizer)
