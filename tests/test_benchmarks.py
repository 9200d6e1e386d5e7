"""The benchmarks' arithmetic, and every script once in its `--smoke` setting."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import run_command
from test_docs import ROOT, commands

from siftrl.recipe import load_recipe

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_curriculum  # noqa: E402
import bench_report  # noqa: E402


def run(selector: str, seed: int, accuracies: list[float], tokens_a_step: int) -> dict[str, Any]:
    points = [
        {"step": 10 * i, "accuracy": accuracy, "rollouts": 16 * i, "tokens": tokens_a_step * i, "seconds": 2.0 * i}
        for i, accuracy in enumerate(accuracies)
    ]
    shares = {"effective_generated": 0.5, "effective_trained": 0.75}
    return {"selector": selector, "seed": seed, "points": points, **shares}


RUNS = [
    run("uniform", 0, [0.5, 0.52, 0.56, 0.60], 100),
    run("uniform", 1, [0.5, 0.50, 0.54, 0.56], 100),
    run("prompt_curriculum", 0, [0.5, 0.60, 0.54, 0.70], 100),
    run("prompt_curriculum", 1, [0.5, 0.54, 0.58, 0.70], 100),
    run("dynamic_sampling", 0, [0.5, 0.5, 0.5, 0.55], 200),
]
RAW = {
    "runs": RUNS,
    "settings": {"start_per_seed": False},
    "hardware": {"cpu": "c", "cores": 2, "torch_threads": 1, "gpus": [], "load_before": 0.0, "versions": {}},
}


def shown() -> list[tuple[str, str, list[str]]]:
    """Every command of a benchmark that a page or a script's docstring shows: where, script, arguments."""
    found = [(where, words) for where, words in commands() if any("scripts/bench_" in word for word in words)]
    for file in sorted(SCRIPTS.glob("bench_*.py")):
        lines = re.findall(r"^    python (scripts/bench_.*)$", file.read_text().split('"""')[1], re.MULTILINE)
        found += [(file.name, shlex.split(line)) for line in lines]
    split = []
    for where, words in found:
        (at,) = [index for index, word in enumerate(words) if word.startswith("scripts/bench_")]
        split.append((where, Path(words[at]).stem, words[at + 1 :]))
    return split


SHOWN = shown()


def test_commands_of_every_benchmark_are_shown() -> None:
    names = {file.stem for file in SCRIPTS.glob("bench_*.py") if "_parser()" in file.read_text()}
    assert {name for where, name, _ in SHOWN if where.startswith("benchmarks.md")} == names


@pytest.mark.parametrize(("where", "name", "arguments"), SHOWN, ids=[f"{where}-{name}" for where, name, _ in SHOWN])
def test_every_command_of_a_benchmark_parses_and_its_recipes_validate(
    where: str, name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the training itself, which takes an hour."""
    args = importlib.import_module(name)._parser().parse_args(arguments)
    for file in [args.recipe] if "recipe" in args else []:
        load_recipe(ROOT / file, [*(bench_curriculum.SMOKE if args.smoke else []), *args.overrides])
    if name == "bench_curriculum" and arguments[0] == "learn":
        monkeypatch.setattr(bench_curriculum, "_run_jobs", lambda *_: [])
        monkeypatch.setattr(bench_curriculum, "report_command", lambda _: 0)
        monkeypatch.chdir(ROOT)
        (tmp_path / "start").mkdir()
        for options in ([], ["--start", str(tmp_path / "start")]):
            if options or args.recipe.endswith("quickstart.yaml"):
                at = arguments.index("--out")
                changed = [*arguments[:at], *options, "--seeds", "0", "--out", str(tmp_path), *arguments[at + 2 :]]
                assert bench_curriculum.main(changed) == 0


def test_the_cost_of_an_accuracy_is_linear_between_evaluations() -> None:
    curve = [(0.0, 0.5), (100.0, 0.6), (200.0, 0.55), (300.0, 0.65)]
    assert bench_report.first_reached(curve, 0.5) == 0
    assert bench_report.first_reached(curve, 0.58) == pytest.approx(80)
    assert bench_report.reached_for_good(curve, 0.58) == pytest.approx(230)
    assert bench_report.reached_for_good(curve, 0.55) == pytest.approx(50)  # never below again, though equal once
    assert bench_report.first_reached(curve, 0.66) is None
    assert bench_report.reached_for_good([(0.0, 0.5), (9.0, 0.7), (18.0, 0.6)], 0.65) is None


def test_selectors_are_measured_against_what_uniform_spent() -> None:
    groups = bench_report.by_selector(RUNS)
    uniform = groups["uniform"]
    assert bench_report.selector_figures(uniform, uniform)["of_uniform"]["tokens"]["first"] == pytest.approx(1)
    ours = bench_report.selector_figures(groups["prompt_curriculum"], uniform)
    assert ours["target"] == pytest.approx(0.58)
    # the mean curve is 0.50, 0.57, 0.56, 0.70 over 0, 100, 200, 300 tokens of uniform's 300
    assert ours["of_uniform"]["tokens"]["first"] == pytest.approx((200 + 100 * 0.02 / 0.14) / 300)
    assert ours["per_seed"]["tokens"] == {0: pytest.approx(100 / 300), 1: pytest.approx(150 / 300)}
    assert ours["end"] == {"mean": pytest.approx(0.7), "low": 0.7, "high": 0.7, "seeds": 2}
    dynamic = bench_report.selector_figures(groups["dynamic_sampling"], uniform)
    assert dynamic["of_uniform"]["tokens"]["first"] is None and dynamic["per_seed"]["seconds"] == {0: None}


def test_the_report_has_a_row_a_selector_and_a_warning_for_unequal_starts() -> None:
    text = bench_report.render(RAW)
    assert "| prompt_curriculum | 2 | 0.500 | 0.700 (0.700..0.700) | 0.50 | 0.75 | 48 | 300 | 6.0 |" in text
    assert "| dynamic_sampling | never / never |" in text and "WARNING" not in text
    other = run("uniform", 2, [0.4, 0.5], 100)
    assert "WARNING: the runs do not begin at one accuracy" in bench_report.render(RAW | {"runs": [*RUNS, other]})


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    done = run_command(command)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learn")
    options = ["--seeds", "0", "--jobs", "2", "--checkpoint-every", "2"]
    script("bench_curriculum", "learn", "--smoke", "--out", str(out), "--selectors", *LABELS, *options)
    return out


LABELS = {"uniform": "uniform", "few={name: prompt_curriculum, candidates: 3, fallback: false}": "few"}


@pytest.mark.slow
def test_learn_trains_each_selector_from_one_start_and_restarts_nothing(learnt: Path) -> None:
    raw = json.loads((learnt / "learn.json").read_text())
    assert [run["selector"] for run in raw["runs"]] == list(LABELS.values())
    for one in raw["runs"]:
        points = one["points"]
        assert [point["step"] for point in points] == [0, 2, 4, 6]
        assert [point["rollouts"] for point in points] == [0, 64, 128, 192]
        assert points[-1]["tokens"] > 0 and points[-1]["seconds"] > points[1]["seconds"] > points[0]["seconds"] == 0
    assert len({run["points"][0]["accuracy"] for run in raw["runs"]}) == 1
    assert (learnt / "learn.png").stat().st_size > 1000
    selection = (learnt / "runs" / "few-0" / "selection.jsonl").read_text().splitlines()
    assert len(json.loads(selection[0])["candidates"]) == 12  # 3 candidates for each of 4 prompts
    before = (learnt / "runs" / "uniform-0" / "summary.json").stat().st_mtime_ns
    options = ["--seeds", "0", "--jobs", "2", "--checkpoint-every", "2"]
    script("bench_curriculum", "learn", "--smoke", "--out", str(learnt), "--selectors", *LABELS, *options)
    assert (learnt / "runs" / "uniform-0" / "summary.json").stat().st_mtime_ns == before
    (learnt / "learn.md").unlink()
    assert "| few | 1 |" in script("bench_curriculum", "report", "--out", str(learnt)).stdout
    assert (learnt / "learn.md").is_file()


@pytest.mark.slow
def test_select_times_a_finished_runs_value_model(learnt: Path, tmp_path: Path) -> None:
    trained = ["--run", str(learnt / "runs" / "few-0")]
    script("bench_curriculum", "select", "--smoke", "--out", str(tmp_path), *trained, "--engine", "transformers")
    check_select(tmp_path)


@pytest.mark.slow
@pytest.mark.engines
def test_select_trains_a_value_model_on_real_vllm(learnt: Path, tmp_path: Path) -> None:
    policy = ["--model", str(learnt / "runs" / "start-0" / "model")]
    script("bench_curriculum", "select", "--smoke", "--out", str(tmp_path), *policy, "--engine", "vllm")
    check_select(tmp_path)


def check_select(out: Path) -> None:
    raw = json.loads((out / "select.json").read_text())
    real, forced = raw["timings"]
    assert (real["keep"], real["of"]) == (4, 16) and real["length"] < forced["length"] == 8  # no EOS ends a forced one
    for timing in (real, forced):
        seconds = timing["seconds"]
        assert len(seconds["value"]) == len(seconds["rollouts"]) == 2
        assert all(whole > part > 0 for whole, part in zip(seconds["rollouts"], seconds["generation"], strict=True))
    by = raw["quality"]["by"]
    assert by.keys() == {"value model", "3 rollouts"}
    assert max(figures["spread_found"] for figures in by.values()) <= raw["quality"]["spread_best"] + 1e-6
    assert "| prompts found |" in (out / "select.md").read_text()


@pytest.mark.slow
def test_value_models_go_through_one_stream(learnt: Path, tmp_path: Path) -> None:
    script("bench_value", "--smoke", "--out", str(tmp_path), "--run", str(learnt / "runs" / "uniform-0"))
    raw = json.loads((tmp_path / "value.json").read_text())
    assert raw["streams"][0]["policies"] == [0, 2, 4, 6]
    settings = [(result["config"]["body"], result["config"]["train"]) for result in raw["results"]]
    assert settings == [("own", "full"), ("own", "lora"), ("own", "head"), ("policy", "head")]
    late = [result["late"]["brier"] for result in raw["results"]]
    assert len(set(late)) == 4  # each setting is another model; a policy head sees a policy that moves
    # two steps: V starts as a constant, and its first update moves the head alone, which started from zero
    assert len({result["early"]["brier"] for result in raw["results"]}) == 1


@pytest.mark.slow
def test_overhead_finds_trls_losses(tmp_path: Path) -> None:
    script("bench_overhead", "--smoke", "--out", str(tmp_path))
    raw = json.loads((tmp_path / "overhead.json").read_text())
    assert raw["same"] and len(raw["runs"]["trl"]) == 2
    assert len(raw["runs"]["trl"][0]["losses"]) == 3 and any(raw["runs"]["trl"][0]["losses"])
    assert raw["runs"]["prompt_curriculum"][0]["parts"]["propose"] > 0
