"""PEFT's prompt learning: refused by name where a selector reads the model below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import digit_share, grpo_args, sft_args, worded_sums
from grpo_runs import selector
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from siftrl.trainers.grpo import GRPOTrainer
from siftrl.trainers.sft import SFTTrainer

KINDS = (PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig)


def adapter(kind: Any) -> Any:
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
def test_selectors_that_read_signals_refuse_it(tiny_model: str, sums: Any, tmp_path: Path, kind: Any) -> None:
    options = {"train_dataset": sums, "peft_config": adapter(kind)}
    with pytest.raises(ValueError, match=rf"signals of the model \(Loss\), which does not work with {kind.__name__}"):
        GRPOTrainer(tiny_model, digit_share, grpo_args(tmp_path), batch_selector=selector("high_loss"), **options)
    head = selector("prompt_curriculum", value={"body": "policy"})
    with pytest.raises(ValueError, match=rf"`body: policy` of a value model .* does not work with {kind.__name__}"):
        GRPOTrainer(tiny_model, digit_share, grpo_args(tmp_path), prompt_selector=head, **options)
    rows = {"train_dataset": worded_sums(), "peft_config": adapter(kind)}
    with pytest.raises(ValueError, match="train LoRA adapters instead"):
        SFTTrainer(AutoModelForCausalLM.from_pretrained(tiny_model), sft_args(tmp_path), **rows,
                   batch_selector=selector("high_loss"))  # fmt: skip


def test_selectors_that_read_none_take_it(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    options = {"prompt_selector": selector("uniform"), "batch_selector": selector("largest_advantage")}
    args = grpo_args(tmp_path, max_steps=1)
    peft_config = adapter(PromptTuningConfig)
    trainer = GRPOTrainer(tiny_model, digit_share, args, train_dataset=sums, peft_config=peft_config, **options)
    trainer.train()
    assert trainer.state.global_step == 1
