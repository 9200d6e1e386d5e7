"""What SFT and DPO measure on held-out rows: the right figure, and nothing of it is left in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import digit_share, sft_args, worded_sums
from keeping import losses
from test_dpo import dpo_args, pair_loss, preferences, shaken
from test_sft import token_losses
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTTrainer as TRLSFTTrainer

from siftrl import DPOTrainer, SFTTrainer, cli, pipeline
from siftrl.evaluate import evaluate_on_ranks
from siftrl.held_out import HeldOut
from siftrl.recipe import RecipeError, load_recipe
from siftrl.rollout import Sampling
from siftrl.trainers.held_out import held_out_loss, policy_engine, rounds


@pytest.mark.parametrize(("num_rows", "world", "size"), [(7, 1, 3), (11, 4, 2), (3, 4, 2), (16, 2, 4), (1, 1, 8)])
def test_every_held_out_row_counts_once_and_ranks_pass_alike(num_rows: int, world: int, size: int) -> None:
    counted = torch.zeros(num_rows, dtype=torch.float64)
    for everyone in rounds(num_rows, world, size):
        assert len(everyone) == world and len({len(rows) for rows in everyone}) == 1 <= len(everyone[0]) <= size
        shared = world > 1 and everyone[0] == everyone[-1]
        for rows in everyone:
            counted[list(rows)] += 1 / world if shared else 1
    assert torch.equal(counted, torch.ones_like(counted))


# ------------------------------------------------------------------------------------------------- the figures


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"padding_free": True, "max_length": None}])
def test_sft_loss_is_the_mean_over_all_held_out_tokens(
    tiny_model: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    data = worded_sums()
    args = sft_args(tmp_path, per_device_eval_batch_size=4, **changes)
    trainer = SFTTrainer(tiny_model, args, train_dataset=data, eval_dataset=data.select(range(11)))
    expected = torch.cat([token_losses(trainer.model, row) for row in trainer.eval_dataset])
    trainer.model.train()
    found = held_out_loss(trainer)
    assert trainer.model.training and found["rows"] == 11
    assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.slow
def test_dpo_loss_and_accuracy_are_the_means_over_held_out_pairs(tiny_model: str, tmp_path: Path) -> None:
    data = preferences()
    trainer = DPOTrainer(
        shaken(tiny_model),
        shaken(tiny_model, seed=2),
        dpo_args(tmp_path, per_device_eval_batch_size=4),
        train_dataset=data,
        eval_dataset=data.select(range(11)),
    )
    pairs = [pair_loss(trainer.model, trainer.ref_model, row).item() for row in trainer.eval_dataset]
    found = held_out_loss(trainer)
    assert found["loss"] == pytest.approx(sum(pairs) / 11, rel=1e-4)
    right = sum(loss < torch.log(torch.tensor(2.0)) for loss in pairs).item()  # a loss below log 2: a margin above 0
    assert 0 < right < 11 and found["accuracy"] == pytest.approx(right / 11)
    assert found["rows"] == 11 and found["margin"] != 0


@pytest.mark.slow
def test_rows_without_a_token_that_bears_loss_are_no_loss_of_zero(tiny_model: str, tmp_path: Path) -> None:
    data = worded_sums()
    trainer = SFTTrainer(tiny_model, sft_args(tmp_path), train_dataset=data, eval_dataset=data.select(range(4)))
    trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="data.eval: none of the 4 held-out rows .* look at the completions"):
        held_out_loss(trainer)


# --------------------------------------------------------------------------------------------- without a trace


class Measures(TrainerCallback):
    """Measures loss and rewards before the first step and after every step."""

    def __init__(self, trainer: Any, rows: Any) -> None:
        self.trainer, self.rows, self.found = trainer, rows, []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        found = held_out_loss(self.trainer)
        with policy_engine(self.trainer, self.trainer.processing_class) as engine:
            options: dict[str, Any] = {"samples": 2, "progress": False}
            tokenizer = self.trainer.processing_class
            sampling = Sampling(4, temperature=1.0)
            found |= evaluate_on_ranks(engine, tokenizer, self.rows, [digit_share], [1.0], sampling, **options)
        self.found.append(found)

    on_step_end = on_train_begin


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training(tiny_model: str, tmp_path: Path) -> None:
    """With dropout, which draws from torch's generator in every step, the losses stay TRL's bit for bit."""
    config = AutoConfig.from_pretrained(tiny_model, attention_dropout=0.2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    runs: list[Any] = []
    for trainer_class in (SFTTrainer, TRLSFTTrainer):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, config=config, dtype="float32")
        data = worded_sums()
        ours = trainer_class is SFTTrainer
        trainer = trainer_class(
            model,
            sft_args(tmp_path / str(ours), max_steps=4),
            train_dataset=data,
            eval_dataset=data.select(range(10)) if ours else None,
            processing_class=tokenizer,
        )
        if ours:
            measures = Measures(trainer, data.select(range(10)))
            trainer.add_callback(measures)
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1])
    for mine, yours in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(mine, yours)
    assert len(measures.found) == 5 and measures.found[-1]["loss"] < measures.found[0]["loss"]
    assert all(0 < found["reward"] < 1 for found in measures.found)


# -------------------------------------------------------------------------------------------------- in a recipe

ROWS = "".join(json.dumps({"prompt": f"{a}+1=", "completion": str(a + 1)}) + "\n" for a in range(24))
RECIPE: dict[str, Any] = {
    "model": {"scratch": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}},
    "data": {"path": "rows.jsonl", "eval": {"size": 8}},
    "logging": {"every": 1},
    "stages": [
        {"kind": "sft", "rows_per_step": 8, "micro_batch_size": 8, "trainer": {"max_steps": 2, "disable_tqdm": True}}
    ],
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def held_out_lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "held_out" in line]


@pytest.mark.slow
def test_held_out_rows_are_measured_unasked(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.run_recipe(load_recipe(recipe))
    measured = held_out_lines(Path("runs/small"))
    assert [line["step"] for line in measured] == [0, 2]
    assert all(line["held_out"].keys() == {"loss", "rows"} and line["held_out"]["rows"] == 8 for line in measured)
    (stage,) = json.loads(Path("runs/small/summary.json").read_text())["stages"]
    assert [stage["eval"][when] for when in ("before", "after")] == [line["held_out"] for line in measured]
    before, after = (f"{stage['eval'][when]['loss']:.3f}" for when in ("before", "after"))
    assert f"loss {before} -> {after}" in capsys.readouterr().out


@pytest.mark.slow
def test_rewards_of_an_sft_stage_are_measured_where_it_says_eval(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target column is the gold; every step is measured; the last measurement is what `siftrl eval` finds."""
    reward = "[{name: exact_match, options: {column: completion}}]"
    settings = "{every: 1, samples: 2, greedy: false, max_completion_tokens: 3}"
    pipeline.run_recipe(load_recipe(recipe, [f"rewards={reward}", f"stages.0.eval={settings}"]))
    measured = held_out_lines(Path("runs/small"))
    assert [line["step"] for line in measured] == [0, 1, 2]
    for line in measured:
        found = line["held_out"]
        assert found["loss"] > 0 and found["reward"] is not None and found["missing"] == 0
        assert found["pass_at_k"].keys() == {"1", "2"} and found["mean_length"] <= 3
    capsys.readouterr()
    assert cli.main(["eval", "runs/small", "--json", "-"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["data"]
    last = {name: figure for name, figure in measured[-1]["held_out"].items() if name != "loss"}
    assert {name: again[name] for name in last} == last


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval=null", "stages.0.eval={}"], "stages.0.eval: there are no held-out rows"),
        (["stages.0.rewards=[exact_match]"], "stages.0.rewards: has no effect in an sft stage without `eval`"),
        (["stages.0.eval={samples: 4, greedy: false}"], "stages.0.eval.samples: has no effect: an sft stage gen"),
        (["stages.0.eval={every: 5}"], ""),
        (["stages.0.eval={max_completion_tokens: 64}", "rewards=[exact_match]"], "has no room for so many"),
        (["stages.0.eval={max_completion_tokens: 4}", "rewards=[exact_match]"], ""),
        (
            ["stages.0={kind: dpo, eval: {batch_size: 4}}", "rewards=[exact_match]"],
            "stages.0.eval.batch_size: has no effect: a dpo stage generates nothing",
        ),
        (
            ["stages.0={kind: grpo, eval: {max_completion_tokens: 4}}", "rewards=[exact_match]"],
            "stages.0.eval.max_completion_tokens: is for sft stages; write rollout.max_completion_tokens",
        ),
    ],
)
def test_keys_without_an_effect_are_refused(recipe: Path, overrides: list[str], message: str) -> None:
    if not message:
        load_recipe(recipe, overrides)
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_a_resumed_run_keeps_what_was_measured_before_it(tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text('{"loss": 2.0}')
    held_out = HeldOut(dict, None, None)
    held_out.resume(tmp_path)
    assert held_out.results == {"before": {"loss": 2.0}}
