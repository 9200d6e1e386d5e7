"""What a recipe names on this machine: files, columns, rows and models, looked at before torch is imported."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REAL_DATA

from siftrl import cli
from siftrl.preflight import HEAD_ROWS, check_evaluation, check_files, load_checked
from siftrl.recipe import DataConfig, RecipeError, RewardConfig
from siftrl.recipe_text import parse_yaml

GRPO = {
    "kind": "grpo",
    "prompts_per_step": 4,
    "completions_per_prompt": 4,
    "micro_batch_size": 8,
    "rollout": {"max_completion_tokens": 16},
}
SFT = {"kind": "sft", "rows_per_step": 8, "micro_batch_size": 8}
DPO = SFT | {"kind": "dpo"}

REWARDS_MODULE = """
from dataclasses import dataclass
import raises_when_imported

def counted(completions, solution, *, limit: int = 3, **columns): ...
def anything(completions, **columns): ...
"""
SELECTORS_MODULE = """
import raises_when_imported
from dataclasses import dataclass
from siftrl.fields import ModelPath
from siftrl.types import PromptSelector

@dataclass
class Pool(PromptSelector):
    pool: int = 3
    scorer: ModelPath | None = None
    def num_candidates(self, keep): return keep * self.pool
    def propose(self, candidates, keep, generator): ...

@dataclass
class Imports(PromptSelector):
    def num_candidates(self, keep): return raises_when_imported.draw(keep)
    def propose(self, candidates, keep, generator): ...
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: int = 32, **cells: Callable[[int], Any]) -> Path:
    cells = cells or {"prompt": lambda i: f"{i}+1=", "answer": lambda i: i + 1}
    path.write_text("".join(json.dumps({name: of(i) for name, of in cells.items()}) + "\n" for i in range(rows)))
    return path


def write_recipe(folder: Path, stage: dict[str, Any] | None = None, **changes: Any) -> Path:
    recipe = {
        "model": {"scratch": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}},
        "data": {"path": "rows.jsonl"},
        "rewards": ["exact_match"],
        "stages": [stage or GRPO],
    }
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (recipe | changes).items() if value is not None}))
    return path


def checked(path: Path, *overrides: str) -> list[str]:
    return load_checked(path, overrides)[1]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_checked(path, overrides)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path))
    return text


# ---------------------------------------------------------------------------------------------- files and columns


def test_all_that_can_be_known_is_checked_and_nothing_is_left_to_say(here: Path) -> None:
    write_rows(here / "rows.jsonl")
    assert checked(write_recipe(here)) == []
    write_rows(here / "rows.jsonl", prompt=lambda i: f"{i}", completion=lambda i: i)
    assert checked(write_recipe(here, SFT, rewards=None)) == []
    write_rows(here / "rows.jsonl", prompt=lambda i: f"{i}", chosen=lambda i: "a", rejected=lambda i: "b")
    assert checked(write_recipe(here, DPO, rewards=None)) == []


COLUMNS: dict[str, tuple[str, str]] = {
    "a prompt's": (
        "data.prompt=promt",
        "with data.prompt=promt: data.prompt: there is no column 'promt'; did you",
    ),
    "a template's": (
        "data.prompt_template='{question}='",
        "data.prompt_template: there is no column 'question'; the columns are prompt, answer, pass_rate",
    ),
    "a template's braces": ("data.prompt_template='{prompt'", "data.prompt_template: '{prompt': expected '}' before"),
    "a source's": ("data.source=topic", "data.source: there is no column 'topic'"),
    "a source that is the prompt": ("data.source=prompt", "data.source: 'prompt' is a name that the trainer reads"),
    "a source that is no name": (
        "data={path: sources.jsonl, source: source}",
        "data.source: row 0 has [1] as its source",
    ),
    "a target's": ("stages.0={kind: sft, micro_batch_size: 8}", "data.completion: there is no column 'completion'"),
    "a pair's": ("stages.0={kind: dpo, micro_batch_size: 8}", "data.chosen: there is no column 'chosen'"),
    "a reward's": (
        "rewards.0={name: exact_match, options: {column: anser}}",
        "rewards.0.options.column: exact_match reads the column 'anser', which the data has not; did you mean 'an",
    ),
    "an answer inside a column": (
        "rewards.0={name: exact_match, options: {gold: '#### (.*)'}}",
        "rewards.0.options.gold: '#### (.*)' finds no answer in the first 32 rows of rows.jsonl, for example in '1'",
    ),
    "an answer that is a list": (
        "data={path: lists.jsonl}",
        "rewards.0: exact_match: column 'answer' holds a list, not an answer: [2]; write one answer a row",
    ),
    "one of several of a reward's": (
        "rewards.0={name: math_verify, options: {column: gold}}",
        "rewards.0.options.column: math_verify reads the column 'gold', which the data has not; it has answer, p",
    ),
    "one that the trainer keeps": (
        "rewards.0={name: exact_match, options: {column: prompt}}",
        "rewards.0.options.column: exact_match reads the column 'prompt', which the trainer keeps for itself",
    ),
    "another library's": ("rewards=[reasoning_gym]", "rewards.0: reasoning_gym reads the column 'task', which"),
    "a function's": (
        "rewards=['checked_rewards:counted']",
        "rewards.0: checked_rewards:counted reads the column 'solution'",
    ),
    "a stage's own reward's": (
        "stages.0.rewards=[{name: exact_match, options: {column: x}}]",
        "stages.0.rewards.0.options.column: exact_match reads the column 'x'",
    ),
    "a selector's": (
        "stages.0.prompt_selector={name: static_filter, column: rate}",
        "stages.0.prompt_selector.column: static_filter reads the column 'rate', which the data has not; did you mean",
    ),
    "held-out rows'": ("data.eval={path: held.jsonl}", "there is no column 'prompt'; the columns are question"),
    "a stage's own data's": (
        "stages.0.data={path: held.jsonl, prompt: questoin}",
        "stages.0.data.prompt: there is no column 'questoin'; did you mean 'question'?",
    ),
    "a missing file": ("data.path=rwos.jsonl", "data.path: there is no file or folder rwos.jsonl"),
    "a missing held-out file": ("data.eval={path: x.jsonl}", "data.eval.path: there is no file or folder x.jsonl"),
    "a missing split": ("data={path: split, split: test}", "data.split: no file in split is named after the split 'te"),
    "no usable row": ("data.path=empty.jsonl", "data.path: empty.jsonl: none of the first 3 rows can be used: empty"),
    "a trainer's own file": (
        "stages.0.trainer.fsdp_config=fsdp.json",
        "stages.0.trainer.fsdp_config: there is no file fsdp.json",
    ),
    "a run folder's": ("output.dir=rows.jsonl", "output.dir: rows.jsonl is no folder that can be written to"),
    "an argument of TRL": ("data.path=trl.jsonl", "data.path: trl.jsonl has a column 'completion_ids', the name of an"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_what_files_do_not_hold_is_refused_by_key(case: str, here: Path) -> None:
    pytest.importorskip("math_verify")
    pytest.importorskip("reasoning_gym")
    override, message = COLUMNS[case]
    (here / "checked_rewards.py").write_text(REWARDS_MODULE)
    write_rows(here / "rows.jsonl", prompt=lambda i: f"{i}+1=", answer=lambda i: i + 1, pass_rate=lambda i: 0.5)
    write_rows(here / "held.jsonl", question=lambda i: "1+1=", answer=lambda i: 2)
    write_rows(here / "empty.jsonl", 3, prompt=lambda i: " ", answer=lambda i: 2)
    write_rows(here / "trl.jsonl", 3, prompt=lambda i: "x", answer=lambda i: 2, completion_ids=lambda i: 2)
    write_rows(here / "lists.jsonl", 3, prompt=lambda i: "x", answer=lambda i: [2])
    write_rows(here / "sources.jsonl", 3, prompt=lambda i: "x", answer=lambda i: 2, source=lambda i: [1])
    (here / "split").mkdir()
    write_rows(here / "split" / "train.jsonl")
    assert message in refusal(write_recipe(here), override)


def test_the_rewards_of_an_sft_stage_see_its_targets(here: Path) -> None:
    write_rows(here / "rows.jsonl", prompt=lambda i: f"{i}+1=", solution=lambda i: i + 1)
    data = {"path": "rows.jsonl", "completion": "solution", "eval": {"size": 4}}
    recipe = write_recipe(here, SFT | {"eval": {}}, data=data)
    assert "rewards.0.options.column: exact_match reads the column 'answer', which the data has not" in refusal(recipe)
    for column in ("completion", "solution"):
        assert checked(recipe, f"rewards=[{{name: exact_match, options: {{column: {column}}}}}]") == []
    text = refusal(recipe, "rewards.0.options.column=solution", "stages.0.eval.max_completion_tokens=512")
    assert "stages.0.eval.max_completion_tokens: the model's context of 512 tokens has no room for so many" in text


def test_rows_of_several_forms_have_the_columns_of_all(here: Path) -> None:
    rows = [{"prompt": "1", "answer": 1}, {"prompt": "2", "solution": 2}] * 4
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert checked(write_recipe(here, rewards=[{"name": "exact_match", "options": {"column": "solution"}}])) == []


def test_what_was_not_checked_is_said_once(here: Path) -> None:
    write_rows(here / "rows.jsonl", prompt=lambda i: f"{i}", solution=lambda i: 1, limit=lambda i: 3)
    (here / "checked_rewards.py").write_text(REWARDS_MODULE)
    (here / "checked_selectors.py").write_text(SELECTORS_MODULE)
    recipe = write_recipe(here, rewards=["checked_rewards:anything", "checked_rewards:counted"])
    selector = {"name": "checked_selectors:Imports"}
    recipe.write_text(
        yaml.safe_dump(
            parse_yaml(recipe.read_text()) | {"stages": [GRPO, GRPO | {"name": "b", "prompt_selector": selector}]}
        )
    )
    assert checked(recipe) == [
        "not checked: rewards.0: which columns checked_rewards:anything reads: it does not declare them",
        "rewards.1.options.limit: the data has a column of this name, too, which checked_rewards:counted is not given",
        "not checked: stages.1.prompt_selector: how many prompts checked_selectors:Imports draws for a step, which "
        "only its code says: it is asked before the model is loaded",
    ]
    assert checked(write_recipe(here), "model={path: some/model}", "data={path: some/data}") == [
        "not checked: model.path: some/model is taken for a hub name: its files, its context",
        "not checked: data.path: some/data is taken for a hub name: its rows and columns",
    ]
    kept = checked(
        write_recipe(here, rewards=["checked_rewards:anything"]), "stages.0.batch_selector={name: high_loss, keep: 16}"
    )
    assert (
        kept[1] == "stages.0.batch_selector.keep: all 16 rows of a step are kept: they are scored, and none is left out"
    )
    elsewhere = load_checked(recipe, ["data.path=/none/such.jsonl"], here=False)[1]
    assert elsewhere == ["not checked: packages, files and models: they are those of the machine that trains"]


# --------------------------------------------------------------------------------------------------- how many rows


COUNTS = {
    "data.path=few.jsonl": "stages.0.prompts_per_step: a step draws 4 prompts, the data has only 3 to train on",
    "stages.0.prompt_selector={name: prompt_curriculum, candidates: 9}": "a step draws 36 prompts, the data has only ",
    "stages.0.prompt_selector={name: 'checked_selectors:Pool', pool: 10}": "a step draws 40 prompts, the data has on",
    "data.eval={size: 32}": "data.eval.size: 32 leaves nothing of the 32 rows; write less",
    "data.eval={size: 30}": "a step draws 4 prompts, the data has only 2 to train on, 30 are held out",
    "data.split='train[:3]'": "a step draws 4 prompts, the data has only 3 to train on",
    "data.split='train[30:]'": "a step draws 4 prompts, the data has only 2 to train on",
    "stages.0={kind: sft, rows_per_step: 48, batch_selector: high_loss}": "rows_per_step: a step reads 48 rows, the d",
    "data.limit=3": "a step draws 4 prompts, the data has only 3 to train on",
}


@pytest.mark.parametrize("override", COUNTS)
def test_too_few_rows_are_refused(override: str, here: Path) -> None:
    (here / "checked_selectors.py").write_text(SELECTORS_MODULE)
    write_rows(here / "rows.jsonl", prompt=lambda i: f"{i}", answer=lambda i: 1, completion=lambda i: 2)
    write_rows(here / "few.jsonl", 3)
    assert COUNTS[override] in refusal(write_recipe(here), override)


def test_as_many_rows_as_a_step_draws_are_enough(here: Path) -> None:
    (here / "checked_selectors.py").write_text(SELECTORS_MODULE)
    write_rows(here / "rows.jsonl")
    assert checked(write_recipe(here), "stages.0.prompt_selector={name: 'checked_selectors:Pool', pool: 8}") == []
    assert checked(write_recipe(here), "data.eval={size: 28}", "data.limit=4") == []
    (line,) = checked(write_recipe(here), "data.split='train[:50%]'")
    assert line == "not checked: data.split: how many rows train[:50%] holds"


class _Counted(io.FileIO):
    read_bytes = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        _Counted.read_bytes += count
        return count


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_only_the_head_of_a_large_file_is_read(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is sparse: behind its rows it goes on for 10 GB that nothing may read."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(2000)]
    if name == "rows.csv":
        text = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows)
    else:
        lines = [json.dumps(row) for row in rows]
        text = "[" + ",\n".join(lines) if name == "rows.json" else "\n".join(lines)
    (here / name).write_text(text)
    with (here / name).open("r+b") as file:
        file.truncate(10 << 30)
    real = io.open

    def counting(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not str(file).endswith(name) or "b" in mode:
            return real(file, mode, *arguments, **options)
        options.pop("buffering", None)
        return io.TextIOWrapper(
            io.BufferedReader(_Counted(str(file))), options.get("encoding"), newline=options.get("newline")
        )

    monkeypatch.setattr(io, "open", counting)
    monkeypatch.setattr(builtins, "open", counting)
    _Counted.read_bytes = 0
    assert checked(write_recipe(here, data={"path": name, "eval": {"size": 1000}})) == []
    assert 0 < _Counted.read_bytes < 16 << 20, "no more than some chunks of a MB"


# ------------------------------------------------------------------------------------------------------------ models


def write_model(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64} | (config or {})))
    (folder / "model.safetensors").write_text("")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_model_s_folder_is_looked_at(here: Path) -> None:
    write_rows(here / "rows.jsonl")
    write_model(here / "model")
    recipe = write_recipe(here, model={"path": "model"})
    assert checked(recipe) == []
    assert "r.yaml with model.path=./none: model.path: there is no folder ./none" in refusal(
        recipe, "model.path=./none"
    )
    assert "model.path: r.yaml is a file; write the folder" in refusal(recipe, "model.path=r.yaml")
    assert "model.path: transformers does not read '~'; write /" in refusal(recipe, "model.path='~/model'")
    write_model(here / "run" / "model")
    assert "model.path: run holds no config.json, so it is no model's folder; its folder model does" in refusal(
        recipe, "model.path=run"
    )
    for missing, message in {
        "tokenizer.json": "model.path: model holds no tokenizer",
        "model.safetensors": "model.path: model holds no weights",
    }.items():
        (here / "model" / missing).rename(here / "aside")
        assert message in refusal(recipe)
        (here / "aside").rename(here / "model" / missing)
    (here / "model" / "config.json").rename(here / "model" / "adapter_config.json")
    assert "model.path: model holds a LoRA adapter without its base model; merge it" in refusal(recipe)


def test_chat_prompts_take_a_chat_template(here: Path) -> None:
    write_rows(here / "rows.jsonl")
    write_rows(here / "chat.jsonl", prompt=lambda i: [{"role": "user", "content": f"{i}"}], answer=lambda i: 1)
    write_model(here / "model")
    recipe = write_recipe(here, model={"path": "model"})
    for asked in ("data.chat=true", "data.system_prompt=Add.", "data.path=chat.jsonl"):
        text = refusal(recipe, asked)
        assert "model.path: the prompts of stage grpo are chat messages, but the tokenizer of model has no chat" in text
    (here / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert checked(recipe, "data.chat=true") == []
    (here / "model" / "tokenizer_config.json").unlink()
    (here / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert checked(recipe, "data.path=chat.jsonl") == []


def test_the_models_of_selectors_are_looked_at(here: Path) -> None:
    (here / "checked_selectors.py").write_text(SELECTORS_MODULE)
    write_rows(here / "rows.jsonl")
    recipe = write_recipe(here)
    for section, key in {
        "prompt_selector={name: prompt_curriculum, value: {model: ./none}}": "prompt_selector.value.model",
        "prompt_selector={name: 'checked_selectors:Pool', scorer: ./none}": "prompt_selector.scorer",
        "batch_selector={name: reducible_loss, reference: ./none}": "batch_selector.reference",
        "batch_selector=[high_loss, {name: reducible_loss, reference: ./none}]": "batch_selector.1.reference",
    }.items():
        assert f"stages.0.{key}: there is no folder ./none" in refusal(recipe, f"stages.0.{section}")
    write_model(here / "reference")
    (here / "reference" / "tokenizer.json").unlink()
    assert checked(recipe, "stages.0.batch_selector={name: reducible_loss, reference: reference}") == []
    text = refusal(recipe, "stages.0.prompt_selector={name: prompt_curriculum, value: {model: reference}}")
    assert "stages.0.prompt_selector.value.model: reference holds no tokenizer" in text
    hub = "stages.0.batch_selector={name: reducible_loss, reference: some/model}"
    assert checked(recipe, hub) == [
        "not checked: stages.0.batch_selector.reference: some/model is taken for a hub name: its files, its context"
    ]


CONTEXTS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_position_embeddings": 64}, 64),
    ({"n_positions": 64, "max_position_embeddings": None}, 64),
    ({"text_config": {"max_position_embeddings": 64}}, 64),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}}, 64),
    ({"max_position_embeddings": None}, None),
    ({"alibi": True}, None),
]


@pytest.mark.parametrize(("config", "positions"), CONTEXTS, ids=str)
def test_completions_fit_the_model_s_context(config: dict[str, Any], positions: int | None, here: Path) -> None:
    write_rows(here / "rows.jsonl")
    write_model(here / "model", config)
    recipe = write_recipe(here, model={"path": "model"})
    assert checked(recipe, f"stages.0.rollout.max_completion_tokens={(positions or 10**6) - 1}") == []
    if positions is not None:
        text = refusal(recipe, f"stages.0.rollout.max_completion_tokens={positions}")
        assert "stages.0.rollout.max_completion_tokens: the model's context of" in text
        assert text.endswith(f"{positions} completion tokens; write {positions - 1} or less")
        text = refusal(recipe, "data.max_prompt_tokens=49", f"stages.0.rollout.max_completion_tokens={positions - 48}")
        assert text.endswith(f"{positions - 48} completion tokens; write {positions - 49} or less")


# ------------------------------------------------------------------------------------------------ the command line


EVALS: dict[str, tuple[list[str], str]] = {
    "a file": (["--data", "none.jsonl"], "--data: there is no file or folder none.jsonl"),
    "a prompt": (["--data", "rows.jsonl", "--prompt", "promt"], "--prompt: there is no column 'promt'; did you mean"),
    "a template": (["--data", "rows.jsonl", "--prompt-template", "{x}"], "--prompt-template: there is no column 'x'"),
    "a split": (["--data", "split", "--split", "test"], "--split: no file in split is named after the split 'test'"),
    "a reward's column": (
        ["--data", "rows.jsonl", "--reward", "{name: exact_match, options: {column: x}}"],
        "--reward: exact_match reads the column 'x', which the data has not",
    ),
    "a chat": (["--data", "rows.jsonl", "--chat"], "MODEL: the prompts are chat messages, but the tokenizer of model"),
    "a context": (["--data", "rows.jsonl", "--max-tokens", "64"], "--max-tokens: the model's context of 64 tokens has"),
    "one of several": (
        ["--data", "rows.jsonl", "--data", "other=held.jsonl"],
        "--prompt: other: there is no column 'prompt'",
    ),
}


@pytest.mark.parametrize("case", EVALS)
def test_eval_looks_at_what_its_flags_name(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = EVALS[case]
    write_model(here / "model")
    write_rows(here / "rows.jsonl")
    write_rows(here / "held.jsonl", question=lambda i: "1+1=", answer=lambda i: 2)
    (here / "split").mkdir()
    write_rows(here / "split" / "train.jsonl")
    flags = ["--max-tokens", "8"] if "--max-tokens" not in arguments else []
    flags += ["--reward", "exact_match"] if "--reward" not in arguments else []
    assert cli.main(["eval", "model", *arguments, *flags]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["eval", "./none", "--data", "rows.jsonl", "--reward", "exact_match"]) == 2
    assert capsys.readouterr().err == "siftrl: MODEL: there is no folder ./none\n"


def test_eval_looks_at_what_a_recipe_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(here / "model")
    write_rows(here / "rows.jsonl")
    data = {"path": "rows.jsonl", "eval": {"path": "none.jsonl"}}
    recipe = str(write_recipe(here, GRPO | {"eval": {}}, model={"path": "model"}, data=data))
    assert cli.main(["eval", recipe]) == 2
    assert capsys.readouterr().err == "siftrl: data.eval.path: there is no file or folder none.jsonl\n"


def test_what_eval_did_not_check_is_said(here: Path) -> None:
    reward, flags = RewardConfig(name="exact_match"), {"model.path": "MODEL", "data.path": "--data"}
    assert check_evaluation("some/model", DataConfig(path="some/data"), [reward], flags) == [
        "not checked: MODEL: some/model is taken for a hub name: its files, its context",
        "not checked: --data: some/data is taken for a hub name: its rows and columns",
    ]


def test_train_stops_where_validate_does_before_torch_is_there(here: Path) -> None:
    write_rows(here / "rows.jsonl", 3)
    code = (
        "import sys; from siftrl.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert status == 2 and not heavy, (status, heavy)"
    )
    command = [sys.executable, "-c", code, "train", str(write_recipe(here))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stages.0.prompts_per_step: a step draws 4 prompts, the data has only 3 to train on" in done.stderr
    assert not (here / "runs").exists()


def test_show_says_where_the_number_of_candidates_is_not_known(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "checked_selectors.py").write_text(SELECTORS_MODULE)
    for name, line in {
        "Pool": "#   prompts proposed             12  checked_selectors:Pool: 3 for each kept",
        "Imports": "#   prompts proposed        unknown  checked_selectors:Imports",
    }.items():
        override = f"stages.0.prompt_selector={{name: 'checked_selectors:{name}'}}"
        assert cli.main(["show", str(write_recipe(here)), override]) == 0
        assert line in capsys.readouterr().out.splitlines()


def test_a_recipe_built_in_python_can_be_checked_too(here: Path) -> None:
    write_rows(here / "rows.jsonl")
    recipe = load_checked(write_recipe(here))[0]
    assert check_files(recipe) == [] and HEAD_ROWS > 32
    recipe.data_of(recipe.stages[0]).prompt = "x"
    with pytest.raises(RecipeError, match="^data.prompt: there is no column 'x'"):
        check_files(recipe)


def test_validate_prints_what_was_not_checked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(here, data={"path": "some/data"})
    assert cli.main(["validate", str(recipe)]) == 0
    assert capsys.readouterr().out == (
        f"{recipe}: a valid recipe, stages: grpo\n"
        "  not checked: data.path: some/data is taken for a hub name: its rows and columns\n"
    )


# --------------------------------------------------------------------------------------------------- validate --rows


def shown(path: Path, rows: int, capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    assert cli.main(["validate", str(path), "--rows", str(rows), *overrides]) == 0
    return capsys.readouterr().out.splitlines()[1:]


def test_rows_are_shown_with_the_verdict_on_their_answers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(here / "rows.jsonl", question=lambda i: f"{i}+1", answer=lambda i: f"I add.\n#### {i + 1}")
    tags = {"name": "response_format", "options": {"tags": ["think", "answer"]}}
    exact = {"name": "exact_match", "options": {"extract": "<answer>(.*?)</answer>"}}
    recipe = write_recipe(here, rewards=[exact, tags], data={"path": "rows.jsonl", "prompt_template": "{question}="})
    lines = shown(recipe, 2, capsys)
    assert lines[:3] == ["stage grpo (grpo)", "row 0", "  prompt: '0+1='"]
    assert lines[3:6] == [
        "  answered '1': exact_match 0, response_format 0",
        "  answered '<answer>1</answer>': exact_match 1, response_format 0",
        "  answered '<think>...</think><answer>1</answer>': exact_match 1, response_format 1",
    ]
    assert lines[6:8] == ["row 1", "  prompt: '1+1='"] and lines[-1].startswith("  answered '<think>")


@pytest.mark.skipif(not (REAL_DATA / "gsm8k").is_dir(), reason=f"no data in {REAL_DATA} (SIFTRL_TEST_DATA)")
def test_a_wrong_reading_of_gsm8k_shows_in_its_first_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    data = {"path": str(REAL_DATA / "gsm8k" / "test.jsonl"), "prompt": "question", "chat": True}
    math = {"name": "math_verify", "options": {"gold": "#### (.*)", "tag": "answer"}}
    lines = shown(write_recipe(here, rewards=[math], data=data), 3, capsys)
    assert [line for line in lines if line.startswith("  answered")] == [
        line
        for gold in (18, 3, 70000)
        for line in (f"  answered '{gold}': math_verify 0", f"  answered '<answer>{gold}</answer>': math_verify 1")
    ]
    math["options"] = {"gold": "(= <<.*)"}  # a match, and no answer
    lines = shown(write_recipe(here, rewards=[math], data=data), 3, capsys)
    assert lines[-1] == "math_verify rewards the right answer of row 0 in none of these forms"


def test_rows_show_chat_messages_and_what_a_reward_does_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "shown_rewards.py").write_text(
        "def zero(completions, answer, **columns): return [0 for _ in completions]\n"
        "async def fails(completions, answer, **columns): raise KeyError(answer[0])\n"
        "def blind(completions, **columns): return [None for _ in completions]\n"
    )
    write_rows(here / "rows.jsonl")
    recipe = write_recipe(here, rewards=["shown_rewards:zero", "shown_rewards:fails"])
    lines = shown(recipe, 2, capsys, "data.system_prompt=Add.")
    assert lines == [
        "stage grpo (grpo)",
        "row 0",
        "  prompt, system: 'Add.'",
        "  prompt, user: '0+1='",
        "  answered '1': shown_rewards:zero 0, shown_rewards:fails raises KeyError: 1",
        "row 1",
        "  prompt, system: 'Add.'",
        "  prompt, user: '1+1='",
        "  answered '2': shown_rewards:zero 0, shown_rewards:fails raises KeyError: 2",
        "shown_rewards:zero rewards the right answer of rows 0, 1 in none of these forms",
        "shown_rewards:fails rewards the right answer of rows 0, 1 in none of these forms",
    ]
    (_, *lines) = shown(write_recipe(here, rewards=["shown_rewards:blind"]), 1, capsys)
    assert lines[-1] == "  the row holds no answer that the rewards could be asked about"


def test_rows_of_other_stages_show_their_targets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(here / "rows.jsonl", 4, prompt=lambda i: f"{i}", completion=lambda i: "" if i else "one")
    lines = shown(write_recipe(here, SFT, rewards=None), 2, capsys)
    assert lines[1:] == [
        "row 0",
        "  prompt: '0'",
        "  completion: 'one'",
        "row 1: dropped (empty completion)",
    ]


# ------------------------------------------------------------------------------------------- the selector's own word


def test_a_selector_that_only_its_code_knows_is_asked_before_the_model_is_loaded() -> None:
    from siftrl.pipeline import _check_candidates
    from siftrl.recipe import GRPOStage
    from siftrl.types import PromptSelector

    class Draws(PromptSelector):
        def __init__(self, drawn: Any) -> None:
            self.drawn = drawn

        def num_candidates(self, keep: int) -> int:
            return self.drawn

    stage = GRPOStage.model_validate(GRPO)
    _check_candidates(Draws(8), stage, 8)
    with pytest.raises(ValueError, match="stage grpo: Draws draws 9 prompts for the 4 of a step, the data has only 8"):
        _check_candidates(Draws(9), stage, 8)
    for wrong in (3, 8.0, None):
        with pytest.raises(ValueError, match=r"Draws.num_candidates\(4\) is .*; it must be a whole number, 4 or more"):
            _check_candidates(Draws(wrong), stage, 8)
