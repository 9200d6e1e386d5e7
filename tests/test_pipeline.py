"""Whole runs of small recipes, from the command line, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENVIRONMENT
from launch import launch_command, launch_environment, run_command

from siftrl import cli

pytestmark = pytest.mark.slow

RECIPE: dict[str, Any] = {
    "name": "small",
    "model": {"scratch": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "max_positions": 128}},
    "data": {
        "reasoning_gym": {
            "tasks": [
                {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
            ],
            "size": 64,  # a multiple of 16: several ranks fill the last batch of an epoch up with rows that come twice
        },
        "prompt_template": "{metadata[expression]}=",
        "eval": {"size": 8},
    },
    "rewards": ["reasoning_gym"],
    "stages": [
        {
            "kind": "sft",
            "name": "warmup",
            "rows_per_step": 16,
            "micro_batch_size": 16,
            "trainer": {"max_steps": 6, "learning_rate": 1e-3, "gradient_checkpointing": False, "max_length": 8},
        },
        {
            "kind": "grpo",
            "prompts_per_step": 4,
            "completions_per_prompt": 4,
            "micro_batch_size": 8,
            "prompt_selector": {"name": "prompt_curriculum", "candidates": 3, "fallback": False},
            "rollout": {"max_completion_tokens": 4},
            "eval": {"every": 8},
            "trainer": {"max_steps": 20, "learning_rate": 1e-4, "gradient_checkpointing": False},
        },
    ],
    "checkpoint": {"every": 5},
    "logging": {"every": 1},
}


def siftrl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "siftrl", *arguments]
    return run_command(command, cwd=cwd)


def write_recipe(folder: Path, **changes: Any) -> str:
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return "small.yaml"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chosen(run: Path) -> dict[int, list[int]]:
    return {
        line["step"]: [c["id"] for c in line["candidates"] if c["chosen"]] for line in lines(run / "selection.jsonl")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = siftrl("train", write_recipe(folder), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"reward \d\.\d{3} -> \d\.\d{3}", done.stdout)
    assert "cut to trainer.max_length" in done.stdout
    return folder / "runs" / "small"


def test_run_folder_holds_what_the_readme_says(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    warmup, grpo = summary["stages"]
    assert (warmup["name"], warmup["kind"], grpo["name"], grpo["kind"]) == ("warmup", "sft", "grpo", "grpo")
    assert 0 < warmup["data"]["cut"] < warmup["data"]["rows"]  # sums of two digits lose their end token
    assert grpo["rollouts"] == 20 * 16 and 320 <= grpo["tokens"] <= 320 * 4
    assert 0 <= grpo["eval"]["before"]["reward"] <= 1 and grpo["eval"]["after"]["rows"] == 8
    parts = {"propose", "generate", "reward", "value_update", "policy_update", "weight_sync", "total"}
    assert grpo["seconds"].keys() == parts | {"score", "select"}  # those of batch selection
    assert sum(grpo["seconds"][part] for part in parts - {"total"}) <= grpo["seconds"]["total"]
    assert all(grpo["seconds"][part] > 0 for part in parts - {"weight_sync"})
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["versions"]["trl"].startswith("1.16") and environment["world_size"] == 1
    metrics = lines(whole / "metrics.jsonl")
    held_out = [(line["stage"], line["step"]) for line in metrics if "held_out" in line]
    assert held_out == [("warmup", 0), ("warmup", 6), *(("grpo", step) for step in (0, 8, 16, 20))]
    assert warmup["eval"]["after"]["loss"] < warmup["eval"]["before"]["loss"]
    assert {line["stage"] for line in metrics} == {"warmup", "grpo"}
    selection = lines(whole / "selection.jsonl")
    assert len(selection) == 20 and all(len(line["candidates"]) == 12 for line in selection)
    assert all(sum(c["chosen"] for c in line["candidates"]) == 4 for line in selection)
    assert {c["why"] for line in selection for c in line["candidates"] if c["chosen"]} == {"score", "explore"}
    assert len(lines(whole / "samples.jsonl")) == 20 * 4
    assert sorted(p.name for p in (whole / "checkpoints" / "grpo").glob("checkpoint-*")) == [
        "checkpoint-15",
        "checkpoint-20",
    ]


def test_the_saved_model_is_the_trained_one_and_loads_anywhere(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    start = AutoModelForCausalLM.from_pretrained(whole / "stages" / "warmup")
    assert not (model.model.norm.weight == start.model.norm.weight).all()
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    assert tokenizer.decode(tokenizer("1+1=")["input_ids"]) == "1+1="


def test_an_existing_run_is_not_overwritten_unasked(whole: Path) -> None:
    done = siftrl("train", "small.yaml", cwd=whole.parents[1])
    assert done.returncode == 2
    assert "holds a run already" in done.stderr and "--resume" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_resolved_recipe_runs_the_same(whole: Path, tmp_path: Path) -> None:
    recipe = whole / "recipe.yaml"
    done = siftrl("validate", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_siftrl_eval_of_the_run_is_what_training_measured(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained model, and the one after the warm-up, which is where the second stage began."""
    monkeypatch.chdir(whole.parents[1])
    stages = json.loads((whole / "summary.json").read_text())["stages"]
    for arguments, when in (([], "after"), (["--stage", "warmup"], "before")):
        assert cli.main(["eval", "runs/small", "--json", "-", *arguments]) == 0
        (found,) = json.loads(capsys.readouterr().out)["data"]
        measured = stages[1]["eval"][when]
        assert {key: found[key] for key in measured} == measured
        assert found["name"] == "held-out rows" and found["rows"] == 8


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_stopped_run_resumes_to_the_same_end(whole: Path, tmp_path: Path, how: str) -> None:
    """Stopped in the GRPO stage after step 11: by Ctrl-C (which saves), or killed (which loses up to 5 steps)."""
    # a reward without weight changes nothing but the pace: there is time to hit the run where it hurts
    (tmp_path / "my_rewards.py").write_text(
        "import time\n\n\n"
        "def pause(completions, **columns):\n    time.sleep(0.3)\n    return [0.0] * len(completions)\n"
    )
    slow = write_recipe(tmp_path, rewards=["reasoning_gym", {"name": "my_rewards:pause", "weight": 0.0}])
    command = [sys.executable, "-m", "siftrl", "train", slow]
    run = tmp_path / "runs" / "small"
    # Popen in a session of its own: only the run gets the signal
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, text=True, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = run / "selection.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= 11:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    if how == "interrupt":
        assert process.returncode == 130, stderr[-3000:]
        assert "--resume" in stdout + stderr
        steps = [int(p.name.split("-")[1]) for p in (run / "checkpoints" / "grpo").glob("checkpoint-*")]
        assert 11 <= max(steps) < 20
    resumed = siftrl("train", write_recipe(tmp_path), "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert chosen(run) == chosen(whole)
    assert [line["step"] for line in lines(run / "selection.jsonl")] == list(range(1, 21))
    before, after = (json.loads((folder / "summary.json").read_text())["stages"][1] for folder in (whole, run))
    assert after["eval"] == before["eval"]
    assert (after["rollouts"], after["tokens"]) == (before["rollouts"], before["tokens"])
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole))
    assert ours == theirs


def test_resume_passes_over_a_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    shutil.copytree(whole, folder)
    write_recipe(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({"stages": summary["stages"][:1]}))  # as if the end was lost
    newest = folder / "checkpoints" / "grpo" / "checkpoint-20" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    done = siftrl("train", "small.yaml", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-15" in done.stdout and "optimizer.pt has 100 bytes" in done.stderr
    assert chosen(folder) == chosen(whole)


def test_a_stage_that_was_trained_but_not_recorded_is_not_trained_again(whole: Path, tmp_path: Path) -> None:
    """A crash after the last step, before the summary was written: its last checkpoint is at the last step."""
    folder = tmp_path / "runs" / "small"
    shutil.copytree(whole, folder)
    write_recipe(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({"stages": summary["stages"][:1]}))
    shutil.rmtree(folder / "stages" / "grpo")
    done = siftrl("train", "small.yaml", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert chosen(folder) == chosen(whole)
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    again = json.loads((folder / "summary.json").read_text())["stages"][1]
    assert (again["steps"], again["rollouts"]) == (20, 320)
    assert again["eval"] == summary["stages"][1]["eval"]


def test_lora_is_merged_for_the_next_stage_and_kept_beside(tmp_path: Path) -> None:
    stages = [dict(stage) for stage in RECIPE["stages"]]
    stages[0]["trainer"] = stages[0]["trainer"] | {"max_steps": 2}
    # TRL's own options pass through: here its TensorBoard logs
    stages[1] = stages[1] | {
        "eval": None,
        "trainer": stages[1]["trainer"] | {"max_steps": 2, "report_to": "tensorboard"},
    }
    model = RECIPE["model"] | {"lora": {"r": 4, "alpha": 8.0}}
    done = siftrl("train", write_recipe(tmp_path, model=model, stages=stages), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    from transformers import AutoModelForCausalLM

    run = tmp_path / "runs" / "small"
    merged = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    scratch = AutoModelForCausalLM.from_pretrained(run / "stages" / "scratch").state_dict()
    moved = {name for name in scratch if not (merged[name] == scratch[name]).all()}
    assert moved and all("proj" in name for name in moved)
    assert (run / "model" / "adapter" / "adapter_config.json").exists()
    assert list(run.rglob("events.out.tfevents.*"))


def test_the_launchers_reach_the_same_result(whole: Path, tmp_path: Path) -> None:
    """torchrun on one rank: the third way in, with the script that DeepSpeed's launcher runs, too."""
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    write_recipe(tmp_path)
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [str(torchrun), "--standalone", "--nproc_per_node", "1", str(script), "small.yaml"]
    done = run_command(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert chosen(tmp_path / "runs" / "small") == chosen(whole)


DIGITS = """

def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.mark.engines
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_run_the_recipe_of_one(tmp_path: Path, launcher: str) -> None:
    """The same recipe, the same prompts; half of the rows on each rank.

    The reward is one that a random model earns: without any reward the gradient is rounding noise, which Adam would
    blow up into different weights.
    """
    (tmp_path / "my_rewards.py").write_text(DIGITS)
    recipe = write_recipe(tmp_path, rewards=["my_rewards:digits"])
    one = siftrl("train", recipe, "name=one", "stages.grpo.trainer.max_steps=6", cwd=tmp_path)
    assert one.returncode == 0, one.stderr[-3000:]
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    overrides = ["name=two", "stages.grpo.trainer.max_steps=6", "stages.warmup.micro_batch_size=8"]
    overrides += ["distribution.deepspeed=zero2"] if launcher == "deepspeed" else []
    command = [*launch_command(2, deepspeed=launcher == "deepspeed"), str(script), recipe, *overrides]
    two = run_command(command, cwd=tmp_path, env=launch_environment())
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-3000:]
    folders = [tmp_path / "runs" / name for name in ("one", "two")]
    assert chosen(folders[0]) == chosen(folders[1])
    single, double = (json.loads((folder / "summary.json").read_text())["stages"] for folder in folders)
    assert double[0]["tokens"] == single[0]["tokens"]
    assert double[1]["rollouts"] == single[1]["rollouts"] == 6 * 16
    assert double[1]["tokens"] == single[1]["tokens"]
    assert double[1]["eval"]["after"]["rows"] == 8
    assert json.loads((folders[1] / "environment.json").read_text())["world_size"] == 2


SHORT_ANSWERS = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from siftrl.fields import Positive
from siftrl.signals import Loss
from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class ShortAnswers(BatchSelector):
    \"\"\"Keeps rows of low loss for their length.

    power: of the length.
    \"\"\"

    power: Positive = 1.0
    needs: ClassVar = frozenset({Loss()})

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        scores = -signals[Loss()] * signals.num_tokens**self.power
        self.best = scores.max().item()
        return Selection.of(scores.argsort(descending=True)[:keep], len(signals), scores=scores, reasons="short")

    def metrics(self) -> dict[str, float]:
        return {"best": self.best}
"""


BEST_REWARDS = """
from dataclasses import dataclass

import torch

from siftrl.types import BatchSelector, Selection, Signals


@dataclass
class BestRewards(BatchSelector):
    \"\"\"Keeps the completions of highest reward.\"\"\"

    reads_rewards = True

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        best = signals.rewards.argsort(descending=True, stable=True)[:keep]
        return Selection.of(best, len(signals), scores=signals.rewards, reasons="best")
"""


def test_recipe_with_batch_selectors_of_ones_own(tmp_path: Path) -> None:
    """Files outside of the package, in chains with a shipped selector, in an sft stage and in the grpo stage after."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_file.py").write_text(SHORT_ANSWERS)
    (tmp_path / "my_package" / "my_rewards.py").write_text(BEST_REWARDS + DIGITS)
    chain = [
        {"name": "my_package.my_file:ShortAnswers", "keep": 0.75, "power": 2.0},
        {"name": "gradient_coreset", "keep": 8},
    ]
    warmup = RECIPE["stages"][0] | {"batch_selector": chain, "micro_batch_size": 4, "signals": {"micro_batch_size": 8}}
    best = {"name": "my_package.my_rewards:BestRewards", "keep": 0.75}
    grpo = RECIPE["stages"][1] | {
        "micro_batch_size": 4,
        "optimizer_steps_per_rollout": 2,
        "batch_selector": [best, chain[1]],
        "signals": {"micro_batch_size": 8},
        "selection": {"skip_zero_advantage": False},
        "eval": None,
        "trainer": RECIPE["stages"][1]["trainer"] | {"max_steps": 4},
    }
    recipe = write_recipe(tmp_path, stages=[warmup, grpo], rewards=["my_package.my_rewards:digits"])
    done = siftrl("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    stage, rl = json.loads((run / "summary.json").read_text())["stages"]
    assert stage["selection"]["rows_read"] == 96 and stage["selection"]["rows_trained"] == 48
    assert 0 < stage["selection"]["share_of_time"] < 1
    assert stage["seconds"]["score"] > 0 and stage["seconds"]["select"] > 0
    steps = [line for line in lines(run / "selection.jsonl") if line["stage"] == "warmup"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        kept = [c for c in line["candidates"] if c["chosen"]]
        assert len(line["candidates"]) == 16 and len(kept) == 8
        assert sum(c["weight"] for c in kept) == pytest.approx(8, rel=1e-4)
        assert {c["source"] for c in line["candidates"]} == {"chain_sum"} and {c["why"] for c in kept} == {"medoid"}
    # 2 rollouts of 16 completions, 8 of each trained on in 2 optimizer steps
    assert (rl["steps"], rl["rollouts"]) == (4, 32)
    assert (rl["selection"]["rows_read"], rl["selection"]["rows_trained"]) == (32, 16)
    rollouts = [line["completions"] for line in lines(run / "selection.jsonl") if "completions" in line]
    assert [len(rows) for rows in rollouts] == [16, 16]
    assert all(sum(row["chosen"] for row in rows) == 8 for rows in rollouts)
    assert {row["source"] for rows in rollouts for row in rows} == {"chain_sum"}
    figures = [line for line in lines(run / "metrics.jsonl") if "loss" in line and line["stage"] == "warmup"]
    assert all(
        {"batch/my_file/best", "batch/gradient_coreset/coverage", "batch/share_of_time"} <= set(f) for f in figures
    )
    for selector, words in ((chain[0] | {"powr": 1.0}, ("powr", "power")), (best, ("reads rewards", "high_loss"))):
        wrong = write_recipe(tmp_path, stages=[warmup | {"batch_selector": [selector]}], rewards=[])
        refused = siftrl("validate", wrong, cwd=tmp_path)
        assert refused.returncode == 2 and all(word in refused.stderr for word in words)
