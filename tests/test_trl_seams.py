"""siftrl overrides private parts of TRL 1.16. If one of these fails after an upgrade, look at what TRL does instead."""

from __future__ import annotations

import inspect

import pytest
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (GRPOTrainer._generate_and_score_completions, ["inputs"]),
        (
            GRPOTrainer._generate_single_turn,
            ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (GRPOTrainer._calculate_rewards, ["inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer._tokenize_prompts, ["prompts"]),
        (GRPOTrainer._get_train_sampler, ["dataset"]),
        (GRPOTrainer._save_checkpoint, ["model", "trial"]),
        (GRPOTrainer._load_optimizer_and_scheduler, ["checkpoint"]),
        (SFTTrainer._save_checkpoint, ["model", "trial"]),
        (SFTTrainer._load_optimizer_and_scheduler, ["checkpoint"]),
        (GRPOTrainer.training_step, ["model", "inputs", "num_items_in_batch"]),
        (GRPOTrainer.log, ["logs", "start_time"]),
        (GRPOTrainer._prepare_inputs, ["generation_batch"]),
        (GRPOTrainer._compute_loss, ["model", "inputs"]),
        (
            GRPOTrainer._get_dataloader,
            ["dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        ),
        (DPOTrainer.compute_loss, ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        (DPOTrainer.compute_ref_log_probs, ["model", "inputs"]),
        (
            RepeatSampler.__init__,
            ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"],
        ),
        (VLLMGeneration.sync_weights, []),
        (VLLMGeneration._init_vllm, []),
        (VLLMGeneration._iter_named_params, []),
        (VLLMGeneration.generate, ["prompts", "images", "num_generations", "profiler"]),
    ],
)
def test_hook_has_the_signature_we_override(hook: object, expected: list[str]) -> None:
    assert parameters(hook) == expected


def test_names_that_are_replaced_for_a_while_exist() -> None:
    assert grpo_trainer.VLLMGeneration is VLLMGeneration
    assert "VLLMGeneration(" in inspect.getsource(grpo_trainer.GRPOTrainer.__init__)
    assert "self.llm = LLM(" in inspect.getsource(VLLMGeneration._init_vllm)
    assert vllm_generation.extract_logprobs


def test_generation_happens_where_prompts_are_chosen() -> None:
    """TRL calls `_generate_and_score_completions` once a generation batch, from `_prepare_inputs`."""
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in source
    assert source.count("self._generate_and_score_completions(") == 2  # training, evaluation


def test_rollouts_are_buffered_where_kept_completions_replace_them() -> None:
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in source


def test_a_rows_loss_is_made_of_the_log_probabilities_that_carry_its_weight() -> None:
    """One call gives the loss its log-probabilities and entropies, and comes before the engine's correction is read."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.count("self._get_per_token_logps_and_entropies(") == 1
    first = source.index("self._get_per_token_logps_and_entropies(")
    assert first < source.index('inputs["importance_sampling_ratio"]')
    types = ("grpo", "sapo", "bnpo", "dr_grpo", "cispo", "dapo", "vespo", "luspo")
    assert all(f'"{kind}"' in source for kind in types)


def test_the_share_of_cut_completions_is_known_when_rewards_are_computed() -> None:
    assert '["completions/clipped_ratio"].append(' in inspect.getsource(GRPOTrainer._generate)
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.index("self._generate(") < source.index("self._calculate_rewards(")


def test_the_passes_over_all_completions_depend_on_what_we_replace() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
    assert "if self.args.gradient_accumulation_steps % generate_every != 0 or (" in source
    assert "self.use_vllm and self.vllm_importance_sampling_correction" in source
    assert "if self.beta != 0.0:" in source
    assert source.count("self._get_per_token_logps_and_entropies(") == 3  # old, reference, reference of an adapter
    assert source.count("self.args.gradient_accumulation_steps") == source.count("self.beta") == 1


def test_weights_are_synced_once_a_step_by_the_tag_we_set() -> None:
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "self.state.global_step != self._last_loaded_step" in source


def test_epochs_are_run_by_a_method_and_left_by_the_control() -> None:
    from transformers import Trainer

    assert "self._run_epoch(" in inspect.getsource(Trainer._inner_training_loop)
    assert "self.control.should_training_stop" in inspect.getsource(Trainer._inner_training_loop)
