"""`siftrl eval`, read and checked: which model, on which rows, with which rewards and settings. Free of torch.

What is measured comes from a recipe (or a run's), from flags, or from a suite file with a list of data sets; a flag
goes before what the recipe says.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from siftrl.eval_sets import Measured, Target, data_sets, held_out_alone, yaml_of
from siftrl.preflight import check_evaluation
from siftrl.recipe import AnyStage, EvalConfig, GRPOStage, ModelConfig, Recipe, load_recipe
from siftrl.recipe_checks import require_installed
from siftrl.recipe_sections import Section
from siftrl.recipe_text import (
    Document,
    RecipeError,
    apply_overrides,
    choose,
    describe_error,
    dotted,
)

_MADE_BY_SIFTRL = {
    "model": "MODEL",
    "tokenizer": "MODEL",
    "revision": "model.revision=...",
    "trust_remote_code": "model.trust_remote_code=true",
    "seed": "--seed",
}
"""Arguments of vllm.LLM that are set by siftrl, and what to write instead."""


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


class _Model(Section):
    """What key=value may set where MODEL is a model."""

    model: ModelConfig


# -------------------------------------------------------------------------------------------------------- the plan


def make_plan(args: argparse.Namespace, find_recipe: Callable[[str], Path]) -> EvalPlan:
    """What the arguments of `siftrl eval` mean.

    find_recipe: a recipe's file by its name. Raises RecipeError, one line that names the flag or the key.
    """
    _check_output(args.out, "--out")
    _check_output(None if args.json in (None, "-") else Path(args.json), "--json")
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
        sets=data_sets(args, base),
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


def _check_output(path: Path | None, flag: str) -> None:
    """What cannot be written is said now, not after the last completion."""
    if path is None:
        return
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; write a file's name", flag)
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RecipeError(f"{there} is no folder that can be written to; write another", flag)


def _base(args: argparse.Namespace, find_recipe: Callable[[str], Path]) -> Target:
    folder, recipe_file = Path(args.target), find_recipe(args.target)
    run = folder if (folder / "recipe.yaml").is_file() else None
    if run is None and not recipe_file.is_file() and recipe_file.suffix not in (".yaml", ".yml"):
        if args.stage is not None:
            raise RecipeError("is for a recipe or a run; this is a model", "--stage")
        return Target(_model(args.target, args.overrides))
    path = recipe_file if run is None else run / "recipe.yaml"
    recipe = load_recipe(path, args.overrides, num_ranks=_ranks(run), check_installed=False)
    stage = _stage(recipe, args.stage)
    data, rewards = recipe.data_of(stage), recipe.rewards_of(stage)
    name = "held-out rows" if data.eval else "training rows"
    measured = Measured(name, data, rewards, data.eval is not None, args.limit, stage)
    return Target(_recipe_model(recipe, run, args.stage), measured, rewards, stage, recipe.seed)


def _ranks(run: Path | None) -> int | None:
    """The processes that a run had: its recipe's arithmetic fits them."""
    path = run / "environment.json" if run else None
    return json.loads(path.read_text(encoding="utf-8")).get("world_size") if path and path.is_file() else None


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
        found[name] = yaml_of(value, "--engine-arg")
    return found
