"""Reads plugins from their source: importing one imports torch, and takes seconds.

A `Module` is a parsed file; names in it are resolved through its imports, file by file. Only modules that are cheap
and hold types (`typing`, `siftrl.fields`, ...) are really imported. This module must stay free of torch.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import importlib.machinery
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REALLY_IMPORTED = {
    *("typing", "typing_extensions", "annotated_types", "collections.abc", "datetime", "fractions", "math"),
    *("pathlib", "re", "string", "siftrl.fields"),
}
REQUIRED: Any = object()
"""The default of a field that has none."""


class Unreadable(ValueError):
    """Something that cannot be known without importing the module."""


@dataclass(frozen=True, slots=True)
class FieldSource:
    """One option of a plugin: a dataclass's field, or a function's keyword-only parameter with a default."""

    name: str
    annotation: ast.expr | None
    default: ast.expr | None
    factory: bool
    """`default` makes the value when called."""
    doc: str
    module: Module
    """Where the annotation's names are looked up."""


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    path: Path
    statements: dict[str, ast.stmt] = field(repr=False)
    """Top-level name -> the statement that binds it, the last one."""
    docstring: str = ""
    lines: list[str] = field(default_factory=list, repr=False)

    def __hash__(self) -> int:
        return hash(self.name)

    def resolve(self, name: str) -> tuple[Module, ast.stmt] | None:
        """The statement that defines `name`, followed through imports; None for what no Python source defines."""
        statement = self.statements.get(name)
        if not isinstance(statement, ast.ImportFrom):
            return None if statement is None or isinstance(statement, ast.Import) else (self, statement)
        origin = _absolute(statement, self)
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        module = None if origin in REALLY_IMPORTED else find_module(origin)
        return module.resolve(original) if module else None


def find_module(name: str) -> Module | None:
    """The parsed source of a module, found without importing it or its packages; None if it has no source."""
    locations = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        try:
            if end == 1:
                spec = importlib.util.find_spec(parts[0])
            else:
                spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:end]), locations)
        except (ValueError, ImportError):
            return None
        if spec is None:
            return None
        locations = spec.submodule_search_locations
    if not spec or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return parse(name, Path(spec.origin))


@functools.cache
def parse(name: str, path: Path) -> Module:
    """Parse a source file. Raises Unreadable on a syntax error."""
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as error:
        raise Unreadable(f"{path}:{error.lineno}: {error.msg}") from None
    statements: dict[str, ast.stmt] = {}
    for statement in _flat(tree.body):
        for bound in bound_names(statement):
            statements[bound] = statement
    return Module(name, path, statements, ast.get_docstring(tree) or "", text.splitlines())


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those inside `if TYPE_CHECKING:` and `try:` included."""
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try)):
            yield from _flat(statement.body)
        else:
            yield statement


def bound_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [statement.name]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _absolute(statement: ast.ImportFrom, module: Module) -> str:
    """The module that a from-import names, relative imports resolved."""
    if not statement.level:
        return statement.module or ""
    package = module.name.split(".")
    if module.path.name == "__init__.py":
        package.append("")
    return ".".join(filter(None, [*package[: -statement.level], statement.module or ""]))


def is_dataclass(node: ast.stmt) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    return any(
        ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] == "dataclass" for d in node.decorator_list
    )


def bases(node: ast.ClassDef, module: Module) -> list[tuple[Module, ast.ClassDef]]:
    """The class's direct bases that have Python source."""
    found = []
    for base in node.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(expression, ast.Name) and (resolved := module.resolve(expression.id)):
            where, statement = resolved
            if isinstance(statement, ast.ClassDef):
                found.append((where, statement))
    return found


def methods(node: ast.ClassDef, module: Module) -> set[str]:
    """Names of the class's methods, inherited ones included."""
    names = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return names.union(*(methods(base, where) for where, base in bases(node, module)))


def method(node: ast.ClassDef, module: Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The class's method of that name, an inherited one included; None where no class with source defines one."""
    for item in reversed(node.body):
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name == name:
            return item
    inherited = (method(base, where, name) for where, base in bases(node, module))
    return next((found for found in inherited if found is not None), None)


def class_attribute(node: ast.ClassDef, module: Module, name: str) -> Any:
    """The value of a class attribute, an inherited one included; None where no class with source assigns it one.

    Raises Unreadable where the value needs an import of the plugin.
    """
    for item in reversed(node.body):
        if isinstance(item, (ast.Assign, ast.AnnAssign)) and item.value and name in bound_names(item):
            return evaluate(item.value, module, None)
    inherited = (class_attribute(base, where, name) for where, base in bases(node, module))
    return next((value for value in inherited if value is not None), None)


def dataclass_fields(node: ast.ClassDef, module: Module) -> dict[str, FieldSource]:
    """Fields as Python's dataclass would have them, in order: those of dataclass bases, then the class's own.

    ClassVars, names with a leading underscore and `field(init=False)` are left out.
    """
    fields: dict[str, FieldSource] = {}
    for where, base in reversed(bases(node, module)):
        fields |= dataclass_fields(base, where) if is_dataclass(base) else {}
    docs = _docs(ast.get_docstring(node) or "")
    for position, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        name, default, factory = item.target.id, item.value, False
        if name.startswith("_") or re.search(r"\b(ClassVar|KW_ONLY)\b", ast.unparse(item.annotation)):
            continue
        if isinstance(default, ast.Call) and ast.unparse(default.func).split(".")[-1] == "field":
            keywords = {keyword.arg: keyword.value for keyword in default.keywords}
            if "init" in keywords and ast.unparse(keywords["init"]) == "False":
                fields.pop(name, None)
                continue
            factory = "default_factory" in keywords
            default = keywords.get("default_factory") or keywords.get("default")
        doc = _doc_below(node.body, position) or _comment(module, item) or docs.get(name, "")
        fields[name] = FieldSource(name, item.annotation, default, factory, doc, module)
    return fields


def function_options(node: ast.FunctionDef | ast.AsyncFunctionDef, module: Module) -> dict[str, FieldSource]:
    """A function's keyword-only parameters with a default."""
    docs = _docs(ast.get_docstring(node) or "")
    return {
        arg.arg: FieldSource(arg.arg, arg.annotation, default, False, docs.get(arg.arg, ""), module)
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if default is not None
    }


def required_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """A function's parameters without a default, in order; `*args` and `**kwargs` are none."""
    positional = [*node.args.posonlyargs, *node.args.args]
    required = positional[: len(positional) - len(node.args.defaults)]
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return [arg.arg for arg in [*required, *(arg for arg, default in keywords if default is None)]]


def _doc_below(body: list[ast.stmt], position: int) -> str:
    """The string literal that stands below a field."""
    following = body[position + 1] if position + 1 < len(body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return " ".join(str(following.value.value).split())
    return ""


def _comment(module: Module, item: ast.stmt) -> str:
    """The comment at the end of a statement's last line."""
    rest = module.lines[(item.end_lineno or 1) - 1].encode()[item.end_col_offset :].decode().strip()
    return rest[1:].strip() if rest.startswith("#") else ""


def _docs(docstring: str) -> dict[str, str]:
    """Paragraphs such as "explore: share of the prompts ..." of a docstring, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.splitlines():
        if start := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        elif line.startswith(" ") and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


class Names(Mapping[str, Any]):
    """The names that an annotation or a default may use, looked up in a module's source when asked for."""

    def __init__(self, module: Module, nested: Any) -> None:
        """nested: (Module, ClassDef of a dataclass) -> what stands for that dataclass."""
        self.module = module
        self.nested = nested

    def __getitem__(self, name: str) -> Any:
        statement = self.module.statements.get(name)
        if statement is None and hasattr(builtins, name):
            return getattr(builtins, name)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
            if alias.name in REALLY_IMPORTED:
                imported = importlib.import_module(alias.name)
                return imported if alias.asname else importlib.import_module(alias.name.partition(".")[0])
        if isinstance(statement, ast.ImportFrom) and (origin := _absolute(statement, self.module)) in REALLY_IMPORTED:
            original = next(a.name for a in statement.names if (a.asname or a.name) == name)
            return getattr(importlib.import_module(origin), original)
        resolved = self.module.resolve(name)
        if resolved is None:
            raise Unreadable(f"{name!r} is not known without importing {self.module.name}")
        where, statement = resolved
        if is_dataclass(statement):
            return self.nested(where, statement)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value:
            return evaluate(statement.value, where, self.nested)
        raise Unreadable(f"{name!r} is no dataclass, type or constant")

    def __iter__(self) -> Iterator[str]:
        return iter(self.module.statements)

    def __len__(self) -> int:
        return len(self.module.statements)


def evaluate(expression: ast.expr, module: Module, nested: Any) -> Any:
    """The value of an annotation or default. Raises Unreadable where that needs an import of the plugin."""
    code = compile(ast.Expression(expression), str(module.path), "eval")
    try:
        return eval(code, {"__builtins__": {}}, Names(module, nested))
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"{ast.unparse(expression)}: {type(error).__name__}: {error}") from None
