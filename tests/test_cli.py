"""The command line: fast, torch-free until it trains, and one line for every mistake."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from siftrl import cli
from siftrl.eval_plan import EvalPlan
from siftrl.recipe import load_recipe
from siftrl.recipe_text import parse_yaml

ROOT = Path(__file__).parents[1]
RECIPE = """\
model: {path: a-model}
data: {path: rows.jsonl}
rewards: [exact_match]
stages:
  - {kind: grpo, prompts_per_step: 8, completions_per_prompt: 4, micro_batch_size: 8, trainer: {max_steps: 5}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": 2}\n' * 32)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("rows.jsonl", str(rows)))
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["validate", "quickstart"],
        ["show", "quickstart"],
        ["schema"],
        ["list", "selectors"],
    ],
    ids=" ".join,
)
def test_quick_commands_are_quick_and_torch_free(arguments: list[str]) -> None:
    pytest.importorskip("reasoning_gym")
    code = (
        "import sys; from siftrl.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as leaving: status = leaving.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'vllm', 'reasoning_gym'} & set(sys.modules)\n"
        "assert not status and not heavy, (status, heavy)"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 2


def test_validate_says_yes_or_no_in_one_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", recipe]) == 0
    first, *unchecked = capsys.readouterr().out.splitlines()
    assert first == f"{recipe}: a valid recipe, stages: grpo"
    assert unchecked == ["  not checked: model.path: a-model is taken for a hub name: its files, its context"]
    assert cli.main(["validate", recipe, "stages.0.micro_batch_size=5"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith(
        f"siftrl: {recipe} with stages.0.micro_batch_size=5: stages.0.micro_batch_size: 5 does"
    )
    assert cli.main(["validate", recipe, "--ranks", "8", "stages.0.micro_batch_size=4"]) == 0
    assert cli.main(["validate", recipe, "--ranks", "8"]) == 2


def test_show_prints_a_recipe_that_loads_again(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["seed=4", "stages.0.prompt_selector={name: dynamic_sampling, max_rounds: 3}"]
    assert cli.main(["show", recipe, *overrides, "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert load_recipe(copy) == load_recipe(recipe, overrides)
    for line in (
        "#   prompts proposed              8  dynamic_sampling: 1 for each kept, at most 3 rounds",
        "#   prompts kept                  8",
        "#   completions a step           32  4 for each prompt",
        "#   micro-batches a rank          2  16 a rank / micro_batch_size 8",
        "#   optimizer steps               5",
    ):
        assert line in text.splitlines()


def test_show_prints_what_a_chain_of_batch_selectors_keeps(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chain = "[{name: high_loss, keep: 0.75}, {name: uniform_rows, keep: 32}]"
    stage = f"stages.0={{kind: sft, rows_per_step: 64, batch_selector: {chain}, trainer: {{max_steps: 5}}}}"
    assert cli.main(["show", recipe, stage, "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "copy.yaml").write_text(text)
    assert load_recipe(tmp_path / "copy.yaml") == load_recipe(recipe, [stage])
    for line in (
        "#   rows read a step             64",
        "#   rows trained on              32  64 -> high_loss 48 -> uniform_rows 32",
        "#   micro-batches a rank          2  16 a rank / micro_batch_size 8",
        "#   gradient accumulation         2  micro-batches of one optimizer step",
        "#   optimizer steps               5",
    ):
        assert line in text.splitlines()
    assert "rows a step" not in text


def test_show_prints_how_many_completions_are_trained_on(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    chain = "stages.0.batch_selector=[{name: largest_advantage, keep: 0.75}, {name: uniform_rows, keep: 8}]"
    assert cli.main(["show", recipe, chain, "stages.0.micro_batch_size=4", "--ranks", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "#   completions a step           32  4 for each prompt",
        "#   completions trained on        8  32 -> largest_advantage 24 -> uniform_rows 8",
        "#   micro-batches a rank          1  4 a rank / micro_batch_size 4",
        "#   gradient accumulation         1  micro-batches of one optimizer step",
        "#   rollouts                      5  steps that generate",
    ):
        assert line in lines


def test_overrides_may_stand_on_both_sides_of_an_option(recipe: str) -> None:
    args = cli._parse(["train", recipe, "seed=1", "--resume", "name=x"])
    assert args.resume and args.overrides == ["seed=1", "name=x"]


@pytest.mark.parametrize("wrong", [["train"], ["train", "r.yaml", "--resme"], ["list", "selector"], ["fly"], []])
def test_wrong_arguments_end_with_code_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(wrong)
    assert leaving.value.code == 2
    assert capsys.readouterr().err


def test_list_shows_names_keys_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "selectors"]) == 0
    text = capsys.readouterr().out
    assert "prompt_curriculum (prompt selector)" in text
    assert "    candidates: Count = 4" in text
    assert "      body: Literal['own', 'policy'] = 'own'" in text
    assert "largest_advantage (batch selector, grpo only)\n" in text
    assert "high_loss (batch selector)\n  Keeps the rows of highest loss; of equal ones the first.\n" in text
    assert "    normalise: bool = True\n" in text
    assert "    reference: WeightsPath (required)\n" in text
    assert "A batch selector also takes `keep` (default 0.5)" in text
    assert cli.main(["list", "rewards"]) == 0
    text = capsys.readouterr().out
    assert "exact_match\n" in text and "`keep`" not in text
    assert cli.main(["list", "recipes"]) == 0
    text = capsys.readouterr().out
    assert "quickstart\n  siftrl train recipes/quickstart.yaml" in text


def test_list_tasks_shows_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    gym = pytest.importorskip("reasoning_gym")
    assert cli.main(["list", "tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line for line in lines if not line.startswith(" ")} == set(gym.factory.DATASETS) - {"composite"}
    assert lines[lines.index("chain_sum") + 1].startswith("    min_terms=2, max_terms=6")


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "prompts_per_step" in schema["$defs"]["GRPOStage"]["properties"]


def test_a_recipe_that_comes_with_siftrl_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.find_recipe("quickstart").read_text() == (ROOT / "recipes/quickstart.yaml").read_text()
    Path("quickstart").write_text("mine")
    assert cli.find_recipe("quickstart") == Path("quickstart")


# -------------------------------------------------------------------------------------------------- eval


def test_eval_plans_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from siftrl import eval_command

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')

    seen: list[EvalPlan] = []
    monkeypatch.setattr(eval_command, "run_plan", lambda plan: seen.append(plan) or 0)
    assert cli.main(["eval", "a-model", "--data", "some/rows", "--reward", "exact_match"]) == 0
    assert seen[0].model.path == "a-model"
    assert "not checked: --data: some/rows is taken for a hub name" in capsys.readouterr().err
    assert cli.main(["eval", "a-model", "--data", "rows.jsonl", "--reward", "exact"]) == 2
    assert capsys.readouterr().err == "siftrl: --reward: no reward 'exact'; did you mean 'exact_match'?\n"
    assert len(seen) == 1


# -------------------------------------------------------------------------------------------------- train


def test_interruption_prints_how_to_go_on(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from siftrl import pipeline
    from siftrl.run import Interrupted

    def interrupted(recipe: object, resume: bool) -> None:
        raise Interrupted("stopped; go on with --resume")

    monkeypatch.setattr(pipeline, "run_recipe", interrupted)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", recipe]) == 130
    assert capsys.readouterr().err.endswith("\nstopped; go on with --resume\n")


def test_siftrl_s_own_errors_are_one_line_and_a_library_s_keep_their_traceback(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from siftrl import pipeline

    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", recipe, "--resume"]) == 2  # nothing to resume
    assert capsys.readouterr().err.startswith("siftrl: there is no run to resume in")

    def library_error(recipe: object, resume: bool) -> None:
        json.loads("{")

    monkeypatch.setattr(pipeline, "run_recipe", library_error)
    with pytest.raises(ValueError, match="Expecting"):
        cli.main(["train", recipe])


def test_the_launcher_s_local_rank_goes_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = runpy.run_path(str(ROOT / "scripts/train.py"))["training_arguments"]
    monkeypatch.setenv("LOCAL_RANK", "")  # so that it is put back afterwards
    monkeypatch.delenv("LOCAL_RANK")
    assert arguments(["--local_rank=3", "r.yaml", "seed=1", "--resume"]) == ["r.yaml", "seed=1", "--resume"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert arguments(["--local-rank", "4", "r.yaml"]) == ["r.yaml"]
    assert os.environ["LOCAL_RANK"] == "3", "what is there already stays"


def test_the_module_and_the_script_run_without_torch_until_they_train(recipe: str) -> None:
    module = subprocess.run([sys.executable, "-m", "siftrl", "validate", recipe], capture_output=True, text=True)
    assert module.returncode == 0 and module.stdout.startswith(f"{recipe}: a valid recipe, stages: grpo\n")
    script = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", "--local_rank=0", recipe, "sed=1"], capture_output=True, text=True
    )
    assert script.returncode == 2
    assert script.stderr.endswith("sed: unknown key; did you mean 'seed'?\n") and "Traceback" not in script.stderr


def test_plugins_of_the_working_folder_are_found(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(completions, **columns): return [0.0 for _ in completions]")
    data = parse_yaml(Path(recipe).read_text()) | {"rewards": ["mine:score"]}
    Path(recipe).write_text(yaml.safe_dump(data))
    command = [str(Path(sys.executable).with_name("siftrl")), "validate", recipe]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
