"""Rows of a generation batch as TRL builds it: take a batch apart, keep some rows, put them together again.

A generation batch is a dict of tensors with first dimension B, left-padded prompts and right-padded completions, and
the scalar `num_items_in_batch`, the number of loss-bearing tokens over all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_IMAGES = ("pixel_values", "num_images")


def split(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """B rows without their padding, on the CPU. Raises ValueError for batches with images."""
    if any(key in batch for key in _IMAGES):
        raise ValueError("rows of a batch with images cannot be exchanged: use a selector that keeps whole batches")
    prompt_mask, completion_mask = batch["prompt_mask"].bool().cpu(), batch["completion_mask"].bool().cpu()
    real = _real_tokens(batch)
    rows = []
    for index in range(len(prompt_mask)):
        row = {}
        for key, value in batch.items():
            if value is None or value.dim() == 0:
                continue
            item = value[index].cpu()
            if key.startswith("prompt_"):
                item = item[prompt_mask[index]]
            elif item.dim() == 1 and len(item) == completion_mask.size(1) and len(item) != 1:
                item = item[: real[index]]
            row[key] = item
        rows.append(row)
    return rows


def _real_tokens(batch: dict[str, Any]) -> list[int]:
    """Completion tokens of each row; all of the width where the mask is 0 throughout (a masked truncated row)."""
    mask = batch["completion_mask"].bool().cpu()
    lengths = mask.sum(1)
    return torch.where(lengths == 0, mask.size(1), lengths).tolist()


def join(rows: list[dict[str, Tensor]], pad_token_id: int, device: torch.device) -> dict[str, Any]:
    """The batch that `split` would take apart into `rows`, without `num_items_in_batch`."""
    batch = {}
    for key in rows[0]:
        items = [row[key] for row in rows]
        if items[0].dim() == 0 or all(len(item) == 1 for item in items):
            batch[key] = torch.stack(items).to(device)
            continue
        width = max(len(item) for item in items)
        fill = pad_token_id if key.endswith("_ids") else 0
        full = items[0].new_full((len(items), width), fill)
        for index, item in enumerate(items):
            if key.startswith("prompt_"):
                full[index, width - len(item) :] = item
            else:
                full[index, : len(item)] = item
        batch[key] = full.to(device)
    return batch


def loss_tokens(rows: list[dict[str, Tensor]]) -> int:
    """Tokens that bear loss: completion tokens, less those a tool wrote."""
    return sum(
        int((row["completion_mask"] * row["tool_mask"] if "tool_mask" in row else row["completion_mask"]).sum())
        for row in rows
    )
