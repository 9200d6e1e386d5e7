"""Types for the recipe keys of a plugin's dataclass. This module must stay free of torch.

A plugin writes its keys as dataclass fields, `explore: Share = 0.125`; the recipe checks the value against the
annotation before torch is imported (see `siftrl.plugins`).
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

Count = Annotated[int, Ge(1)]
"""A whole number, at least 1."""
NonNegative = Annotated[float, Ge(0)]
"""A number, 0 or more."""
Positive = Annotated[float, Gt(0)]
"""A number above 0."""
Rate = Annotated[float, Gt(0), Le(1)]
"""A learning rate of Adam: above 0, and at most 1, which moves a weight by about 1 in a step."""
Share = Annotated[float, Ge(0), Le(1)]
"""A share of something, from 0 to 1."""
MODEL, WEIGHTS = "model", "weights"
ModelPath = Annotated[str, MODEL]
"""A model's local folder or hub name; where it is a folder, it is looked at before anything is loaded."""
WeightsPath = Annotated[str, WEIGHTS]
"""The same, of a model whose own tokenizer is not read."""
