"""The only module that talks to a process group. Every function is a no-op (or the identity) on one process.

All functions are collectives: every rank calls them, in the same order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def open_group(*, deepspeed: bool) -> None:
    """Join the launcher's processes. On CPUs this must happen before the trainer's arguments are read: they would
    take a machine without a GPU for one process."""
    if deepspeed and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed as engine

        if "RANK" not in os.environ:  # one process, without a launcher
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
        engine.init_distributed(dist_backend="gloo")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def _device() -> torch.device:
    """Where a tensor must lie for the default group's backend: NCCL has no CPU tensors, gloo takes both."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_strided(local: Tensor) -> Tensor:
    """Undo `items[rank::world]`: rank r holds rows r, r + W, r + 2W, ...; every rank gets all rows in order.

    local: [n_r, ...], with n_r differing by at most one between ranks. Returns [sum of n_r, ...] on local's device.
    """
    world = world_size()
    if world == 1:
        return local
    parts = gather_objects(local.cpu())
    rows = torch.empty((sum(len(part) for part in parts), *local.shape[1:]), dtype=local.dtype)
    for index, part in enumerate(parts):
        rows[index::world] = part
    return rows.to(local.device)


def gather_objects(item: Any) -> list[Any]:
    """One picklable object a rank -> the list of all, in rank order, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: Any) -> Any:
    """Rank 0's picklable object, on every rank."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def sum_(tensors: Iterable[Tensor]) -> None:
    """Sum float tensors over ranks, in place, in one flat message for each dtype."""
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group]).to(_device())
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def max_number(value: float) -> float:
    """The largest of the ranks' numbers; NaN on any rank gives NaN."""
    values = gather_objects(float(value))
    return float("nan") if any(v != v for v in values) else max(values)


def any_true(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    tensor = torch.tensor(int(flag), device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def check_same(decision: Tensor, what: str, weights: Tensor | None = None) -> str:
    """Stop the run unless every rank made the same decision; returns its hash (16 hexadecimal digits).

    decision: an integer tensor. weights: float [k], of what was decided; ranks may differ by rounding, a thousandth.
    Raises RuntimeError, on every rank, with the decisions that differ.
    """
    numbers = decision.cpu().contiguous()
    digest = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]
    if world_size() == 1:
        return digest
    weighed = torch.empty(0) if weights is None else weights.detach().float().cpu()
    everyone = gather_objects((digest, weighed))
    if len({its_digest for its_digest, _ in everyone}) > 1:
        _disagree(what, gather_objects(numbers.tolist()))
    if not all(torch.allclose(its_weights, everyone[0][1], rtol=1e-3, atol=0.0) for _, its_weights in everyone):
        _disagree(f"the weights of {what}", [its_weights.tolist() for _, its_weights in everyone])
    return digest


def _disagree(what: str, decisions: list[Any]) -> NoReturn:
    listing = "\n".join(f"  rank {index}: {found}" for index, found in enumerate(decisions))
    raise RuntimeError(f"the ranks disagree on {what}; training would go wrong silently:\n{listing}")
