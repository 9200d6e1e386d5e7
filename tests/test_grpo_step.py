"""The optimizer step on kept completions: each loss by hand, against TRL's, and the passes that it takes."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import grpo_args, letter_sum
from grpo_runs import Watching, build, log_probs, run, selector, small_first, teaching
from keeping import First, Unmeasured, logged, losses
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer as TRLGRPOTrainer

from siftrl.rollout import RolloutOptions
from siftrl.trainers.grpo import GRPOTrainer
from siftrl.value import decoder

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo", "sapo", "vespo"])
def test_a_step_of_a_few_is_as_long_as_that_of_all(tiny_model: str, sums: Any, tmp_path: Path, kind: str) -> None:
    """4 of the T completions that have an advantage, out of 16: by hand, their mean times T / 16 (rows or tokens), and
    the KL penalty, which is a mean over them, as it is. The second iteration has one: in the first the policy is the
    reference."""
    chooser = Unmeasured()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    hand, first = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    options |= {"learning_rate": 0.05, "beta": 0.5, "num_iterations": 2, "max_steps": 2, "loss_type": kind}
    options |= {"epsilon_high": 5.0} if kind == "cispo" else {}
    trainer = run(build(model, tmp_path, sums, chooser, Watching, keep=4, reward=small_first, **options))
    rows = trainer.rollout_rows[0]
    taught = [index for index, row in enumerate(rows) if abs(row["advantages"].item()) > 1e-6]
    lengths = [1 if kind in ("grpo", "sapo") else len(row["completion_ids"]) for row in rows]
    scale = sum(lengths[index] for index in taught) / sum(lengths)
    assert 4 < len(taught) < 16 and logged(trainer, "step_scale")[0] == pytest.approx(scale)
    kept = [rows[index] for index in teaching(chooser, trainer)]
    with torch.no_grad():
        old = [log_probs(first, row, 1.0) for row in kept]
    for _ in range(2):
        per_row = [
            token_losses(
                log_probs(hand, row, 1.0), before, before, row["advantages"].double() * scale, kind, trainer.args
            )
            for row, before in zip(kept, old, strict=True)
        ]
        hand.zero_grad()
        step_loss(per_row, torch.ones(4), kind, trainer.args).backward()
        with torch.no_grad():
            for parameter in hand.parameters():
                parameter -= 0.05 * parameter.grad
    for new, expected in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(new, expected, atol=2e-6, rtol=1e-4)


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


@pytest.mark.parametrize("keep", [None, 12])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_skipped_completions_count_though_they_are_not_run(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str, keep: int | None
) -> None:
    """TRL's step, without the passes of completions that have no advantage: the same gradient up to rounding. With a
    selector that has to keep more than have one, too: the step is no longer for it.

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
    skipping: dict[str, Any] = {"skip_zero_advantage": True} if keep is None else {"keep": keep}
    skipping["rollout"] = RolloutOptions(seeded=False)  # as without a selector
    chooser = None if keep is None else Unmeasured()
    trainer = run(build(model, tmp_path / "part", sums, chooser, Watching, **skipping, **changes))
    effective = [abs(row["advantages"].item()) > 1e-6 for row in trainer.rollout_rows[0]]
    assert 0 < sum(effective) <= 12
    if keep is None or "grpo" in kind:  # the others divide by tokens
        assert logged(trainer, "step_scale") == [pytest.approx(1 if keep is None else 12 / 16)]
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
    assert {e["sampling/masked"] for e in spared.state.log_history if "sampling/masked" in e} == {0.0}
    assert len(off) == 2 // iterations and min(off) > 1e-4
