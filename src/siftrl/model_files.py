"""A model's local folder, looked at before anything is loaded. This module must stay free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftrl.recipe_text import Key, RecipeError, dotted

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab*", "tekken.json", "*.tiktoken", "tokenization_*.py")
_CHAT_TEMPLATES = ("chat_template.*", "additional_chat_templates")
_POSITIONS = ("max_position_embeddings", "n_positions")
_STRETCHED = ("linear", "dynamic", "yarn")  # whose factor is not in max_position_embeddings already, or may not be


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model's folder says of it.

    positions: the longest sequence; None where its configuration names none. chat_template: whether its tokenizer has
    one.
    """

    positions: int | None
    chat_template: bool


def check_model(path: str, key: Key, lines: list[str], *, tokenizer: bool = True) -> ModelFiles | None:
    """Check a model's folder; None, with a line in `lines`, for what must be a hub name.

    tokenizer: the folder's tokenizer is needed as well. Raises RecipeError with the key.
    """
    folder = Path(path)
    if path.startswith("~"):
        raise RecipeError(f"transformers does not read '~'; write {Path(path).expanduser()}", *key)
    if not folder.exists():
        if path.startswith((".", "/")) or path.count("/") > 1:
            raise RecipeError(f"there is no folder {path}", *key)
        lines.append(f"not checked: {dotted(key)}: {path} is taken for a hub name: its files, its context")
        return None
    if not folder.is_dir():
        raise RecipeError(f"{path} is a file; write the folder that holds the model", *key)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").exists():
            problem = f"{path} holds a LoRA adapter without its base model; merge it into the base first"
            raise RecipeError(f"{problem} (peft: merge_and_unload, then save_pretrained)", *key)
        below = sorted(file.parent.name for file in folder.glob("*/config.json"))
        hint = f"; its folder {below[0]} does: write {folder / below[0]}" if below else ""
        raise RecipeError(f"{path} holds no config.json, so it is no model's folder{hint}", *key)
    if not _holds(folder, _WEIGHTS):
        raise RecipeError(f"{path} holds no weights (model.safetensors)", *key)
    if tokenizer and not _holds(folder, _TOKENIZERS):
        problem = f"{path} holds no tokenizer (tokenizer.json, tokenizer_config.json)"
        raise RecipeError(f"{problem}; put the files of the model's own tokenizer beside it", *key)
    settings = _read(folder / "tokenizer_config.json", key) if (folder / "tokenizer_config.json").is_file() else {}
    has_template = bool(settings.get("chat_template")) or _holds(
        folder, ("chat_template.*", "additional_chat_templates")
    )
    return ModelFiles(_positions(_read(folder / "config.json", key)), has_template)


def _read(file: Path, key: Key) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file}: is no JSON: {error}", *key) from None


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that a configuration allows; None where it names none, as recurrent models and ALiBi do."""
    config = config.get("text_config") or config
    positions = next((config[name] for name in _POSITIONS if config.get(name)), None)
    if positions is None or config.get("alibi"):
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) in _STRETCHED:
        whole = rope.get("original_max_position_embeddings") or positions
        return max(positions, int(whole * (rope.get("factor") or 1)))
    return int(positions)
