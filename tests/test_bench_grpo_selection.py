"""The arithmetic of `bench_grpo_selection.py`, and one run of it in its `--smoke` setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_grpo_report  # noqa: E402
import bench_grpo_selection  # noqa: E402
import bench_grpo_task  # noqa: E402

PARTS = {"generate": 1.0, "policy_update": 2.0, "weight_sync": 0.0}


def run_of(arm: str, seed: int, accuracies: list[float], cost: float, finished: bool = True) -> dict[str, Any]:
    """A point every 10 steps; a step costs `cost` seconds, 100 generated tokens and 100 cost trained ones."""
    points = []
    for index, accuracy in enumerate(accuracies):
        step = 10 * index
        points.append(
            {
                "step": step,
                "accuracy": accuracy,
                "accuracy/easy": 1.0,
                "accuracy/medium": accuracy / 2,
                "greedy": accuracy + 0.1,
                "seconds": step * cost,
                "generated": 100 * step,
                "trained": 100 * cost * step,
                "rows": 20 * step,
                "rows_with_advantage": 5 * step,
                "effective": [0.25] if step else [],
                "parts": {part: seconds * step * cost / 4 for part, seconds in PARTS.items()},
            }
        )
    return {"arm": arm, "seed": seed, "points": points, "finished": finished}


UNIFORM = [run_of("uniform", 0, [0.2, 0.3, 0.4], 1.0), run_of("uniform", 1, [0.2, 0.4, 0.6], 1.0)]
HALF = [run_of("half", 0, [0.2, 0.6, 0.4], 0.5), run_of("half", 1, [0.2, 0.5, 0.8], 0.5)]
RAW = {
    "hardware": {"cpu": "?", "cores": 1, "torch_threads": 1, "gpus": [], "load_before": 0, "versions": {}},
    "settings": {"arms": ["uniform", "half", "broken"], "seeds": [0, 1]},
    "runs": [*UNIFORM, *HALF, run_of("broken", 0, [0.2, 0.9], 1.0), run_of("broken", 1, [0.2], 1.0, finished=False)],
}


def test_what_it_took_is_read_off_the_mean_curve_and_seed_by_seed() -> None:
    """Uniform ends at (0.4 + 0.6) / 2 = 0.5 after 20 s. The other's mean curve is 0.2, 0.55, 0.6 at 0, 5, 10 s: 0.5 is
    reached at 5 (0.3 / 0.35). Its seed 0 comes to 0.4 halfway to 0.6, in 2.5 s of 20; its seed 1 to 0.6 after a third
    of the way from 0.5 to 0.8, in 6.67 s of 20."""
    found = bench_grpo_report.cost_shares(HALF, UNIFORM, "seconds")
    assert found["first"] == found["for_good"] == pytest.approx(5 * 0.3 / 0.35 / 20)
    assert found["per_seed"] == {0: pytest.approx(2.5 / 20), 1: pytest.approx((5 + 5 / 3) / 20)}
    steps = bench_grpo_report.cost_shares(HALF, UNIFORM, "step")
    assert steps["first"] == pytest.approx(2 * found["first"])  # a step costs half as much here
    own = bench_grpo_report.cost_shares(UNIFORM, UNIFORM, "trained")
    assert own["first"] == own["per_seed"][0] == own["per_seed"][1] == pytest.approx(1)
    assert bench_grpo_report.cost_shares([run_of("low", 0, [0.2, 0.3], 1.0)], UNIFORM, "seconds")["first"] is None


def test_the_seconds_of_a_step_by_part_add_up_to_all_of_them() -> None:
    found = bench_grpo_report.seconds_a_step(HALF)
    assert found == {"generate": 0.125, "policy_update": 0.25, "weight_sync": 0.0, "other": pytest.approx(0.125)}


def test_the_report_tells_of_runs_that_did_not_end_and_leaves_them_out() -> None:
    text = bench_grpo_report.render(RAW)
    assert "WARNING: broken: 1 of 2 runs came to their end" in text and "WARNING: half" not in text
    ends = "0.200 | 0.600 (0.400..0.800) | 1.000 | 0.300 | 0.700 | 0.25 | 0.25 | 2,000 | 1,000 | 400 | 10"
    assert f"| half | 2 | {ends} |" in text
    assert "| broken | 1 | 0.200 | 0.900 (0.900..0.900) |" in text
    assert "reach 0.500, the mean accuracy of uniform" in text
    assert "| half | 0.43 / 0.43 | 0.21 / 0.21 | 0.21 / 0.21 | 0.43 / 0.43 | 0.12, 0.33 |" in text
    assert "| half | 125 | 250 | 125 | 500 |" in text and "weight sync" not in text
    nothing = bench_grpo_report.render(RAW | {"runs": [run_of("uniform", 0, [0.1], 1.0, finished=False)]})
    assert "WARNING: uniform: 0 of 2" in nothing and "At the end" not in nothing


def test_rows_have_both_right_answers_and_the_kinds_their_shares() -> None:
    assert bench_grpo_task.running_totals("8 - 3 + 9 - 20") == "5;14;-6"
    rows = bench_grpo_task.make_rows(200, 5, bench_grpo_task.PROMPTS)
    assert [sum(row["kind"] == kind for row in rows) for kind in ("small", "large")] == [40, 160]
    for row in rows:
        expression = row["prompt"].removesuffix("=")
        assert expression.count("+") + expression.count("-") == row["steps"].count(";") + 1
        assert row["steps"].split(";")[-1] == row["answer"] == str(eval(expression))
    first = rows[0]["question"]
    again = bench_grpo_task.make_rows(200, 5, bench_grpo_task.PROMPTS, frozenset({first}))
    assert first not in {row["question"] for row in again}


@pytest.mark.slow
def test_one_start_and_one_run_leave_points_that_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`learn` runs these commands in processes of their own; here they stay in this one."""

    class Process:
        def __init__(self, command: list[str], *_: Any) -> None:
            self.returncode = 1 if "uniform" in command else bench_grpo_selection.main(command[2:])

        def poll(self) -> int:
            return self.returncode

        wait = poll

    monkeypatch.setattr(bench_grpo_selection, "launch", Process)
    options = ["--out", str(tmp_path), "--smoke", "--arms", "uniform", "all three", "--seeds", "0"]
    assert bench_grpo_selection.main(["learn", *options]) == 1
    printed = capsys.readouterr().out
    assert "WARNING: uniform: 0 of 1 runs came to their end" in printed
    lines = [json.loads(line) for line in (tmp_path / "runs" / "all_three-0.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [0, 1, 2, None]
    last = lines[2]
    assert 0 < last["rows"] <= 2 * 8 and last["generated"] > 0  # half of 4 x 4 completions a step
    assert last["seconds"] > 0 and last["parts"]["generate"] > 0
    assert 3 * last["accuracy"] == pytest.approx(sum(last[f"accuracy/{terms} terms"] for terms in (3, 4, 5)))
    assert (tmp_path / "grpo_selection.png").stat().st_size > 0
