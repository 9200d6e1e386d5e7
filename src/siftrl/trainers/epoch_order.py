"""The order of a GRPO epoch's prompts where no selector chooses them: TRL's own, and the same after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, with an epoch's order known from its number: a resumed run sees the order it would have had.

    TRL's own draws epoch e's order with the e-th call of its generator, so a run resumed in epoch 1 sees epoch 0's.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        self.epoch += 1
        yield from super().__iter__()


class EpochTeller(TrainerCallback):
    """Tells the sampler which epoch begins; a resumed loop begins in the middle of a later one."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._train_sampler is not None:
            self.trainer._train_sampler.set_epoch(int(state.epoch + 1e-6))
