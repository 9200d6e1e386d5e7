"""Two real ranks on CPUs: plain DDP, ZeRO-2, ZeRO-3, and ZeRO-3 with a vLLM in each rank."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launch import kept_completions, kept_prompts, run_ranks, start_ranks

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def one_rank(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("one")
    return out, run_ranks("grpo", 1, out, "--model", tiny_model, "--micro", "8")[0]


def check_against_one_rank(out: Path, reports: list[dict[str, Any]], one_rank: tuple[Path, dict[str, Any]]) -> None:
    """The same prompts, losses and value model as on one rank, up to the order of summation."""
    folder, single = one_rank
    assert [report["world"] for report in reports] == [2, 2]
    assert kept_prompts(out) == kept_prompts(folder)
    for report in reports:
        assert report["losses"] == pytest.approx(single["losses"], abs=1e-6)
        assert report["value_loss"] == pytest.approx(single["value_loss"], rel=1e-4)
        assert report["value_sum"] == pytest.approx(single["value_sum"], abs=1e-4)
        assert report["rollouts"] == single["rollouts"] == 64
        assert report["evaluation"]["rows"] == 33
        assert report["evaluation"]["reward"] == pytest.approx(single["evaluation"]["reward"], abs=1e-6)
    assert reports[0]["value_sum"] == reports[1]["value_sum"]  # the ranks' copies stay equal bit for bit


def test_ddp(tiny_model: str, tmp_path: Path, one_rank: Any) -> None:
    reports = run_ranks("grpo", 2, tmp_path, "--model", tiny_model, "--micro", "4")
    check_against_one_rank(tmp_path, reports, one_rank)


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_deepspeed(tiny_model: str, tmp_path: Path, one_rank: Any, zero: str) -> None:
    args = ["--model", tiny_model, "--micro", "4", "--deepspeed", zero]
    check_against_one_rank(tmp_path, run_ranks("grpo", 2, tmp_path, *args, deepspeed=True), one_rank)


def test_value_head_on_a_policy_that_zero3_shards(tiny_model: str, tmp_path: Path) -> None:
    args = ["--model", tiny_model, "--deepspeed", "zero3", "--body", "policy"]
    two = run_ranks("grpo", 2, tmp_path / "two", *args, "--micro", "4", deepspeed=True)
    one = run_ranks("grpo", 1, tmp_path / "one", "--model", tiny_model, "--body", "policy", "--micro", "8")
    assert kept_prompts(tmp_path / "two") == kept_prompts(tmp_path / "one")
    assert two[0]["value_sum"] == two[1]["value_sum"] == pytest.approx(one[0]["value_sum"], abs=1e-4)


def test_zero3_with_colocated_vllm(tiny_model: str, tmp_path: Path) -> None:
    args = ["--model", tiny_model, "--micro", "4", "--deepspeed", "zero3", "--vllm"]
    reports = run_ranks("grpo", 2, tmp_path, *args, deepspeed=True)
    for report in reports:
        assert len(report["drift"]) == 4 and max(report["drift"]) < 1e-4  # the weights arrive, each step
        assert report["rollouts"] == 64
    assert reports[0]["value_sum"] == reports[1]["value_sum"]


def test_dynamic_sampling_refills_over_ranks(tiny_model: str, tmp_path: Path) -> None:
    args = ["--model", tiny_model, "--selector", "dynamic_sampling"]
    two = run_ranks("grpo", 2, tmp_path / "two", *args, "--micro", "4")
    one = run_ranks("grpo", 1, tmp_path / "one", *args, "--micro", "8")
    assert kept_prompts(tmp_path / "two") == kept_prompts(tmp_path / "one")
    assert two[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-6)


def test_resume_under_zero2_takes_the_prompts_it_would_have_taken(
    tiny_model: str, tmp_path: Path, one_rank: Any
) -> None:
    args = ["--model", tiny_model, "--micro", "4", "--deepspeed", "zero2", "--checkpoint-at", "2"]
    run_ranks("grpo", 2, tmp_path, *args, "--steps", "2", deepspeed=True)
    reports = run_ranks("grpo", 2, tmp_path, *args, "--resume", deepspeed=True)
    assert kept_prompts(tmp_path) == kept_prompts(one_rank[0])
    assert reports[0]["value_sum"] == pytest.approx(one_rank[1]["value_sum"], abs=1e-4)


# ------------------------------------------------------------------------------------- all three selections at once

CHAIN = json.dumps([["utility_diversity", {}, 12], ["gradient_coreset", {}, 8]])


@pytest.fixture(scope="module")
def selected_on_one_rank(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("selected")
    return out, run_ranks("grpo", 1, out, "--model", tiny_model, "--micro", "4", "--chain", CHAIN)[0]


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_all_three_selections_choose_on_two_ranks_what_they_choose_on_one(
    tiny_model: str, tmp_path: Path, selected_on_one_rank: Any, deepspeed: str | None
) -> None:
    folder, single = selected_on_one_rank
    args = ["--model", tiny_model, "--micro", "2", "--chain", CHAIN]
    args += ["--deepspeed", deepspeed] if deepspeed else []
    reports = run_ranks("grpo", 2, tmp_path, *args, deepspeed=deepspeed is not None)
    assert kept_prompts(tmp_path) == kept_prompts(folder)
    assert kept_completions(tmp_path) == kept_completions(folder)
    assert [len(kept) for kept in kept_completions(tmp_path)] == [8] * 4
    for report in reports:
        assert report["losses"] == pytest.approx(single["losses"], abs=1e-5)
        assert report["evaluation"]["reward"] == pytest.approx(single["evaluation"]["reward"], abs=1e-5)
    check_equal_work(reports)


def check_equal_work(reports: list[dict[str, Any]]) -> None:
    """Each rank trains on 4 of the 8 rows, and on nearly as many tokens."""
    for mine, theirs in zip(reports[0]["trained_tokens"], reports[1]["trained_tokens"], strict=True):
        assert abs(mine - theirs) <= 16  # one row's
    assert max(reports[0]["padding"]) < 0.3


def test_old_and_reference_passes_of_kept_completions_agree_under_zero3(tiny_model: str, tmp_path: Path) -> None:
    """Two iterations with a KL penalty: both need passes of their own, which sharded ranks must take together."""
    args = ["--model", tiny_model, "--chain", json.dumps([["largest_advantage", {}, 8]])]
    args += ["--iterations", "2", "--beta", "0.2"]
    two = run_ranks("grpo", 2, tmp_path / "two", *args, "--micro", "2", "--deepspeed", "zero3", deepspeed=True)
    one = run_ranks("grpo", 1, tmp_path / "one", *args, "--micro", "4")
    assert kept_completions(tmp_path / "two") == kept_completions(tmp_path / "one")
    assert len(kept_completions(tmp_path / "two")) == 2  # rollouts of 4 steps
    for report in two:
        assert report["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)


def test_all_three_selections_under_zero3_with_a_vllm_in_each_rank(tiny_model: str, tmp_path: Path) -> None:
    args = ["--model", tiny_model, "--micro", "2", "--deepspeed", "zero3", "--vllm", "--chain", CHAIN]
    reports = run_ranks("grpo", 2, tmp_path, *args, deepspeed=True)
    for report in reports:
        assert len(report["drift"]) == 4 and max(report["drift"]) < 1e-4
        assert report["rollouts"] == 64 and len(report["losses"]) == 4
        assert all(0 <= share < 1 for share in report["idle_tail"])
    assert [len(kept) for kept in kept_completions(tmp_path)] == [8] * 4
    assert reports[0]["losses"] == reports[1]["losses"] and any(reports[0]["losses"])
    check_equal_work(reports)


def test_ranks_that_choose_differently_stop_the_run(tiny_model: str, tmp_path: Path) -> None:
    args = ["--model", tiny_model, "--micro", "2", "--selector", "uniform", "--chain", '[["uniform_rows", {}, 8]]']
    done = start_ranks("grpo", 2, tmp_path, *args, "--disagree")
    assert done.returncode != 0
    assert "the ranks disagree on the rows of step 1" in done.stderr
    decisions = dict(re.findall(r"rank ([01]): (\[[\d, ]+\])", done.stderr))
    assert decisions.keys() == {"0", "1"} and decisions["0"] != decisions["1"]
