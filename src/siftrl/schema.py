"""The recipe's JSON schema, for editors. This module must stay free of torch.

An editor that knows the YAML language server checks and completes a recipe that begins with the line
`# yaml-language-server: $schema=recipe.schema.json`, where `siftrl schema > recipe.schema.json` made that file.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from siftrl import plugins
from siftrl.recipe import Recipe
from siftrl.trl_options import OWNED, option_type, trl_options


def recipe_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of recipes, with the keys of every selector, reward and TRL option."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    keep = definitions["BatchSelectorConfig"]["properties"]["keep"]
    definitions["SelectorConfig"] = _selectors("prompt", {}, definitions)
    definitions["BatchSelectorConfig"] = _selectors("batch", {"keep": keep}, definitions)
    reward = definitions["RewardConfig"]
    with_options = [
        {"properties": {"name": {"const": name}, "options": _plugin("reward", name, definitions)}}
        for name in plugins.names("reward")
    ]
    names = _names(plugins.names("reward"))
    definitions["RewardConfig"] = {"anyOf": [names, {**reward, "anyOf": [*with_options, _external({})]}]}
    for kind, stage in (("sft", "SFTStage"), ("dpo", "DPOStage"), ("grpo", "GRPOStage")):
        definitions[stage]["properties"]["trainer"] = _trainer(kind)
    return schema


def _names(names: list[str]) -> dict[str, Any]:
    """The short form: a plugin's name alone."""
    return {"anyOf": [{"enum": names}, {"type": "string", "pattern": ":"}]}


def _external(properties: dict[str, Any]) -> dict[str, Any]:
    """A section that names a `package.module:Object`, whose keys the schema does not know."""
    name = {"type": "string", "pattern": ":"}
    return {"type": "object", "properties": {"name": name, **properties}, "required": ["name"]}


def _selectors(role: str, keys: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The selectors of a role, by name or as sections. keys: those that each takes beside `name` and its own."""
    names = [name for name in plugins.names("selector") if plugins.find("selector", name).role == role]
    sections = []
    for name in names:
        section = _plugin("selector", name, definitions)
        section["properties"] = {"name": {"const": name}, **keys, **section["properties"]}
        section["required"] = ["name", *section.get("required", [])]
        sections.append(section)
    return {"anyOf": [_names(names), *sections, _external(keys)]}


def _plugin(kind: plugins.Kind, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a plugin's options; nested sections move to the recipe's own definitions."""
    model: type[BaseModel] = plugins.option_model(kind, name)
    section = model.model_json_schema()
    definitions.update(section.pop("$defs", {}))
    section.setdefault("properties", {})
    section["description"] = plugins.find(kind, name).summary
    return section


def _trainer(kind: str) -> dict[str, Any]:
    properties = {}
    for name, option in trl_options(kind).items():
        if name in OWNED[kind]:
            continue
        section = {"enum": option["choices"]} if "choices" in option else option_type(option["type"]).json_schema()
        properties[name] = section | ({"default": option["default"]} if "default" in option else {})
    return {"type": "object", "properties": properties, "additionalProperties": False, "description": "TRL's options."}
