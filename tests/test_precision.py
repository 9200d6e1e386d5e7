"""Weights that lose updates are told of, and the precision follows the machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import sft_args, worded_sums
from test_recipe import BASE
from torch import nn
from transformers import AutoModelForCausalLM

from siftrl import precision
from siftrl.recipe import RecipeError, load_recipe
from siftrl.recipe_checks import check_recipe
from siftrl.trainers.sft import SFTTrainer


def test_a_gpu_computes_in_bfloat16_if_it_can() -> None:
    def chosen(gpu: bool, has: bool, **asked: Any) -> tuple[bool, bool]:
        found = precision.mixed_precision(asked, gpu=gpu, gpu_has_bfloat16=has)
        return found["bf16"], found["fp16"]

    assert chosen(True, True) == (True, False)
    assert chosen(True, False) == (False, True)
    assert chosen(False, False) == (False, False)
    assert chosen(True, True, fp16=True) == (False, True)
    assert chosen(True, True, bf16=False) == (False, False)
    assert chosen(True, False, bf16=None) == (False, True)


def test_a_bfloat16_weight_does_not_see_a_small_update() -> None:
    """Why it is refused: at learning rate 1e-3 a weight near 1 stays where it is, step after step."""
    for dtype, moves in ((torch.bfloat16, False), (torch.float32, True)):
        weight = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert bool((weight != 1).all()) is moves


@pytest.mark.parametrize(
    ("model", "extra", "fine"),
    [
        ("dtype: bfloat16", "", False),
        ("dtype: float16", "", False),
        ("dtype: float32", "", True),
        ("dtype: bfloat16, lora: {}", "", True),
        ("dtype: bfloat16", "distribution: {deepspeed: zero2}", True),
        ("dtype: bfloat16", "distribution: {deepspeed: {zero_optimization: {stage: 1}}}", False),
    ],
)
def test_a_recipe_that_would_lose_updates_is_refused(tmp_path: Path, model: str, extra: str, fine: bool) -> None:
    text = BASE.replace("scratch: {hidden_size: 96}", f"path: some/model\n  {model.replace(', ', chr(10) + '  ')}")
    (tmp_path / "r.yaml").write_text(text + extra)

    def check() -> None:
        check_recipe(load_recipe(tmp_path / "r.yaml", []), 1, check_installed=False)

    if fine:
        check()
    else:
        with pytest.raises(RecipeError, match=r"model.dtype: weights trained in b?float16 lose an update of less than"):
            check()


def test_a_trainer_warns_once(tiny_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="bfloat16")
    trainer = SFTTrainer(model, sft_args(tmp_path, max_steps=1), train_dataset=worded_sums())
    trainer.train()
    assert caplog.text.count("trained weights are held in bfloat16, which loses an update") == 1
    assert any("held in bfloat16" in text for text in trainer.health.warnings)
    adapters = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))  # in float32, above a bfloat16 base
    assert precision.rounded_updates(adapters.parameters(), trainer.args, masters=False) is None


def test_nothing_is_said_where_float32_copies_are_kept() -> None:
    weights, args = [nn.Parameter(torch.ones(1, dtype=torch.bfloat16))], SimpleNamespace(bf16=True, fp16=False)
    assert precision.rounded_updates(weights, args, masters=True) is None
    assert "held in bfloat16" in str(precision.rounded_updates(weights, args, masters=False))
    args.use_transformers_continuous_batching = True
    whole = [nn.Parameter(torch.ones(1))]
    assert "continuous_batching casts" in str(precision.rounded_updates(whole, args, masters=False))
    args.bf16 = False
    assert precision.rounded_updates(whole, args, masters=False) is None


def test_adapters_are_held_in_float32() -> None:
    layers = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16).requires_grad_(False), nn.Linear(2, 2).to(torch.bfloat16))
    precision.adapters_in_float32(layers)
    assert [p.dtype for p in layers.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_apples_gpu_is_refused() -> None:
    trainer = object.__new__(SFTTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(ValueError, match=r"does not run on Apple's GPU \(MPS\): write use_cpu=True"):
        trainer._init_sift(None)
