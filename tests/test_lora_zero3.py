"""A recipe that trains adapters on a sharded model, on two ranks: what it saves is the base with the adapter in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import launch_command, launch_environment, run_command
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.engines
TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
OPTIONS: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True}


def test_zero3_saves_the_base_with_its_adapter_stage_by_stage(tiny_model: str, tmp_path: Path) -> None:
    recipe = {
        "name": "run",
        "model": {"path": tiny_model, "lora": {"r": 4}},
        "data": {"path": str(tmp_path / "rows.jsonl"), "completion": "answer"},
        "rewards": ["exact_match"],
        "stages": [
            {"kind": "sft", "rows_per_step": 8, "micro_batch_size": 4, "trainer": OPTIONS},
            {
                "kind": "grpo",
                "prompts_per_step": 4,
                "completions_per_prompt": 2,
                "micro_batch_size": 4,
                "rollout": {"max_completion_tokens": 3},
                "trainer": OPTIONS | {"max_steps": 1},
            },
        ],
        "distribution": {"deepspeed": "zero3"},
        "checkpoint": {"every": None},
    }
    rows = "".join(f'{{"prompt": "{a}+1=", "answer": "{a + 1}"}}\n' for a in range(16))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = [*launch_command(2, deepspeed=True), str(TRAIN), "r.yaml"]
    done = run_command(command, cwd=tmp_path, env=launch_environment(), timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    stages = tmp_path / "runs" / "run" / "stages"
    ids = torch.tensor([[8, 9, 10, 11]])
    for base, stage in ((tiny_model, stages / "sft"), (str(stages / "sft"), stages / "grpo")):
        merged = AutoModelForCausalLM.from_pretrained(stage)
        start = AutoModelForCausalLM.from_pretrained(base)
        assert torch.equal(merged.get_input_embeddings().weight, start.get_input_embeddings().weight)
        trained = PeftModel.from_pretrained(start, str(stage / "adapter"))
        assert torch.allclose(trained(ids).logits, merged(ids).logits, atol=1e-5)
        assert base.endswith(trained.peft_config["default"].base_model_name_or_path)
        norms = [p.norm().item() for name, p in trained.named_parameters() if "lora_B" in name]
        assert stage.name == "grpo" or min(norms) > 0
