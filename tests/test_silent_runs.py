"""Runs that learn nothing: what they say, how they stop, and what the summary repeats."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import letter_sum
from grpo_runs import build, run
from keeping import Unmeasured

from siftrl import cli, recipe

pytestmark = pytest.mark.slow


def never(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def train_recipe(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch, **logs: Any) -> int:
    """A GRPO run of 3 steps whose completions are never right."""
    rows = [{"prompt": f"{a}+1=", "answer": "no model says this"} for a in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "grpo",
        "prompts_per_step": 4,
        "completions_per_prompt": 2,
        "micro_batch_size": 8,
        "prompt_selector": {"name": "prompt_curriculum", "candidates": 2, "value": {"body": "policy"}},
        "batch_selector": {"name": "reward_variance", "keep": 4},
        "rollout": {"max_completion_tokens": 3},
        "trainer": {"max_steps": 3, "use_cpu": True, "disable_tqdm": True},
    }
    content = {
        "model": {"path": model},
        "data": {"path": "data.jsonl"},
        "rewards": ["exact_match"],
        "stages": [stage],
        "logging": {"every": 1, **logs},
    }
    (folder / "run.yaml").write_text(recipe.dump_yaml(content))
    monkeypatch.chdir(folder)
    return cli.main(["train", "run.yaml"])


def test_a_run_that_learns_nothing_says_so_once_and_in_its_summary(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    assert train_recipe(tmp_path, tiny_model, monkeypatch) == 0
    (stage,) = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["stages"]
    beginnings = [  # or nearly
        "of the completions end at their limit",
        "3 steps in a row changed the weights by no reward",
        "the batch selectors had nothing to choose in 3 of the last 3 steps",
        "the curriculum chose uniformly in 3 of the last 3 steps: too few prompts were judged",
    ]
    assert len(stage["warnings"]) == len(beginnings)
    for text, beginning in zip(stage["warnings"], beginnings, strict=True):
        assert beginning in text[:100]
        assert [record.message for record in caplog.records].count(text) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"grpo: warning: {' '.join(text.split())}" in printed for text in stage["warnings"])
    metrics = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    assert "explained_variance" not in metrics and "prompts/fallback" in metrics  # 12 prompts were judged


def test_halt_on_no_signal_stops_with_exit_code_1(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert train_recipe(tmp_path, tiny_model, monkeypatch, halt_on_no_signal=2) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("siftrl: step 2: 2 steps in a row changed the weights by no reward")
    assert said.endswith("stopped by halt_on_no_signal: 2") and "(every reward was 0)" in said
    assert not (tmp_path / "runs" / "run" / "model").exists()


def test_a_run_without_an_optimizer_step_is_an_error(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no optimizer step was made: the training data does not fill one step"):
        run(build(tiny_model, tmp_path, sums.select(range(2)), None))


def test_what_was_said_is_in_the_checkpoint_and_sound_runs_say_nothing(
    tiny_model: str, sums: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="siftrl")
    changes: dict[str, Any] = {"max_steps": 2, "reward": letter_sum, "keep": 1.0, "save_strategy": "steps"}
    first = run(build(tiny_model, tmp_path, sums, Unmeasured(), save_steps=1, **changes))
    said = first.health.warnings
    assert said[0].startswith("batch_selector keeps all completions") and "of the completions end" in said[1]
    assert len(said) == 2 == len([record for record in caplog.records if record.name.startswith("siftrl")])
    again = build(tiny_model, tmp_path, sums, Unmeasured(), save_steps=1, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.health.warnings == said
