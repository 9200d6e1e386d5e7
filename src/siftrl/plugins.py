"""Plugins by name: selectors and rewards.

A plugin is `siftrl/selectors/NAME.py` or `siftrl/rewards/NAME.py` (the file's name is the plugin's name) or any
`package.module:Object`. Its options, the recipe's keys, are the fields of its dataclass, checked from the source, so
before torch is imported; `load` is what really imports it. This module must stay free of torch.

- A selector file holds one public dataclass with `propose` (a prompt selector) or `select` (a batch selector). A batch
  selector with `reads_rewards = True` in its class is for grpo stages only.
- A reward file holds one public dataclass with `__call__`, or a public function named like the file, whose options
  are its keyword-only parameters that have a default. Either has TRL's signature: (completions, **columns).
  `reads = ("answer",)` in its class names the columns that it reads; parameters without a default do so, too.
  `row_by_row = True` in its class says that it judges each completion by itself, so that a call may be split.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from siftrl.plugin_source import (
    FieldSource,
    Module,
    Unreadable,
    class_attribute,
    dataclass_fields,
    evaluate,
    find_module,
    function_options,
    is_dataclass,
    method,
    methods,
    parse,
    required_parameters,
)
from siftrl.plugin_stand_in import stand_in
from siftrl.recipe_text import RecipeError, choose, describe_error, near
from siftrl.reward_columns import TRL_ARGUMENTS

Kind = Literal["selector", "reward"]
ROLES = {"propose": "prompt", "select": "batch"}
"""A selector's method -> what it selects."""


class PluginError(RecipeError):
    """A mistake in a plugin's name or options; `key` is relative to the plugin's section of the recipe."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was found, not imported. node: its class or function; None where only importing tells."""

    name: str
    kind: Kind
    module: str
    symbol: str
    role: str
    """"prompt" or "batch" for selectors, "reward" for rewards."""
    source: Module | None = None
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None = None
    reads_rewards: bool = False
    """Whether it is a batch selector that reads rewards or advantages, which only the completions of grpo have."""
    row_by_row: bool = False
    """Whether it is a reward that judges each completion by itself, so that a call may be split."""
    reads: tuple[str, ...] | None = None
    """The columns that it reads, as it declares them (`columns_read` fills in its options); None: it does not."""

    @property
    def summary(self) -> str:
        """The first line of its docstring, or of its file's."""
        text = (ast.get_docstring(self.node) if self.node else "") or (self.source.docstring if self.source else "")
        return text.partition("\n")[0]

    @property
    def is_function(self) -> bool:
        """Whether it is a reward that is a function, which is called with its options and the columns alike."""
        return isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef))

    @property
    def fields(self) -> dict[str, FieldSource]:
        """Its options, in order."""
        if self.node is None or self.source is None:
            return {}
        if isinstance(self.node, ast.ClassDef):
            return dataclass_fields(self.node, self.source) if is_dataclass(self.node) else {}
        return function_options(self.node, self.source)


@dataclass(frozen=True, slots=True)
class Option:
    """One key of a plugin, as text."""

    name: str
    type: str
    default: str
    doc: str
    options: tuple[Option, ...] = ()
    """Those of a nested section."""


def folder(kind: Kind) -> Path:
    return Path(__file__).parent / f"{kind}s"


def names(kind: Kind) -> list[str]:
    """The plugins that lie in siftrl/selectors or siftrl/rewards."""
    return sorted(path.stem for path in folder(kind).glob("*.py") if not path.stem.startswith("_"))


def find(kind: Kind, name: str) -> Plugin:
    """Find a plugin without importing it.

    Raises PluginError (key "name") when there is none, naming the near ones.
    """
    try:
        return _find(kind, name)
    except Unreadable as error:
        raise PluginError(str(error), "name") from None


def _find(kind: Kind, name: str) -> Plugin:
    module_name, colon, symbol = name.partition(":")
    if colon:
        return _find_object(kind, name, module_name, symbol)
    if name not in names(kind):
        hint = near(name, names(kind)) or f"; write one of {', '.join(names(kind))}, or package.module:Name"
        raise PluginError(f"no {kind} {name!r}{hint}", "name")
    path = folder(kind) / f"{name}.py"
    source = parse(f"siftrl.{kind}s.{name}", path)
    wanted = set(ROLES) if kind == "selector" else {"__call__"}
    classes = [
        node
        for bound, node in source.statements.items()
        if isinstance(node, ast.ClassDef) and not bound.startswith("_") and is_dataclass(node)
        if wanted & methods(node, source)
    ]
    function = source.statements.get(name)
    if kind == "reward" and isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _reward_function(name, source.name, name, source, function)
    if len(classes) != 1:
        raise PluginError(
            f"{path} must hold one public @dataclass with {' or '.join(sorted(wanted))}, it has {len(classes)}", "name"
        )
    return _plugin_class(name, kind, source.name, classes[0].name, source, classes[0])


def _find_object(kind: Kind, name: str, module_name: str, symbol: str) -> Plugin:
    source = find_module(module_name)
    if source is None:
        raise PluginError(
            f"{name}: no Python source of module {module_name!r} is on the import path or in this folder", "name"
        )
    if symbol not in source.statements:
        public = [bound for bound in source.statements if not bound.startswith("_")]
        raise PluginError(f"{name}: {source.path} defines no {symbol!r}{choose(symbol, public)}", "name")
    where, node = source.resolve(symbol) or (source, None)
    if isinstance(node, ast.ClassDef):
        return _plugin_class(name, kind, module_name, symbol, where, node)
    if kind == "reward" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _reward_function(name, module_name, symbol, where, node)
    if kind == "selector":
        raise PluginError(f"{name}: must be a class with propose or select", "name")
    return Plugin(name, kind, module_name, symbol, "reward")


def _plugin_class(name: str, kind: Kind, module_name: str, symbol: str, source: Module, node: ast.ClassDef) -> Plugin:
    role = _role(kind, node, source)
    reads_rewards = role == "batch" and class_attribute(node, source, "reads_rewards") is True
    row_by_row = role == "reward" and class_attribute(node, source, "row_by_row") is True
    reads = _reads(node, source, role)
    return Plugin(name, kind, module_name, symbol, role, source, node, reads_rewards, row_by_row, reads)


def _reward_function(
    name: str, module_name: str, symbol: str, source: Module, node: ast.FunctionDef | ast.AsyncFunctionDef
) -> Plugin:
    return Plugin(name, "reward", module_name, symbol, "reward", source, node, reads=_columns_required(node))


def _reads(node: ast.ClassDef, source: Module, role: str) -> tuple[str, ...] | None:
    declared = class_attribute(node, source, "reads")
    if declared is None:
        if role != "reward":
            return None
        call = method(node, source, "__call__")
        return None if call is None else _columns_required(call, 1)
    if not isinstance(declared, (tuple, list)) or not all(isinstance(entry, str) for entry in declared):
        problem = f'reads must be a tuple of column names, for example ("answer",), not {declared!r}'
        raise PluginError(f"class {node.name}: {problem}", "name")
    return tuple(declared)


def _columns_required(node: ast.FunctionDef | ast.AsyncFunctionDef, skip: int = 0) -> tuple[str, ...] | None:
    """The columns that a function cannot be called without; None where it takes `**columns` alone: any or none."""
    columns = tuple(name for name in required_parameters(node)[skip:] if name not in TRL_ARGUMENTS)
    return None if not columns and node.args.kwarg else columns


def columns_read(plugin: Plugin, options: dict[str, Any]) -> tuple[tuple[str, ...], ...] | None:
    """The data columns that a reward (or selector) reads with these options, as its source declares them.

    Each inner tuple holds alternatives, one of which must be among the data's columns. None: the reward does not
    declare what it reads, so it cannot be checked.

    In `reads` of its class, `{NAME}` is the column that the option NAME names, and `|` stands between
    alternatives: with "{column}|answer|solution" an option `column` that is set stands alone, a null one is passed
    over. Raises PluginError for an entry that names no option, or one that is no column's name.
    """
    if plugin.reads is None:
        return None
    values = validate(plugin.kind, plugin.name, options)
    columns = []
    for entry in plugin.reads:
        alternatives: list[str] = []
        for part in entry.split("|"):
            if not (part.startswith("{") and part.endswith("}")):
                alternatives.append(part)
                continue
            option = part[1:-1]
            value = values.get(option)
            if option not in values or not isinstance(value, str | None):
                problem = f"{entry!r}: {option!r} is no option that names a column{choose(option, list(values))}"
                raise PluginError(f"class {plugin.symbol}: reads: {problem}", "name")
            if value is not None:
                alternatives = [value]
                break
        if alternatives:
            columns.append(tuple(alternatives))
    return tuple(columns)


def _role(kind: Kind, node: ast.ClassDef, source: Module) -> str:
    if kind == "reward":
        return "reward"
    found = [role for method, role in ROLES.items() if method in methods(node, source)]
    if len(found) != 1:
        raise PluginError(f"class {node.name} must have either propose (prompts) or select (batches)", "name")
    return found[0]


@functools.cache
def option_model(kind: Kind, name: str) -> type[BaseModel]:
    """A pydantic model of a plugin's options, built from its source."""
    plugin = find(kind, name)
    return _model(plugin.symbol, plugin.fields)


_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _model(name: str, fields: dict[str, FieldSource]) -> type[BaseModel]:
    definitions: dict[str, Any] = {}
    for option in fields.values():
        try:
            annotation = Any if option.annotation is None else evaluate(option.annotation, option.module, _nested)
            if isinstance(annotation, str):  # quoted in the source
                annotation = evaluate(ast.parse(annotation, mode="eval").body, option.module, _nested)
            value = ... if option.default is None else evaluate(option.default, option.module, _nested)
            if isinstance(value, BaseModel):
                value = value.model_copy()
            TypeAdapter(annotation, config=None if _holds_model(annotation) else _STRICT)
        except Unreadable as error:
            raise PluginError(
                f"{option.module.path}: {name}.{option.name}: {error}; use siftrl.fields or typing"
            ) from None
        except Exception as error:
            problem = f"{option.module.path}: {name}.{option.name}: no type for a recipe key: {error}"
            raise PluginError(" ".join(problem.split())) from None
        default: dict[str, Any] = {"default_factory": value} if option.factory else {"default": value}
        definitions[option.name] = (annotation, Field(description=option.doc or None, **default))
    return create_model(name, __config__=_STRICT, **definitions)


def _holds_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@functools.cache
def _nested(source: Module, node: ast.ClassDef) -> type[BaseModel]:
    """The model of a dataclass inside a plugin's options, which remembers the class that it stands for."""
    model = _model(node.name, dataclass_fields(node, source))
    model.__siftrl_origin__ = (source.name, node.name)  # type: ignore[attr-defined]
    return model


def validated(kind: Kind, name: str, options: dict[str, Any]) -> BaseModel:
    """The options as a model, their types and bounds checked; see `validate`."""
    model = option_model(kind, name)
    try:
        # As JSON, where strict mode takes a list for a tuple: YAML has no tuples.
        return model.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        key, problem = describe_error(error, options, model)
        if not model.model_fields and error.errors()[0]["type"] == "extra_forbidden":
            problem = f"unknown key; {kind} {name!r} has no options"
        raise PluginError(problem, *key) from None
    except TypeError as error:
        raise PluginError(f"{kind} {name!r}: options must be what YAML can hold: {error}") from None


def validate(kind: Kind, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as plain data, defaults included. Raises PluginError with the key that is wrong.

    What the class's `__post_init__` says of them counts as well, where it runs without an import.
    """
    values = validated(kind, name, options)
    plugin = find(kind, name)
    if isinstance(plugin.node, ast.ClassDef) and plugin.source is not None:
        try:
            stand_in(plugin.node, plugin.source, values)
        except RecipeError as error:
            raise PluginError(error.problem, *error.key) from None
    return values.model_dump(mode="json")


def load(kind: Kind, name: str, options: dict[str, Any] | None = None) -> Any:
    """Import a plugin and make it: an instance of its class, or its function with the options bound."""
    plugin = find(kind, name)
    values = _build_fields(validated(kind, name, options or {}))
    made: Any = getattr(importlib.import_module(plugin.module), plugin.symbol)
    if inspect.isclass(made):
        try:
            return made(**values)
        except ValueError as error:
            raise PluginError(str(error)) from None
    if not values:
        return made
    bound = functools.partial(made, **values)
    functools.update_wrapper(bound, made)
    return bound


def _build_fields(model: BaseModel) -> dict[str, Any]:
    return {name: _build(getattr(model, name)) for name in type(model).model_fields}


def _build(value: Any) -> Any:
    """The value with nested models replaced by the dataclasses that they stand for."""
    if isinstance(value, BaseModel):
        module, symbol = type(value).__siftrl_origin__  # type: ignore[attr-defined]
        return getattr(importlib.import_module(module), symbol)(**_build_fields(value))
    if isinstance(value, dict):
        return {key: _build(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_build(item) for item in value)
    return value


def check(plugin: Any) -> None:
    """Check a live dataclass instance's values against its annotations, as a recipe's are.

    For plugins built in Python. Raises PluginError that names the class and the field.
    """
    hints = typing.get_type_hints(type(plugin), include_extras=True)
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    for field in dataclasses.fields(plugin):
        if field.name.startswith("_") or not field.init:
            continue
        value, hint = getattr(plugin, field.name), hints[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check(value)
            if isinstance(hint, type) and not isinstance(value, hint):
                problem = f"must be a {hint.__name__}, not a {type(value).__name__}"
                raise PluginError(f"{type(plugin).__name__}.{field.name}: {problem}")
            continue
        try:
            TypeAdapter(hint, config=config).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise PluginError(f"{type(plugin).__name__}.{field.name}: {message}, not {value!r}") from None


def describe(kind: Kind, name: str) -> tuple[Plugin, tuple[Option, ...]]:
    """A plugin and its options as text, for `siftrl list`."""
    plugin = find(kind, name)
    return plugin, _options(plugin.fields, option_model(kind, name))


def _options(fields: dict[str, FieldSource], model: type[BaseModel]) -> tuple[Option, ...]:
    options = []
    for name, source in fields.items():
        annotation = model.model_fields[name].annotation
        inner: tuple[Option, ...] = ()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            where = find_module(annotation.__siftrl_origin__[0])  # type: ignore[attr-defined]
            node = where.statements[annotation.__name__] if where else None
            assert isinstance(node, ast.ClassDef) and where
            inner = _options(dataclass_fields(node, where), annotation)
        text = ast.unparse(source.annotation) if source.annotation else "any"
        default = "" if source.default is None else ast.unparse(source.default)
        options.append(Option(name, text, "" if inner else default, source.doc, inner))
    return tuple(options)
