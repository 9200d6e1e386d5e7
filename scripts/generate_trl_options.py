"""Write src/siftrl/trl_options.json from the installed TRL: python scripts/generate_trl_options.py"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path

from trl import DPOConfig, GRPOConfig, SFTConfig

TARGET = Path(__file__).parents[1] / "src" / "siftrl" / "trl_options.json"
# Declared narrower than what TRL's documentation and __post_init__ accept.
WIDER = {"scale_rewards": "bool | str"}


def type_text(annotation: object) -> tuple[str, list[str]]:
    """The annotation as text, in builtins, Any and Literal only; and the values of the enums in it."""
    parts = typing.get_args(annotation) if is_union(annotation) else (annotation,)
    texts, choices = [], []
    for part in parts:
        if part is type(None):
            texts.append("None")
        elif isinstance(part, type) and issubclass(part, enum.Enum):
            choices += [str(member.value) for member in part]
        elif typing.get_origin(part) is list and typing.get_args(part)[0].__module__ != "builtins":
            texts.append("list[str]")
        elif typing.get_origin(part) is not None:
            texts.append(str(part).replace("typing.", ""))
        elif part.__module__ == "builtins":
            texts.append(part.__name__)
        # Any other class cannot be written in YAML.
    texts.sort(key=lambda text: text == "None")
    return " | ".join(texts), choices


def is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def options(config: type) -> dict[str, dict[str, object]]:
    hints = typing.get_type_hints(config)
    listed: dict[str, dict[str, object]] = {}
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name):
        text, choices = type_text(hints[field.name])
        option: dict[str, object] = {"type": WIDER.get(field.name, text)}
        default = field.default.value if isinstance(field.default, enum.Enum) else field.default
        if isinstance(default, (str, int, float, bool, type(None))):
            option["default"] = default
        if choices:
            option["choices"] = choices
        listed[field.name] = option
    return listed


def render() -> str:
    """The JSON text: one line an option."""
    kinds = []
    for kind, config in (("sft", SFTConfig), ("dpo", DPOConfig), ("grpo", GRPOConfig)):
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(o)}" for name, o in options(config).items())
        kinds.append(f'  "{kind}": {{\n{lines}\n  }}')
    return "{\n" + ",\n".join(kinds) + "\n}\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")
