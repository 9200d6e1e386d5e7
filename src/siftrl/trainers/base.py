"""What siftrl's trainers add to TRL's, whatever is trained: timing, the NaN stop, logs, warnings of a run that learns
nothing, complete checkpoints."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from siftrl import distributed, precision, state
from siftrl.health import Health
from siftrl.row_selection import RowSelection, check_chain
from siftrl.run import Clock, Recorder

logger = logging.getLogger(__name__)


class SiftMixin:
    """Put before a TRL trainer in the bases; set up with `_init_sift` once the trainer is built."""

    args: Any
    accelerator: Any
    state: Any
    control: Any
    model: Any
    recorder: Recorder | None
    clock: Clock
    health: Health
    row_selection: RowSelection | None = None
    """Where a batch selector is on; its figures, summary and checkpoint go with the trainer's."""

    def _init_sift(self, recorder: Recorder | None, halt_on_no_signal: int | None = None) -> None:
        self.recorder = recorder
        self.clock = Clock()
        self.health = Health(halt_on_no_signal)
        self._started = time.perf_counter()
        if self.accelerator.device.type == "mps":
            raise ValueError("siftrl does not run on Apple's GPU (MPS): write use_cpu=True in the trainer's arguments")
        self.add_callback(_OptimizerTimer(self.clock))  # type: ignore[attr-defined]
        self.add_callback(_Watch(self))  # type: ignore[attr-defined]

    def warn(self, text: str) -> None:
        """Say it now, and again in the run's summary."""
        self.health.warnings.append(text)
        _say(text)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        why = precision.rounded_updates(self.model.parameters(), self.args, self._has_float32_masters)
        if why and why not in self.health.warnings:  # a second call of `train`, or a resumed run
            self.warn(why)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    @property
    def _has_float32_masters(self) -> bool:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        settings = plugin.deepspeed_config if plugin is not None else {}
        on = {"bf16": self.args.bf16, "fp16": self.args.fp16}
        asked = {name: settings.get(name, {}).get("enabled", False) for name in on}
        return any(on[name] if asked[name] == "auto" else asked[name] for name in on)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed from a checkpoint at the last step, transformers would train one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        with self.clock("policy_update"):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} in step {self.state.global_step + 1}: lower learning_rate, or look at "
                    "the data and the rewards of this step; the last checkpoint is untouched"
                )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.row_selection is not None and self.model.training:
            logs |= self.row_selection.shares_since_log()
        super().log(logs, start_time)  # type: ignore[misc]
        if self.recorder is not None and distributed.is_main():
            self.recorder.metrics(self.state.global_step, logs)

    def sift_summary(self) -> dict[str, Any]:
        """This stage's figures for summary.json: rollouts, tokens (generated or trained on), seconds by part."""
        summary = {"rollouts": 0, "tokens": 0, "seconds": self.seconds()}
        return summary if self.row_selection is None else summary | {"selection": self.row_selection.summary()}

    def seconds(self) -> dict[str, float]:
        """Seconds by part and in all, those before a resume included."""
        return {**self.clock.seconds, "total": time.perf_counter() - self._started}

    # -- checkpoints -------------------------------------------------------------------------------------------

    def sift_state(self) -> dict[str, Any]:
        """What the checkpoint holds beyond TRL's, the same on every rank: plain containers and tensors."""
        saved: dict[str, Any] = {"seconds": self.seconds(), "health": self.health.state_dict()}
        return saved if self.row_selection is None else saved | {"rows": self.row_selection.state_dict()}

    def load_sift_state(self, saved: dict[str, Any]) -> None:
        """Go on from `sift_state()`'s answer."""
        earlier = dict(saved["seconds"])
        self._started = time.perf_counter() - earlier.pop("total")
        self.clock.seconds.update(earlier)
        if "health" in saved:  # not in checkpoints of earlier versions
            self.health.load_state_dict(saved["health"])
        check_chain(self.row_selection, saved.get("rows"))
        if self.row_selection is not None:
            self.row_selection.load_state_dict(saved["rows"])

    def rank_state(self) -> dict[str, Any]:
        """What the checkpoint holds of this rank alone."""
        return {}

    def load_rank_state(self, saved: dict[str, Any]) -> None:
        """Go on from `rank_state()`'s answer."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if rank_state := self.rank_state():
            state.save_file(folder / f"siftrl_rank{distributed.rank()}.pt", rank_state)
        if distributed.is_main():
            state.save_file(folder / "siftrl.pt", self.sift_state())
        distributed.barrier()  # all files are there before the checkpoint is called complete
        if distributed.is_main():
            state.seal(folder, step=self.state.global_step, world_size=distributed.world_size())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / "siftrl.pt").is_file():
            raise ValueError(f"{checkpoint} holds no siftrl.pt: it was not written by siftrl's trainer")
        self.load_sift_state(state.load_file(folder / "siftrl.pt"))
        if (mine := folder / f"siftrl_rank{distributed.rank()}.pt").is_file():
            self.load_rank_state(state.load_file(mine))
        if self.recorder is not None and distributed.is_main():
            self.recorder.rewind(state.step_of(folder))


def settle(device: torch.device) -> None:
    """Wait for what a GPU still works on, so that it counts for the part of the clock that is open."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class _OptimizerTimer(TrainerCallback):
    """The optimizer's step lies between two events of the training loop, outside of `training_step`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._timing: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timing = self.clock("policy_update")
        self._timing.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timing.__exit__(None, None, None)


class _Watch(TrainerCallback):
    """Says it when a run learns nothing; a run that made no step at all is an error."""

    def __init__(self, trainer: SiftMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        health = self.trainer.health
        for text in health.step(self.trainer.clock.seconds):
            _say(text)
        if health.halted is not None:
            raise RuntimeError(f"step {state.global_step}: {health.halted}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for text in self.trainer.health.finish():
            _say(text)
        if state.global_step == 0:
            raise ValueError(
                "no optimizer step was made: the training data does not fill one step, or max_steps "
                f"({args.max_steps}) and num_train_epochs ({args.num_train_epochs:g}) ask for none; give more rows, or "
                "make a step smaller (prompts_per_step or rows_per_step in a recipe)"
            )


def _say(text: str) -> None:
    if distributed.is_main():
        logger.warning("%s", text)
