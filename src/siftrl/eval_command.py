"""`siftrl eval`: measure a model on data sets, print a table, write JSON and the rows."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from siftrl import precision
from siftrl.data import load_data
from siftrl.eval_plan import EvalPlan, Measured, held_out_alone
from siftrl.evaluate import EvalReport, evaluate, summarise
from siftrl.held_out import for_rewards
from siftrl.models import load_policy, load_tokenizer
from siftrl.recipe import ModelConfig
from siftrl.reward_guard import RewardError, close_rewards, load_rewards
from siftrl.rollout import Engine, Sampling, TransformersEngine, VLLMEngine
from siftrl.row_limits import RowLimits, model_limits, stage_limits
from siftrl.row_shapes import encode_prompts
from siftrl.run import plain


def run_plan(plan: EvalPlan) -> int:
    """Measure each data set of the plan; all of them are read before the model is loaded. Returns the exit code.

    Raises ValueError for what the user can mend: data, model, a reward at fault.
    """
    tokenizer = load_tokenizer(plan.model)
    rewards: list[Any] = []
    try:
        rewards += [load_rewards(one.rewards) for one in plan.sets]
        results, reports, rows = _measure(plan, tokenizer, rewards)
    finally:
        for functions, _ in rewards:
            close_rewards(functions)
    _show(plan, results)
    if plan.out is not None:
        _write_rows(plan.out, plan.sets, rows, reports)
    return 0


def _measure(
    plan: EvalPlan, tokenizer: PreTrainedTokenizerBase, rewards: list[tuple[list[Any], list[float]]]
) -> tuple[list[dict[str, Any]], list[EvalReport], list[Dataset]]:
    """Each data set's figures as plain JSON, its report and its rows."""
    loaded = [_rows(one, tokenizer, _limits(one, plan)) for one in plan.sets]
    for one, (rows, dropped) in zip(plan.sets, loaded, strict=True):
        counts = "".join(f", {number} dropped ({reason})" for reason, number in dropped.items())
        print(f"{one.name}: {len(rows)} rows{counts}", file=sys.stderr)
    engine, autocast = _engine(plan, tokenizer, [rows for rows, _ in loaded])
    sampling = Sampling(**plan.sampling)
    results, reports = [], []
    for one, (functions, weights), (rows, dropped) in zip(plan.sets, rewards, loaded, strict=True):
        try:
            with autocast:
                report = evaluate(
                    *(engine, tokenizer, rows, functions, weights, sampling),
                    samples=plan.samples,
                    batch_size=plan.batch_size,
                    seed=plan.seed,
                )
        except RewardError as error:
            raise ValueError(f"{one.name}: {error}" if len(plan.sets) > 1 else str(error)) from error
        found = summarise([report], plan.ks or None)
        errors = report.pass_at_k_errors(plan.ks or None)
        named = [reward.name for reward in one.rewards]
        results.append({"name": one.name, "rewards": named, **found, "pass_at_k_errors": errors, "dropped": dropped})
        reports.append(report)
    return results, reports, [rows for rows, _ in loaded]


def _limits(measured: Measured, plan: EvalPlan) -> RowLimits:
    """What the model reads at once; of an sft stage's rows also what it trains on of them."""
    if measured.kind == "sft" and measured.stage is not None:
        return replace(stage_limits(measured.stage, plan.model), rows=1)
    engine = plan.engine_args.get("max_model_len")
    return replace(model_limits(plan.model), completion_tokens=int(plan.sampling["max_tokens"]), engine_context=engine)


def _rows(measured: Measured, tokenizer: PreTrainedTokenizerBase, limits: RowLimits) -> tuple[Dataset, dict[str, int]]:
    """The rows to measure on, and how many were dropped, by reason."""
    data = measured.data
    alone = held_out_alone(data) if measured.held_out else data.model_copy(update={"eval": None})
    try:
        splits = load_data(alone or data, measured.kind, tokenizer, limits)
    except ValueError as error:
        key, _, problem = str(error).partition(":")
        if not key.startswith("data"):
            raise
        if measured.stage is None:
            problem = problem.replace("rollout.max_completion_tokens", "--max-tokens")
        if measured.flags:
            problem = re.sub(r"write data\.max_prompt_tokens: \d+, or lower", "lower", problem)
        where = measured.flags.get(key, f"{measured.name}: {key}")
        raise ValueError(f"{where}:{problem}") from error
    rows, report = splits.train, splits.report
    if alone is None:
        assert splits.eval is not None
        rows, report = splits.eval, splits.report["eval"]
    rows = for_rewards(rows, measured.kind)
    chosen = rows if measured.limit is None else rows.select(range(min(measured.limit, len(rows))))
    return chosen, {reason: number for reason, number in report["dropped"].items() if number}


def _engine(
    plan: EvalPlan, tokenizer: PreTrainedTokenizerBase, sets: list[Dataset]
) -> tuple[Engine, AbstractContextManager[Any]]:
    """The engine with the model, and what is open while it generates."""
    model, on_gpu = plan.model, torch.cuda.is_available()
    assert model.path is not None
    dtype = None
    if plan.stage is not None:  # what the trainer computes in
        mixed = precision.mixed_precision(plan.stage.trainer, gpu=on_gpu, gpu_has_bfloat16=precision.gpu_has_bfloat16())
        dtype = "bfloat16" if mixed["bf16"] else "float16" if mixed["fp16"] else "float32"
    if plan.engine == "vllm":
        longest = max(len(ids) for rows in sets for ids in encode_prompts(rows["prompt"][:], tokenizer))
        options: dict[str, Any] = {"max_model_len": longest + plan.sampling["max_tokens"]}
        if dtype or model.dtype != "auto":
            options["dtype"] = dtype or model.dtype
        options |= {"trust_remote_code": model.trust_remote_code}
        options |= {"revision": model.revision} if model.revision is not None else {}
        return VLLMEngine.from_path(model.path, **(options | plan.engine_args)), nullcontext()
    if not on_gpu and model.dtype == "auto" and model.quantize is None:
        model = model.model_copy(update={"dtype": "float32"})  # as vLLM on CPUs; bfloat16 takes many times as long
    policy, _, _ = load_policy(model, for_training=plan.stage is not None)
    if model.quantize is None:
        policy = policy.to("cuda" if on_gpu else "cpu")  # type: ignore[arg-type]
    engine = TransformersEngine(policy, tokenizer)
    if dtype is None or dtype == "float32":
        return engine, nullcontext()
    return engine, torch.autocast("cuda" if on_gpu else "cpu", getattr(torch, dtype))


# ------------------------------------------------------------------------------------------------------- the output


def _show(plan: EvalPlan, results: list[dict[str, Any]]) -> None:
    """The table, and the JSON where it was asked for."""
    assert plan.model.path is not None
    if plan.json is not None:
        settings = {"engine": plan.engine, **plan.sampling, "samples": plan.samples, "seed": plan.seed}
        document = plain({"model": plan.model.path, "settings": settings, "data": results})
        text = json.dumps(document, indent=2, ensure_ascii=False)
        if plan.json == "-":
            print(text)
            return
        Path(plan.json).parent.mkdir(parents=True, exist_ok=True)
        Path(plan.json).write_text(text + "\n", encoding="utf-8")
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width that would cut the figures
        console = Console(highlight=False, width=200)
    console.print(_table(plan.model, results))


def _table(model: ModelConfig, results: list[dict[str, Any]]) -> Table:
    table = Table(title=model.path)
    ks = list(results[0]["pass_at_k"])
    missing = any(found["missing"] for found in results)
    headings = ["rows", "mean reward", *(f"pass@{k}" for k in ks), "tokens a completion", "truncated"]
    table.add_column("data")
    for heading in [*headings, *(["without a reward"] if missing else [])]:
        table.add_column(heading, justify="right")
    for found in results:
        cells = [f"{found['rows']:,}", _with_error(found["reward"], found["std_error"])]
        cells += [_with_error(found["pass_at_k"][k], found["pass_at_k_errors"][k]) for k in ks]
        cells += [f"{found['mean_length']:.1f}", f"{found['truncated']:.1%}"]
        table.add_row(found["name"], *cells, *([f"{found['missing']:.1%}"] if missing else []))
    return table


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4f}" if error is None or math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _write_rows(path: Path, sets: list[Measured], rows: list[Dataset], reports: list[EvalReport]) -> None:
    """Each line is a row with `samples`, `rewards`, `mean_reward` and `pass_rate` added, so that the file can be
    trained on (`data: {path: ...}`) with the static_filter selector; of several data sets also `data`, the set's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for one, dataset, report in zip(sets, rows, reports, strict=True):
            name = {"data": one.name} if len(sets) > 1 else {}
            for row, texts, rewards, correct in zip(dataset, report.texts, report.rewards, report.correct, strict=True):
                mean = rewards.nanmean().item()
                line = {
                    **row,
                    **name,
                    "samples": texts,
                    "rewards": [None if math.isnan(reward) else reward for reward in rewards.tolist()],
                    "mean_reward": None if math.isnan(mean) else mean,
                    "pass_rate": correct.double().mean().item(),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
