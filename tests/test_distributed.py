"""Two real ranks on CPUs: plain DDP, ZeRO-2, ZeRO-3, and ZeRO-3 with a vLLM in each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import kept_prompts, run_ranks

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
