"""Tiny random models of many families: 2 blocks of width 32, 64 tokens, float32; the same weights every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",  # it gives the attention weights
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, **_GROUPED}


def _family(name: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = getattr(transformers, f"{name}Config")(**(_SIZES | changes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # norms off 1, biases off 0, and logits large enough for a cap to show
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return build


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _family("Llama", **_GROUPED),
    "mistral": _family("Mistral", **_GROUPED),
    "qwen2": _family("Qwen2", **_GROUPED),
    "qwen3": _family("Qwen3", head_dim=16, **_GROUPED),
    "gemma": _family("Gemma", head_dim=16, **_GROUPED),  # tied, no cap
    "gemma2": _family("Gemma2", head_dim=8, final_logit_softcapping=1.0, **_GROUPED),
    "gemma3": _family("Gemma3Text", head_dim=8, **_GROUPED),
    "phi": _family("Phi"),  # the head has a bias; attention and MLP are parallel
    "phi3": _family("Phi3", **_GROUPED),  # Q, K and V in one matrix
    "gpt_neox": _family("GPTNeoX"),  # one matrix, interleaved by heads
    "qwen3_moe": _family("Qwen3Moe", head_dim=8, moe_intermediate_size=16, num_experts=4, **_EXPERTS),
    "mixtral": _family("Mixtral", num_local_experts=4, **_EXPERTS),
    "gpt2": _family("GPT2"),  # one matrix, transposed
    "granite": _family("Granite", logits_scaling=8.0, **_GROUPED),
    "cohere": _family("Cohere", logit_scale=0.25, **_GROUPED),
    "olmo2": _family("Olmo2", **_GROUPED),
    "falcon": _family("Falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "stablelm": _family("StableLm", **_GROUPED),
    "opt": _family("OPT", ffn_dim=48, word_embed_proj_dim=32),
}
"""Families that people train, each with something of its own."""

LAYOUTS: dict[str, Callable[[], PreTrainedModel]] = {
    "falcon_7b": _family("Falcon", multi_query=True, alibi=False),
    "falcon_rw": _family("Falcon", multi_query=False, alibi=True),
    "bloom": _family("Bloom"),
    "persimmon": _family("Persimmon"),
    "mpt": _family("Mpt"),
    "codegen": _family("CodeGen", rotary_dim=4),
    "gpt_bigcode": _family("GPTBigCode", multi_query=True),
    "gpt_bigcode_heads": _family("GPTBigCode", multi_query=False),
    "deepseek_v3": _family(
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=12,
        v_head_dim=8,
    ),
}
"""More ways to keep V in one matrix with K or Q."""
