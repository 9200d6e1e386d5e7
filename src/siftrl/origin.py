"""Where a model came from: what is loaded beside it, or beneath its adapters, is loaded as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def whole(model: Any) -> PreTrainedModel:
    """The transformers model, below PEFT's wrapper where there is one."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def loading_options(model: nn.Module, path: str, init_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a model at `path` that belongs to `model`.

    At the place that `model` itself was loaded from: the same commit (a branch may have moved on since), code and
    attention. At any other place: whether code from the hub may run, and the attention that was asked for.

    init_kwargs: what `model` was loaded with (TRL's `model_init_kwargs`), for what it does not tell itself.
    """
    asked, base = dict(init_kwargs or {}), whole(model)
    runs_hub_code = type(base).__module__.startswith("transformers_modules")
    options: dict[str, Any] = {"trust_remote_code": bool(asked.get("trust_remote_code")) or runs_hub_code}
    attention = asked.get("attn_implementation")
    if path == base.config._name_or_path:
        attention = attention or base.config._attn_implementation
        revision = getattr(base.config, "_commit_hash", None) or asked.get("revision")
        if revision is not None:
            options["revision"] = revision
    if attention is not None:
        options["attn_implementation"] = attention
    return options


def reference_loader(load: Callable[..., Any], policy: Any) -> Callable[..., Any]:
    """TRL's `load(path, **kwargs)`, for the reference of a policy that is a model already: from the same commit."""
    if not isinstance(policy, nn.Module):  # a path: TRL takes its model_init_kwargs for both
        return load

    def load_same(path: str, **kwargs: Any) -> Any:
        return load(path, **(loading_options(policy, path) | kwargs))

    return load_same


def merge_adapter(
    policy: nn.Module, path: str, adapter: Path, dtype: str | torch.dtype, init_kwargs: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model at `path`, which `policy` trains adapters on, with the saved `adapter` merged into its weights.

    One process may do this alone, under ZeRO-3 too. `path` is read anew: the merge into a quantised base would lose
    precision. The generation settings are the policy's.
    """
    from peft import PeftModel

    with whole_model():
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **loading_options(policy, path, init_kwargs))
        merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    trained = whole(policy)
    merged.generation_config = trained.generation_config
    merged.config.get_text_config().pad_token_id = trained.config.get_text_config().pad_token_id
    return merged  # type: ignore[no-any-return]


@contextmanager
def whole_model() -> Iterator[None]:
    """Load a model whole: under ZeRO-3 transformers would shard every model it loads, which takes all ranks."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
