"""In which precision weights are held and computed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

LOW = (torch.bfloat16, torch.float16)


def mixed_precision(asked: Mapping[str, Any], *, gpu: bool, gpu_has_bfloat16: bool) -> dict[str, bool]:
    """TRL's `bf16` and `fp16`. What is not asked for: bfloat16 on a GPU that has it, float16 on one that lacks it,
    float32 on CPUs."""
    if asked.get("bf16") is None and asked.get("fp16") is None:
        return {"bf16": gpu and gpu_has_bfloat16, "fp16": gpu and not gpu_has_bfloat16}
    return {name: bool(asked.get(name)) for name in ("bf16", "fp16")}


def gpu_has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 itself; emulated, it is slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def adapters_in_float32(model: nn.Module) -> None:
    """Hold what is trained in float32. TRL holds the adapters of a quantised model in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def rounded_updates(parameters: Iterable[nn.Parameter], args: Any, masters: bool) -> str | None:
    """Why the optimizer's small updates would be lost, or None.

    A bfloat16 weight has 8 significant bits: an update of less than 1/256 of it rounds to nothing, and at usual
    learning rates most are smaller.

    args: the trainer's. masters: whether the optimizer keeps float32 copies of the weights (DeepSpeed's `bf16`).
    """
    if masters:
        return None
    trained = {parameter.dtype for parameter in parameters if parameter.requires_grad}
    low = next((str(dtype).removeprefix("torch.") for dtype in LOW if dtype in trained), None)
    if low is not None:
        return (
            f"trained weights are held in {low}, which loses an update of less than 1/256 of a weight: load the model "
            "in float32 (`dtype: float32`), where bf16=True still computes in bfloat16"
        )
    if getattr(args, "use_transformers_continuous_batching", False) and (args.bf16 or args.fp16):
        return (
            "use_transformers_continuous_batching casts the trained weights to 16 bits for good, which loses an update "
            "of less than 1/256 of a weight: remove it, or use vLLM"
        )
    return None
