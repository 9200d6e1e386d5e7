"""`siftrl eval`, read and checked: which model, on which rows, with which rewards and settings. Free of torch.

What is measured comes from a recipe (or a run's), from flags, or from a suite file with a list of data sets; a flag
goes before what the recipe says.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from siftrl.eval_arguments import GYM_ROWS
from siftrl.preflight import check_evaluation
from siftrl.recipe import AnyStage, DataConfig, EvalConfig, GRPOStage, ModelConfig, Recipe, RewardConfig, load_recipe
from siftrl.recipe_checks import check_measured, require_installed
from siftrl.recipe_sections import Section
from siftrl.recipe_text import (
    Document,
    Key,
    RecipeError,
    apply_overrides,
    choose,
    describe_error,
    dotted,
    parse_yaml,
    read_yaml,
)

_MADE_BY_SIFTRL = {
    "model": "MODEL",
    "tokenizer": "MODEL",
    "revision": "model.revision=...",
    "trust_remote_code": "model.trust_remote_code=true",
    "seed": "--seed",
}
"""Arguments of vllm.LLM that are set by siftrl, and what to write instead."""
_FLAGS = {
    "model.path": "MODEL",
    "rewards": "--reward",
    "data.path": "--data",
    "data.reasoning_gym": "--data",
    "data.split": "--split",
    "data.prompt": "--prompt",
    "data.prompt_template": "--prompt-template",
    "data.chat": "--chat",
    "data.system_prompt": "--system-prompt",
    "data.limit": "--limit",
}
"""The flag that says what a recipe's key says, for messages."""
_OF_DATA = ("split", "prompt", "prompt_template", "chat", "system_prompt")
"""Flags that say how `--data` is read."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows to measure on, with their rewards.

    held_out: the rows that `data.eval` holds out of `data`; else `data`'s own. limit: only so many of them.
    stage: whose rows they are; None: rows of no recipe. flags: where keys of `data` are said: {"data.path": "--data"}.
    """

    name: str
    data: DataConfig
    rewards: list[RewardConfig]
    held_out: bool = False
    limit: int | None = None
    stage: AnyStage | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["sft", "dpo", "grpo"]:
        return self.stage.kind if self.stage else "grpo"


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """sampling: the fields of `siftrl.rollout.Sampling`. ks: which pass@k to report; []: the powers of 2.

    stage: the recipe's stage whose settings count. The model is then loaded as its trainer loads it, so that the
    figures are those that `siftrl train` prints.
    """

    model: ModelConfig
    sets: list[Measured]
    sampling: dict[str, Any]
    samples: int
    ks: list[int]
    batch_size: int
    seed: int
    engine: Literal["transformers", "vllm"]
    engine_args: dict[str, Any]
    stage: AnyStage | None
    out: Path | None
    json: str | None


class SuiteEntry(DataConfig):
    """A data set of a suite: the keys of a recipe's `data`, and these."""

    name: str | None = None
    """What the table calls it; null: its path."""
    split: str = "test"
    rewards: list[RewardConfig] | None = None
    """null: the suite's own, or else `--reward`, or the recipe's."""


class Suite(Section):
    """Data sets to measure on."""

    data: list[SuiteEntry] = Field(min_length=1)
    rewards: list[RewardConfig] | None = None
    """Rewards of every data set that has none of its own."""


class _Model(Section):
    """What key=value may set where MODEL is a model."""

    model: ModelConfig


# -------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True)
class _Base:
    """What the target says, before the flags: of a recipe's stage, or the defaults for a model."""

    model: ModelConfig
    measured: Measured | None = None
    rewards: list[RewardConfig] | None = None
    stage: AnyStage | None = None
    seed: int = 0


def make_plan(args: argparse.Namespace, find_recipe: Callable[[str], Path]) -> EvalPlan:
    """What the arguments of `siftrl eval` mean.

    find_recipe: a recipe's file by its name. Raises RecipeError, one line that names the flag or the key.
    """
    base = _base(args, find_recipe)
    stage = base.stage
    settings = (stage.eval if stage else None) or EvalConfig()
    sampling = stage.eval_sampling() if stage else {"max_tokens": 512, "temperature": 0.0}
    samples = args.samples or settings.samples
    if args.temperature is not None:
        sampling["temperature"] = args.temperature
    elif samples > 1 and not sampling["temperature"]:
        sampling["temperature"] = stage.temperature if stage else 1.0
    if args.max_tokens is not None:
        sampling["max_tokens"] = args.max_tokens
    if samples > 1 and sampling["temperature"] == 0:
        raise RecipeError(f"{samples} greedy completions are all the same; raise --temperature", "--samples")
    if args.k and args.k[-1] > samples:
        raise RecipeError(f"pass@{args.k[-1]} needs --samples {args.k[-1]} or more, not {samples}", "--k")
    rollout = stage.rollout if isinstance(stage, GRPOStage) else None
    engine = args.engine or (rollout.engine if rollout else "transformers")
    if engine == "vllm":
        require_installed("vllm", "--engine")
    elif args.engine_arg:
        raise RecipeError("is for vllm; write --engine vllm", "--engine-arg")
    engine_args: dict[str, Any] = {}
    if rollout is not None and rollout.engine == engine == "vllm":
        own = {name: getattr(rollout, name) for name in ("gpu_memory_utilization", "tensor_parallel_size")}
        engine_args = own | ({"max_model_len": rollout.max_model_len} if rollout.max_model_len else {})
        engine_args |= rollout.engine_args
    return EvalPlan(
        model=base.model,
        sets=_sets(args, base),
        sampling=sampling,
        samples=samples,
        ks=args.k,
        batch_size=args.batch_size or settings.batch_size,
        seed=base.seed if args.seed is None else args.seed,
        engine=engine,
        engine_args=engine_args | _engine_args(args.engine_arg),
        stage=stage,
        out=args.out,
        json=args.json,
    )


def look_at(plan: EvalPlan) -> list[str]:
    """Look at the model's folder and at the first rows of each data set, before anything is loaded.

    Returns a line for each thing that was not checked. Raises RecipeError that names the flag or the key.
    """
    lines: list[str] = []
    of_model = {"max_tokens": "--max-tokens"} | ({} if plan.stage else {"model.path": "MODEL"})
    assert plan.model.path is not None
    for one in plan.sets:
        data, names = one.data, of_model | dict(one.flags)
        if one.held_out:
            data = held_out_alone(data) or data
            if one.data.eval is not None and one.data.eval.path is not None:
                names |= {"data.path": "data.eval.path", "data.split": "data.eval.split"}
        try:
            lines += check_evaluation(
                plan.model.path, data, one.rewards, names, kind=one.kind, max_tokens=plan.sampling["max_tokens"]
            )
        except RecipeError as error:
            is_named = len(plan.sets) > 1 and not dotted(error.key).startswith(("MODEL", "--max"))
            raise RecipeError(f"{one.name}: {error.problem}" if is_named else error.problem, *error.key) from None
    return list(dict.fromkeys(lines))


def _base(args: argparse.Namespace, find_recipe: Callable[[str], Path]) -> _Base:
    folder, recipe_file = Path(args.target), find_recipe(args.target)
    run = folder if (folder / "recipe.yaml").is_file() else None
    if run is None and not recipe_file.is_file() and recipe_file.suffix not in (".yaml", ".yml"):
        if args.stage is not None:
            raise RecipeError("is for a recipe or a run; this is a model", "--stage")
        return _Base(_model(args.target, args.overrides))
    path = recipe_file if run is None else run / "recipe.yaml"
    recipe = load_recipe(path, args.overrides, num_ranks=_ranks(run), check_installed=False)
    stage = _stage(recipe, args.stage)
    data, rewards = recipe.data_of(stage), recipe.rewards_of(stage)
    name = "held-out rows" if data.eval else "training rows"
    measured = Measured(name, data, rewards, data.eval is not None, args.limit, stage)
    return _Base(_recipe_model(recipe, run, args.stage), measured, rewards, stage, recipe.seed)


def _ranks(run: Path | None) -> int | None:
    """The processes that a run had: its recipe's arithmetic fits them."""
    path = run / "environment.json" if run else None
    return json.loads(path.read_text(encoding="utf-8"))["world_size"] if path and path.is_file() else None


def _stage(recipe: Recipe, name: str | None) -> AnyStage:
    """The stage whose settings count: the named one, or the last, where that one measures no rewards itself."""
    measuring = [stage for stage in recipe.stages if recipe.measures_rewards(stage)]
    last = measuring[-1] if measuring else recipe.stages[-1]
    if name is None:
        return last
    named = {stage.name: stage for stage in recipe.stages}
    if name not in named:
        raise RecipeError(f"there is no stage {name!r}{choose(name, named)}", "--stage")
    return named[name] if named[name] in measuring else last


def _recipe_model(recipe: Recipe, run: Path | None, stage: str | None) -> ModelConfig:
    if run is None:
        if recipe.model.scratch is not None:
            problem = "is made by `siftrl train`; train it and give the run's folder, or write model.path=FOLDER"
            raise RecipeError(problem, "model", "scratch")
        return recipe.model
    path = run / "model" if stage is None else run / "stages" / stage
    if not (path / "config.json").is_file():
        done = [each.name for each in recipe.stages if (run / "stages" / each.name / "config.json").is_file()]
        advice = f"; write --stage {done[-1]}" if done else "; no stage of it is done"
        raise RecipeError(f"{path} holds no model yet{advice}", "--stage" if stage else "RUN")
    here = {"path": str(path), "scratch": None, "revision": None, "quantize": None}  # adapters are merged
    return recipe.model.model_copy(update=here)


def _model(path: str, overrides: list[str]) -> ModelConfig:
    document = Document(Path(path), {"model": {"path": path}})
    apply_overrides(document, overrides)
    try:
        return _Model.model_validate(document.data).model
    except ValidationError as error:
        key, problem = describe_error(error, document.data, _Model)
        advice = "; a model has no recipe: set model.KEY, and say the rest by flags" if key[:1] != ("model",) else ""
        raise RecipeError(problem + advice, *key) from None


def _engine_args(texts: list[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RecipeError(f"{text!r} must be key=value, for example max_model_len=2048", "--engine-arg")
        if name in _MADE_BY_SIFTRL:
            raise RecipeError(f"{name} is set by siftrl; write {_MADE_BY_SIFTRL[name]} instead", "--engine-arg")
        found[name] = _yaml(value, "--engine-arg")
    return found


# -------------------------------------------------------------------------------------------------------- the data


def _sets(args: argparse.Namespace, base: _Base) -> list[Measured]:
    """The data sets, each with rewards, checked."""
    given = [_reward(text) for text in args.reward]
    if args.suite is not None and args.data:
        raise RecipeError("give --data or --suite, not both; a suite lists data sets under `data:`", "--suite")
    if args.suite is not None:
        _refuse(args, ("split", "prompt", "prompt_template"), "write it in the suite")
        sets = _suite(args, base, given)
    elif args.data:
        sets = [_data(text, args, base, given) for text in args.data]
    elif base.measured is not None:
        for name in _OF_DATA:
            key = "data.eval.split" if name == "split" else f"data.{name}"
            _refuse(args, (name,), f"is for --data; for the recipe's own rows write {key}=...")
        sets = [replace(base.measured, rewards=given or base.measured.rewards)]
    else:
        raise RecipeError("a model is measured on data: give --data or --suite", "--data")
    names = [one.name for one in sets]
    for one in sets:
        if names.count(one.name) > 1:
            raise RecipeError(f"{one.name!r} is there twice; name one: NAME={one.name}", "--data")
        if not one.rewards:
            where = "; what training measured of this run is in its summary.json" if base.stage else ""
            raise RecipeError(f"{one.name}: nothing says what is right: write --reward exact_match{where}", "--reward")
        try:
            check_measured(one.data, one.rewards)
        except RecipeError as error:
            named = RecipeError(error.problem, *flag_of(error.key, one.flags))
            raise RecipeError(f"{args.suite}: {one.name}: {named}" if args.suite else str(named)) from None
    return sets


def flag_of(key: Key, flags: Mapping[str, str]) -> Key:
    """The flag of the longest part of the key that has one, or else the key."""
    found = [flags[dotted(key[:end])] for end in range(len(key), 0, -1) if dotted(key[:end]) in flags]
    return (found[0],) if found else key


def _refuse(args: argparse.Namespace, flags: tuple[str, ...], advice: str) -> None:
    for name in flags:
        if getattr(args, name) is not None:
            raise RecipeError(advice, "--" + name.replace("_", "-"))


def _data(text: str, args: argparse.Namespace, base: _Base, given: list[RewardConfig]) -> Measured:
    """One `--data`."""
    named = None if Path(text).exists() else re.fullmatch(r"([\w.-]+)=(.+)", text)
    name, where = (named[1], named[2]) if named else (text, text)
    keys: dict[str, Any] = {"prompt": args.prompt, "prompt_template": args.prompt_template, "limit": args.limit}
    keys |= _asked(args, base)
    source, colon, family = where.partition(":")
    if colon and source == "reasoning_gym":
        keys["reasoning_gym"] = {"tasks": [{"name": family}], "size": args.limit or GYM_ROWS}
    else:
        keys |= {"path": where, "split": args.split or "test"}
    data = _validated(DataConfig, {key: value for key, value in keys.items() if value is not None}, "--data")
    return Measured(name, data, given or base.rewards or [], flags=_FLAGS)


def _suite(args: argparse.Namespace, base: _Base, given: list[RewardConfig]) -> list[Measured]:
    document = read_yaml(args.suite, "a list of data sets under `data:`")
    try:
        suite = Suite.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(document.located(*describe_error(error, document.data, Suite))) from None
    found = []
    for index, entry in enumerate(suite.data):
        if entry.eval is not None:
            problem = "holds rows out of training, and nothing is trained here; write `path` and `split`"
            raise RecipeError(document.located(("data", index, "eval"), problem))
        defaults = {"limit": args.limit} | _asked(args, base)
        data = entry.model_copy(update={key: v for key, v in defaults.items() if key not in entry.model_fields_set})
        gym = entry.reasoning_gym
        name = entry.name or entry.path or "+".join(task.name for task in (gym.tasks if gym else []))
        rewards = next(
            these for these in (entry.rewards, suite.rewards, given or base.rewards, []) if these is not None
        )
        found.append(Measured(name, data, rewards))
    return found


def _asked(args: argparse.Namespace, base: _Base) -> dict[str, Any]:
    """How the model is asked: by the flags, or as the recipe asks it."""
    recipe = base.measured.data if base.measured else None
    chat = bool(args.chat) or (recipe is not None and recipe.chat)
    system = args.system_prompt if args.system_prompt is not None or recipe is None else recipe.system_prompt
    return {"chat": chat, "system_prompt": system}


def _reward(text: str) -> RewardConfig:
    return _validated(RewardConfig, _yaml(text, "--reward"), "--reward")


def _validated(model: type[BaseModel], data: Any, flag: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        key, problem = describe_error(error, data, model)
        raise RecipeError(f"{dotted(key)}: {problem}" if key and key != ("name",) else problem, flag) from None


def _yaml(text: str, flag: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r} is not YAML; put texts with special characters in quotes", flag) from None


def held_out_alone(data: DataConfig) -> DataConfig | None:
    """The rows that `data` holds out as a data set of their own, where they can be read without the training rows.

    None where they are the last ones of the training set.
    """
    held, gym = data.eval, data.reasoning_gym
    assert held is not None
    own: dict[str, Any] = {"eval": None, "limit": None, "source": None}
    if held.path is not None:
        where = {"path": held.path, "config": held.config, "split": held.split, "revision": held.revision}
        return data.model_copy(update=own | where | {"reasoning_gym": None, "limit": held.size})
    if gym is None:
        return None
    seed = gym.seed + 1 if held.seed is None else held.seed
    return data.model_copy(update=own | {"reasoning_gym": gym.model_copy(update={"size": held.size, "seed": seed})})
