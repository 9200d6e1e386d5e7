from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import digit_share, grpo_args
from trl import GRPOTrainer as TRLGRPOTrainer

from siftrl import plugins
from siftrl.rollout import RolloutOptions, free_memory
from siftrl.trainers import rows as row_ops
from siftrl.trainers.epoch_order import EpochRepeatSampler
from siftrl.trainers.grpo import GRPOTrainer
from siftrl.types import Candidates, PromptSelector, Selection


class Seen:
    """A reward that keeps the prompts it saw, one list a call."""

    __name__ = "seen"

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.completions: list[list[str]] = []

    def __call__(self, completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
        self.prompts.append(list(prompts))
        self.completions.append(list(completions))
        return digit_share(completions)


def selector(name: str, **options: Any) -> Any:
    return plugins.load("selector", name, options)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_without_a_selector_losses_are_trls_bit_for_bit(
    tiny_model: str, sums: Any, tmp_path: Path, loss_type: str
) -> None:
    def run(trainer_class: Any, name: str) -> Any:
        args = grpo_args(tmp_path / name, loss_type=loss_type, num_iterations=2, max_steps=4)
        trainer = trainer_class(model=tiny_model, reward_funcs=digit_share, args=args, train_dataset=sums)
        trainer.train()
        return trainer

    trl, ours = run(TRLGRPOTrainer, "trl"), run(GRPOTrainer, "ours")
    assert losses(ours) == losses(trl) and any(losses(trl))
    for (name, theirs), (_, mine) in zip(trl.model.named_parameters(), ours.model.named_parameters(), strict=True):
        assert torch.equal(theirs, mine), name
    assert not (tmp_path / "ours" / "selection.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "prompt_curriculum", "posterior_sampling", "difficulty_pools", "uniform"])
def test_resuming_inside_the_second_epoch_sees_the_prompts_of_an_uninterrupted_run(
    tiny_model: str, sums: Any, tmp_path: Path, name: str | None
) -> None:
    """48 prompts, 4 a step: the second epoch begins with step 13. Stopped after 15 of 18 steps."""

    def run(folder: str, **changes: Any) -> tuple[Any, Seen]:
        seen = Seen()
        args = grpo_args(tmp_path / folder, **{"max_steps": 18, "save_strategy": "steps", "save_steps": 15, **changes})
        options = {"fallback": False} if name == "prompt_curriculum" else {}
        trainer = GRPOTrainer(
            model=tiny_model,
            reward_funcs=seen,
            args=args,
            train_dataset=sums,
            prompt_selector=selector(name, **options) if name else None,
        )
        checkpoint = tmp_path / "whole" / "checkpoint-15"
        trainer.train(resume_from_checkpoint=str(checkpoint) if folder == "resumed" else None)
        return trainer, seen

    whole, seen_whole = run("whole")
    resumed, seen_resumed = run("resumed")
    assert len(seen_resumed.prompts) == 3
    assert seen_resumed.prompts == seen_whole.prompts[15:]
    assert seen_resumed.completions == seen_whole.completions[15:]  # the rollouts are the same, too
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for (key, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    assert resumed.rollouts == whole.rollouts and resumed.generated_tokens == whole.generated_tokens
    if whole.value_model is not None:
        weights = zip(whole.value_model.parameters(), resumed.value_model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.slow
def test_resuming_between_the_optimizer_steps_of_one_rollout(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """2 optimizer steps x 2 iterations a rollout: step 3 of 4 must go on with the rollouts of step 1."""

    def run(folder: str, checkpoint: Path | None = None) -> tuple[Any, Seen]:
        seen = Seen()
        args = grpo_args(
            tmp_path / folder,
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            num_iterations=2,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )
        trainer = GRPOTrainer(
            model=tiny_model, reward_funcs=seen, args=args, train_dataset=sums, prompt_selector=selector("uniform")
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer, seen

    whole, seen = run("whole")
    resumed, seen_resumed = run("resumed", tmp_path / "whole" / "checkpoint-3")
    assert len(seen.prompts) == 2 and seen_resumed.prompts == seen.prompts[1:]
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_epoch_order_is_trls_and_known_from_the_epoch_alone() -> None:
    def sampler() -> EpochRepeatSampler:
        return EpochRepeatSampler(range(9), mini_repeat_count=2, batch_size=3, repeat_count=1, shuffle=True, seed=5)

    straight = sampler()
    epochs = [list(straight) for _ in range(3)]
    assert epochs[0] != epochs[1]
    jumped = sampler()
    jumped.set_epoch(2)
    assert list(jumped) == epochs[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt_curriculum", "uniform", "posterior_sampling", "difficulty_pools"])
def test_every_step_trains_on_what_the_audit_log_says(tiny_model: str, sums: Any, tmp_path: Path, name: str) -> None:
    seen = Seen()
    trainer = GRPOTrainer(
        model=tiny_model,
        reward_funcs=seen,
        args=grpo_args(tmp_path),
        train_dataset=sums,
        prompt_selector=selector(name),
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line, prompts, completions in zip(lines, seen.prompts, seen.completions, strict=True):
        chosen = {c["id"]: c["reward"] for c in line["candidates"] if c["chosen"]}
        assert sorted(sums[i]["prompt"] for i in chosen for _ in range(4)) == sorted(prompts)
        assert all(prompts[i] == prompts[i + j] for i in (0, 4, 8, 12) for j in range(4))  # groups stay together
        rewards = torch.tensor(digit_share(completions)).view(4, 4).mean(1)
        by_prompt = dict(zip(prompts[::4], rewards.tolist(), strict=True))
        for index, reward in chosen.items():
            assert reward == pytest.approx(by_prompt[sums[index]["prompt"]], abs=1e-5)
    assert trainer.rollouts == 48
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and {"prompt", "completion", "reward"} <= samples[0].keys()


class HalfAccepted(PromptSelector):
    """Accepts the first half of every round's groups, and remembers what it was asked for."""

    max_rounds = 3

    def __init__(self) -> None:
        self.asked: list[int] = []

    def propose(self, candidates: Candidates, keep: int, generator: torch.Generator) -> Selection:
        self.asked.append(keep)
        return Selection.of(torch.arange(keep), len(candidates))

    def accept(self, rewards: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(rewards)) < len(rewards) // 2


def test_refused_groups_are_replaced_and_the_batch_is_whole(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """4 groups wanted: round 1 gives 2, round 2 draws 4 and gives 2. Their rows make a batch of TRL's kind."""
    chooser = HalfAccepted()
    batches: list[dict[str, Any]] = []

    class Watching(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            batches.append({key: value.clone() for key, value in batch.items()})
            return batch

    seen = Seen()
    args = grpo_args(tmp_path, max_steps=1, num_iterations=1)
    trainer = Watching(model=tiny_model, reward_funcs=seen, args=args, train_dataset=sums, prompt_selector=chooser)
    trainer.train()
    assert chooser.asked == [4, 4]
    (batch,) = batches
    assert batch["completion_ids"].shape[0] == 16
    kept = [seen.completions[0][i] for i in range(8)] + [seen.completions[1][i] for i in range(8)]
    decoded = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert decoded == kept
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    rewards = torch.tensor(digit_share(kept)).view(4, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = centred / (rewards.std(1, keepdim=True) + 1e-4)  # TRL's default scaling, within each group
    assert torch.allclose(batch["advantages"].view(4, 4), expected, atol=1e-4)


def test_rows_survive_split_and_join() -> None:
    batch = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
        "advantages": torch.tensor([0.5, -0.5]),
        "old_per_token_logps": torch.tensor([[-1.0, -2, 0, 0], [-3, -4, -5, 0]]),
        "importance_sampling_ratio": torch.tensor([[1.5], [0.5]]),
        "num_items_in_batch": torch.tensor(5),
    }
    rows = row_ops.split(batch)
    assert rows[0]["prompt_ids"].tolist() == [5, 6] and rows[1]["completion_ids"].tolist() == [3, 4, 5]
    assert row_ops.loss_tokens(rows) == 5
    joined = row_ops.join(rows, pad_token_id=0, device=torch.device("cpu"))
    for key, value in joined.items():
        full = batch[key]
        trimmed = full[:, :3] if value.dim() == 2 and value.size(1) == 3 else full
        assert torch.equal(value, trimmed), key
    with pytest.raises(ValueError, match="images"):
        row_ops.split(batch | {"pixel_values": torch.zeros(1)})


def test_a_batch_without_any_reward_stops_the_run(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    trainer = GRPOTrainer(model=tiny_model, reward_funcs=nothing, args=grpo_args(tmp_path), train_dataset=sums)
    with pytest.raises(RuntimeError, match="step 1: no completion got a reward"):
        trainer.train()


def test_an_infinite_loss_stops_the_run_before_the_weights_change(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    class Broken(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs) * float("inf")

    trainer = Broken(model=tiny_model, reward_funcs=digit_share, args=grpo_args(tmp_path), train_dataset=sums)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match=r"in step 1: lower learning_rate"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_too_few_rows_are_named_before_training(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draws 16 candidates a step, but the data set has 10 rows"):
        GRPOTrainer(
            model=tiny_model,
            reward_funcs=digit_share,
            args=grpo_args(tmp_path),
            train_dataset=sums.select(range(10)),
            prompt_selector=selector("prompt_curriculum"),
        )


@pytest.mark.slow
def test_resuming_with_another_selector_is_refused(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    args = grpo_args(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    GRPOTrainer(model=tiny_model, reward_funcs=digit_share, args=args, train_dataset=sums).train()
    trainer = GRPOTrainer(
        model=tiny_model,
        reward_funcs=digit_share,
        args=args,
        train_dataset=sums,
        prompt_selector=selector("uniform"),
    )
    with pytest.raises(ValueError, match="was written without a prompt selector"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.engines
def test_colocated_vllm_gets_every_weight_and_the_probe_sees_stale_ones(
    tiny_model: str, sums: Any, tmp_path: Path
) -> None:
    args = grpo_args(tmp_path, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64, max_steps=4)
    trainer = GRPOTrainer(
        model=tiny_model,
        reward_funcs=digit_share,
        args=args,
        train_dataset=sums,
        prompt_selector=selector("prompt_curriculum"),
        rollout=RolloutOptions(engine_args={"max_num_batched_tokens": 512}),
    )
    config = trainer.vllm_generation.llm.llm_engine.vllm_config
    assert config.scheduler_config.max_num_batched_tokens == 512  # engine_args reach vLLM past TRL's fixed list
    trainer.train()
    drifts = [e["engine/logprob_drift"] for e in trainer.state.log_history if "engine/logprob_drift" in e]
    assert len(drifts) == 4 and max(drifts) < 1e-5
    for name, parameter in trainer.model.named_parameters():  # each matrix alone, the tied head among them
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        trainer.vllm_generation.sync_weights()
        assert trainer.probe_engine() < 1e-4, name
    trainer.vllm_generation.structured_outputs_regex = "[5-7]{3}"  # seeded rollouts obey it, the probe does not
    seeded = trainer._generate_seeded(trainer._tokenize_prompts(["1+1=", "2+3="])[0])
    texts = trainer.processing_class.batch_decode(seeded.ids, skip_special_tokens=True)
    assert all(re.fullmatch("[5-7]{3}", text) for text in texts), texts
    assert trainer.probe_engine() < 1e-4
    trainer.vllm_generation.sync_weights = lambda: None  # weights that never arrive
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    trainer._last_loaded_step = -1
    with pytest.raises(RuntimeError, match=r"more than rollout\.max_logprob_drift allows \(0\.005\)"):
        trainer._sync_engine()


@pytest.mark.engines
def test_a_trainer_that_is_done_leaves_no_engine_and_no_model_in_memory(
    tiny_model: str, sums: Any, tmp_path: Path
) -> None:
    def train() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        args = grpo_args(
            tmp_path, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64, max_steps=1, top_p=0.5
        )
        trainer = GRPOTrainer(model=tiny_model, reward_funcs=digit_share, args=args, train_dataset=sums)
        trainer.train()
        figures = trainer.state.log_history[0]  # of half of the distribution, and its probabilities are the whole one's
        for name in ("min", "mean", "max"):
            assert figures[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1, abs=1e-3)
        assert figures["sampling/masked"] == 0
        return weakref.ref(trainer.vllm_generation.llm), weakref.ref(trainer.model)

    engine, model = train()
    gc.collect()
    assert engine() is not None  # vLLM exempts what is there from the collection
    free_memory()
    assert engine() is None and model() is None
