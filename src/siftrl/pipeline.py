"""Runs a recipe: its stages one after another, each from the model that the one before left.

Run folder:
    recipe.yaml environment.json metrics.jsonl selection.jsonl samples.jsonl summary.json
    checkpoints/<stage>/checkpoint-<step>   to resume from
    stages/<stage>/                         the stage's model, once it is done
    model/                                  the last stage's model, for transformers and vLLM
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer that is built, unless this is set
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from siftrl import distributed, end_tokens, models, origin, plugins, precision, state
from siftrl.batch_arithmetic import batch_arithmetic
from siftrl.data import DataSplits, load_data
from siftrl.deepspeed_config import deepspeed_config
from siftrl.held_out import HeldOut, measurement
from siftrl.recipe import AnyStage, DPOStage, GRPOStage, ModelConfig, Recipe, SFTStage, dump
from siftrl.report import Progress, print_summary, say
from siftrl.reward_guard import close_rewards, load_rewards
from siftrl.rollout import RolloutOptions, free_memory
from siftrl.row_limits import stage_limits
from siftrl.row_shapes import COMPLETIONS
from siftrl.run import Interrupted, Recorder, check_folder, environment, write_json
from siftrl.types import PromptSelector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from siftrl.trainers.dpo import DPOTrainer
    from siftrl.trainers.grpo import GRPOTrainer
    from siftrl.trainers.sft import SFTTrainer

logger = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, resume: bool = False) -> None:
    """Run every stage that is not done yet.

    Raises:
        ValueError: what the user can mend: data, model, an existing run folder.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    folder = recipe.run_folder
    if torch.backends.mps.is_available():
        logger.warning("Apple's GPU (MPS) is not used: siftrl runs on CUDA GPUs and on CPUs, here on the CPU")
    transformers_logging.disable_progress_bar()  # one bar a stage is enough; downloads keep theirs
    datasets.disable_progress_bars()
    distributed.open_group(deepspeed=recipe.distribution.deepspeed is not None)
    if distributed.is_main():
        _open_folder(recipe, resume)
    distributed.barrier()
    summary = _read_summary(folder)
    model = recipe.model
    if model.scratch is not None:
        start = folder / "stages" / "scratch"
        if distributed.is_main() and not start.exists():
            models.save_scratch_model(model.scratch, start, recipe.seed)
        distributed.barrier()
        model = model.model_copy(update={"path": str(start), "scratch": None})
    for index, stage in enumerate(recipe.stages):
        done = folder / "stages" / stage.name
        if index >= len(summary["stages"]):
            report = _run_stage(recipe, stage, model, done, resume)
            free_memory()  # before the next stage builds its own trainer and engine
            summary["stages"].append(report)
            if distributed.is_main():
                write_json(folder / "summary.json", summary)
            resume = False  # the stages after the interrupted one begin at their beginning
        model = model.model_copy(update={"path": str(done), "revision": None})
        distributed.barrier()
    if distributed.is_main():
        final = folder / "model"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(folder / "stages" / recipe.stages[-1].name, final)
        print_summary(summary, folder)


def _open_folder(recipe: Recipe, resume: bool) -> None:
    folder = recipe.run_folder
    check_folder(recipe, resume)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        _warn_of_changes(folder / "recipe.yaml", dump(recipe))
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    write_json(folder / "environment.json", environment())


def _warn_of_changes(old: Path, new: str) -> None:
    before, after = set(old.read_text(encoding="utf-8").splitlines()), set(new.splitlines())
    if before != after:
        changed = sorted(line.strip() for line in after - before)
        logger.warning("the recipe differs from the one the run began with: %s", "; ".join(changed) or "keys removed")


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stages": []}


# ------------------------------------------------------------------------------------------------------ one stage


def _run_stage(recipe: Recipe, stage: AnyStage, model: ModelConfig, done: Path, resume: bool) -> dict[str, Any]:
    tokenizer = models.load_tokenizer(model)
    limits = stage_limits(stage, model)
    data = load_data(recipe.data_of(stage), stage.kind, tokenizer, limits)
    say(f"stage {stage.name} ({stage.kind}): {_describe(data)}")
    checkpoints = recipe.run_folder / "checkpoints" / stage.name
    recorder = Recorder(
        recipe.run_folder, stage.name, samples=recipe.logging.samples, selection=recipe.logging.selection
    )
    options = _trainer_options(recipe, stage, checkpoints)
    trainer: GRPOTrainer | DPOTrainer | SFTTrainer
    if isinstance(stage, GRPOStage):
        trainer = _grpo_trainer(recipe, stage, model, tokenizer, data, options, recorder)
    else:
        trainer = _row_trainer(recipe, stage, model, tokenizer, data, options, recorder)
    if trainer.args.world_size != distributed.world_size():  # ranks that train apart would look like success
        raise RuntimeError(
            f"the launcher started {distributed.world_size()} processes, but the trainer sees {trainer.args.world_size}"
        )
    if not isinstance(data.train[0]["prompt"], str):
        end_tokens.settle_turn_end(trainer, tokenizer, learns=not isinstance(stage, GRPOStage))
    if model.quantize is not None and not trainer.is_deepspeed_enabled:
        precision.adapters_in_float32(trainer.model)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress(stage.name))
    held_out: HeldOut | None = None
    if data.eval is not None:
        measure = measurement(recipe, stage, trainer, data.eval, tokenizer)
        held_out = HeldOut(measure, stage.eval.every if stage.eval else None, trainer)
        trainer.add_callback(held_out)
    checkpoint = state.last_checkpoint(checkpoints) if resume else None
    if checkpoint is not None:
        say(f"stage {stage.name}: resuming from {checkpoint}")
        state.discard_after(checkpoints, state.step_of(checkpoint)) if distributed.is_main() else None
        if held_out is not None:
            held_out.resume(checkpoints)
    elif resume and distributed.is_main():
        recorder.rewind(-1)
    with _stop_on_signal(trainer) as stopped:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopped:
        raise Interrupted(
            f"stopped in stage {stage.name} after step {trainer.state.global_step}; the checkpoint is in "
            f"{checkpoints}. Go on with the same command and --resume"
        )
    if held_out is not None:
        held_out.finish()
    if isinstance(stage, GRPOStage):
        close_rewards(trainer.reward_funcs)
    _save_model(trainer, tokenizer, done, model)
    report: dict[str, Any] = {"name": stage.name, "kind": stage.kind, "eval": held_out.results if held_out else {}}
    report |= {"steps": trainer.state.global_step, **trainer.sift_summary(), "warnings": trainer.health.warnings}
    if data.report:
        report["data"] = data.report
    return report


def _describe(data: DataSplits) -> str:
    report = data.report
    parts = [f"{len(data.train)} rows"]
    if data.eval is not None:
        parts.append(f"{len(data.eval)} held out")
    parts += [f"{count} dropped ({reason})" for reason, count in report["dropped"].items() if count]
    if cut := report.get("cut"):
        parts.append(f"{cut} cut to trainer.max_length")
    if report["ignored_columns"]:
        parts.append(f"columns not used: {', '.join(report['ignored_columns'])}")
    return ", ".join(parts)


def _trainer_options(recipe: Recipe, stage: AnyStage, checkpoints: Path) -> dict[str, Any]:
    """What TRL's config class gets: siftrl's own keys, then everything under `trainer:`."""
    on_cpu = not torch.cuda.is_available()
    numbers = batch_arithmetic(stage, distributed.world_size())
    every = recipe.checkpoint.every
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "seed": recipe.seed,
        "per_device_train_batch_size": stage.micro_batch_size,
        "gradient_accumulation_steps": numbers.gradient_accumulation_steps,
        "logging_steps": recipe.logging.every,
        "save_strategy": "no" if every is None else "steps",
        "save_total_limit": recipe.checkpoint.keep,
        "deepspeed": deepspeed_config(recipe, cpu=on_cpu),
        "report_to": "none",
        "trust_remote_code": recipe.model.trust_remote_code,
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu,  # without it transformers takes a machine without a GPU for one process
    }
    if every is not None:
        options["save_steps"] = every
    if isinstance(stage, GRPOStage):
        rollout = stage.rollout
        # of all rows that are generated; the trainer itself counts those that a batch selector keeps
        micro_batches = numbers.rows_per_rank // stage.micro_batch_size
        options |= {
            "gradient_accumulation_steps": micro_batches // stage.optimizer_steps_per_rollout,
            "num_generations": stage.completions_per_prompt,
            "steps_per_generation": micro_batches,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "min_p": rollout.min_p,
            "repetition_penalty": rollout.repetition_penalty,
            "max_completion_length": rollout.max_completion_tokens,
            "use_vllm": rollout.engine == "vllm",
        }
        if rollout.engine == "vllm":
            options |= {
                "vllm_mode": rollout.mode,
                # scripts/engine_noise.py measured which keeps the gradient of long completions
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_gpu_memory_utilization": rollout.gpu_memory_utilization,
                "vllm_tensor_parallel_size": rollout.tensor_parallel_size,
                "vllm_max_model_length": rollout.max_model_len,
                "vllm_enable_sleep_mode": rollout.sleep,
                "vllm_server_base_url": rollout.server_url,
                "vllm_server_timeout": rollout.server_timeout,
            }
    asked = precision.mixed_precision(stage.trainer, gpu=not on_cpu, gpu_has_bfloat16=precision.gpu_has_bfloat16())
    return options | stage.trainer | asked


def _grpo_trainer(
    recipe: Recipe,
    stage: GRPOStage,
    model: ModelConfig,
    tokenizer: Any,
    data: DataSplits,
    options: dict[str, Any],
    recorder: Recorder,
) -> GRPOTrainer:
    from trl import GRPOConfig

    from siftrl.trainers.grpo import GRPOTrainer

    options["model_init_kwargs"] = models.model_init_kwargs(model)
    rewards, weights = load_rewards(recipe.rewards_of(stage))
    chosen = stage.prompt_selector
    selector = plugins.load("selector", chosen.name, chosen.options) if chosen else None
    if selector is not None:
        _check_candidates(selector, stage, len(data.train))
    rollout = stage.rollout
    return GRPOTrainer(
        model=model.path,
        reward_funcs=rewards,
        args=GRPOConfig(**options, reward_weights=weights),
        train_dataset=data.train,
        processing_class=tokenizer,
        peft_config=models.peft_config(model),
        quantization_config=models.quantization_config(model),
        prompt_selector=selector,
        rollout=RolloutOptions(rollout.seeded, rollout.max_logprob_drift, rollout.engine_args),
        skip_zero_advantage=stage.selection.skip_zero_advantage,
        halt_on_no_signal=recipe.logging.halt_on_no_signal,
        recorder=recorder,
        **_selection_options(recipe, stage),
    )


def _check_candidates(selector: PromptSelector, stage: GRPOStage, rows: int) -> None:
    """Ask the selector itself how many prompts it draws, before a model is loaded."""
    keep = stage.prompts_per_step
    drawn, who = selector.num_candidates(keep), f"stage {stage.name}: {type(selector).__name__}"
    if not isinstance(drawn, int) or drawn < keep:
        raise ValueError(f"{who}.num_candidates({keep}) is {drawn!r}; it must be a whole number, {keep} or more")
    if drawn > rows:
        raise ValueError(
            f"{who} draws {drawn} prompts for the {keep} of a step, the data has only {rows} to train on; lower "
            "prompts_per_step, or what the selector draws"
        )


def _row_trainer(
    recipe: Recipe,
    stage: SFTStage | DPOStage,
    model: ModelConfig,
    tokenizer: Any,
    data: DataSplits,
    options: dict[str, Any],
    recorder: Recorder,
) -> SFTTrainer | DPOTrainer:
    from trl import DPOConfig, SFTConfig

    from siftrl.trainers.dpo import DPOTrainer
    from siftrl.trainers.sft import SFTTrainer

    options["model_init_kwargs"] = models.model_init_kwargs(model)
    selection = _selection_options(recipe, stage)
    source = selection["source_column"]
    columns = ["prompt", *COMPLETIONS[stage.kind], *([source] if source else [])]
    trainer, config = (SFTTrainer, SFTConfig) if stage.kind == "sft" else (DPOTrainer, DPOConfig)
    held_out = None if data.eval is None else data.eval.select_columns(["prompt", *COMPLETIONS[stage.kind]])
    options.setdefault("per_device_eval_batch_size", stage.micro_batch_size)
    if stage.kind == "sft":
        options.setdefault("eval_packing", False)
    return trainer(
        model=model.path,
        args=config(**options),
        train_dataset=data.train.select_columns(columns),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=models.peft_config(model),
        quantization_config=models.quantization_config(model),
        candidates=stage.rows_per_step,
        recorder=recorder,
        **selection,
    )


def _selection_options(recipe: Recipe, stage: AnyStage) -> dict[str, Any]:
    """What every trainer gets for choosing rows inside a batch."""
    from siftrl.parts import PartNames

    names = stage.signals
    chain = [(plugins.load("selector", one.name, one.options), one.keep) for one in stage.batch_selectors]
    return {
        "batch_selector": chain or None,
        "source_column": recipe.data_of(stage).source if chain else None,
        "scoring_batch_size": names.micro_batch_size,
        "parts": PartNames(names.block, names.value, names.head),
        "max_overhead": stage.selection.max_overhead,
    }


def _save_model(trainer: Any, tokenizer: Any, folder: Path, model: ModelConfig) -> None:
    """Save what the stage made so that transformers and vLLM load it; adapters are merged, and kept beside."""
    shutil.rmtree(folder, ignore_errors=True) if distributed.is_main() else None
    distributed.barrier()
    if model.lora is None:
        trainer.save_model(str(folder))
    else:
        trainer.save_model(str(folder / "adapter"))
        distributed.barrier()
        if distributed.is_main():
            assert model.path is not None
            policy, kwargs = trainer.accelerator.unwrap_model(trainer.model), trainer.args.model_init_kwargs
            merged = origin.merge_adapter(policy, model.path, folder / "adapter", model.dtype, kwargs)
            merged.save_pretrained(str(folder))
    if distributed.is_main():
        tokenizer.save_pretrained(str(folder))
    distributed.barrier()


@contextmanager
def _stop_on_signal(trainer: Any) -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask for a checkpoint after the step under way; a second SIGINT stops at once.

    Yields a list that holds the signal once one came and the trainer has stopped for it.
    """
    asked: list[int] = []
    obeyed: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping after this step; a checkpoint will be saved (press Ctrl-C again to stop at once)")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if distributed.any_true(bool(asked)):
                control.should_save = control.should_training_stop = True
                obeyed.append(signal.SIGINT)

    trainer.add_callback(Stop())
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield obeyed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
