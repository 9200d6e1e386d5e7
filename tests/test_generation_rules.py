"""What is ignored or would be another distribution than the loss takes it for is refused, with what to write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import digit_share, grpo_args
from test_recipe import BASE

from siftrl.generation_rules import check_generation, logprobs_mode
from siftrl.pipeline import _trainer_options
from siftrl.recipe import RecipeError, load_recipe
from siftrl.recipe_checks import check_recipe
from siftrl.rollout import RolloutOptions
from siftrl.selectors.largest_advantage import LargestAdvantage
from siftrl.selectors.uniform import Uniform
from siftrl.trainers.grpo import GRPOTrainer

VLLM: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def test_the_engine_reports_what_the_loss_compares() -> None:
    assert logprobs_mode(VLLM) == "processed_logprobs"
    assert logprobs_mode(VLLM | {"temperature": 0.7, "min_p": None}) == "processed_logprobs"
    for cut in ({"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        assert logprobs_mode(VLLM | cut) == "raw_logprobs"
        with pytest.raises(RecipeError, match=rf"^{next(iter(cut))}: vLLM reports .* write `temperature: 1`"):
            logprobs_mode(VLLM | cut | {"temperature": 0.7})
        with pytest.raises(RecipeError, match="write `mode: colocate`"):
            logprobs_mode(VLLM | cut | {"vllm_mode": "server"})
        uncorrected = VLLM | cut | {"temperature": 0.7, "vllm_importance_sampling_correction": False}
        assert logprobs_mode(uncorrected) == "processed_logprobs"
        with pytest.raises(RecipeError, match="remove off_policy_mask_threshold"):
            logprobs_mode(uncorrected | {"off_policy_mask_threshold": 0.5})
    assert logprobs_mode(VLLM | {"generation_kwargs": '{"min_tokens": 4}'}) == "raw_logprobs"
    assert logprobs_mode(VLLM | {"generation_kwargs": {"stop_token_ids": [3]}}) == "processed_logprobs"


@pytest.mark.parametrize(
    ("options", "seeded", "message"),
    [
        ({"generation_kwargs": {"top_p": 0.9}}, False, "generation_kwargs: remove 'top_p', which is set by top_p"),
        (VLLM | {"generation_kwargs": {"seed": 1}}, False, "remove 'seed', which is set by the run's own seed"),
        ({"generation_kwargs": {"typical_p": 0.9}}, True, "'typical_p' does not work where each completion has its"),
        ({"use_transformers_continuous_batching": True}, True, "use_transformers_continuous_batching: draws tokens"),
        ({"vllm_structured_outputs_regex": "a+"}, True, "vllm_structured_outputs_regex: is an option of vLLM"),
        (VLLM | {"vllm_structured_outputs_regex": "a+"}, True, "among the tokens that the pattern allows"),
        (VLLM | {"generation_kwargs": {"structured_outputs": {"regex": "a"}}}, True, "^generation_kwargs: vLLM"),
    ],
)
def test_settings_that_do_not_work_together(options: dict[str, Any], seeded: bool, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_generation(options, seeded=seeded)


def test_settings_that_do() -> None:
    check_generation({"generation_kwargs": {"suppress_tokens": [3]}, "cache_implementation": "static"}, seeded=True)
    check_generation({"generation_kwargs": {"typical_p": 0.9}}, seeded=False)
    check_generation({"use_transformers_continuous_batching": True}, seeded=False)
    pattern = {"vllm_structured_outputs_regex": "a+", "vllm_importance_sampling_correction": False}
    check_generation(VLLM | pattern, seeded=True)


def test_a_recipe_names_the_key_that_is_to_be_changed(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BASE)

    def check(*overrides: str) -> None:
        check_recipe(load_recipe(tmp_path / "r.yaml", list(overrides)), 1, check_installed=False)

    vllm = "stages.1.rollout.engine=vllm"
    check(vllm, "stages.1.rollout.top_p=0.9")
    check(vllm, "stages.1.rollout.top_p=0.9", "stages.1.rollout.temperature=0.5",
          "stages.1.trainer.vllm_importance_sampling_correction=false")  # fmt: skip
    with pytest.raises(RecipeError, match=r": stages.1.rollout.top_p: vLLM reports"):
        check(vllm, "stages.1.rollout.top_p=0.9", "stages.1.rollout.temperature=0.5")
    with pytest.raises(RecipeError, match=r": stages.1.trainer.use_transformers_continuous_batching: draws"):
        check("stages.1.trainer.use_transformers_continuous_batching=true")
    check("stages.1.trainer.use_transformers_continuous_batching=true", "stages.1.rollout.seeded=false")


def test_the_trainer_refuses_before_it_loads(tmp_path: Path, sums: Any) -> None:
    def build(selector: Any = None, args: Any = None, **options: Any) -> None:
        GRPOTrainer(str(tmp_path / "none"), digit_share, args or grpo_args(tmp_path), train_dataset=sums, **options)

    for name, chooser in (("tools", "prompt_selector"), ("environment_factory", "prompt_selector")):
        with pytest.raises(ValueError, match=f"^{name} does not work with prompt_selector or batch_selector"):
            build(**{name: [math.sqrt], chooser: Uniform()})
    with pytest.raises(ValueError, match="^rollout_func does not work with"):
        build(rollout_func=print, batch_selector=LargestAdvantage())
    with pytest.raises(ValueError, match="use_transformers_continuous_batching: draws"):
        build(args=grpo_args(tmp_path, use_transformers_continuous_batching=True), prompt_selector=Uniform())
    with pytest.raises(ValueError, match="'typical_p' does not work"):
        build(args=grpo_args(tmp_path, generation_kwargs={"typical_p": 0.5}), rollout=RolloutOptions(seeded=True))


def test_seeded_rollouts_honour_what_they_take(tiny_model: str, tmp_path: Path, sums: Any) -> None:
    """Tokens that generation_kwargs forbids are not drawn, in rollouts and evaluation; any cache gives the same."""
    allowed = 7

    def drawn(**options: Any) -> list[list[int]]:
        args = grpo_args(tmp_path, max_completion_length=8, **options)
        trainer = GRPOTrainer(tiny_model, digit_share, args, train_dataset=sums, rollout=RolloutOptions(seeded=True))
        prompts = trainer._tokenize_prompts(["1+1=", "12+3="])[0]
        return trainer._generate_single_turn(prompts, None, {}, 1)[0]

    forbidden = [token for token in range(102) if token != allowed]
    only = {"generation_kwargs": {"suppress_tokens": forbidden}}
    assert drawn(**only) == [[allowed] * 8] * 2
    assert drawn() == drawn(cache_implementation="static") != [[allowed] * 8] * 2


def test_what_a_recipe_asks_of_trl(tmp_path: Path) -> None:
    def options(*overrides: str) -> dict[str, Any]:
        recipe = load_recipe(tmp_path / "r.yaml", ["stages.1.rollout.engine=vllm", *overrides])
        return _trainer_options(recipe, recipe.stages[1], tmp_path)

    (tmp_path / "r.yaml").write_text(BASE.replace("scratch: {hidden_size: 96}", "path: some/model"))
    assert options()["vllm_importance_sampling_mode"] == "token_truncate"
    assert options()["trust_remote_code"] is False and options("model.trust_remote_code=true")["trust_remote_code"]
    own = options("stages.1.trainer.vllm_importance_sampling_mode=sequence_mask")
    assert own["vllm_importance_sampling_mode"] == "sequence_mask"
