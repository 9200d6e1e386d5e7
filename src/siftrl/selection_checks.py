"""What a selector answers, checked: one of one's own is easily wrong here, and training would go wrong silently."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from siftrl.types import PromptSelector, Selection

METHODS = {"prompt": "propose", "batch": "select"}


def check_selection(
    selection: Any, keep: int, num_rows: int, selector: Any, role: Literal["prompt", "batch"], weighted: bool
) -> None:
    """Raises ValueError, with the selector's class, unless `selection` is `keep` of `num_rows` rows (or prompts).

    weighted: whether weights other than 1 have been announced.
    """
    who, rows = f"{role}_selector {type(selector).__name__}", "rows" if role == "batch" else "prompts"
    method = METHODS[role]
    if not isinstance(selection, Selection):
        kind = type(selection).__name__
        raise ValueError(f"{who}: {method} must return a Selection, it returned a {kind}; write Selection.of(...)")
    indices, weights = selection.indices, selection.weights
    if not isinstance(indices, Tensor) or indices.dim() != 1 or (len(indices) and indices.dtype != torch.int64):
        found = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"{who}: the indices must be an int64 tensor [{keep}], not {found}")
    # a negative index would be a row of its own here, and a row for the second time below
    num_different = len(set(indices.tolist()) & set(range(num_rows)))
    if num_different != keep or len(indices) != keep:
        raise ValueError(
            f"{who}: {method} must return {keep} different {rows} of the {num_rows} that it is given, it returned "
            f"{len(indices)} ({num_different} different ones of those)"
        )
    lengths = [len(weights), len(selection.reasons), len(selection.scores), len(selection.probability)]
    if lengths != [keep, keep, num_rows, num_rows]:
        raise ValueError(
            f"{who}: {keep} weights and reasons, and {num_rows} scores and probabilities, go with {keep} of {num_rows} "
            f"{rows}, it returned {', '.join(map(str, lengths))}; write Selection.of(...)"
        )
    if not weighted and not torch.equal(weights, torch.ones_like(weights)):
        cure = "set `weighted = True` in the class" if role == "batch" else "prompts have none, so leave them out"
        raise ValueError(f"{who}: it returned weights other than 1; {cure}")
    if not ((weights > 0) & weights.isfinite()).all():
        raise ValueError(f"{who}: weights must be finite and above 0")


def check_accepted(accepted: Any, num_groups: int, selector: PromptSelector) -> None:
    """Raises ValueError, with the selector's class, unless `accept` said yes or no to each of the groups."""
    if isinstance(accepted, Tensor) and accepted.dtype == torch.bool and accepted.shape == (num_groups,):
        return
    found = f"{accepted.dtype} {list(accepted.shape)}" if isinstance(accepted, Tensor) else type(accepted).__name__
    raise ValueError(
        f"prompt_selector {type(selector).__name__}: accept must return a bool tensor [{num_groups}], one for each "
        f"group, it returned {found}"
    )
