"""TRL's options, checked without importing TRL: `trl_options.json` lists them, a test keeps it in step."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from siftrl.recipe_text import RecipeError, kind_of, near

_ALL = {
    "output_dir": "output.dir",
    "seed": "the recipe's `seed`",
    "data_seed": "the recipe's `seed`",
    "deepspeed": "distribution.deepspeed",
    "local_rank": "the launcher",
    "resume_from_checkpoint": "`siftrl train --resume`",
    "per_device_train_batch_size": "micro_batch_size",
    "auto_find_batch_size": "micro_batch_size",
    "logging_steps": "logging.every",
    "logging_strategy": "logging.every",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "trust_remote_code": "model.trust_remote_code",
    "model_init_kwargs": "model.dtype, model.revision or model.attn_implementation",
}
OWNED: dict[str, dict[str, str]] = {
    "sft": _ALL | {"gradient_accumulation_steps": "rows_per_step and micro_batch_size"},
    "dpo": _ALL | {"gradient_accumulation_steps": "rows_per_step and micro_batch_size"},
    "grpo": _ALL
    | {
        "gradient_accumulation_steps": "prompts_per_step, micro_batch_size and optimizer_steps_per_rollout",
        "generation_batch_size": "prompts_per_step and completions_per_prompt",
        "steps_per_generation": "prompts_per_step, micro_batch_size and optimizer_steps_per_rollout",
        "num_generations": "completions_per_prompt",
        "max_completion_length": "rollout.max_completion_tokens",
        "temperature": "rollout.temperature",
        "top_p": "rollout.top_p",
        "top_k": "rollout.top_k",
        "min_p": "rollout.min_p",
        "repetition_penalty": "rollout.repetition_penalty",
        "reward_weights": "rewards[].weight",
        "use_vllm": "rollout.engine",
        "vllm_mode": "rollout.mode",
        "vllm_enable_sleep_mode": "rollout.sleep",
        "vllm_server_base_url": "rollout.server_url",
        "vllm_server_host": "rollout.server_url",
        "vllm_server_port": "rollout.server_url",
        "vllm_server_timeout": "rollout.server_timeout",
        "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
        "vllm_max_model_length": "rollout.max_model_len",
        "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    },
}
"""TRL's options that a key of siftrl sets, by kind of stage: option -> that key."""


@functools.cache
def trl_options(kind: str) -> dict[str, dict[str, Any]]:
    """Options of the stage kind's TRL config: name -> {"type", "default" where it is JSON, "choices" if closed}."""
    text = Path(__file__).with_name("trl_options.json").read_text(encoding="utf-8")
    return json.loads(text)[kind]


@functools.cache
def option_type(text: str) -> TypeAdapter[Any]:
    """A type that validates values of a listed type, such as "int | None"."""
    names = {"Any": Any, "Literal": Literal}
    return TypeAdapter(eval(text, names), config=ConfigDict(strict=True, allow_inf_nan=False))


def check_trainer_options(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse options that TRL lacks, that siftrl owns, or whose type is wrong.

    Raises RecipeError with the option as its key.
    """
    known = trl_options(kind)
    config = {"sft": "SFTConfig", "dpo": "DPOConfig", "grpo": "GRPOConfig"}[kind]
    free = [name for name in known if name not in OWNED[kind]]
    for name, value in options.items():
        if name in OWNED[kind]:
            raise RecipeError(f"is set by siftrl; write {OWNED[kind][name]} instead", name)
        if name not in known:
            raise RecipeError(f"unknown option of TRL's {config}{near(name, free)}", name)
        choices = known[name].get("choices")
        if choices and isinstance(value, str) and value not in choices:
            hint = near(value, choices) or f"; write one of {', '.join(choices)}"
            raise RecipeError(f"must not be {value!r}{hint}", name)
        try:
            option_type(known[name]["type"]).validate_python(value)
        except ValidationError:
            raise RecipeError(f"must be {known[name]['type']}, not {kind_of(value)}", name) from None
