"""GRPO trainers with batch selectors for tests, and what is known of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import digit_share, grpo_args
from keeping import First
from torch import Tensor

from siftrl import plugins
from siftrl.trainers import rows as row_ops
from siftrl.trainers.grpo import GRPOTrainer


class Watching(GRPOTrainer):
    """Keeps the rows of every rollout, and the micro-batches made of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rollout_rows: list[list[dict[str, Tensor]]] = []
        self.batches: list[list[dict[str, Any]]] = []
        super().__init__(*args, **kwargs)

    def _keep_completions(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        self.rollout_rows.append(row_ops.split(batch))
        self.batches.append(super()._keep_completions(batch))
        return self.batches[-1]


def small_first(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """The same for all completions of a prompt, unless its first digit is below 4."""
    return [float(text[:1] > "a") if prompt < "4" else 0.1 for text, prompt in zip(completions, prompts, strict=True)]


def selector(name: str, **options: Any) -> Any:
    return plugins.load("selector", name, options)


def build(model: Any, folder: Path, data: Any, batch_selector: Any, kind: Any = GRPOTrainer, **changes: Any) -> Any:
    ours = ("keep", "source_column", "scoring_batch_size", "skip_zero_advantage", "prompt_selector", "max_overhead")
    ours += ("peft_config", "rollout")
    options = {name: changes.pop(name) for name in ours if name in changes}
    reward = changes.pop("reward", digit_share)
    return kind(
        model, reward, grpo_args(folder, **changes), train_dataset=data, batch_selector=batch_selector, **options
    )


def log_probs(model: Any, row: dict[str, Tensor], temperature: float) -> Tensor:
    """float64 [n]: of the completion's tokens."""
    ids = torch.cat([row["prompt_ids"], row["completion_ids"]])
    scores = (model(input_ids=ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)
    return scores.gather(1, ids[1:, None])[len(row["prompt_ids"]) - 1 :, 0]


def teaching(chooser: First, trainer: Watching, step: int = 0) -> list[int]:
    """Places of the chosen rows among all of the rollout: a selector is shown those that teach."""
    seen = chooser.seen[step]
    rows = trainer.rollout_rows[step]
    places = [index for index, row in enumerate(rows) if abs(row["advantages"].item()) > 1e-6]
    assert len(places) == len(seen)
    return [places[index] for index in chooser.kept[step].indices.tolist()]


def run(trainer: Any) -> Any:
    trainer.train()
    return trainer
