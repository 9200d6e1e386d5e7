"""Models and tokenizers: load a policy for a stage, or make a small one from scratch.

`ModelConfig` and `ScratchConfig` are those of `siftrl.recipe`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from siftrl.precision import gpu_has_bfloat16

if TYPE_CHECKING:
    from siftrl.recipe import ModelConfig, ScratchConfig

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
"""Printable ASCII and the line break: the character tokenizer's default alphabet."""

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ARCHITECTURES: dict[str, Any] = {"qwen3": Qwen3Config, "llama": LlamaConfig}


def character_tokenizer(alphabet: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character, which gives every text of `alphabet` back exactly.

    Besides the alphabet (default: printable ASCII) it has `<pad>`, `<eos>`, `<unk>` (any other character;
    `siftrl.data` refuses rows that hold one) and one token a chat role.
    """
    characters = list(dict.fromkeys(PRINTABLE if alphabet is None else alphabet))
    if not characters:
        raise ValueError("model.scratch.alphabet: is empty; write the characters the model shall know")
    specials = ["<pad>", "<eos>", "<unk>", *_ROLES]
    vocabulary = {token: i for i, token in enumerate([*specials, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=list(_ROLES),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def save_scratch_model(scratch: ScratchConfig, folder: str | Path, seed: int) -> None:
    """Write a randomly initialised float32 model with a character tokenizer: a function of its arguments.

    `transformers` and vLLM load the folder like any other. The process's random state is left as it was.
    """
    if scratch.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"model.scratch.architecture: {scratch.architecture!r} is not known; "
            f"write one of {', '.join(_ARCHITECTURES)}"
        )
    tokenizer = character_tokenizer(scratch.alphabet)
    tokenizer.model_max_length = scratch.max_positions
    special_ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = _ARCHITECTURES[scratch.architecture](
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_heads,
        num_key_value_heads=scratch.num_kv_heads,
        head_dim=scratch.head_dim,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=scratch.max_positions,
        tie_word_embeddings=scratch.tie_embeddings,
        bos_token_id=None,
        **special_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=True, bos_token_id=None, **special_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_init_kwargs(model_config: ModelConfig, *, for_training: bool = True) -> dict[str, Any]:
    """The keyword arguments of `from_pretrained` that a recipe's `model:` asks for, as plain JSON values.

    `dtype: auto` means the checkpoint's own type, except for full fine-tuning, which needs float32 master
    weights (bfloat16 loses an update of less than 1/256 of a weight; autocast still computes in bfloat16).
    """
    dtype = model_config.dtype
    if dtype == "auto" and for_training and model_config.lora is None:
        dtype = "float32"
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model_config.trust_remote_code}
    if model_config.revision is not None:
        kwargs["revision"] = model_config.revision
    if model_config.attn_implementation is not None:
        kwargs["attn_implementation"] = model_config.attn_implementation
    # A quantised model cannot be moved after loading, so it is loaded where its rank computes; any other
    # model is placed by the trainer (TRL's default, "auto", would spread it over all GPUs).
    if model_config.quantize is not None:
        from accelerate import PartialState

        kwargs["device_map"] = {"": PartialState().local_process_index}
    else:
        kwargs["device_map"] = None
    return kwargs


def quantization_config(model_config: ModelConfig) -> Any | None:
    """The `transformers.BitsAndBytesConfig` of `model.quantize`, or None; 4 bits are double-quantised NF4."""
    if model_config.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    if model_config.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if gpu_has_bfloat16() else torch.float16,
    )


def peft_config(model_config: ModelConfig) -> Any | None:
    """The `peft.LoraConfig` of `model.lora`, or None."""
    if model_config.lora is None:
        return None
    from peft import LoraConfig

    lora = model_config.lora
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float serves as well
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        revision=model_config.revision,
    )


def load_policy(
    model_config: ModelConfig, *, for_training: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any | None]:
    """The model of `model.path`, its tokenizer, and its LoRA configuration (not applied: trainers do that).

    A scratch model is written by `save_scratch_model` first; `model.path` is then its folder. Under ZeRO-3
    call this after the training arguments exist, so that transformers shards the weights while it loads them.
    """
    assert model_config.path is not None
    tokenizer = load_tokenizer(model_config)
    kwargs = model_init_kwargs(model_config, for_training=for_training)
    if model_config.quantize is not None:
        kwargs["quantization_config"] = quantization_config(model_config)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_config.path, **kwargs)
    except OSError as error:
        raise ValueError(_not_loaded("model", model_config.path, error)) from error
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, peft_config(model_config)


def load_tokenizer(model_config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`, checked by `check_tokenizer`; it pads on the left, for generation."""
    path = model_config.path
    assert path is not None
    _check_folder(path)
    kwargs: dict[str, Any] = {"trust_remote_code": model_config.trust_remote_code}
    if model_config.revision is not None:
        kwargs["revision"] = model_config.revision
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded("model configuration", path, error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **kwargs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(_not_loaded("tokenizer", path, error)) from error
    check_tokenizer(tokenizer, path, num_embeddings=config.get_text_config().vocab_size)
    return tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, where: str | Path, *, num_embeddings: int | None = None
) -> None:
    """Refuse a tokenizer that would train a model on nothing; set a missing pad token to the eos token.

    For a folder without tokenizer files transformers builds an empty tokenizer that encodes every text to
    nothing, or to unknown tokens, without a word. A tokenizer passes when at least one sample text (English,
    digits, or a token of its own) survives encoding and decoding, ignoring case and white space.

    Args:
        where: the model's path, for the message.
        num_embeddings: rows of the model's embedding; no id of a special token that text is given may lie beyond.
            (Of other tokens, rows that hold one are refused: `siftrl.row_limits`.)
    """
    special = set(tokenizer.all_special_ids)
    own = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    samples = ["Hello, world", "12 + 34 = 46", *(_decode(tokenizer, [i]) for i in own[:512])]
    if not own or not any(_survives(tokenizer, text) for text in samples):
        raise ValueError(
            f"model.path: {where}: its tokenizer is not usable: sample texts do not survive encoding and "
            f"decoding ({len(own)} tokens besides the special ones); put the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) beside the model's"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: {where}: its tokenizer has no end-of-text token, so completions would never end; "
            "set `eos_token` in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    used = {"begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    for name, token in used.items():
        if num_embeddings is not None and isinstance(token, int) and token >= num_embeddings:
            raise ValueError(
                f"model.path: {where}: its tokenizer's {name} token is number {token}, but the model embeds only "
                f"{num_embeddings} tokens; use the tokenizer that the model was trained with"
            )


def _survives(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    bare = "".join(text.split()).lower()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(bare) and bool(ids) and "".join(_decode(tokenizer, ids).split()).lower() == bare


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def _check_folder(path: str) -> None:
    """Say what is wrong with a local path before transformers takes it for a hub name."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ValueError(f"model.path: there is no folder {path}")
        return
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"model.path: {path} holds a LoRA adapter without its base model; merge it into the base first "
            "(peft: merge_and_unload, then save_pretrained)"
        )


def _not_loaded(what: str, path: str, error: Exception) -> str:
    return f"model.path: {path}: the {what} cannot be loaded: {str(error).strip().splitlines()[0]}"
