"""The data sets that `siftrl eval` measures on: a recipe's held-out rows, `--data`, or a suite's. Free of torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from siftrl.eval_arguments import GYM_ROWS
from siftrl.recipe import AnyStage, DataConfig, ModelConfig, RewardConfig
from siftrl.recipe_checks import check_measured
from siftrl.recipe_sections import Section
from siftrl.recipe_text import Key, RecipeError, describe_error, dotted, parse_yaml, read_yaml

FLAGS = {
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
class Target:
    """What the target says, before the flags: of a recipe's stage, or the defaults for a model."""

    model: ModelConfig
    measured: Measured | None = None
    rewards: list[RewardConfig] | None = None
    stage: AnyStage | None = None
    seed: int = 0


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


def data_sets(args: argparse.Namespace, base: Target) -> list[Measured]:
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


def _data(text: str, args: argparse.Namespace, base: Target, given: list[RewardConfig]) -> Measured:
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
    return Measured(name, data, given or base.rewards or [], flags=FLAGS)


def _suite(args: argparse.Namespace, base: Target, given: list[RewardConfig]) -> list[Measured]:
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


def _asked(args: argparse.Namespace, base: Target) -> dict[str, Any]:
    """How the model is asked: by the flags, or as the recipe asks it."""
    recipe = base.measured.data if base.measured else None
    chat = bool(args.chat) or (recipe is not None and recipe.chat)
    system = args.system_prompt if args.system_prompt is not None or recipe is None else recipe.system_prompt
    return {"chat": chat, "system_prompt": system}


def _reward(text: str) -> RewardConfig:
    return _validated(RewardConfig, yaml_of(text, "--reward"), "--reward")


def _validated(model: type[BaseModel], data: Any, flag: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        key, problem = describe_error(error, data, model)
        raise RecipeError(f"{dotted(key)}: {problem}" if key and key != ("name",) else problem, flag) from None


def yaml_of(text: str, flag: str) -> Any:
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
