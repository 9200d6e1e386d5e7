"""siftrl: post-train language models on the data worth training on.

Importing the package is cheap; torch is imported when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "GRPOTrainer": "siftrl.trainers.grpo",
    "SFTTrainer": "siftrl.trainers.sft",
    "DPOTrainer": "siftrl.trainers.dpo",
    "ValueModel": "siftrl.value",
    "ValueConfig": "siftrl.value",
    "Candidates": "siftrl.types",
    "PromptSelector": "siftrl.types",
    "BatchSelector": "siftrl.types",
    "Selection": "siftrl.types",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from siftrl.trainers.dpo import DPOTrainer
    from siftrl.trainers.grpo import GRPOTrainer
    from siftrl.trainers.sft import SFTTrainer
    from siftrl.types import BatchSelector, Candidates, PromptSelector, Selection
    from siftrl.value import ValueConfig, ValueModel


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'siftrl' has no attribute {name!r}")
