from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerState

from siftrl.data import load_data
from siftrl.evaluate import EvalReport, evaluate, pass_at_k, score, summarise
from siftrl.models import load_policy
from siftrl.recipe import DataConfig, ModelConfig
from siftrl.rollout import Sampling, TransformersEngine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def policy(tiny_model: str) -> Any:
    model, tokenizer, _ = load_policy(ModelConfig(path=tiny_model), for_training=False)
    return TransformersEngine(model, tokenizer), tokenizer


GREEDY = Sampling(4, temperature=0.0)


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def report(rewards: list[list[float]], **changes: Any) -> EvalReport:
    values = torch.tensor(rewards)
    fields: dict[str, Any] = {
        "rewards": values,
        "lengths": torch.full(values.shape, 3),
        "cut": torch.zeros(values.shape, dtype=torch.bool),
        "texts": [["x"] * values.size(1)] * len(values),
    }
    return EvalReport(**(fields | changes))


def test_pass_at_k_is_the_mean_over_all_subsets_of_k() -> None:
    correct = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    for k in range(1, 6):
        subsets = list(itertools.combinations(range(5), k))
        share = sum(bool(row[list(subset)].any()) for row in correct for subset in subsets) / (3 * len(subsets))
        assert pass_at_k(correct, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="pass@6 needs at least 6 samples a prompt; there are 5"):
        pass_at_k(correct, 6)


def test_score_sums_as_trl_does() -> None:
    def some(completions: list[str], bonus: list[float], completion_ids: Any, **columns: Any) -> list[float | None]:
        return [None if text == "x" else extra for text, extra in zip(completions, bonus, strict=True)]

    async def length(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if text == "x" else float(len(text)) for text in completions]

    totals = score([some, length, digits], [2.0, 1.0, 0.5], ["p"] * 2, ["x", "12"], {"bonus": [9.0, 10.0]})
    assert totals.tolist() == [0.0, 22.5]
    assert score([some, length], [2.0, 1.0], ["p"] * 2, ["x", "12"], {"bonus": [9.0, 10.0]})[0].isnan()


def test_rewards_see_the_state_of_the_training() -> None:
    """One that grows stricter with the steps is measured as strictly as it trains; before a training, at its start."""

    def step(completions: list[str], trainer_state: TrainerState, **columns: Any) -> list[float | None]:
        return [float(trainer_state.global_step)] * len(completions)

    assert score([step], [1.0], ["p"], ["x"], {}).tolist() == [0.0]
    assert score([step], [1.0], ["p"], ["x"], {}, trainer_state=TrainerState(global_step=7)).tolist() == [7.0]


def test_report_figures_by_hand() -> None:
    nan = math.nan
    measured = report([[1.0, 0.0], [1.0, 1.0], [nan, nan], [0.5, nan]], cut=torch.eye(4, 2, dtype=torch.bool))
    summary = summarise([measured])
    assert summary["reward"] == pytest.approx(3.5 / 5)
    means = torch.tensor([0.5, 1.0, 0.5])
    assert summary["std_error"] == pytest.approx(means.std().item() / 3**0.5)
    assert summary["pass_at_k"] == {"1": 3 / 8, "2": 2 / 4}
    chances = torch.tensor([[0.5, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    errors = measured.pass_at_k_errors()
    assert [errors["1"], errors["2"]] == pytest.approx((chances.std(1) / 2).tolist())
    assert (summary["truncated"], summary["missing"], summary["mean_length"], summary["rows"]) == (0.25, 3 / 8, 3, 4)
    assert report([[0.9]], threshold=0.5).correct.item() and not report([[0.4]], threshold=0.5).correct.item()
    assert summarise([report([[1.0]])])["std_error"] is None
    assert summarise([report([[1.0], [0.0]]), report([[1.0]])]) == summarise([report([[1.0], [0.0], [1.0]])])


def test_greedy_evaluation_scores_each_row_with_its_columns(policy: Any, sums: Any) -> None:
    engine, tokenizer = policy
    seen: list[tuple[str, str, str]] = []

    def record(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, answer, strict=True))
        return digits(completions)

    options: dict[str, Any] = {"progress": False, "threshold": 0.5}
    measured = evaluate(engine, tokenizer, sums, [record], [1.0], GREEDY, batch_size=10, **options)
    assert [(prompt, answer) for prompt, _, answer in seen] == list(zip(sums["prompt"], sums["answer"], strict=True))
    assert [[text] for _, text, _ in seen] == measured.texts
    assert measured.rewards.shape == measured.lengths.shape == (48, 1)
    again = evaluate(engine, tokenizer, sums, [digits], [1.0], GREEDY, batch_size=48, progress=False)
    assert torch.equal(again.rewards, measured.rewards)
    assert int(measured.lengths.max()) == 4 and 0 < measured.truncated <= 1


def test_samples_depend_on_the_seed_and_the_prompt_alone(policy: Any, sums: Any) -> None:
    engine, tokenizer = policy
    options: dict[str, Any] = {"sampling": Sampling(4), "samples": 3, "progress": False}
    rows = sums.select(range(8))
    whole = evaluate(engine, tokenizer, rows, [digits], [1.0], batch_size=64, seed=1, **options)
    halves = [
        evaluate(engine, tokenizer, rows.select(part), [digits], [1.0], batch_size=5, seed=1, **options)
        for part in (range(4), range(4, 8))
    ]
    assert whole.texts == halves[0].texts + halves[1].texts
    assert len({text for texts in whole.texts for text in texts}) > 12  # samples of one prompt differ
    other = evaluate(engine, tokenizer, rows, [digits], [1.0], batch_size=64, seed=2, **options)
    assert other.texts != whole.texts


def test_chat_prompts_get_chat_completions_and_no_rows_are_no_error(policy: Any, tmp_path: Path) -> None:
    engine, tokenizer = policy
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1="}\n{"prompt": "20+1="}\n')
    rows = load_data(DataConfig(path=str(path), chat=True), "grpo", tokenizer).train

    def roles(completions: list[Any], **columns: Any) -> list[float]:
        return [float(completion[0]["role"] == "assistant") for completion in completions]

    measured = evaluate(engine, tokenizer, rows, [roles], [1.0], GREEDY, progress=False)
    assert measured.mean_reward == 1.0
    empty = evaluate(engine, tokenizer, rows.select([]), [roles], [1.0], GREEDY, progress=False)
    assert summarise([measured, empty]) == summarise([measured])
