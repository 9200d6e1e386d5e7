"""`siftrl validate --rows`: the first rows as a stage sees them, and what its rewards say of their right answers.

The rewards are called with the row's own answer as the completion, bare and in the forms that their options ask for.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from siftrl import plugins
from siftrl.data_files import head, whole
from siftrl.recipe import AnyStage, DataConfig, Recipe, RewardConfig
from siftrl.recipe_text import RecipeError
from siftrl.reward_columns import compiled, gold_text
from siftrl.row_shapes import Prompt, shape_row, shorten

_LENGTH = 600
"""Characters of a text that are printed."""


def rows_text(recipe: Recipe, count: int) -> str:
    """The first `count` rows of every stage, shaped, each with the rewards' verdicts on its answer."""
    blocks: dict[str, None] = {}
    for stage in recipe.stages:
        data = recipe.data_of(stage)
        rewards = recipe.rewards_of(stage) if recipe.measures_rewards(stage) else []
        made = [(reward, plugins.load("reward", reward.name, reward.options)) for reward in rewards]
        rows = first_rows(data, count)
        lines = [f"stage {stage.name} ({stage.kind})"]
        without: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            lines += _row_lines(index, row, stage, data, made, without)
        for name, where in without.items():
            rows_named = ("row " if len(where) == 1 else "rows ") + ", ".join(map(str, where))
            lines.append(f"{name} rewards the right answer of {rows_named} in none of these forms")
        blocks["\n".join(lines)] = None
    return "\n\n".join(blocks)


def first_rows(data: DataConfig, count: int) -> list[dict[str, Any]]:
    """The first rows of the data with all of their columns; reasoning-gym's are made, a hub's are downloaded."""
    if data.reasoning_gym is not None:
        from siftrl.gym_rows import make_rows

        return make_rows(data.reasoning_gym, size=count, seed=data.reasoning_gym.seed)
    assert data.path is not None
    rows = head(data.path, data.split, count)
    if rows is None:
        from siftrl.data import load_rows

        loaded = load_rows(data.path, split=data.split, config=data.config, revision=data.revision)
        return [loaded[index] for index in range(min(count, len(loaded)))]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: whole(row.get(column)) for column in columns} for row in rows]


def _row_lines(
    index: int,
    row: dict[str, Any],
    stage: AnyStage,
    data: DataConfig,
    made: Sequence[tuple[RewardConfig, Any]],
    without: dict[str, list[int]],
) -> list[str]:
    """without: for each reward the rows whose answer it rewards in no form, added to here."""
    shaped, reason = shape_row(row, data, stage.kind, f"row {index}")
    if reason:
        return [f"row {index}: dropped ({reason})"]
    lines = [f"row {index}"]
    for name in ("prompt", "completion", "chosen", "rejected"):
        if shaped.get(name) is not None:
            lines += _text_lines(name, shaped[name])
    columns = {name: [value] for name, value in row.items() if name not in ("prompt", "completion", "metadata")}
    golds = {reward.name: _gold(row, reward, data) for reward, _ in made}
    best: dict[str, float] = {}
    for form in dict.fromkeys(form for gold in golds.values() if gold is not None for form in _forms(gold, made)):
        verdicts = []
        for reward, function in made:
            plugin = plugins.find("reward", reward.name)
            options = plugin.fields if plugin.is_function else {}  # a column of an option's name is not handed on
            given = {name: cells for name, cells in columns.items() if name not in options}
            value = _verdict(function, shaped["prompt"], form, given)
            best[reward.name] = max(best.get(reward.name, 0.0), value if isinstance(value, float) else 0.0)
            verdicts.append(f"{reward.name} {value:g}" if isinstance(value, float) else f"{reward.name} {value}")
        lines.append(f"  answered {shorten(form, _LENGTH)!r}: {', '.join(verdicts)}")
    if made and not any(gold is not None for gold in golds.values()):
        lines.append("  the row holds no answer that the rewards could be asked about")
    for name, value in best.items():
        if value <= 0:
            without.setdefault(name, []).append(index)
    return lines


def _text_lines(name: str, text: Prompt) -> list[str]:
    if isinstance(text, str):
        return [f"  {name}: {shorten(text, _LENGTH)!r}"]
    return [f"  {name}, {message['role']}: {shorten(message['content'], _LENGTH)!r}" for message in text]


def _gold(row: Mapping[str, Any], reward: RewardConfig, data: DataConfig) -> str | None:
    """The row's right answer for a reward, as text; None where it has none."""
    read = plugins.columns_read(plugins.find("reward", reward.name), reward.options) or ()
    declared = [column for alternatives in read for column in alternatives if row.get(column) is not None]
    by_option = [column for column in declared if column in reward.options.values()]
    known = [column for column in ("answer", "solution") if column in declared]
    target = [data.completion] if isinstance(row.get(data.completion or ""), str | int | float) else []
    candidates = [*by_option, *known, *target, *declared]
    if not candidates:
        return None
    column, pattern = candidates[0] or "", reward.options.get("gold")
    return gold_text(row[column], compiled("gold", pattern) if isinstance(pattern, str) else None, reward.name, column)


def _forms(gold: str, made: Sequence[tuple[RewardConfig, Any]]) -> list[str]:
    """The answer as a completion: bare, and as the rewards' options want it written."""
    forms = [gold]
    for reward, _ in made:
        options = reward.options
        if isinstance(tag := options.get("tag"), str):
            forms.append(f"<{tag}>{gold}</{tag}>")
        if isinstance(tags := options.get("tags"), list) and tags:
            before = "".join(f"<{tag}>...</{tag}>" for tag in tags[:-1])
            forms.append(f"{before}<{tags[-1]}>{gold}</{tags[-1]}>")
        if options.get("boxed_only") is True:
            forms.append(f"\\boxed{{{gold}}}")
        if isinstance(extract := options.get("extract"), str) and (form := _written_out(extract, gold)) is not None:
            forms.append(form)
    return forms


def _written_out(pattern: str, gold: str) -> str | None:
    """A text whose only group in the regular expression is `gold`; None where the pattern is more than plain text."""
    parts = re.fullmatch(r"([^()]*)\((?!\?)[^()]*\)([^()]*)", pattern)
    if parts is None:
        return None
    form = re.sub(r"\\(.)", r"\1", parts[1]) + gold + re.sub(r"\\(.)", r"\1", parts[2])
    match = re.search(pattern, form, re.DOTALL)
    return form if match and match.group(1).strip() == gold.strip() else None


def _verdict(function: Any, prompt: Prompt, text: str, columns: Mapping[str, list[Any]]) -> float | str:
    """What a reward gives the text, or in words what it does instead."""
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    given: dict[str, Any] = {"prompts": [prompt], "completions": [completion], "completion_ids": [[]], **columns}
    given |= {"trainer_state": None, "log_metric": lambda *logged: None, "log_extra": lambda *logged: None}
    try:
        values = function(**given)
        if inspect.isawaitable(values):
            values = asyncio.run(_await(values))
        (value,) = values
        return "None (no reward)" if value is None else float(value)
    except RecipeError:
        raise
    except Exception as error:
        return f"raises {type(error).__name__}: {shorten(' '.join(str(error).split()), _LENGTH)}"


async def _await(values: Any) -> Any:
    return await values
