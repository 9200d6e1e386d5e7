"""The recipe: one YAML file, typed. This module must stay free of torch.

`load_recipe` reads a file, applies `key.path=value` overrides, and checks everything that can be checked before
torch is imported; `resolved` and `dump` write a recipe so that it loads again to an equal one. The models below are
plain data: every other module takes them by attribute access.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from siftrl.batch_arithmetic import BatchArithmetic, batch_arithmetic, world_size
from siftrl.deepspeed_config import deepspeed_config
from siftrl.fields import Count
from siftrl.recipe_checks import check_recipe
from siftrl.recipe_sections import (
    BatchSelectorConfig,
    CheckpointConfig,
    DataConfig,
    DistributionConfig,
    EvalConfig,
    EvalDataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    Name,
    OutputConfig,
    ReasoningGymConfig,
    ReasoningGymTask,
    RewardConfig,
    RolloutConfig,
    ScratchConfig,
    Section,
    SelectionConfig,
    SelectorConfig,
    SignalsConfig,
)
from siftrl.recipe_text import Key, RecipeError, apply_overrides, describe_error, dump_yaml, read_yaml

__all__ = [
    "AnyStage",
    "BatchArithmetic",
    "DPOStage",
    "GRPOStage",
    "Recipe",
    "RecipeError",
    "SFTStage",
    "Stage",
    "batch_arithmetic",
    "deepspeed_config",
    "dump",
    "load_recipe",
    "resolved",
    "BatchSelectorConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistributionConfig",
    "EvalConfig",
    "EvalDataConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OutputConfig",
    "ReasoningGymConfig",
    "ReasoningGymTask",
    "RewardConfig",
    "RolloutConfig",
    "ScratchConfig",
    "Section",
    "SelectionConfig",
    "SelectorConfig",
    "SignalsConfig",
]


def _one_or_chain(value: Any) -> str:
    return "chain" if isinstance(value, list) else "one"


# Told apart by their form, so that an error speaks of what was written, not of every form there is.
BatchSelectors = Annotated[
    Annotated[BatchSelectorConfig, Tag("one")]
    | Annotated[list[BatchSelectorConfig], Field(min_length=1), Tag("chain")],
    Discriminator(_one_or_chain),
]
"""One batch selector, or a chain of them."""


EVAL_COMPLETION_TOKENS = 256
"""The most tokens of a completion of a held-out prompt, where neither `rollout` nor `eval` says it."""


class Stage(Section):
    """What every kind of stage has."""

    name: Name = ""
    """Its name in the run folder; null: its kind."""
    data: DataConfig | None = None
    """Replaces the recipe's `data` for this stage."""
    rewards: list[RewardConfig] | None = None
    """Replaces the recipe's `rewards` for this stage."""
    micro_batch_size: Count = 8
    """Rows in one forward and backward pass of one rank."""
    batch_selector: BatchSelectors | None = None
    """Chooses the rows of a step (grpo: its completions) that are trained on, before backward; a list: each chooses
    from what the one before kept."""
    signals: SignalsConfig = SignalsConfig()
    """How rows are scored for the batch selector."""
    selection: SelectionConfig = SelectionConfig()
    """What choosing rows may cost, and what becomes of completions that teach nothing."""
    eval: EvalConfig | None = None
    """Evaluation on the held-out rows; null: where there are any, before and after the stage."""
    trainer: dict[str, Any] = {}
    """Options of TRL's config class (SFTConfig, DPOConfig, GRPOConfig), passed through."""

    @model_validator(mode="before")
    @classmethod
    def named_by_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") is None and isinstance(data.get("kind"), str):
            return {**data, "name": data["kind"]}
        return data

    @property
    def batch_selectors(self) -> list[BatchSelectorConfig]:
        """The chain of batch selectors, in order; none: empty."""
        chosen = self.batch_selector
        return chosen if isinstance(chosen, list) else [chosen] if chosen else []

    @property
    def batch_selector_keys(self) -> list[Key]:
        """Where each of `batch_selectors` stands in the stage."""
        if isinstance(self.batch_selector, list):
            return [("batch_selector", index) for index in range(len(self.batch_selector))]
        return [("batch_selector",)] if self.batch_selector else []

    @property
    def temperature(self) -> float:
        """Of completions that are not greedy."""
        return 1.0

    def eval_sampling(self) -> dict[str, Any]:
        """How completions of held-out prompts are drawn: the fields of `siftrl.rollout.Sampling`."""
        settings = self.eval or EvalConfig()
        return {
            "max_tokens": settings.max_completion_tokens or EVAL_COMPLETION_TOKENS,
            "temperature": 0.0 if settings.greedy else self.temperature,
        }


class SFTStage(Stage):
    """Supervised fine-tuning on prompt and completion."""

    kind: Literal["sft"]
    rows_per_step: Count = 64
    """Rows of one optimizer step, over all ranks; with a batch selector: the rows that it chooses from."""


class DPOStage(Stage):
    """Direct preference optimization on pairs of a chosen and a rejected completion."""

    kind: Literal["dpo"]
    rows_per_step: Count = 64
    """Pairs of one optimizer step, over all ranks; with a batch selector: the pairs that it chooses from."""


class GRPOStage(Stage):
    """Group relative policy optimization: reinforcement learning from rewards."""

    kind: Literal["grpo"]
    prompts_per_step: Count = 16
    """Prompts rolled out in one step, over all ranks."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Completions of one prompt: the group that advantages are relative to."""
    optimizer_steps_per_rollout: Count = 1
    prompt_selector: SelectorConfig | None = None
    """Chooses the prompts of a step before the rollouts; null: the data set's shuffled order, as TRL does."""
    rollout: RolloutConfig = RolloutConfig()

    @property
    def temperature(self) -> float:
        return self.rollout.temperature

    def eval_sampling(self) -> dict[str, Any]:
        rollout = self.rollout
        return super().eval_sampling() | {
            "max_tokens": rollout.max_completion_tokens,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "min_p": rollout.min_p,
            "repetition_penalty": rollout.repetition_penalty,
        }


AnyStage = Annotated[SFTStage | DPOStage | GRPOStage, Field(discriminator="kind")]


class Recipe(Section):
    """A siftrl recipe: a model, data, rewards, and the stages of training."""

    name: Name = "run"
    """The run folder's name; by default the recipe file's."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig
    data: DataConfig | None = None
    rewards: list[RewardConfig] = []
    stages: Annotated[list[AnyStage], Field(min_length=1)]
    distribution: DistributionConfig = DistributionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig = OutputConfig()

    def data_of(self, stage: Stage) -> DataConfig:
        """The stage's own data, or the recipe's."""
        data = stage.data or self.data
        assert data is not None, "check_recipe lets no stage without data through"
        return data

    def rewards_of(self, stage: Stage) -> list[RewardConfig]:
        """The stage's own rewards, or the recipe's."""
        return self.rewards if stage.rewards is None else stage.rewards

    def measures_rewards(self, stage: AnyStage) -> bool:
        """Whether the stage's evaluation generates completions: grpo always, sft where its `eval` is written."""
        return stage.kind == "grpo" or (stage.kind == "sft" and stage.eval is not None and bool(self.rewards_of(stage)))

    @property
    def run_folder(self) -> Path:
        return Path(self.output.dir) / self.name


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_ranks: int | None = None,
    check_installed: bool = True,
) -> Recipe:
    """Read a recipe and check it against everything that can be known without torch.

    overrides: `key.path=value`, the value in YAML; a list's items by index, or stages by name: `stages.warmup.…`.
    num_ranks: processes that the recipe will run on; None: as many as the launcher says, else one.
    check_installed: also require the packages that the recipe needs (vllm, deepspeed, ...).
    Raises RecipeError, one line: the file, the key, what is wrong, what to write.
    """
    document = read_yaml(Path(path))
    apply_overrides(document, overrides)
    if document.data.get("name") is None:
        document.data["name"] = Path(path).stem
    try:
        recipe = Recipe.model_validate(document.data)
        check_recipe(recipe, world_size=num_ranks or world_size(), check_installed=check_installed)
    except ValidationError as error:
        raise RecipeError(document.located(*describe_error(error, document.data, Recipe))) from None
    except RecipeError as error:
        raise RecipeError(document.located(error.key, error.problem)) from None
    return recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe, defaults included, as plain data; it loads again to an equal recipe."""
    return recipe.model_dump(mode="python")


def dump(recipe: Recipe) -> str:
    """`resolved(recipe)` as YAML."""
    return dump_yaml(resolved(recipe))
