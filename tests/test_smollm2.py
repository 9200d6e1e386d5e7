"""A real pretrained model and worked solutions in GSM8K's form, from the recipe to the figure: what a user does first.

`make smollm2` writes the model. The two stages, the evaluation of the start and that of the run share two processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import launch_environment, run_command

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
RECIPE = "grpo-gsm8k-smollm2-135m"

pytestmark = [pytest.mark.slow, pytest.mark.engines]


def rows(first: int, last: int) -> str:
    """Sums in the form of GSM8K's file: a calculation, then the answer after a mark."""
    texts = [
        {
            "question": f"Ann has {a} apples and buys {a + 1:,}. How many has she now?",
            "answer": f"She has {a} + {a + 1} = <<{a}+{a + 1}={2 * a + 1}>>{2 * a + 1:,}.\n#### {2 * a + 1:,}",
        }
        for a in range(first, last)
    ]
    return "".join(json.dumps(text) + "\n" for text in texts)


def siftrl(*arguments: str, cwd: Path) -> Any:
    environment = launch_environment() | {"OMP_NUM_THREADS": "2"}
    done = run_command([sys.executable, "-m", "siftrl", *arguments], cwd=cwd, env=environment, timeout=560)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.timeout(1200)
def test_a_real_model_is_measured_trained_by_sft_and_grpo_and_measured_again(tmp_path: Path) -> None:
    assert MODEL.is_dir(), "there is no model: run `make smollm2`"
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(rows(1, 40))
    (tmp_path / "gsm8k" / "test.jsonl").write_text(rows(500, 504))
    data = {"path": "gsm8k", "config": "null", "eval.path": "gsm8k", "eval.config": "null", "eval.size": "4"}
    overrides = [f"model.path={MODEL}", *(f"data.{key}={value}" for key, value in data.items()), "output.dir=runs"]
    short = ["stages.sft.trainer.max_steps=2", "stages.grpo.trainer.max_steps=2"]
    short += ["stages.sft.rows_per_step=4", "stages.sft.micro_batch_size=4"]
    short += ["stages.grpo.prompts_per_step=2", "stages.grpo.completions_per_prompt=4"]
    short += ["stages.grpo.rollout.max_completion_tokens=24", "stages.grpo.prompt_selector.candidates=2"]

    siftrl("train", RECIPE, *overrides, *short, cwd=tmp_path)

    run = tmp_path / "runs" / RECIPE
    sft, grpo = json.loads((run / "summary.json").read_text())["stages"]
    assert (sft["steps"], grpo["steps"], grpo["rollouts"]) == (2, 2, 16)
    assert sft["eval"]["after"]["loss"] < sft["eval"]["before"]["loss"]
    assert grpo["eval"]["before"]["rows"] == 4 and grpo["eval"]["before"]["missing"] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drifts = [line["engine/logprob_drift"] for line in lines if "engine/logprob_drift" in line]
    assert len(drifts) == 2 and max(drifts) < 0.005  # vLLM has the adapters' weights, before and after a step

    # the run is measured as its recipe measured it
    siftrl("eval", f"runs/{RECIPE}", "--json", "found.json", cwd=tmp_path)
    (found,) = json.loads((tmp_path / "found.json").read_text())["data"]
    assert found["reward"] == pytest.approx(grpo["eval"]["after"]["reward"])
    assert found["mean_length"] == pytest.approx(grpo["eval"]["after"]["mean_length"])
