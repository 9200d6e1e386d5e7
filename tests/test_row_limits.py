"""What a stage and its model take of rows: what is cut or dropped is counted, what they cannot take is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_rows
from pydantic import TypeAdapter

from siftrl.data import load_data
from siftrl.models import character_tokenizer, load_tokenizer
from siftrl.recipe import AnyStage, DataConfig, ModelConfig, Recipe
from siftrl.row_limits import NO_LIMITS, RowLimits, _context, stage_limits

TOKENIZER = character_tokenizer()
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(5)]


pytestmark = pytest.mark.usefixtures("data_cache")


def config(**keys: Any) -> DataConfig:
    return DataConfig.model_validate(keys)


def load(data: DataConfig, kind: Any = "grpo", tokenizer: Any = TOKENIZER, limits: RowLimits = NO_LIMITS) -> Any:
    return load_data(data, kind, tokenizer, limits)


def test_rows_over_max_length_are_counted_as_trl_treats_them(tmp_path: Path) -> None:
    """Prompt, completion and the end's token: rows of 6, 7, 8 and 12 tokens, and one whose prompt alone has 6."""
    sizes = [(2, 3), (2, 4), (2, 5), (2, 9), (6, 3)]
    rows = [{"prompt": "p" * p, "completion": "c" * c, "chosen": "c" * c, "rejected": "r"} for p, c in sizes]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    limits = RowLimits(max_length=6, drops_full_prompts=True)
    for kind in ("sft", "dpo"):
        splits = load(config(path=path), kind, limits=limits)
        assert splits.report["cut"] == 3 and splits.report["dropped"] == {"prompt fills max_length": 1}
        assert len(splits.train) == 4
        with pytest.raises(ValueError, match="all 5 .* fill trainer.max_length .2 tokens.*the longest row has 12 tok"):
            load(config(path=path), kind, limits=RowLimits(max_length=2, drops_full_prompts=True))
    assert load(config(path=path), "sft", limits=RowLimits(max_length=6)).report["cut"] == 4
    assert load(config(path=path), "sft", limits=RowLimits(max_length=12)).report["cut"] == 0
    assert "cut" not in load(config(path=path), "sft").report


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_cut_and_dropped_rows_are_those_of_trls_trainer(tmp_path: Path, tiny_model: str, kind: Any) -> None:
    """What the counts say is left, is left by TRL's own preparation: chat and plain, at lengths about the limit."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows = [
        {"prompt": "p" * p, "completion": "c" * c, "chosen": "c" * c, "rejected": "r" * 3}
        for p in range(1, 9)
        for c in (1, 4)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    trainer_of, config_of = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
    for chat in (False, True):
        data = config(path=path, chat=chat)
        whole = load(data, kind).train
        limits = RowLimits(max_length=8, drops_full_prompts=True)
        splits = load(data, kind, limits=limits)
        columns = ["prompt", *(["completion"] if kind == "sft" else ["chosen", "rejected"])]
        args = config_of(output_dir=str(tmp_path), max_length=8, report_to="none", use_cpu=True, bf16=False)
        trainer = trainer_of(
            model=tiny_model,
            args=args,
            train_dataset=whole.select_columns(columns),
            processing_class=character_tokenizer(),
        )
        prepared = trainer.train_dataset
        assert len(prepared) == len(splits.train) < len(rows)
        if kind == "sft":  # a row that ends at the limit without the end's token was cut
            end = TOKENIZER.eos_token_id
            assert sum(ids[-1] != end for ids in prepared["input_ids"]) == splits.report["cut"] > 0
        else:
            longest = [
                len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in prepared
            ]
            assert sum(length > 8 for length in longest) == splits.report["cut"] > 0


def test_what_a_stage_takes_is_read_from_its_trainers_options(tiny_model: str) -> None:
    model = ModelConfig(path=tiny_model)

    def limits(kind: str, **keys: Any) -> RowLimits:
        stages = TypeAdapter(list[AnyStage])
        return stage_limits(stages.validate_python([{"kind": kind, "name": "s", **keys}])[0], model)

    assert limits("sft") == RowLimits(1024, True, context=64, num_embeddings=102, rows_key="rows_per_step")
    assert limits("sft", trainer={"max_length": None, "completion_only_loss": False}).max_length is None
    assert not limits("dpo", trainer={"truncation_mode": "keep_end"}).drops_full_prompts
    assert limits("sft", trainer={"packing": True}).max_length == 1024  # bfd cuts, the other strategies go on
    assert limits("sft", trainer={"packing": True, "packing_strategy": "wrapped"}).max_length is None
    assert limits("dpo", rows_per_step=8, batch_selector="uniform_rows").rows == 8
    rollout = limits("grpo", prompts_per_step=4, rollout={"max_completion_tokens": 20})
    assert (rollout.rows, rollout.completion_tokens, rollout.max_length) == (4, 20, None)
    for engine, read in (("transformers", None), ("vllm", 32)):
        assert limits("grpo", rollout={"engine": engine, "max_model_len": 32}).engine_context == read


def test_rows_that_the_model_cannot_read_are_refused_by_name(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "p" * 4, "completion": "c"}, {"prompt": "p" * 9, "completion": "c"}]
    )
    with pytest.raises(
        ValueError, match="row 1: a prompt of 9 tokens and a completion of 4 .* the 12 .* data.max_prompt_tokens: 8"
    ):
        load(config(path=path), limits=RowLimits(context=12, completion_tokens=4))
    assert (
        len(load(config(path=path, max_prompt_tokens=8), limits=RowLimits(context=12, completion_tokens=4)).train) == 1
    )
    with pytest.raises(ValueError, match="the 10 tokens that the engine reads .* or raise rollout.max_model_len"):
        load(config(path=path), limits=RowLimits(context=99, engine_context=10, completion_tokens=4))
    with pytest.raises(ValueError, match="row 1: has 11 tokens, more than the 10 .* trainer.max_length: 10"):
        load(config(path=path), "sft", limits=RowLimits(context=10, max_length=1024))
    assert len(load(config(path=path), "sft", limits=RowLimits(context=10, max_length=10)).train) == 2


def test_too_few_rows_for_a_step_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="a step takes 17 rows, but there are 16 .* lower prompts_per_step"):
        load(config(path=path, eval={"size": 4}), limits=RowLimits(rows=17, rows_key="prompts_per_step"))
    assert len(load(config(path=path), limits=RowLimits(rows=20)).train) == 20


def test_a_token_that_the_model_does_not_embed_refuses_its_row(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    limits = RowLimits(num_embeddings=len(tokenizer))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    rows = [{"prompt": "hi", "completion": "a"}, {"prompt": "hi", "completion": "an <image>"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert len(load(config(path=path), "grpo", tokenizer, limits).train) == 2
    with pytest.raises(ValueError, match="row 1: completion: holds token 102, but the model embeds only 102 tokens"):
        load(config(path=path), "sft", tokenizer, limits)


def test_what_a_chat_template_refuses_is_one_line_with_the_row(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuses + TOKENIZER.chat_template
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="row 0: .* refuses its messages: System role .*; remove data.system_prompt"):
        load(config(path=path, system_prompt="be brief"), tokenizer=tokenizer)
    user = {"role": "user", "content": "hi"}
    rows = [{"prompt": [user]}, {"prompt": [{"role": "system", "content": "s"}, user]}]
    with pytest.raises(ValueError, match="row 1: .* System role not supported$"):
        load(config(path=write_rows(tmp_path / "rows.jsonl", rows)), tokenizer=tokenizer)


def test_the_context_of_a_stretched_model_is_the_stretched_one() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    plain = SimpleNamespace(max_position_embeddings=100, rope_parameters={"rope_type": "default"})
    assert _context(plain) == 100 and _context(SimpleNamespace()) is None
    assert _context(SimpleNamespace(max_position_embeddings=100, rope_parameters=yarn)) == 400
    assert _context(SimpleNamespace(max_position_embeddings=400, rope_parameters=yarn)) == 400
    llama = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}
    assert _context(SimpleNamespace(max_position_embeddings=800, rope_parameters=llama)) == 800


@pytest.mark.slow
def test_a_stage_ends_before_its_model_is_loaded_where_it_cannot_take_its_rows(tmp_path: Path, tiny_model: str) -> None:
    """Through a run: too few rows for a step, a template that refuses system messages, prompts that fill max_length."""
    from siftrl.pipeline import run_recipe

    tokenizer = load_tokenizer(ModelConfig(path=tiny_model))
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(tiny_model).iterdir():
        (folder / file.name).symlink_to(file)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    path = write_rows(tmp_path / "rows.jsonl", [row | {"completion": "0"} for row in ROWS])
    grpo = {"kind": "grpo", "completions_per_prompt": 4, "micro_batch_size": 8, "rollout": {"max_completion_tokens": 4}}
    for stage, data, message in (
        (grpo | {"prompts_per_step": 32}, {}, "a step takes 32 rows, but there are 20 .* lower prompts_per_step"),
        (grpo | {"prompts_per_step": 4}, {"system_prompt": "s"}, "no system role; remove data.system_prompt"),
        ({"kind": "sft", "trainer": {"max_length": 4}}, {}, "fill trainer.max_length"),
    ):
        recipe = {
            "name": "run",
            "output": {"dir": str(tmp_path / "runs"), "overwrite": True},
            "model": {"path": str(folder)},
            "data": {"path": path, **data},
            "rewards": ["exact_match"],
            "stages": [stage],
        }
        with pytest.raises(ValueError, match=message):
            run_recipe(Recipe.model_validate(recipe))
