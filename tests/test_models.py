from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftrl.models import (
    character_tokenizer,
    check_tokenizer,
    load_policy,
    load_tokenizer,
    model_init_kwargs,
    save_scratch_model,
)
from siftrl.recipe import ModelConfig, ScratchConfig

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_positions": 32}


def config(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate(keys)


def scratch(folder: Path, seed: int = 0, **keys: Any) -> str:
    save_scratch_model(ScratchConfig.model_validate(SMALL | keys), folder, seed)
    return str(folder)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_scratch_models_load_with_plain_transformers(tmp_path: Path, architecture: str) -> None:
    folder = scratch(tmp_path, architecture=architecture, tie_embeddings=False, alphabet="01+=")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == architecture and model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("1+0=")["input_ids"]) == "1+0="
    assert model(**tokenizer("1+0=", return_tensors="pt")).logits.isfinite().all()


def test_scratch_models_are_a_function_of_the_seed_and_leave_the_random_state(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    folders = [scratch(tmp_path / name, seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_the_character_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scratch(tmp_path))
    for text in ["Hello , world!  's", " leading", "two\nlines\n", "a .b ?", "".join(map(chr, range(32, 127)))]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.batch_decode([ids])[0] == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer("ab<eos>")["input_ids"][-1] == tokenizer.eos_token_id  # what SFT appends to completions
    with pytest.raises(ValueError, match="model.scratch.alphabet: is empty"):
        character_tokenizer("")


def test_chat_prompts_are_a_prefix_of_the_conversation(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scratch(tmp_path))
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}]
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "2"}], return_dict=True)
    opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    assert len(opening["input_ids"]) == 7
    assert whole["input_ids"][:7] == opening["input_ids"]
    assert tokenizer.decode(whole["input_ids"][7:]) == "2<eos>"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert AutoTokenizer.from_pretrained(folder)("every text")["input_ids"] == []  # why it must be refused
    with pytest.raises(ValueError, match="its tokenizer is not usable") as caught:
        load_policy(config(path=folder))
    assert folder in str(caught.value)


def test_tokenizers_without_eos_or_beyond_the_embedding_are_refused() -> None:
    tokenizer = character_tokenizer()
    check_tokenizer(tokenizer, "here", num_embeddings=len(tokenizer))
    with pytest.raises(ValueError, match="here: its tokenizer's end token is number 1, but .* only 1 tokens"):
        check_tokenizer(tokenizer, "here", num_embeddings=1)
    check_tokenizer(tokenizer, "here", num_embeddings=3)  # rows that hold what lies beyond are refused, not the model
    tokenizer.pad_token = None
    check_tokenizer(tokenizer, "here")
    assert tokenizer.pad_token == "<eos>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_tokenizer(tokenizer, "here")


def test_small_alphabets_pass_the_check() -> None:
    check_tokenizer(character_tokenizer("01"), "here")
    check_tokenizer(character_tokenizer("αβγ"), "here")


def test_paths_that_are_no_models_are_one_line_errors(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    cases = {
        str(tmp_path / "none"): "there is no folder",
        str(tmp_path): "configuration cannot be loaded",
        "nobody/no-such-model": "configuration cannot be loaded",
        str(adapter): "LoRA adapter without its base",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_policy(config(path=path))
        assert str(caught.value).startswith(f"model.path: {path}" if "there is" not in message else "model.path:")
        assert "\n" not in str(caught.value)
    folder = Path(scratch(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the model cannot be loaded"):
        load_policy(config(path=str(folder)))


def test_auto_dtype_trains_in_float32_and_otherwise_keeps_the_checkpoints(tmp_path: Path) -> None:
    folder = scratch(tmp_path / "a")
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    assert load_policy(config(path=str(half)))[0].dtype == torch.float32
    assert load_policy(config(path=str(half)), for_training=False)[0].dtype == torch.bfloat16
    assert load_policy(config(path=str(half), lora={}))[0].dtype == torch.bfloat16
    assert load_policy(config(path=str(half), dtype="float16"))[0].dtype == torch.float16


def test_lora_settings_reach_peft(tmp_path: Path) -> None:
    from peft import get_peft_model

    lora = {"r": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    model, tokenizer, peft_config = load_policy(config(path=scratch(tmp_path), lora=lora))
    assert peft_config is not None and (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (4, 8, 0.1)
    trainable = [name for name, p in get_peft_model(model, peft_config).named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("q_proj" in name or "v_proj" in name for name in trainable)
    assert tokenizer.padding_side == "left"


def test_init_kwargs_are_plain_and_complete() -> None:
    import json

    kwargs = model_init_kwargs(config(path="x", revision="main", attn_implementation="eager"))
    assert json.loads(json.dumps(kwargs)) == kwargs
    assert kwargs == {
        "dtype": "float32",
        "trust_remote_code": False,
        "revision": "main",
        "attn_implementation": "eager",
        "device_map": None,
    }


def test_load_tokenizer_serves_without_the_weights(tmp_path: Path) -> None:
    folder = Path(scratch(tmp_path))
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(config(path=str(folder))).eos_token == "<eos>"


@pytest.mark.engines
def test_vllm_loads_a_scratch_model(tiny_model: str) -> None:
    from siftrl.rollout import Sampling, VLLMEngine

    engine = VLLMEngine.from_path(tiny_model, max_model_len=32)
    prompt = load_tokenizer(config(path=tiny_model))("1+1=")["input_ids"]
    completions = engine.generate([prompt] * 2, Sampling(4, temperature=0.0), None)
    assert completions.ids[0] == completions.ids[1] and 1 <= len(completions.ids[0]) <= 4
