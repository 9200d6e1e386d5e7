"""A plugin's own arithmetic, run from its source: importing a selector imports torch, and takes seconds.

A stand-in has a plugin's options as attributes, and its constants, methods and properties, each read from the source
when asked for. It imports nothing but what `siftrl.plugin_source` may import, and opens no file. What needs more
fails, with any exception but a ValueError: then only the real object knows. This module must stay free of torch.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from siftrl.plugin_source import REALLY_IMPORTED, Module, Names, bases, bound_names, evaluate, find_module
from siftrl.recipe_text import RecipeError

_REFUSED = {"__import__", "breakpoint", "compile", "eval", "exec", "exit", "globals", "input", "open", "print", "quit"}


class NeedsImport(Exception):
    """Something that only the imported plugin can do. No ValueError: that is what a plugin says of its options."""


class StandIn:
    """The plugin of a class, with `values` for its fields; its `__post_init__` is not run yet."""

    def __init__(self, node: ast.ClassDef, module: Module, values: Mapping[str, Any]) -> None:
        self.__source = node, module
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        found = _member(*self.__source, name)
        if found is None:
            raise AttributeError(name)
        node, module = found
        if isinstance(node, ast.expr):
            return _unless_unreadable(lambda: evaluate(node, module, _no_dataclass))
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        function = function_of(node, module)
        if decorators == ["property"]:
            return function(self)
        if decorators:
            raise NeedsImport(f"{name} is decorated")
        return types.MethodType(function, self)


def stand_in(node: ast.ClassDef, source: Module, values: BaseModel) -> StandIn:
    """The plugin that these options make, not imported. Raises RecipeError with what its `__post_init__` refuses."""
    fields = {}
    for name in type(values).model_fields:
        value = getattr(values, name)
        if isinstance(value, BaseModel):
            try:
                value = stand_in(*_dataclass_of(value), value)
            except RecipeError as error:
                raise RecipeError(error.problem, name, *error.key) from None
        fields[name] = value
    made = StandIn(node, source, fields)
    if has_member(node, source, "__post_init__"):
        try:
            made.__post_init__()
        except ValueError as error:
            raise RecipeError(str(error)) from None
        except Exception:  # it takes an import: `load` will tell
            pass
    return made


def _dataclass_of(model: BaseModel) -> tuple[ast.ClassDef, Module]:
    """The dataclass that a nested model stands for, as its source has it."""
    module, symbol = type(model).__siftrl_origin__  # type: ignore[attr-defined]
    source = find_module(module)
    assert source is not None
    node = source.statements[symbol]
    assert isinstance(node, ast.ClassDef)
    return node, source


def has_member(node: ast.ClassDef, module: Module, name: str) -> bool:
    """Whether the class, or a base that has Python source, defines `name`."""
    return _member(node, module, name) is not None


def _member(node: ast.ClassDef, module: Module, name: str) -> tuple[ast.FunctionDef | ast.expr, Module] | None:
    for item in reversed(node.body):
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return item, module
        if isinstance(item, (ast.Assign, ast.AnnAssign)) and item.value and name in bound_names(item):
            return item.value, module
    inherited = (_member(base, where, name) for where, base in bases(node, module))
    return next((found for found in inherited if found is not None), None)


def function_of(node: ast.FunctionDef, module: Module) -> Callable[..., Any]:
    """The function that a statement defines, its decorators left out."""
    bare = copy.copy(node)
    bare.decorator_list = []
    code = compile(
        ast.Module([bare], []), str(module.path), "exec", __future__.annotations.compiler_flag, dont_inherit=True
    )
    names = _Globals(module)
    exec(code, names)
    return names[node.name]


class _Globals(dict[str, Any]):
    """A function's global names, read from the module's source when asked for."""

    def __init__(self, module: Module) -> None:
        super().__init__({"__builtins__": {**vars(builtins), "__import__": _import}, "__name__": module.name})
        self.module = module

    def __missing__(self, name: str) -> Any:
        if name in _REFUSED:
            raise NeedsImport(name)
        found = self.module.resolve(name)
        if found and isinstance(found[1], ast.FunctionDef) and not found[1].decorator_list:
            return function_of(found[1], found[0])
        return _unless_unreadable(lambda: Names(self.module, _no_dataclass)[name])


def _import(name: str, *arguments: Any) -> Any:
    if name not in REALLY_IMPORTED:
        raise NeedsImport(name)
    return builtins.__import__(name, *arguments)


def _no_dataclass(module: Module, node: ast.ClassDef) -> Any:
    raise NeedsImport(node.name)


def _unless_unreadable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:  # `Unreadable`
        raise NeedsImport(str(error)) from None
