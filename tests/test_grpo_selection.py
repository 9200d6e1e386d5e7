"""GRPO that trains on chosen completions: what is trained on, how it is counted, and how it fails."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import digit_share, grpo_args, letter_sum
from keeping import First, Unmeasured, logged, losses
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer as TRLGRPOTrainer

from siftrl import plugins
from siftrl.signals import Loss, ValueGradient
from siftrl.trainers import rows as row_ops
from siftrl.trainers.grpo import GRPOTrainer
from siftrl.value import decoder

pytestmark = pytest.mark.slow


class Watching(GRPOTrainer):
    """Keeps the rows of every rollout, and the micro-batches made of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rollout_rows: list[list[dict[str, Tensor]]] = []
        self.batches: list[list[dict[str, Any]]] = []
        super().__init__(*args, **kwargs)

    def _keep_completions(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        self.rollout_rows.append(row_ops.split(batch))
        self.batches.append(super()._keep_completions(batch))
        return self.batches[-1]


def small_first(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """The same for all completions of a prompt, unless its first digit is below 4."""
    return [float(text[:1] > "a") if prompt < "4" else 0.1 for text, prompt in zip(completions, prompts, strict=True)]


def selector(name: str, **options: Any) -> Any:
    return plugins.load("selector", name, options)


def build(model: Any, folder: Path, data: Any, batch_selector: Any, kind: Any = GRPOTrainer, **changes: Any) -> Any:
    ours = ("keep", "source_column", "scoring_batch_size", "skip_zero_advantage", "prompt_selector", "max_overhead")
    ours += ("peft_config",)
    options = {name: changes.pop(name) for name in ours if name in changes}
    reward = changes.pop("reward", digit_share)
    return kind(
        model, reward, grpo_args(folder, **changes), train_dataset=data, batch_selector=batch_selector, **options
    )


# ------------------------------------------------------------------------------------------------ each loss, by hand


def log_probs(model: Any, row: dict[str, Tensor], temperature: float) -> Tensor:
    """float64 [n]: of the completion's tokens."""
    ids = torch.cat([row["prompt_ids"], row["completion_ids"]])
    scores = (model(input_ids=ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)
    return scores.gather(1, ids[1:, None])[len(row["prompt_ids"]) - 1 :, 0]


def token_losses(now: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, kind: str, args: Any) -> Tensor:
    """float64 [n]: the published losses, one completion's tokens."""
    ratio = torch.exp(now - old)
    if args.importance_sampling_level == "sequence":
        ratio = torch.exp((now - old).mean()).expand(len(now))
    if kind == "cispo":  # MiniMax-M1: the clipped ratio is a constant
        each = -ratio.clamp(max=args.epsilon_high).detach() * advantage * now
    elif kind == "sapo":  # a soft gate
        t = args.sapo_temperature_pos if advantage > 0 else args.sapo_temperature_neg
        each = -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantage
    elif kind == "vespo":  # phi(w) = exp(lambda) w^k exp(-lambda w), w the sequence's ratio
        k, lam = (
            (args.vespo_k_pos, args.vespo_lambda_pos) if advantage >= 0 else (args.vespo_k_neg, args.vespo_lambda_neg)
        )
        w = torch.exp((now - old).sum()).detach()
        each = -(w**k * torch.exp(lam - lam * w)) * advantage * now
    else:
        clipped = ratio.clamp(1 - args.epsilon, 1 + (args.epsilon_high or args.epsilon))
        each = -torch.minimum(ratio * advantage, clipped * advantage)
    if args.beta:
        penalty = torch.exp(reference - now) - (reference - now) - 1
        each = each + args.beta * penalty * (ratio if args.use_bias_correction_kl else 1.0)
    return each


def step_loss(per_row: list[Tensor], weights: Tensor, kind: str, args: Any) -> Tensor:
    """sum_i w_i l_i / sum_i w_i, l_i a mean or a sum over tokens; or sum_i w_i sum_t l_it / sum_i w_i n_i."""
    sums = torch.stack([row.sum() for row in per_row])
    lengths = torch.tensor([float(len(row)) for row in per_row])
    if kind in ("grpo", "sapo"):
        return (weights * sums / lengths).sum() / weights.sum()
    if kind == "dr_grpo":
        return (weights * sums).sum() / weights.sum() / args.max_completion_length
    if kind == "luspo":
        return (weights * sums).sum() / weights.sum()
    return (weights * sums).sum() / (weights * lengths).sum()


LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"beta": 0.5}),
    ("grpo", {"importance_sampling_level": "sequence", "epsilon": 1e-3}),
    ("dapo", {"epsilon": 1e-3, "epsilon_high": 2e-3}),
    ("dapo", {"beta": 0.5, "use_bias_correction_kl": False}),
    ("bnpo", {}),
    ("dr_grpo", {}),
    ("cispo", {"epsilon_high": 5.0}),
    ("sapo", {}),
    ("vespo", {}),
    ("luspo", {"importance_sampling_level": "sequence"}),
]


@pytest.mark.parametrize("weigh", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("kind", "changes"), LOSSES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_the_selected_step_by_hand(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str, changes: dict[str, Any], weigh: bool
) -> None:
    """12 of 16 completions in micro-batches of 4, 2 iterations: two steps of SGD, in the second ratios are not 1."""
    chooser = Unmeasured(weigh=weigh)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    hand, first = copy.deepcopy(model), copy.deepcopy(model)
    trainer = build(
        model,
        tmp_path,
        sums,
        chooser,
        Watching,
        keep=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_iterations=2,
        max_steps=2,
        max_completion_length=24,
        reward=letter_sum,
        loss_type=kind,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        learning_rate=0.05,
        temperature=0.8,
        **changes,
    )
    assert (trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size) == (3, 4)
    trainer.train()
    kept = [trainer.rollout_rows[0][index] for index in teaching(chooser, trainer)]
    weights = chooser.kept[0].weights.double()
    assert len({len(row["completion_ids"]) for row in kept}) > 1
    with torch.no_grad():
        old = [log_probs(first, row, 0.8) for row in kept]
    for _ in range(2):
        per_row = [
            token_losses(log_probs(hand, row, 0.8), before, before, row["advantages"].double(), kind, trainer.args)
            for row, before in zip(kept, old, strict=True)
        ]
        hand.zero_grad()
        step_loss(per_row, weights, kind, trainer.args).backward()
        with torch.no_grad():
            for parameter in hand.parameters():
                parameter -= 0.05 * parameter.grad
    moved = 0.0
    for new, expected, before in zip(model.parameters(), hand.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(new, expected, atol=2e-6, rtol=1e-4)
        moved = max(moved, (expected - before).abs().max().item())
    assert moved > 1e-4


def teaching(chooser: First, trainer: Watching, step: int = 0) -> list[int]:
    """Places of the chosen rows among all of the rollout: a selector is shown those that teach."""
    seen = chooser.seen[step]
    rows = trainer.rollout_rows[step]
    places = [index for index, row in enumerate(rows) if abs(row["advantages"].item()) > 1e-6]
    assert len(places) == len(seen)
    return [places[index] for index in chooser.kept[step].indices.tolist()]


def run(trainer: Any) -> Any:
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"])
def test_keeping_all_completions_is_trls_step_bit_for_bit(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str
) -> None:
    changes = {"loss_type": kind, "num_iterations": 2, "max_steps": 4}
    args = grpo_args(tmp_path / "trl", **changes)
    theirs = run(TRLGRPOTrainer(model=tiny_model, reward_funcs=small_first, args=args, train_dataset=sums))
    ours = run(build(tiny_model, tmp_path / "ours", sums, Unmeasured(), keep=1.0, reward=small_first, **changes))
    assert losses(ours) == losses(theirs) and any(losses(theirs))
    for mine, yours in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_skipped_completions_count_though_they_are_not_run(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str
) -> None:
    """TRL's step, without the passes of completions that have no advantage: the same gradient up to rounding.

    One micro-batch, since bnpo divides by the tokens of each: here by the step's.
    """
    changes = {
        "loss_type": kind,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "reward": small_first,
    }
    whole = run(build(tiny_model, tmp_path / "whole", sums, None, **changes))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    seen: list[int] = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: None if kwargs.get("use_cache") else seen.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    trainer = run(build(model, tmp_path / "part", sums, None, Watching, skip_zero_advantage=True, **changes))
    effective = [abs(row["advantages"].item()) > 1e-6 for row in trainer.rollout_rows[0]]
    assert 0 < sum(effective) < 16
    assert seen == [sum(effective)]
    assert logged(trainer, "rows_run") == [sum(effective)]
    moved = 0.0
    parameters = zip(model.parameters(), whole.model.parameters(), before.parameters(), strict=True)
    for new, expected, old in parameters:
        torch.testing.assert_close(new, expected, atol=1e-6, rtol=1e-4)
        moved = max(moved, (expected - old).abs().max().item())
    assert moved > 1e-4


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, {}) for kind in ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")]
    + [("grpo", {"beta": 0.5})],
)
def test_completions_that_are_the_same_run_once(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Two iterations of TRL's step, without the passes of copies: one of them weighs as much as all."""
    options: dict[str, Any] = changes | {
        "loss_type": kind,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "max_steps": 2,
        "max_completion_length": 2,
        "temperature": 0.12,  # few different ones
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "importance_sampling_level": "sequence" if kind == "luspo" else "token",
        "reward": letter_sum,
    }
    whole = run(build(tiny_model, tmp_path / "whole", sums, None, **options))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = run(build(model, tmp_path / "once", sums, None, Watching, skip_zero_advantage=True, **options))
    rows = trainer.rollout_rows[0]
    taught = [index for index, row in enumerate(rows) if abs(row["advantages"].item()) > 1e-6]
    different = {(index // 4, tuple(rows[index]["completion_ids"].tolist())) for index in taught}
    others = 16 - len(taught) if "beta" in changes else 0  # those have a KL penalty
    assert len(different) < len(taught) and logged(trainer, "rows_run") == [len(different) + others]
    assert logged(trainer, "copies") == [(len(taught) - len(different)) / 16]
    moved = 0.0
    for new, expected, old in zip(model.parameters(), whole.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, expected, atol=2e-6, rtol=1e-4)
        moved = max(moved, (expected - old).abs().max().item())
    assert moved > 1e-4


def test_selectors_see_one_of_the_same_and_its_weight_is_theirs(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    chooser = Unmeasured()
    trainer = build(
        tiny_model, tmp_path, sums, chooser, Watching, reward=letter_sum, max_completion_length=1, temperature=0.12
    )
    trainer.train()
    lines = [json.loads(line)["completions"] for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    for seen, kept, rows in zip(chooser.seen, chooser.kept, lines, strict=True):
        taught = [row for row in rows if row.get("why") != "no advantage" and row.get("why") != "fill"]
        copies = [row for row in taught if row.get("why") == "a copy"]
        assert len(seen) == len(taught) - len(copies) and int(seen.copies.sum()) == len(taught)
        assert torch.equal(seen.shares, (seen.copies * seen.num_tokens).float())  # dapo: tokens
        weights = [row["weight"] for row in taught if row["chosen"]]
        counts = seen.copies[kept.indices].float()
        assert weights == pytest.approx((counts * len(counts) / counts.sum()).tolist(), rel=1e-5)
    assert any(row.get("why") == "a copy" for rows in lines for row in rows)


def test_no_advantage_anywhere_is_a_step_without_a_gradient(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """TRL's step has rounding noise for a gradient there, which Adam makes a step of full size of."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = build(
        model, tmp_path, sums, Unmeasured(), reward=lambda completions, **columns: [0.1] * len(completions), max_steps=2
    )
    trainer.train()
    assert logged(trainer, "rows_run") == [0, 0] and logged(trainer, "with_advantage") == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_rows_without_an_advantage_take_no_ones_place(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """14 of 16 are kept: all that have an advantage, and others only because they are too few; those are not run."""
    chooser = Unmeasured()
    trainer = run(
        build(
            tiny_model,
            tmp_path,
            sums,
            chooser,
            Watching,
            keep=14,
            reward=small_first,
            max_steps=3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    mixed: list[bool] = []
    for rows, line, batches in zip(trainer.rollout_rows, lines, trainer.batches, strict=True):
        advantages = [row["advantages"].item() for row in rows]
        taught = {index for index, advantage in enumerate(advantages) if abs(advantage) > 1e-6}
        mixed.append(0 < len(taught) < 14)
        if not taught:  # see the test above
            continue
        chosen = {index for index, row in enumerate(line["completions"]) if row["chosen"]}
        assert chosen == taught
        assert all(row["why"] == "no advantage" for row in line["completions"] if not row["chosen"])
        assert [row["advantage"] for row in line["completions"]] == pytest.approx(advantages, rel=1e-4)
        assert [sums[row["id"]]["prompt"] for row in line["completions"]] == decoded(trainer, rows)
        (batch,) = batches
        assert len(batch["advantages"]) == len(taught)
        assert batch["num_items_in_batch"] >= batch["completion_mask"].sum()
    assert any(mixed)


def decoded(trainer: Any, rows: list[dict[str, Tensor]]) -> list[str]:
    return trainer.processing_class.batch_decode([row["prompt_ids"] for row in rows], skip_special_tokens=True)


def test_a_kl_penalty_has_every_kept_completion_run(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    trainer = run(
        build(tiny_model, tmp_path, sums, Unmeasured(), Watching, keep=0.5, reward=small_first, beta=0.1, max_steps=2)
    )
    assert logged(trainer, "rows_run") == [8, 8]
    lines = [json.loads(line)["completions"] for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [sum(row["chosen"] for row in rows) for rows in lines] == [8, 8]
    assert any(row.get("why") == "fill" and row["advantage"] == 0 for rows in lines for row in rows)
    assert all(sum(len(batch["advantages"]) for batch in batches) == 8 for batches in trainer.batches)


def test_dropped_completions_get_no_pass(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """Of 16 completions all that have an advantage are scored, without gradient, and 4 are trained on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    passes = {True: 0, False: 0}

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not kwargs.get("use_cache") and kwargs["input_ids"].shape != (
            2,
            8,
        ):  # generation, and the probe of the parts
            passes[module.training] += len(kwargs["input_ids"])

    model.model.register_forward_hook(count, with_kwargs=True)
    trainer = run(build(model, tmp_path, sums, First(), keep=4, reward=letter_sum))
    assert passes == {True: 12, False: 48}
    assert logged(trainer, "rows_read") == logged(trainer, "rows_scored") == [16] * 3
    assert logged(trainer, "rows_trained") == [4] * 3
    assert trainer.sift_summary()["selection"]["rows_trained"] == 12
    assert trainer.rollouts == 48


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_old_policy_and_the_reference_run_only_what_is_kept(
    tiny_model: str, sums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    """Two iterations and a KL penalty: TRL runs all 16 completions for each, here the 4 kept ones; the steps agree."""

    def start(folder: str) -> tuple[Any, list[int]]:
        trainer = build(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"),
            tmp_path / folder,
            sums,
            Unmeasured(),
            keep=4,
            reward=letter_sum,
            num_iterations=2,
            beta=0.1,
            max_steps=4,
            peft_config=LoraConfig(r=2, init_lora_weights=False) if adapter else None,
        )
        passes: list[int] = []

        def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not kwargs.get("use_cache"):  # that is generation
                passes.append(len(kwargs["input_ids"]))

        bodies = {id(m): m for m in (decoder(trainer.model), decoder(trainer.ref_model or trainer.model))}
        for body in bodies.values():
            body.register_forward_hook(count, with_kwargs=True)
        trainer.train()
        return trainer, passes

    spared, few = start("spared")
    assert sum(few) == 2 * (4 + 4) + 4 * 4  # two rollouts' passes, and four steps
    monkeypatch.setattr(GRPOTrainer, "_without_old_passes", contextlib.nullcontext)
    whole, many = start("whole")
    assert sum(many) == 2 * (16 + 16) + 4 * 4
    assert losses(spared) == pytest.approx(losses(whole), abs=1e-6)
    assert [entry["kl"] for entry in spared.state.log_history if "kl" in entry][-1] > 1e-6
    for mine, yours in zip(spared.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-4)


def test_free_selectors_before_it_spare_the_scoring(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """8 of 16 survive the first selector, so 8 are scored."""
    chooser = First()
    trainer = run(build(tiny_model, tmp_path, sums, [(Unmeasured(), 0.5), (chooser, 0.5)], reward=letter_sum))
    assert logged(trainer, "rows_scored") == [8] * 3 and logged(trainer, "rows_trained") == [4] * 3
    assert [len(signals) for signals in chooser.seen] == [8] * 3


def test_optimizer_steps_of_one_rollout(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """4 micro-batches of 4 in 2 optimizer steps become 2 of 4 in 2; each kept row is in one of them, twice over."""
    chooser = Unmeasured()
    trainer = run(
        build(
            tiny_model,
            tmp_path,
            sums,
            chooser,
            Watching,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            num_iterations=2,
            max_steps=8,
            reward=letter_sum,
        )
    )
    args = trainer.args
    assert (args.gradient_accumulation_steps, args.steps_per_generation, args.generation_batch_size) == (1, 2, 16)
    assert len(chooser.seen) == 2  # 2 optimizer steps x 2 iterations a rollout
    for step, batches in enumerate(trainer.batches):
        kept = [trainer.rollout_rows[step][index]["advantages"].item() for index in teaching(chooser, trainer, step)]
        assert [len(batch["advantages"]) for batch in batches] == [4, 4]
        assert sorted(torch.cat([batch["advantages"] for batch in batches]).tolist()) == sorted(kept)


@pytest.mark.parametrize("save", [2, 3])
def test_resuming_is_exact(tiny_model: str, sums: Any, tmp_path: Path, save: int) -> None:
    """All three selections; step 3 is in the middle of a rollout."""

    def start(folder: str, checkpoint: Path | None = None) -> Any:
        chain = [(selector("utility_diversity"), 12), (selector("gradient_coreset"), 8)]
        trainer = build(
            tiny_model,
            tmp_path / folder,
            sums,
            chain,
            prompt_selector=selector("prompt_curriculum", fallback=False),
            reward=letter_sum,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            max_steps=6,
            save_strategy="steps",
            save_steps=save,
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer

    whole = start("whole")
    resumed = start("resumed", tmp_path / "whole" / f"checkpoint-{save}")
    assert losses(resumed)[-(6 - save) :] == losses(whole)[-(6 - save) :]
    for mine, yours in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, yours)
    logs = [(tmp_path / folder / "selection.jsonl").read_text().splitlines() for folder in ("whole", "resumed")]
    assert logs[1] and logs[0][-len(logs[1]) :] == logs[1]
    assert whole.sift_summary()["selection"]["rows_trained"] == resumed.sift_summary()["selection"]["rows_trained"]
    with pytest.raises(ValueError, match="written with batch_selector utility_diversity -> gradient_coreset, this run"):
        args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer = build(
            tiny_model, tmp_path / "other", sums, None, prompt_selector=selector("prompt_curriculum"), **args
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save}"))


@pytest.mark.parametrize("prompts", [None, "uniform"])
def test_prompts_whose_completions_will_be_long_are_rolled_out_first(
    tiny_model: str, sums: Any, tmp_path: Path, prompts: str | None
) -> None:
    """With what was learned of lengths; each completion keeps the seed of its place in TRL's order or the choice."""

    def start(folder: str, by_length: bool) -> Any:
        chosen = selector(prompts) if prompts else None
        trainer = build(
            tiny_model, tmp_path / folder, sums, Unmeasured(), Watching, prompt_selector=chosen, reward=letter_sum
        )
        # lengths that the prompts tell: longer ones for larger first digits
        trainer.lengths.predict = lambda ids, tokens, predicted: ids.double() if by_length else -ids.double()
        trainer.train()
        return trainer

    long_first, short_first = start("long", True), start("short", False)
    for mine, theirs in zip(long_first.rollout_rows[:1], short_first.rollout_rows[:1], strict=True):
        ids = [int(row["ids"]) for row in mine[::4]]
        assert ids == sorted(ids, reverse=True) and ids != sorted(ids)
        assert [int(row["ids"]) for row in theirs[::4]] == ids[::-1]
        completions = [[row["completion_ids"].tolist() for row in rows] for rows in (mine, theirs)]
        groups = [[rows[at : at + 4] for at in range(0, 16, 4)] for rows in completions]
        assert groups[0] == groups[1][::-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 7}, r"7 of 8 completions .* keep 4 or 8"),
        ({"keep": 17}, "batch_selector: 17 rows are more than the 8"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6, "keep": 8}, "one must be a multiple"),
        ({"source_column": "family"}, "there is no column 'family'"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    tiny_model: str, sums: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build(tiny_model, tmp_path, sums, Unmeasured(), per_device_train_batch_size=4, **changes)


# ----------------------------------------------------------------------------------- what the signals say of a policy


def test_spsa_sees_the_policy_loss(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """Slopes along random directions are those of the exact gradient."""
    chooser = Probing()
    run(build(tiny_model, tmp_path, sums, chooser, reward=letter_sum, max_steps=1, max_completion_length=12))
    (signals,) = chooser.seen
    exact, probed = (signals[signal].total(torch.eye(len(signals))) for signal in sorted(chooser.needs, key=repr))
    assert exact.norm() > 0
    # E[z z^T g] = g: over 64 directions of 64 x 64 numbers the estimates are noisy, but lie on g's side
    cosines = torch.cosine_similarity(exact, probed, dim=1)
    assert cosines.min() > 0.03 and cosines.mean() > 0.08, cosines


@dataclass
class Probing(First):
    needs: ClassVar[frozenset[Any]] = frozenset({ValueGradient(), ValueGradient("spsa", perturbations=64)})


@dataclass
class Asking(First):
    needs: ClassVar[frozenset[Any]] = frozenset({ValueGradient()})


class Comparing(GRPOTrainer):
    """Compares each row's signal with autograd of TRL's own loss of that row alone; collects their norms' ratios."""

    ratios: list[Tensor]

    def _keep_completions(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        kept = super()._keep_completions(batch)
        signals = self.chain[0].selector.seen[-1]
        rows = [row for row in row_ops.split(batch) if row["advantages"].abs() > 1e-6]
        assert len(rows) == len(signals)
        value = self.model.model.layers[-1].self_attn.v_proj.weight
        for place, row in enumerate(rows):
            one = row_ops.join([row], 0, torch.device("cpu")) | {"num_items_in_batch": torch.tensor(1.0)}
            loss = self._compute_loss(self.model, one)
            if self.loss_type in ("dapo", "cispo"):
                loss = loss / len(row["completion_ids"])
            expected = torch.autograd.grad(loss, value)[0].flatten()
            mine = signals[ValueGradient()].at(torch.arange(len(expected)), torch.tensor([place]))[0]
            assert torch.cosine_similarity(mine, expected, dim=0) > 1 - 1e-5
            self.ratios.append(expected.norm() / mine.norm())
        return kept


@pytest.mark.parametrize(
    ("kind", "changes"), [("grpo", {"beta": 0.3}), ("dapo", {}), ("cispo", {"epsilon_high": 5.0}), ("sapo", {})]
)
def test_the_scored_gradient_is_that_of_trls_loss(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "max_completion_length": 12, "max_grad_norm": 0}
    trainer = build(
        tiny_model,
        tmp_path,
        sums,
        Asking(),
        Comparing,
        reward=letter_sum,
        loss_type=kind,
        temperature=0.7,
        **options,
        **changes,
    )
    trainer.ratios = []
    trainer.train()
    ratios = torch.stack(trainer.ratios)  # one factor for all rows: what TRL divides by
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-3, atol=0)


def test_figures_count_by_the_advantage(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """Loss: |A| times the mean over tokens of -log p."""
    chooser = First()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = run(build(model, tmp_path, sums, chooser, Watching, reward=letter_sum, max_steps=1, temperature=0.5))
    rows = [trainer.rollout_rows[0][index] for index in teaching(chooser, trainer)]
    with torch.no_grad():
        expected = [row["advantages"].abs() * -log_probs(before, row, 0.5).mean() for row in rows]
    torch.testing.assert_close(chooser.seen[0][Loss()][:8].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_budget_stops_the_scoring_and_says_so_once(
    tiny_model: str, sums: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousandth of a step is too little for any: after the steps that measure, rows are taken at random."""
    trainer = run(build(tiny_model, tmp_path, sums, First(), max_overhead=1e-3, max_steps=8, reward=letter_sum))
    scored = logged(trainer, "rows_scored")
    assert min(scored[:2]) > 12 and scored[-1] == 0  # all that have an advantage, then none
    assert logged(trainer, "rows_trained") == [8] * 8
    said = [record.message for record in caplog.records if "max_overhead" in record.message]
    assert len(said) == 1 and "more than 0%" in said[0]
    shares = logged(trainer, "share_of_time")
    assert len(shares) == 8 and shares[-1] < shares[1]


@pytest.mark.engines
@pytest.mark.parametrize(
    ("mode", "iterations", "spared_rows"),
    [("token_truncate", 1, 2 * 16), ("sequence_mask", 1, 2 * 16), ("token_truncate", 2, 16 - 8)],
)
def test_with_vllm_the_old_policys_pass_is_spared_and_the_step_is_the_same(
    tiny_model: str,
    sums: Any,
    tmp_path: Path,
    mode: str,
    iterations: int,
    spared_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL runs all 16 completions for the correction of the engine's probabilities; here the trained ones give it.

    With a second iteration the old policy's probabilities are needed, too: of the 8 kept ones.
    """

    def start(folder: str) -> tuple[Any, list[int]]:
        chain = [(selector("largest_advantage"), 12), (selector("gradient_coreset"), 8)]
        trainer = build(
            tiny_model,
            tmp_path / folder,
            sums,
            chain,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            vllm_importance_sampling_mode=mode,
            num_iterations=iterations,
            reward=letter_sum,
            max_steps=2,
        )
        sync = trainer.vllm_generation.sync_weights

        def skewed() -> None:  # an engine whose probabilities are a little off, so that the correction shows
            with torch.no_grad():
                weight = trainer.model.model.layers[0].mlp.down_proj.weight
                weight.mul_(1.05)
                sync()
                weight.div_(1.05)

        trainer.vllm_generation.sync_weights = skewed
        passes: list[int] = []
        trainer.model.model.register_forward_hook(
            lambda module, args, kwargs, output: passes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        trainer.train()
        return trainer, passes

    spared, few = start("spared")
    monkeypatch.setattr(GRPOTrainer, "_without_old_passes", contextlib.nullcontext)
    whole, many = start("whole")
    assert sum(many) - sum(few) == spared_rows
    assert losses(spared) == pytest.approx(losses(whole), abs=1e-6)
    for mine, yours in zip(spared.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-4)
    name = "sampling/sampling_logp_difference/mean"
    off = [entry[name] for entry in spared.state.log_history if name in entry]
    assert len(off) == 2 // iterations and min(off) > 1e-4


def test_completions_that_are_masked_for_their_length_count_as_the_longest(
    tiny_model: str, sums: Any, tmp_path: Path
) -> None:
    """Of a random model's completions nearly all come to the limit of 6 tokens; their masks are empty."""
    trainer = build(
        tiny_model, tmp_path, sums, Unmeasured(), Watching, reward=letter_sum, mask_truncated_completions=True
    )
    seen: list[Tensor] = []
    trainer.lengths.observe = lambda ids, tokens, predicted, lengths: seen.append(lengths)
    trainer.train()
    masked = [row for row in trainer.rollout_rows[0] if not row["completion_mask"].any()]
    assert len(masked) > 8
    assert seen[0].min() > 3
