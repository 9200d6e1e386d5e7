"""The recipe as text: YAML with line numbers, `key.path=value` overrides, and one-line errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

Key = tuple[str | int, ...]
"""The path of a value in a recipe: ("stages", 1, "trainer", "max_steps")."""


class RecipeError(ValueError):
    """A mistake in a recipe: what is wrong, where, and what to write instead."""

    def __init__(self, problem: str, *key: str | int) -> None:
        super().__init__(f"{dotted(key)}: {problem}" if key else problem)
        self.problem = problem
        self.key = key


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def near(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" when one of the known words is near, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def choose(word: str, known: Iterable[str]) -> str:
    """The near word, or else all known ones."""
    known = sorted(known)
    return near(word, known) or f"; write one of {', '.join(known)}"


# YAML 1.2's core schema: PyYAML reads 1e-4 as text, `eval_strategy: no` as False, and 2024-01-01 as a date.
_RESOLVERS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def dump_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


@dataclass
class Document:
    """A recipe file's content, the line of each key, and the overrides that were applied."""

    path: Path
    data: Any
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)

    def located(self, key: Key, problem: str) -> str:
        """One line: the file, the line (or the override) that holds the key, the key, the problem."""
        text = f"{dotted(key)}: {problem}" if key else problem
        for end in range(len(key), 0, -1):
            if key[:end] in self.overrides:
                return f"{self.path} with {self.overrides[key[:end]]}: {text}"
            if key[:end] in self.lines:
                return f"{self.path}:{self.lines[key[:end]]}: {text}"
        return f"{self.path}: {text}"


def read_yaml(path: Path, needs: str = "`model:` and `stages:`") -> Document:
    """Read a YAML file; a repeated key or a key that is not text is an error. needs: its keys, for messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; `siftrl list recipes` shows those that come with siftrl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    loader = _Loader(text)
    document = Document(path, {})
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{path}: the file is empty; it needs {needs}")
        _read_lines(node, (), document)
        document.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: must be a mapping with {needs}, not {kind_of(document.data)}")
    return document


def _read_lines(node: yaml.Node, key: Key, document: Document) -> None:
    """Record the line of every key below `node`."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[*key, index] = item.start_mark.line + 1
            _read_lines(item, (*key, index), document)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for name, value in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            line = name.start_mark.line + 1
            if name.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{document.path}:{line}: the key {name.value} is not text; put it in quotes")
            if name.value in seen:
                first = document.lines[*key, name.value]
                raise RecipeError(
                    f"{document.path}:{line}: {dotted((*key, name.value))}: is there twice (first on line {first}); "
                    "remove one"
                )
            seen.add(name.value)
            document.lines[*key, name.value] = line
            _read_lines(value, (*key, name.value), document)


_PLUGINS = ("prompt_selector", "batch_selector", "rewards")
"""Keys whose sections, or whose items, have a short form: a plugin's name alone."""


def apply_overrides(document: Document, overrides: Iterable[str]) -> None:
    """Set `key.path=value` in the document's data. Lists are entered by index, or by the `name` of an item."""
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise RecipeError(f"override {text!r}: write key.path=value, for example stages.0.trainer.max_steps=10")
        try:
            parsed = parse_yaml(value)
        except yaml.YAMLError:
            raise RecipeError(f"override {text!r}: the value is not YAML; put it in quotes") from None
        target: Any = document.data
        key: Key = ()
        *parents, last = path.split(".")
        for part in parents:
            step = _item(target, part, text, key) if isinstance(target, list) else part
            inner = target.get(step) if isinstance(target, dict) else target[step]
            if inner is None:
                inner = {}
            elif isinstance(inner, str) and (step in _PLUGINS or isinstance(target, list) and key[-1] in _PLUGINS):
                inner = {"name": inner}  # the short form of a plugin
            key = (*key, step)
            if not isinstance(inner, (dict, list)):
                raise RecipeError(f"override {text!r}: {dotted(key)} is {kind_of(inner)}, nothing lies below it")
            target[step] = inner
            target = inner
        step = _item(target, last, text, key) if isinstance(target, list) else last
        target[step] = parsed
        key = (*key, step)
        document.overrides[key] = text


def located(path: Path, overrides: Iterable[str], error: RecipeError) -> str:
    """The error of a check of a whole recipe, with the file and the line, or the override, that holds its key."""
    document = read_yaml(path)
    apply_overrides(document, overrides)
    return document.located(error.key, error.problem)


def _item(items: list[Any], part: str, text: str, key: Key) -> int:
    """The index of the list's item that `part` means: a number, or the item's name (a stage's name or kind)."""
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [item.get("name") or item.get("kind") if isinstance(item, dict) else item for item in items]
    if names.count(part) == 1:
        return names.index(part)
    if part in names:
        raise RecipeError(f"override {text!r}: {dotted(key)} has several items {part!r}; use the index")
    known = [str(name) for name in names if name] + [str(index) for index in range(len(items))]
    raise RecipeError(f"override {text!r}: {dotted(key)} has no item {part!r}{choose(part, known)}")


def kind_of(value: Any) -> str:
    """What a YAML value is, in a recipe writer's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return "a list" if isinstance(value, (list, tuple)) else "a mapping"


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
}


def describe_error(error: ValidationError, data: Any, model: type[BaseModel]) -> tuple[Key, str]:
    """A pydantic error as (key, problem). Of several the unknown key comes first: it often explains the others."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = _data_key(first["loc"], data, first["type"])
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return key, "unknown key" + near(str(key[-1]), _known_keys(model, key, data))
    if kind == "missing":
        return key, "is required"
    if kind == "value_error":
        cause = context["error"]
        return (*key, *getattr(cause, "key", ())), getattr(cause, "problem", str(cause))
    if kind == "literal_error":
        known = [text.strip("' ") for text in re.split(r", | or ", context["expected"])]
        return key, f"must be {' or '.join(known)}, not {kind_of(value)}{near(str(value), known)}"
    if kind.startswith("union_tag"):
        key = (*key, "kind")
        known = [text.strip("' ") for text in context.get("expected_tags", "sft, grpo").split(",")]
        tag = context.get("tag")
        return key, (f"must be {' or '.join(known)}, not {tag!r}{near(str(tag), known)}" if tag else "is required")
    if kind == "too_short":
        return key, "is empty; write at least one item"
    if kind == "string_pattern_mismatch":
        return key, f"{value!r} must be letters, digits, '.', '_' and '-', and not a number: it names a folder"
    if kind in _WANTED:
        unquoted = parse_yaml(value) if isinstance(value, str) and re.fullmatch(r"[-+.\w]+", value) else None
        types: dict[str, Any] = {"int_type": int, "float_type": (int, float), "bool_type": bool}
        fits = types.get(kind)
        hint = f"; write {value} without quotes" if fits and isinstance(unquoted, fits) else ""
        return key, f"must be {_WANTED[kind]}, not {kind_of(value)}{hint}"
    return key, first["msg"].replace("Input should be", "must be") + f", not {kind_of(value)}"


def _data_key(loc: tuple[str | int, ...], data: Any, kind: str) -> Key:
    """pydantic's location without the tags of unions, which are no keys of the recipe."""
    key: Key = ()
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        inside = isinstance(data, dict) and part in data or isinstance(data, list) and isinstance(part, int)
        if inside or (last and kind == "missing"):
            key = (*key, part)
            data = data[part] if inside else None
    return key


def _known_keys(model: type[BaseModel], key: Key, data: Any) -> list[str]:
    """The keys allowed in the section that holds `key`."""
    models = [model]
    for part in key[:-1]:
        data = data[part]
        if isinstance(part, str):
            models = [
                inner
                for outer in models
                if part in outer.model_fields
                for inner in _models_in(outer.model_fields[part].annotation)
            ]
        if isinstance(data, dict) and "kind" in data:
            models = [m for m in models if data["kind"] in get_args(m.model_fields["kind"].annotation)]
    return [name for known in models for name in known.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
