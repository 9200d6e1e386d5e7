"""What is loaded beside a policy, or beneath its adapters, comes from where the policy came from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import digit_share, grpo_args
from datasets import Dataset
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftrl import origin, value
from siftrl.models import save_scratch_model
from siftrl.recipe import ScratchConfig
from siftrl.scoring import Reference
from siftrl.trainers.dpo import DPOTrainer
from siftrl.trainers.grpo import GRPOTrainer

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture()
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's cache with a model whose branches main and v1 differ."""
    sizes = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, max_positions=32)
    model = tmp_path / "hub" / "models--me--tiny"
    (model / "refs").mkdir(parents=True)
    for seed, (branch, commit) in enumerate(COMMITS.items()):
        save_scratch_model(sizes, model / "snapshots" / commit, seed)
        (model / "refs" / branch).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "me/tiny"


def embedding(model: Any) -> torch.Tensor:
    return origin.whole(model).get_input_embeddings().weight.detach().float()


def branch_of(model: Any) -> list[str]:
    found = {branch: AutoModelForCausalLM.from_pretrained("me/tiny", revision=branch) for branch in COMMITS}
    return [branch for branch, theirs in found.items() if torch.equal(embedding(theirs), embedding(model))]


def test_a_model_tells_where_it_came_from(hub: str) -> None:
    policy = AutoModelForCausalLM.from_pretrained(hub, revision="v1", attn_implementation="eager")
    same = origin.loading_options(policy, hub)
    assert same == {"trust_remote_code": False, "revision": COMMITS["v1"], "attn_implementation": "eager"}
    assert origin.loading_options(policy, "another/model") == {"trust_remote_code": False}
    asked = {"trust_remote_code": True, "attn_implementation": "eager", "revision": "v1"}
    there = origin.loading_options(policy, "another/model", asked)
    assert there == {"trust_remote_code": True, "attn_implementation": "eager"}  # of another model v1 means nothing
    Path(constants.HF_HUB_CACHE, "models--me--tiny", "refs", "v1").write_text(COMMITS["main"])  # the branch moves on
    assert origin.loading_options(policy, hub)["revision"] == COMMITS["v1"]


def test_adapters_are_merged_into_the_commit_they_were_trained_on(hub: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    policy = AutoModelForCausalLM.from_pretrained(hub, revision="v1")
    policy.generation_config.eos_token_id = [1, 5]
    trained = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trained.save_pretrained(tmp_path / "adapter")
    merged = origin.merge_adapter(trained, hub, tmp_path / "adapter", "auto")
    ids = torch.tensor([[6, 7, 8, 9]])
    assert branch_of(merged) == ["v1"]
    assert torch.allclose(merged(ids).logits, trained(ids).logits, atol=1e-5)
    assert merged.generation_config.eos_token_id == [1, 5]
    assert merged.dtype == torch.float32
    assert origin.merge_adapter(trained, hub, tmp_path / "adapter", "bfloat16").dtype == torch.bfloat16


def test_the_value_model_and_references_come_from_the_policys_commit(hub: str, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(hub, revision="v1")
    tokenizer = AutoTokenizer.from_pretrained(hub)
    device = torch.device("cpu")
    assert branch_of(value.build(value.ValueConfig(), policy, tokenizer, device).body) == ["v1"]
    assert branch_of(Reference(hub, policy, device, 1.0).model) == ["v1"]
    rows = Dataset.from_dict({"prompt": ["1+1="] * 4, "chosen": ["2"] * 4, "rejected": ["3"] * 4})
    made = GRPOTrainer(policy, digit_share, grpo_args(tmp_path / "grpo", beta=0.1), train_dataset=rows)
    assert branch_of(made.ref_model) == ["v1"]
    from_path = grpo_args(tmp_path / "path", beta=0.1, model_init_kwargs={"revision": "v1", "device_map": None})
    made = GRPOTrainer(hub, digit_share, from_path, train_dataset=rows)
    assert branch_of(made.model) == branch_of(made.ref_model) == ["v1"]
    from trl import DPOConfig

    pairs = DPOConfig(output_dir=str(tmp_path / "dpo"), report_to="none", use_cpu=True, bf16=False)
    assert branch_of(DPOTrainer(policy, None, pairs, train_dataset=rows).ref_model) == ["v1"]


def test_colocated_vllm_reads_the_policys_commit(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration, tokenizer and end tokens come from there, before the weights do."""
    policy = AutoModelForCausalLM.from_pretrained(hub, revision="v1")
    built: dict[str, Any] = {}
    monkeypatch.setattr("siftrl.trainers.grpo.ColocatedVLLM", lambda **kwargs: built.update(kwargs))
    trainer = object.__new__(GRPOTrainer)
    trainer.args, trainer._rows_per_rank = SimpleNamespace(model_init_kwargs={"trust_remote_code": True}), 8
    trainer.rollout = SimpleNamespace(engine_args={})
    accelerator, trainer.eos_token_ids = SimpleNamespace(mixed_precision="no"), [1, 5]
    asked = {"generation_kwargs": {"stop_token_ids": [7], "min_tokens": 2}, "tensor_parallel_size": 1}
    GRPOTrainer._build_vllm(trainer, model=policy, accelerator=accelerator, **asked)
    assert built["generation_kwargs"] == {"stop_token_ids": [1, 5, 7], "min_tokens": 2}
    assert built["engine_args"] == {
        "dtype": "float32",
        "trust_remote_code": True,
        "revision": COMMITS["v1"],
        "tokenizer_revision": COMMITS["v1"],
        "logprobs_mode": "processed_logprobs",
    }
