"""SFT: TRL's trainer with siftrl's logs and complete checkpoints."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer as TRLSFTTrainer

from siftrl.run import Recorder
from siftrl.trainers.base import SiftMixin


class SFTTrainer(SiftMixin, TRLSFTTrainer):
    """TRL's `SFTTrainer`; the losses are TRL's bit for bit.

    Args:
        recorder: where the metrics go besides `args.report_to`; None: nowhere.
    """

    def __init__(self, *args: Any, recorder: Recorder | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_sift(recorder)

    def sift_summary(self) -> dict[str, Any]:
        return super().sift_summary() | {"tokens": int(self._total_train_tokens)}
