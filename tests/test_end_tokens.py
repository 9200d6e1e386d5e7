"""Completions end at the tokens that the model declares, on every engine; nothing else of its settings is taken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import digit_share, grpo_args
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from siftrl import pipeline
from siftrl.end_tokens import end_tokens, settle_turn_end, stop_at_turn_end, turn_end, without_generation_config
from siftrl.evaluate import evaluate
from siftrl.recipe import load_recipe
from siftrl.rollout import RolloutOptions, Sampling, TransformersEngine, row_seeds
from siftrl.trainers.grpo import GRPOTrainer

SETTINGS = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(6, 60)), "top_k": 1}
"""What a hub model's generation_config.json may hold, and rollouts must not take."""
MESSAGES = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + END }}{% endfor %}"


@pytest.fixture()
def model(tiny_model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture()
def tokenizer(tiny_model: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def ends_with(tokenizer: Any, end: str) -> Any:
    tokenizer.chat_template = MESSAGES.replace("END", end)
    return tokenizer


def test_end_tokens_are_the_tokenizers_and_those_that_the_model_declares(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    assert end_tokens(GenerationConfig(), tokenizer) == [eos]
    assert end_tokens(GenerationConfig(eos_token_id=7), tokenizer) == [eos, 7]
    assert end_tokens(GenerationConfig(eos_token_id=[7, eos, 9]), tokenizer) == [eos, 7, 9]


def test_the_turns_end_is_read_off_the_chat_template(tokenizer: Any) -> None:
    assert turn_end(tokenizer) == tokenizer.eos_token_id  # the scratch model's own template
    own = tokenizer.convert_tokens_to_ids("<|system|>")
    assert turn_end(ends_with(tokenizer, "'<|system|>'")) == own
    assert turn_end(ends_with(tokenizer, "'<|system|>\\n'")) == own
    assert turn_end(ends_with(tokenizer, "''")) == "the chat template writes nothing after an assistant's message"
    assert turn_end(ends_with(tokenizer, "'\\n###\\n'")) == (
        "the chat template ends an assistant's message with plain text, '###'"
    )
    assert "does not render" in str(turn_end(ends_with(tokenizer, "raise_exception('no user')")))


class Bare:
    """What the turn's end is settled on: a trainer with its model."""

    def __init__(self, model: Any, eos_token_ids: list[int]) -> None:
        self.model, self.eos_token_ids = model, eos_token_ids
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_a_stage_of_conversations_settles_the_turns_end(model: Any, tokenizer: Any) -> None:
    eos, own = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|system|>")
    trainer = Bare(model, [eos])
    ends_with(tokenizer, "'<|system|>'")
    settle_turn_end(trainer, tokenizer, learns=False)
    assert trainer.said.pop().startswith("completions do not stop at <|system|>")
    assert model.generation_config.eos_token_id == eos
    settle_turn_end(trainer, tokenizer, learns=True)
    assert model.generation_config.eos_token_id == [eos, own] and not trainer.said
    ends_with(tokenizer, "'\\n'")
    settle_turn_end(trainer, tokenizer, learns=True)
    assert "learns no token that ends its turns: the chat template writes nothing" in trainer.said.pop()


def test_adapters_learn_the_turns_end_too(model: Any, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert stop_at_turn_end(wrapped, ends_with(tokenizer, "'<|system|>'")) is None
    assert model.generation_config.eos_token_id == [1, 3]


def test_evaluation_stops_where_the_model_says(model: Any, tokenizer: Any) -> None:
    from datasets import Dataset

    prompt = tokenizer("0+0=").input_ids
    rows = Dataset.from_dict({"prompt": ["0+0="], "answer": ["0"]})

    def truncated(engine: TransformersEngine) -> float:
        return evaluate(
            engine, tokenizer, rows, [digit_share], [1.0], Sampling(1, temperature=0.0), progress=False
        ).truncated

    before = TransformersEngine(model, tokenizer)
    long, first = (before.generate([prompt], way, [3]).ids[0] for way in (Sampling(12), Sampling(1, temperature=0.0)))
    assert truncated(before) == 1.0
    model.generation_config.eos_token_id = [long[4], *first]
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate([prompt], Sampling(12), [3]).ids == [long[: long.index(long[4]) + 1]]
    assert truncated(engine) == 0.0  # its only token ends it


@pytest.mark.parametrize("adapters", [False, True])
def test_engines_take_no_sampling_setting_of_the_checkpoint(model: Any, tokenizer: Any, adapters: bool) -> None:
    from peft import LoraConfig, get_peft_model

    prompts = [tokenizer(text).input_ids for text in ("1+1=", "12+3=")]
    if adapters:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    engine = TransformersEngine(model, tokenizer)

    def everything() -> list[Any]:
        torch.manual_seed(0)
        ways = [(Sampling(8, temperature=0.0), None), (Sampling(8), row_seeds(1, rows=range(2))), (Sampling(8), None)]
        return [engine.generate(prompts, sampling, seeds).ids for sampling, seeds in ways]

    before = everything()
    model.generation_config.update(**SETTINGS)
    assert everything() == before
    assert model.generation_config.no_repeat_ngram_size == 1  # the saved model keeps its own
    ids = torch.tensor(prompts[:1])
    asked = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0)
    leaks = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=asked)
    with without_generation_config(model):
        clean = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=asked)
    assert leaks.tolist() != clean.tolist()  # why it must be set aside


def test_trls_own_rollouts_take_none_either(tiny_model: str, tmp_path: Path, sums: Any) -> None:
    def drawn(**settings: Any) -> list[list[int]]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.generation_config.update(**settings)
        args = grpo_args(tmp_path)
        unseeded = RolloutOptions(seeded=False)
        trainer = GRPOTrainer(model, digit_share, args, train_dataset=sums, rollout=unseeded)
        prompts = trainer._tokenize_prompts(["1+1=", "12+3="])[0]
        torch.manual_seed(0)
        return trainer._generate_single_turn(prompts, None, {}, 1)[0]

    assert drawn(**SETTINGS) == drawn()


@pytest.mark.slow
@pytest.mark.parametrize(("chat", "lora"), [(True, None), (True, {}), (False, None)])
def test_after_chat_sft_of_a_base_model_the_saved_model_stops_at_the_turns_end(
    tiny_model: str, tmp_path: Path, tokenizer: Any, chat: bool, lora: Any
) -> None:
    start = tmp_path / "base"
    shutil.copytree(tiny_model, start)
    ends_with(tokenizer, "'<|system|>'").save_pretrained(start)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi", "completion": "yo"}\n' * 16)
    recipe = {
        "name": "run",
        "output": {"dir": str(tmp_path)},
        "model": {"path": str(start), "lora": lora},
        "data": {"path": str(tmp_path / "rows.jsonl"), "chat": chat},
        "stages": [{"kind": "sft", "rows_per_step": 8, "trainer": {"max_steps": 1, "disable_tqdm": True}}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    pipeline.run_recipe(load_recipe(tmp_path / "r.yaml", []))
    assert GenerationConfig.from_pretrained(tmp_path / "run" / "model").eos_token_id == ([1, 3] if chat else [1])
