"""DeepSpeed's settings for a recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftrl.recipe_text import RecipeError, near

if TYPE_CHECKING:
    from siftrl.recipe import Recipe

BUILT_IN = Path(__file__).parent / "recipes" / "deepspeed"
"""zero1.json, zero2.json, zero3.json."""


def deepspeed_config(recipe: Recipe, cpu: bool = False) -> dict[str, Any] | None:
    """The settings that `distribution.deepspeed` names, as a dict for the trainer; None without DeepSpeed.

    The built-in settings hold no optimizer, so that the trainer's `optim` option is the one that counts.
    cpu: train on CPUs, where DeepSpeed's own Adam is not built: ask for torch's wherever DeepSpeed makes one.
    Raises RecipeError when the name or the file does not exist or is no JSON object.
    """
    wanted = recipe.distribution.deepspeed
    if wanted is None:
        return None
    config = copy.deepcopy(wanted) if isinstance(wanted, dict) else _read(wanted)
    if cpu:
        config["zero_force_ds_cpu_optimizer"] = False
        if "adam" in config.get("optimizer", {}).get("type", "").lower():
            config["optimizer"].setdefault("params", {})["torch_adam"] = True
    return config


def _read(name: str) -> dict[str, Any]:
    key = ("distribution", "deepspeed")
    built_in = sorted(path.stem for path in BUILT_IN.glob("*.json"))
    path = BUILT_IN / f"{name}.json" if name in built_in else Path(name)
    if not path.is_file():
        hint = near(name, built_in) or f"; write {', '.join(built_in)}, the path of a JSON file, or the settings"
        raise RecipeError(f"no settings and no file {name!r}{hint}", *key)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{name}: not JSON: {error}", *key) from None
    if not isinstance(config, dict):
        raise RecipeError(f"{name}: must hold a JSON object", *key)
    return config
