"""What a plugin does, known before it is imported: how many prompts it draws, which models it loads. Free of torch."""

from __future__ import annotations

import ast
import typing
from typing import Any

from pydantic import BaseModel

from siftrl import plugins
from siftrl.fields import MODEL, WEIGHTS
from siftrl.plugin_stand_in import has_member, stand_in


def num_candidates(name: str, options: dict[str, Any], keep: int) -> int | None:
    """How many prompts a prompt selector draws in order to keep `keep`; None where only the object itself can say."""
    plugin = plugins.find("selector", name)
    if not isinstance(plugin.node, ast.ClassDef) or plugin.source is None:
        return None
    if not has_member(plugin.node, plugin.source, "num_candidates"):  # it need not subclass PromptSelector
        return None
    try:
        drawn = stand_in(plugin.node, plugin.source, plugins.validated("selector", name, options)).num_candidates(keep)
    except Exception:
        return None
    return drawn if isinstance(drawn, int) and not isinstance(drawn, bool) else None


def model_paths(kind: plugins.Kind, name: str, options: dict[str, Any]) -> list[tuple[tuple[str, ...], str, bool]]:
    """The models that a plugin loads with these options, its fields of type `ModelPath` or `WeightsPath`.

    Returns (the option's key, path, whether the model's tokenizer is read, too) of each.
    """
    return _model_paths(plugins.validated(kind, name, options))


def _model_paths(values: BaseModel) -> list[tuple[tuple[str, ...], str, bool]]:
    found: list[tuple[tuple[str, ...], str, bool]] = []
    for name, field in type(values).model_fields.items():
        value, marks = getattr(values, name), (*field.metadata, *_metadata(field.annotation))
        if isinstance(value, BaseModel):
            found += [((name, *key), path, tokenizer) for key, path, tokenizer in _model_paths(value)]
        elif isinstance(value, str) and (MODEL in marks or WEIGHTS in marks):
            found.append(((name,), value, MODEL in marks))
    return found


def _metadata(annotation: Any) -> list[Any]:
    """What the parts of a union are annotated with."""
    return [each for part in typing.get_args(annotation) for each in getattr(part, "__metadata__", ())]
