"""What a recipe names on this machine, looked at before torch is imported: data files and their columns, models.

Only the heads of files are read, and rows are counted no further than a step needs. Whatever cannot be looked at
without a download or an import is told as a line that begins with "not checked". This module must stay free of torch.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from siftrl import plugin_facts, plugins
from siftrl.batch_arithmetic import batch_arithmetic, kept_rows, world_size
from siftrl.data_files import head, local_files, read_rows, whole
from siftrl.model_files import ModelFiles, check_model
from siftrl.recipe import AnyStage, DataConfig, EvalDataConfig, GRPOStage, Recipe, RewardConfig, load_recipe
from siftrl.recipe_checks import check_context
from siftrl.recipe_text import Key, RecipeError, dotted, located, near
from siftrl.reward_columns import TRL_ARGUMENTS, compiled, gold_text
from siftrl.row_shapes import COMPLETIONS, Kind, columns_needed, shape_row, shorten, template_columns

HEAD_ROWS = 100
"""Rows at a file's beginning whose columns and forms are looked at."""
_GYM_COLUMNS = ("question", "answer", "task", "task_config", "entry")
_NOT_HANDED_ON = ("prompt", "completion", "completion_ids")
"""Columns that no reward is given: the trainer has arguments of its own for them."""
_NOT_HERE = "packages, files and models: they are those of the machine that trains"


def load_checked(
    path: str | Path, overrides: Sequence[str] = (), *, num_ranks: int | None = None, here: bool = True
) -> tuple[Recipe, list[str]]:
    """`load_recipe`, and what `check_files` says of the recipe.

    here: the recipe runs on this machine; else neither packages nor files are looked for.
    """
    recipe = load_recipe(path, overrides, num_ranks=num_ranks, check_installed=here)
    if not here:
        return recipe, [f"not checked: {_NOT_HERE}"]
    try:
        return recipe, check_files(recipe, num_ranks)
    except RecipeError as error:
        raise RecipeError(located(Path(path), overrides, error)) from None


def check_files(recipe: Recipe, num_ranks: int | None = None) -> list[str]:
    """Look at all that the recipe names on this machine.

    Returns a line for each thing that was not checked, and for each that is without effect.
    Raises RecipeError with the key, what is wrong, and what to write instead.
    """
    lines: list[str] = []
    folder = Path(recipe.output.dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RecipeError(f"{there} is no folder that can be written to; write another", "output", "dir")
    model = None
    if recipe.model.path is not None:
        model = check_model(recipe.model.path, ("model", "path"), lines)
    for index, stage in enumerate(recipe.stages):
        key: Key = ("stages", index)
        if model is not None and model.positions is not None:
            check_context(recipe, stage, model.positions, key)
        has_chat = _check_stage_data(recipe, stage, key, num_ranks or world_size(), lines)
        if has_chat and model is not None and not stage.trainer.get("chat_template_path"):
            _require_template(model, recipe.model.path, f"the prompts of stage {stage.name}")
        _check_plugin_models(stage, key, lines)
        _check_trainer_files(stage, (*key, "trainer"))
        if isinstance(stage, GRPOStage) and stage.rollout.engine_args:
            lines.append(f"not checked: {dotted((*key, 'rollout', 'engine_args'))}: vllm's own options")
    return list(dict.fromkeys(lines))


def check_evaluation(
    model: str,
    data: DataConfig,
    rewards: Sequence[RewardConfig],
    flags: Mapping[str, str],
    *,
    kind: Kind = "grpo",
    max_tokens: int = 0,
) -> list[str]:
    """`check_files` of a model and of rows that its completions of at most `max_tokens` are measured on.

    flags: what stands for each key in messages: {"model.path": "MODEL", "data.path": "--data", "rewards": "--reward"}.
    """
    lines: list[str] = []
    try:
        folder = check_model(model, ("model", "path"), lines)
        _, has_chat = _check_rows(data, kind, rewards, ("data",), ("rewards",), lines)
        if folder is not None and has_chat:
            _require_template(folder, model, "the prompts")
        if folder is not None and folder.positions is not None and max_tokens >= folder.positions:
            problem = f"the model's context of {folder.positions} tokens has no room for {max_tokens} after a prompt"
            raise RecipeError(f"{problem}; write {folder.positions - 1} or less", "max_tokens")
    except RecipeError as error:
        raise RecipeError(error.problem, _flag(error.key, flags)) from None
    return [re.sub(r"^(not checked: )?([\w.]+)", lambda match: _flag_line(match, flags), line) for line in lines]


def _flag(key: Key, flags: Mapping[str, str]) -> str:
    """The flag of the longest part of the key that has one, or else the key."""
    known = (dotted(key[:end]) for end in range(len(key), 0, -1))
    return next((flags[text] for text in known if text in flags), dotted(key))


def _flag_line(match: re.Match[str], flags: Mapping[str, str]) -> str:
    return (match[1] or "") + _flag(tuple(match[2].split(".")), flags)


def _require_template(folder: ModelFiles, path: str | None, prompts: str) -> None:
    if not folder.chat_template:
        problem = f"{prompts} are chat messages, but the tokenizer of {path} has no chat template"
        advice = "write plain prompts (without `chat` and `system_prompt`), or take a chat model"
        raise RecipeError(f"{problem}; {advice}", "model", "path")


# ------------------------------------------------------------------------------------------------------- a stage


def _check_stage_data(recipe: Recipe, stage: AnyStage, key: Key, world: int, lines: list[str]) -> bool:
    """Check a stage's rows; returns whether its prompts are chat messages, as far as that is known."""
    data = recipe.data_of(stage)
    data_key: Key = ("data",) if stage.data is None else (*key, "data")
    rewards = recipe.rewards_of(stage) if recipe.measures_rewards(stage) else []
    reward_key: Key = ("rewards",) if stage.rewards is None else (*key, "rewards")
    columns, has_chat = _check_rows(data, stage.kind, rewards, data_key, reward_key, lines)
    numbers = batch_arithmetic(stage, world)
    if stage.batch_selectors:
        keeps = [selector.keep for selector in stage.batch_selectors]
        if kept_rows(numbers.rows, keeps)[-1] == numbers.rows:
            keep = dotted((*key, *stage.batch_selector_keys[-1], "keep"))
            lines.append(f"{keep}: all {numbers.rows} rows of a step are kept: they are scored, and none is left out")
    if not isinstance(stage, GRPOStage):
        needed = stage.rows_per_step if stage.batch_selectors else 1
        _check_count(data, needed, data_key, (*key, "rows_per_step"), lines, "reads", "rows")
        return has_chat
    if stage.prompt_selector is not None:
        name, options = stage.prompt_selector.name, stage.prompt_selector.options
        where = (*key, "prompt_selector")
        if columns is not None:
            for column in plugins.columns_read(plugins.find("selector", name), options) or ():
                _require_one(column, columns, options, f"{name} reads", where)
        if numbers.prompts_proposed is None:
            what = f"how many prompts {name} draws for a step, which only its code says: it is asked before the model"
            lines.append(f"not checked: {dotted(where)}: {what} is loaded")
    _check_count(data, numbers.prompts_proposed or stage.prompts_per_step, data_key, (*key, "prompts_per_step"), lines)
    return has_chat


def _check_plugin_models(stage: AnyStage, key: Key, lines: list[str]) -> None:
    """The models that the stage's selectors load."""
    chosen = [(("prompt_selector",), stage.prompt_selector)] if isinstance(stage, GRPOStage) else []
    for where, section in [*chosen, *zip(stage.batch_selector_keys, stage.batch_selectors, strict=True)]:
        if section is None:
            continue
        for option, path, tokenizer in plugin_facts.model_paths("selector", section.name, section.options):
            check_model(path, (*key, *where, *option), lines, tokenizer=tokenizer)


def _check_trainer_files(stage: AnyStage, key: Key) -> None:
    """Files that TRL's own options name."""
    for option in ("accelerator_config", "chat_template_path", "fsdp_config"):
        path = stage.trainer.get(option)
        is_local = isinstance(path, str) and (path.startswith((".", "/")) or path.endswith((".json", ".jinja")))
        if is_local and not Path(cast(str, path)).exists():
            raise RecipeError(f"there is no file {path}", *key, option)


# ------------------------------------------------------------------------------------------------- rows and columns


def _check_rows(
    data: DataConfig, kind: Kind, rewards: Sequence[RewardConfig], key: Key, reward_key: Key, lines: list[str]
) -> tuple[set[str] | None, bool]:
    """Check the first rows of the data, and of the held-out rows.

    key, reward_key: where the data and the rewards stand.
    Returns the columns (None: unknown), and whether the prompts are chat messages, as far as that is known.
    """
    known, has_chat = None, data.chat or data.system_prompt is not None
    if data.reasoning_gym is not None:
        known = {*_GYM_COLUMNS, "prompt"}
        if data.prompt_template is not None:
            _check_template(data.prompt_template, {*known, "metadata"}, key)
        what = "its tasks' settings, but for their names, and what metadata their rows have"
        lines.append(f"not checked: {dotted((*key, 'reasoning_gym'))}: {what}")
        _check_reward_columns(rewards, _handed_on(known, kind), reward_key, lines)
    elif data.path is not None:
        known, is_chat = _check_source(data.path, data.split, data, kind, rewards, key, reward_key, lines)
        has_chat = has_chat or is_chat
    if data.eval is not None and data.eval.path is not None:
        held = data.eval
        _check_source(data.eval.path, held.split, data, kind, rewards, (*key, "eval"), reward_key, lines, data_key=key)
    return known, has_chat


def _check_source(
    path: str,
    split: str,
    data: DataConfig,
    kind: Kind,
    rewards: Sequence[RewardConfig],
    key: Key,
    reward_key: Key,
    lines: list[str],
    data_key: Key | None = None,
) -> tuple[set[str] | None, bool]:
    """`_check_rows` for one path. data_key: where the names of columns stand, if not at `key` as the path does."""
    named = data_key or key
    try:
        rows = head(path, split, HEAD_ROWS, dotted(key))
    except ValueError as error:
        raise _keyed(error, key) from None
    if rows is None:
        lines.append(f"not checked: {dotted((*key, 'path'))}: {path} is taken for a hub name: its rows and columns")
        for index, reward in enumerate(rewards):
            _note_undeclared(reward, (*reward_key, index), lines)
        return None, False
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    rows = [{column: whole(row.get(column)) for column in columns} for row in rows]
    if kind == "grpo" and (clash := sorted(TRL_ARGUMENTS & set(columns))):
        problem = f"{path} has a column {clash[0]!r}, the name of an argument that the trainer gives to rewards"
        raise RecipeError(f"{problem}; rename it in the file, for example to 'row_{clash[0]}'", *key, "path")
    if data.prompt_template is not None:
        _check_template(data.prompt_template, columns, named)
    for option, column in columns_needed(rows[0], data, kind).items():
        _require(column, columns, (*named, option))
    if data.source is not None and data.reasoning_gym is None:
        _check_sources(rows, data.source, kind, columns, (*named, "source"))
    _check_reward_columns(rewards, _handed_on(set(columns), kind), reward_key, lines)
    _check_golds(rewards, rows, path, reward_key)
    try:
        shaped = [shape_row(row, data, kind, f"{path}: row {index}") for index, row in enumerate(rows)]
    except ValueError as error:
        raise _keyed(error, named) from None
    reasons = [reason for _, reason in shaped]
    if all(reasons):
        problem = f"none of the first {len(rows)} rows can be used: {', '.join(sorted(set(reasons)))}"
        raise RecipeError(f"{path}: {problem}", *key, "path")
    return set(columns), any(isinstance(row.get("prompt"), list) for row, _ in shaped)


def _check_sources(rows: Sequence[Mapping[str, Any]], column: str, kind: Kind, columns: list[str], key: Key) -> None:
    if column in ("prompt", *COMPLETIONS[kind]):
        raise RecipeError(f"{column!r} is a name that the trainer reads; rename the column, to 'source'", *key)
    _require(column, columns, key)
    for index, row in enumerate(rows):
        if not isinstance(row[column], str | int | float | None):
            problem = f"row {index} has {row[column]!r} as its {column}; it must be text or a number"
            raise RecipeError(problem, *key)


def _keyed(error: ValueError, key: Key) -> RecipeError:
    """The error of a function that writes keys as text, at the front; they begin with `data` or with `key`."""
    text = str(error)
    for front in (dotted(key), "data"):
        if match := re.match(rf"{re.escape(front)}((?:\.\w+)*): ", text):
            return RecipeError(text[match.end() :], *key, *match[1].split(".")[1:])
    return RecipeError(text, *key)


def _check_template(template: str, columns: Sequence[str] | set[str], key: Key) -> None:
    try:
        named = template_columns(template)
    except ValueError as error:
        raise _keyed(error, key) from None
    for column in named:
        _require(column, columns, (*key, "prompt_template"))


def _require(column: str, columns: Sequence[str] | set[str], key: Key) -> None:
    if column not in columns:
        shown = ", ".join(map(str, columns if isinstance(columns, list) else sorted(columns)))
        raise RecipeError(f"there is no column {column!r}{near(column, columns)}; the columns are {shown}", *key)


def _handed_on(columns: set[str], kind: Kind) -> set[str]:
    """The columns that rewards are given: in an evaluation of SFT the targets, too."""
    return columns - set(_NOT_HANDED_ON) | ({"completion"} if kind == "sft" else set())


def _check_reward_columns(rewards: Sequence[RewardConfig], columns: set[str], key: Key, lines: list[str]) -> None:
    for index, reward in enumerate(rewards):
        where = (*key, index)
        plugin = plugins.find("reward", reward.name)
        read = _note_undeclared(reward, where, lines) or ()
        for alternatives in read:
            _require_one(alternatives, columns, reward.options, f"{reward.name} reads", where, ("options",))
        for option in plugin.fields if plugin.is_function else ():
            if option in columns:
                what = f"the data has a column of this name, too, which {reward.name} is not given"
                lines.append(f"{dotted((*where, 'options', option))}: {what}")


def _check_golds(rewards: Sequence[RewardConfig], rows: Sequence[Mapping[str, Any]], path: str, key: Key) -> None:
    """Whether siftrl's own rewards that compare with an answer find one in some of the rows."""
    for index, reward in enumerate(rewards):
        plugin, pattern = plugins.find("reward", reward.name), reward.options.get("gold")
        if not plugin.module.startswith("siftrl.rewards.") or "gold" not in plugin.fields:
            continue
        finder = compiled("gold", pattern)
        for alternatives in plugins.columns_read(plugin, reward.options) or ():
            there = [name for name in alternatives if name in rows[0]]
            cells = [(name, row[name]) for name in there for row in rows if row[name] is not None]
            try:
                found = [gold_text(cell, finder, reward.name, name) for name, cell in cells]
            except ValueError as error:
                raise RecipeError(str(error), *key, index) from None
            if cells and not any(found):
                what = f"{pattern!r} finds no answer" if pattern else f"{reward.name} finds no answer"
                where = f"in the first {len(rows)} rows of {path}, for example in {shorten(str(cells[0][1]), 80)!r}"
                raise RecipeError(f"{what} {where}", *key, index, *(("options", "gold") if pattern else ()))


def _note_undeclared(reward: RewardConfig, key: Key, lines: list[str]) -> tuple[tuple[str, ...], ...] | None:
    """The columns that a reward declares, or a line."""
    read = plugins.columns_read(plugins.find("reward", reward.name), reward.options)
    if read is None:
        lines.append(f"not checked: {dotted(key)}: which columns {reward.name} reads: it does not declare them")
    return read


def _require_one(
    alternatives: Sequence[str], columns: set[str], options: Mapping[str, Any], who: str, key: Key, section: Key = ()
) -> None:
    """One of the columns must be there. key: the plugin's; section: where its options stand in it."""
    if columns & set(alternatives):
        return
    named = [option for option, value in options.items() if value in alternatives]
    where = (*section, named[0]) if named else ()
    if taken := [column for column in alternatives if column in _NOT_HANDED_ON]:
        problem = f"{who} the column {taken[0]!r}, which the trainer keeps for itself; rename it in the data"
        raise RecipeError(problem, *key, *where)
    wanted = " or ".join(map(repr, alternatives))
    hint = next(filter(None, (near(column, columns) for column in alternatives)), "")
    shown = ", ".join(sorted(columns)) or "none"
    raise RecipeError(f"{who} the column {wanted}, which the data has not{hint}; it has {shown}", *key, *where)


# --------------------------------------------------------------------------------------------------- how many rows


def _check_count(
    data: DataConfig,
    needed: int,
    key: Key,
    needed_key: Key,
    lines: list[str],
    draws: str = "draws",
    prompts: str = "prompts",
) -> None:
    """Whether the local rows are enough for a step that draws `needed`, once the held-out ones are taken out."""
    if data.path is None:
        return
    held = _held_out(data.eval)
    first, end = _slice(data.split)
    if first is None:
        lines.append(f"not checked: {dotted((*key, 'split'))}: how many rows {data.split} holds")
        return
    wanted = needed + held
    try:
        files = local_files(data.path, data.split, dotted(key))
        if files is None:
            return
        stored = itertools.chain.from_iterable(map(read_rows, files))
        rows = sum(1 for _ in itertools.islice(stored, first, min(first + wanted, end or first + wanted)))
    except ValueError as error:
        raise _keyed(error, key) from None
    if held and rows <= held:
        raise RecipeError(f"{held} leaves nothing of the {rows} rows; write less", *key, "eval", "size")
    if rows < wanted:
        left = f"the data has only {rows - held} to train on" + (f", {held} are held out" if held else "")
        advice = "lower it, or what the selector draws" if prompts == "prompts" else "lower it"
        raise RecipeError(f"a step {draws} {needed} {prompts}, {left}; {advice}", *needed_key)


def _held_out(held: EvalDataConfig | None) -> int:
    """Rows that are taken out of the training rows."""
    return held.size or 0 if held is not None and held.path is None else 0


def _slice(split: str) -> tuple[int | None, int | None]:
    """(first row, the row behind the last one) of a split; no first row: counting all rows would tell."""
    match = re.fullmatch(r"\s*[\w.]+\s*(?:\[(\d*):(\d*)\])?\s*", split)
    if match is None:
        return None, None
    return int(match[1] or 0), int(match[2]) if match[2] else None
