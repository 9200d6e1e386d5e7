"""Which settings of generation work together. This module must stay free of torch: recipes are checked by it, too.

Options go by TRL's names (`GRPOConfig`), in a mapping that may leave out those that keep their default. Each check
raises RecipeError with the option as its key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from siftrl.recipe_text import RecipeError

_OWN_OPTION = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_completion_length (rollout.max_completion_tokens)",
    "max_new_tokens": "max_completion_length (rollout.max_completion_tokens)",
    "n": "num_generations (completions_per_prompt)",
    "num_return_sequences": "num_generations (completions_per_prompt)",
    "seed": "the run's own seed",
    "logprobs": "what the trainer needs",
    "do_sample": "temperature",
    "return_dict_in_generate": "what the trainer needs",
}
"""Keys of generation_kwargs that are set by something else -> by what."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
}
"""Options that change what tokens are drawn from, and the values that leave it as the model has it."""
_RESHAPING = (
    *("frequency_penalty", "presence_penalty", "logit_bias", "bad_words", "allowed_token_ids", "min_tokens"),
    *("logits_processors", "repetition_detection", "extra_args"),
)
"""Keys of generation_kwargs that do so in vLLM."""
HONOURED_WITH_SEEDS = frozenset(
    {"no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "min_new_tokens"}
    | {"sequence_bias", "exponential_decay_length_penalty", "remove_invalid_values", "use_cache"}
    | {"cache_implementation", "cache_config", "prefill_chunk_size"}
)
"""Keys of generation_kwargs that the transformers engine takes when each completion has its own seed."""


def generation_kwargs(options: Mapping[str, Any]) -> dict[str, Any]:
    """`generation_kwargs` as a dict; it may be written as JSON."""
    given = options.get("generation_kwargs") or {}
    return dict(json.loads(given)) if isinstance(given, str) else dict(given)


def check_generation(options: Mapping[str, Any], *, seeded: bool) -> None:
    """Refuse what would be ignored, or would make another distribution than the loss takes the completions for.

    seeded: whether each completion is drawn from a seed of its own.
    """
    given = generation_kwargs(options)
    for key in given:
        if key in _OWN_OPTION:
            raise RecipeError(f"remove {key!r}, which is set by {_OWN_OPTION[key]}", "generation_kwargs")
    if options.get("use_vllm"):
        logprobs_mode(options)
        return
    if options.get("vllm_structured_outputs_regex") is not None:
        raise RecipeError("is an option of vLLM; remove it, or generate with vLLM", "vllm_structured_outputs_regex")
    if not seeded:
        return
    unseed = "write `seeded: false` under `rollout` (in Python RolloutOptions(seeded=False))"
    if options.get("use_transformers_continuous_batching"):
        problem = "draws tokens with a sampler of its own, and here each completion has its own seed"
        raise RecipeError(f"{problem}; remove it, or {unseed}", "use_transformers_continuous_batching")
    for key in given:
        if key not in HONOURED_WITH_SEEDS:
            problem = f"{key!r} does not work where each completion has its own seed, on the transformers engine"
            raise RecipeError(f"{problem}; remove it, or {unseed}", "generation_kwargs")


def logprobs_mode(options: Mapping[str, Any]) -> str:
    """Which log-probabilities vLLM shall report of the tokens that it drew (its `logprobs_mode`).

    The loss compares them with the trainer's, which are of the model's whole distribution at the temperature. vLLM's
    "processed_logprobs" are of what it drew from: the same, unless top-p and the like cut it. Of a cut distribution
    each token's ratio is the kept mass, and their product over a long completion is near 0. "raw_logprobs" are of the
    whole distribution, before the temperature: the right ones where that is 1.
    """
    corrected = options.get("vllm_importance_sampling_correction", True)
    if not corrected and options.get("off_policy_mask_threshold") is None:
        return "processed_logprobs"
    given = generation_kwargs(options)
    cure = "or write `vllm_importance_sampling_correction: false` (under `trainer` in a recipe)"
    if not corrected:
        cure = "or remove off_policy_mask_threshold"
    pattern = {
        "vllm_structured_outputs_regex": options.get("vllm_structured_outputs_regex"),
        "generation_kwargs": given.get("structured_outputs"),
    }
    where = next((name for name, value in pattern.items() if value is not None), None)
    if where:
        problem = "vLLM reports the probabilities among the tokens that the pattern allows, the loss has those of all"
        raise RecipeError(f"{problem} tokens; remove it, {cure}", where)
    cuts = [name for name, neutral in _NEUTRAL.items() if options.get(name) not in neutral]
    cuts += ["generation_kwargs"] * any(key in _RESHAPING for key in given)
    if not cuts:
        return "processed_logprobs"
    problem = "vLLM reports the probabilities of what it cut the distribution down to, the loss has the whole one's"
    if options.get("temperature", 1.0) != 1.0:
        raise RecipeError(f"{problem}; remove it, write `temperature: 1`, where both can be had, {cure}", cuts[0])
    if options.get("vllm_mode", "colocate") == "server":
        raise RecipeError(f"{problem}; remove it, write `mode: colocate`, where both can be had, {cure}", cuts[0])
    return "raw_logprobs"
