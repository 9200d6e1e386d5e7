"""What `siftrl eval` is asked to measure, read from recipes, runs, flags and suites without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from siftrl import cli
from siftrl.eval_plan import EvalPlan, held_out_alone, look_at, make_plan
from siftrl.recipe import DataConfig, dump, load_recipe
from siftrl.recipe_text import RecipeError

RECIPE: dict[str, Any] = {
    "seed": 5,
    "model": {"path": "some/model", "revision": "abc", "dtype": "float32", "attn_implementation": "eager"},
    "data": {"path": "rows.jsonl", "prompt": "question", "system_prompt": "Think.", "eval": {"size": 8}},
    "rewards": [{"name": "exact_match", "options": {"column": "gold"}}],
    "stages": [
        {"kind": "sft", "name": "warmup"},
        {
            "kind": "grpo",
            "rollout": {"max_completion_tokens": 32, "temperature": 0.7, "top_k": 5},
            "eval": {"batch_size": 64},
            "trainer": {"max_steps": 1},
        },
    ],
}


def plan(*arguments: str) -> EvalPlan:
    return make_plan(cli._parse(["eval", *arguments]), cli.find_recipe)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "gsm8k").mkdir()
    row = dict.fromkeys(("prompt", "question", "problem", "Body", "Question", "answer", "gold"), "1")
    for name in ("rows", "other", "a", "b", "svamp", "gsm8k/test"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 12)
    return tmp_path


def make_model(folder: Path) -> None:
    """The files by which a model's folder is known."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")


def make_run(home: Path, *stages: str, recipe: dict[str, Any] = RECIPE) -> None:
    """A run's folder, as `siftrl train` leaves it when these stages are done; with all of them, the whole run."""
    (home / "my.yaml").write_text(yaml.safe_dump(recipe))
    run = home / "runs/my"
    done = [f"stages/{stage}" for stage in stages] + (["model"] if len(stages) == 2 else [])
    for folder in done:
        make_model(run / folder)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(dump(load_recipe(home / "my.yaml", num_ranks=4)))
    (run / "environment.json").write_text(json.dumps({"world_size": 4}))


# -------------------------------------------------------------------------------------------------- recipes and runs


def test_a_recipe_says_all_that_training_measures_with(home: Path) -> None:
    found = plan("my.yaml")
    assert found.model == load_recipe("my.yaml").model
    (measured,) = found.sets
    assert measured.held_out and measured.kind == "grpo"
    assert (measured.data.system_prompt, measured.data.prompt) == ("Think.", "question")
    assert measured.rewards[0].options["column"] == "gold"
    assert found.sampling == {
        "max_tokens": 32,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert (found.samples, found.batch_size, found.seed, found.engine) == (1, 64, 5, "transformers")
    assert found.stage == load_recipe("my.yaml").stages[1]


def test_flags_and_overrides_go_before_the_recipe(home: Path) -> None:
    found = plan("my.yaml", "--samples", "4", "seed=7", "--reward", "math_verify", "data.eval.size=3", "--limit", "2")
    assert (found.samples, found.sampling["temperature"], found.seed) == (4, 0.7, 7)
    assert [reward.name for reward in found.sets[0].rewards] == ["math_verify"]
    assert found.sets[0].data.eval is not None and (found.sets[0].data.eval.size, found.sets[0].limit) == (3, 2)
    found = plan("my.yaml", "--temperature", "0.5", "--max-tokens", "9", "--seed", "1", "--batch-size", "3")
    assert (found.sampling["temperature"], found.sampling["max_tokens"], found.seed, found.batch_size) == (0.5, 9, 1, 3)
    assert not plan("my.yaml", "data.eval=null", "stages.grpo.eval=null").sets[0].held_out


def test_vllm_s_settings_come_from_the_recipe(home: Path) -> None:
    pytest.importorskip("vllm")
    rollout = "stages.grpo.rollout={engine: vllm, max_model_len: 512, engine_args: {max_num_seqs: 8, swap_space: 1}}"
    found = plan("my.yaml", rollout, "--engine-arg", "max_num_seqs=16", "--engine-arg", "enforce_eager=true")
    assert found.engine == "vllm" and found.engine_args == {
        "gpu_memory_utilization": 0.3,
        "tensor_parallel_size": 1,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "swap_space": 1,
        "enforce_eager": True,
    }
    assert plan("my.yaml", rollout, "--engine", "transformers").engine_args == {}
    assert plan("my.yaml", "--engine", "vllm").engine_args == {}


def test_a_run_is_measured_as_its_recipe_measured_it(home: Path) -> None:
    make_run(home, "warmup", "grpo")
    found = plan("runs/my")
    assert found.model.path == "runs/my/model"
    assert (found.model.revision, found.model.dtype, found.model.attn_implementation) == (None, "float32", "eager")
    assert found.sampling["top_k"] == 5 and found.sets[0].held_out
    warmup = plan("runs/my", "--stage", "warmup")  # measures no rewards itself: as the stage that does
    assert warmup.model.path == "runs/my/stages/warmup" and warmup.sampling == found.sampling
    with pytest.raises(RecipeError, match="--stage: there is no stage 'warm'; did you mean 'warmup'?"):
        plan("runs/my", "--stage", "warm")


def test_a_run_that_is_not_done_says_which_stage_is(home: Path) -> None:
    make_run(home, "warmup")
    with pytest.raises(RecipeError, match="runs/my/model holds no model yet; write --stage warmup"):
        plan("runs/my")
    assert plan("runs/my", "--stage", "warmup").model.path == "runs/my/stages/warmup"


def test_the_stage_chooses_whose_settings_count(home: Path) -> None:
    stages = [dict(stage) for stage in RECIPE["stages"]]
    stages[0] |= {"eval": {"max_completion_tokens": 11}}
    make_run(home, "warmup", "grpo", recipe=RECIPE | {"stages": stages})
    assert plan("runs/my").sampling["max_tokens"] == 32
    warmup = plan("runs/my", "--stage", "warmup")
    assert warmup.sampling == {"max_tokens": 11, "temperature": 0.0} and warmup.sets[0].kind == "sft"


def test_a_scratch_model_is_measured_once_it_is_trained(home: Path) -> None:
    recipe = RECIPE | {"model": {"scratch": {}}}
    (home / "my.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="model.scratch: is made by `siftrl train`"):
        plan("my.yaml")
    make_run(home, "warmup", "grpo", recipe=recipe)
    assert plan("runs/my").model.path == "runs/my/model"


def test_the_recipes_that_come_with_siftrl_are_found_by_name() -> None:
    found = plan("grpo-qwen3-1.7b-lora", "--engine", "transformers")
    assert found.model.path == "Qwen/Qwen3-1.7B-Base" and found.sets[0].data.eval is not None


def test_held_out_rows_are_read_without_the_training_rows_where_they_can() -> None:
    data = DataConfig.model_validate(
        {"path": "train.jsonl", "prompt": "q", "limit": 3, "source": "s", "eval": {"path": "test.jsonl", "size": 9}}
    )
    alone = held_out_alone(data)
    assert alone is not None
    assert (alone.path, alone.split, alone.limit, alone.prompt) == ("test.jsonl", "test", 9, "q")
    assert alone.eval is alone.source is None
    made = DataConfig.model_validate(
        {"reasoning_gym": {"tasks": [{"name": "chain_sum"}], "seed": 4}, "eval": {"size": 6}}
    )
    alone = held_out_alone(made)
    assert alone is not None and alone.reasoning_gym is not None
    assert (alone.reasoning_gym.size, alone.reasoning_gym.seed) == (6, 5)
    assert held_out_alone(data.model_copy(update={"eval": data.eval.model_copy(update={"path": None})})) is None  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------ flags


def test_a_model_is_measured_by_flags(home: Path) -> None:
    found = plan("a-model", "--data", "rows.jsonl", "--reward", "exact_match")
    assert (found.model.path, found.samples, found.sampling) == ("a-model", 1, {"max_tokens": 512, "temperature": 0.0})
    (measured,) = found.sets
    assert (measured.name, measured.data.path, measured.data.split) == ("rows.jsonl", "rows.jsonl", "test")
    assert not measured.data.chat and found.stage is None
    found = plan("a-model", "--data", "d", "--reward", "exact_match", "--samples", "8", "--k", "4, 1,8")
    assert (found.ks, found.sampling["temperature"]) == ([1, 4, 8], 1.0)
    found = plan("a-model", "model.revision=abc", "model.dtype=float32", "--data", "d", "--reward", "exact_match")
    assert (found.model.revision, found.model.dtype) == ("abc", "float32")


def test_several_data_sets_share_the_flags(home: Path) -> None:
    reward = "{name: math_verify, weight: 2.0, options: {column: gold}}"
    flags = ["--prompt", "question", "--chat", "--system-prompt", "Be brief.", "--limit", "7"]
    found = plan("m", "--data", "one=a.jsonl", "--data", "b.jsonl", "--reward", reward, *flags)
    assert [one.name for one in found.sets] == ["one", "b.jsonl"]
    for one in found.sets:
        assert (one.data.prompt, one.data.chat, one.data.system_prompt) == ("question", True, "Be brief.")
        assert (one.data.limit, one.rewards[0].weight, one.rewards[0].options["column"]) == (7, 2.0, "gold")
    (home / "a=b.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    assert plan("m", "--data", "a=b.jsonl", "--reward", "exact_match").sets[0].data.path == "a=b.jsonl"
    gym = plan("m", "--data", "reasoning_gym:chain_sum", "--reward", "reasoning_gym", "--limit", "5").sets[0]
    assert gym.data.reasoning_gym is not None and gym.data.reasoning_gym.size == 5


def test_other_data_is_asked_as_the_recipe_asks(home: Path) -> None:
    (one,) = plan("my.yaml", "--data", "other.jsonl", "--prompt", "problem").sets
    assert (one.data.system_prompt, one.data.prompt, one.held_out) == ("Think.", "problem", False)
    assert one.rewards[0].options["column"] == "gold"
    assert plan("my.yaml", "--data", "a.jsonl", "--system-prompt", "Hm.").sets[0].data.system_prompt == "Hm."


MODEL = ["m", "--data", "rows.jsonl", "--reward", "exact_match"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "--data: a model is measured on data: give --data or --suite"),
        (["m", "--data", "d"], "--reward: d: nothing says what is right: write --reward exact_match"),
        (["m", "--data", "d", "--reward", "exact"], "--reward: no reward 'exact'; did you mean 'exact_match'?"),
        (["m", "--data", "d", "--reward", "{name: exact_match, options: {colum: a}}"], "--reward: options.colum: "),
        (["m", "--data", "d", "--reward", "{name: exact_match, weigt: 1}"], "--reward: weigt: unknown key; did you"),
        (["m", "--data", "d", "--reward", "{name: exact_match, weight: 0.0}"], "--reward: every reward has weight 0"),
        ([*MODEL, "--k", "4"], "--k: pass@4 needs --samples 4 or more, not 1"),
        ([*MODEL, "--samples", "2", "--temperature", "0"], "--samples: 2 greedy completions are all"),
        ([*MODEL, "--data", "reasoning_gym:chain_sums"], "--data: reasoning-gym has no family 'chain_sums'"),
        ([*MODEL, "--data", "rows.jsonl"], "--data: 'rows.jsonl' is there twice"),
        ([*MODEL, "--stage", "grpo"], "--stage: is for a recipe or a run"),
        ([*MODEL, "--engine-arg", "max_model_len=64"], "--engine-arg: is for vllm; write --engine vllm"),
        ([*MODEL, "--engine", "vllm", "--engine-arg", "seed=3"], "--engine-arg: seed is set by siftrl; write --seed"),
        ([*MODEL, "--engine", "vllm", "--engine-arg", "eager"], "--engine-arg: 'eager' must be key=value"),
        ([*MODEL, "--suite", "s.yaml"], "--suite: give --data or --suite, not both"),
        ([*MODEL, "data.prompt=x"], "data: unknown key; a model has no recipe"),
        ([*MODEL, "model.dtyp=auto"], "model.dtyp: unknown key; did you mean 'dtype'?"),
        (["my.yaml", "--chat"], "--chat: is for --data; for the recipe's own rows write data.chat="),
        (["my.yaml", "--prompt-template", "x"], "--prompt-template: is for --data; .* write data.prompt_template="),
        (["my.yaml", "rewards=null"], "my.yaml with rewards=null: rewards: must be a list"),
        (["missing.yaml"], "missing.yaml: no such file"),
        (["./none", *MODEL[1:]], "MODEL: there is no folder ./none"),
        (["m", "--data", "none.jsonl", "--reward", "exact_match"], "--data: there is no file or folder none.jsonl"),
        ([*MODEL, "--prompt", "promt"], "--prompt: there is no column 'promt'; did you mean 'prompt'"),
        ([*MODEL, "--prompt-template", "{qestion}"], "--prompt-template: .*'qestion'"),
        (["m", "--data", "b.jsonl", "--reward", "{name: exact_match, options: {column: gld}}"], "--reward: .*'gld'"),
        (["my.yaml", "data.path=none.jsonl"], "data.path: there is no file or folder none.jsonl"),
        (["my.yaml", "data.eval={path: none.jsonl}"], "data.eval.path: there is no file or folder none.jsonl"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(home: Path, arguments: list[str], message: str) -> None:
    if "vllm" in arguments:
        pytest.importorskip("vllm")
    with pytest.raises(RecipeError, match=message) as error:
        look_at(plan(*arguments))
    assert "\n" not in str(error.value)


def test_wrong_values_of_flags_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (("--temperature", "0.0001"), ("--seed", str(2**32)), ("--limit", "0"), ("--k", "0,1")):
        with pytest.raises(SystemExit):
            cli._parse(["eval", *MODEL, flag, value])
        assert f"argument {flag}: '{value.split(',')[0]}' must be" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ suites

SUITE = """\
rewards: [exact_match]
data:
  - {name: gsm8k, path: gsm8k/test.jsonl, prompt: question, limit: 5}
  - {path: svamp.jsonl, prompt_template: "{Body} {Question}", chat: false, rewards: [math_verify]}
  - {reasoning_gym: {tasks: [{name: chain_sum}], size: 40}, rewards: [reasoning_gym]}
"""


def test_a_suite_lists_data_sets_with_keys_of_their_own(home: Path) -> None:
    (home / "s.yaml").write_text(SUITE)
    found = plan("m", "--suite", "s.yaml", "--chat", "--limit", "9").sets
    assert [one.name for one in found] == ["gsm8k", "svamp.jsonl", "chain_sum"]
    assert [one.data.limit for one in found] == [5, 9, 9]
    assert [one.data.chat for one in found] == [True, False, True]
    assert [one.data.split for one in found] == ["test"] * 3
    assert [[reward.name for reward in one.rewards] for one in found] == [
        ["exact_match"],
        ["math_verify"],
        ["reasoning_gym"],
    ]
    assert plan("my.yaml", "--suite", "s.yaml").sets[0].data.system_prompt == "Think."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prompt: question", "promt: question", "s.yaml:3: data.0.promt: unknown key; did you mean 'prompt'"),
        ("rewards: [math_verify]", "rewards: [math]", "s.yaml:4: data.1.rewards.0.name: no reward 'math'"),
        ("limit: 5", "eval: {size: 5}", "s.yaml:3: data.0.eval: holds rows out of training"),
        ("chain_sum}", "chain}", "s.yaml: chain: data.reasoning_gym.tasks.0.name: reasoning-gym has no family"),
        (SUITE, "[]", "s.yaml: must be a mapping with a list of data sets under `data:`, not a list"),
    ],
)
def test_a_suite_s_mistakes_name_the_file_and_the_key(home: Path, old: str, new: str, message: str) -> None:
    (home / "s.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        plan("m", "--suite", "s.yaml")
