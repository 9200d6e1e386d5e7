"""Data sets: rows in, rows that the trainers, the rewards and the evaluation understand out.

Every row that comes out has `prompt` (a text, or chat messages), for SFT also `completion`, for DPO `chosen` and
`rejected` (of the same kind), and all of its other columns, which reach the rewards. What does not fit is a clear error
or a counted drop.
"""

from __future__ import annotations

import csv
import glob
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from siftrl.gym_rows import make_rows
from siftrl.recipe_text import near
from siftrl.row_shapes import (
    COMPLETIONS,
    Kind,
    Prompt,
    check_encodable,
    columns_needed,
    encode_prompts,
    fill,
    shape_row,
    text_of,
)

if TYPE_CHECKING:
    from siftrl.recipe import DataConfig, EvalDataConfig

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_REWARD_ARGUMENTS = {
    *("prompts", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
}
# columns that change what TRL takes a data set for; models of text only are trained here
_TRL_COLUMNS: dict[Kind, set[str]] = {
    "grpo": {"image", "images"},
    "dpo": {"image", "images", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"},
    "sft": {
        *("image", "images", "messages", "conversations", "text"),
        *("input_ids", "labels", "completion_mask", "assistant_masks"),
    },
}
_SOURCES_REPORTED = 20
_UNCACHED: dict[str, Any] = {"load_from_cache_file": False}  # a closure's hash is no safe key for a cache


@dataclass(frozen=True, slots=True)
class DataSplits:
    """train, eval: rows to train on and held-out rows (None: none asked for). report: what was counted."""

    train: Dataset
    eval: Dataset | None
    report: dict[str, Any]


def load_data(data: DataConfig, kind: Kind, tokenizer: PreTrainedTokenizerBase) -> DataSplits:
    """Load, check and shape the rows of a stage. The same recipe gives the same rows in the same order.

    Held-out rows never occur in training: equal prompts are taken out of the training rows and counted.
    With `data.source` the training rows' column of that name is text, or None where it is missing.
    report: {"rows", "prompt_tokens": {"mean", "max"}, "dropped": {reason: count}, "ignored_columns": names that
    TRL would misread}, with `data.source` also "sources": {name: rows} of the 20 largest ("": missing), and all but
    that for the held-out rows under "eval".
    Raises ValueError for missing columns, empty sets, rows that make no sense, prompts the tokenizer cannot encode.
    """
    if data.reasoning_gym is not None:
        train_rows, eval_rows = _gym_rows(data)
    else:
        train_rows, eval_rows = _stored_rows(data)
    filled = data  # reasoning-gym's rows got their prompts when they were made, while all of their record was at hand
    if data.reasoning_gym is not None and data.prompt_template is not None:
        filled = data.model_copy(update={"prompt": "prompt", "prompt_template": None})
    if data.source is not None:
        train_rows = _with_sources(train_rows, data.source, kind)
    train, report = _shape(train_rows, filled, kind, tokenizer, "training rows")
    held_out = None
    if eval_rows is not None:
        is_made = data.eval is not None and data.eval.path is None
        held_out, eval_report = _shape(eval_rows, filled if is_made else data, kind, tokenizer, "held-out rows")
        known = {_key(prompt) for prompt in held_out["prompt"]}
        num_rows = len(train)
        train = train.filter(lambda prompt: _key(prompt) not in known, input_columns="prompt", **_UNCACHED)
        if len(train) < num_rows:
            report["dropped"]["also held out"] = num_rows - len(train)
        if not len(train):
            raise ValueError("data.eval: every training prompt is also held out; hold out other rows")
        report["eval"] = eval_report
    report["rows"] = len(train)
    if data.source is not None:
        report["sources"] = dict(Counter(name or "" for name in train[data.source]).most_common(_SOURCES_REPORTED))
    return DataSplits(train, held_out, report)


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


# ------------------------------------------------------------------------------------------------------- sources


def _gym_rows(data: DataConfig) -> tuple[Dataset, Dataset | None]:
    gym, held = data.reasoning_gym, data.eval
    assert gym is not None
    eval_rows, known = None, frozenset[str]()
    if held is not None and held.path is not None:
        eval_rows = _load_held_out(held)
    elif held is not None:
        # Equal questions leave the training rows, not the held-out ones: where training covers the small families,
        # only rare and hard questions would be left to evaluate on.
        assert held.size is not None
        seed = gym.seed + 1 if held.seed is None else held.seed
        if seed == gym.seed:
            raise ValueError(f"data.eval.seed: {seed} is also the training rows' seed; write another one")
        eval_rows = Dataset.from_list(_with_prompts(make_rows(gym, size=held.size, seed=seed), data))
        known = frozenset(eval_rows["question"])
    size = min(gym.size, data.limit or gym.size)
    rows = make_rows(gym, size=size, seed=gym.seed, exclude=known)
    return Dataset.from_list(_with_prompts(rows, data)), eval_rows


def _with_prompts(rows: list[dict[str, Any]], data: DataConfig) -> list[dict[str, Any]]:
    """Apply the template to rows with `metadata`, which no column can hold: its shape differs between families."""
    for row in rows:
        if data.prompt_template is not None:
            row["prompt"] = fill(data.prompt_template, row)
        del row["metadata"]
    return rows


def _stored_rows(data: DataConfig) -> tuple[Dataset, Dataset | None]:
    assert data.path is not None
    train = load_rows(data.path, split=data.split, config=data.config, revision=data.revision)
    held = data.eval
    eval_rows = None
    if held is not None and held.path is not None:
        eval_rows = _load_held_out(held)
    elif held is not None:
        assert held.size is not None
        if held.size >= len(train):
            raise ValueError(f"data.eval.size: {held.size} leaves nothing of the {len(train)} rows; write less")
        eval_rows = train.select(range(len(train) - held.size, len(train)))
        train = train.select(range(len(train) - held.size))
    if data.limit is not None:
        train = train.select(range(min(data.limit, len(train))))
    return train, eval_rows


def _load_held_out(held: EvalDataConfig) -> Dataset:
    assert held.path is not None
    rows = load_rows(held.path, split=held.split, config=held.config, revision=held.revision, key="data.eval")
    return rows if held.size is None else rows.select(range(min(held.size, len(rows))))


def load_rows(
    path: str, *, split: str = "train", config: str | None = None, revision: str | None = None, key: str = "data"
) -> Dataset:
    """The rows of a local file, folder or glob, or of a hub data set, as they are stored.

    A local file is one split whatever `split` calls it, and slices such as "train[:10%]" work. CSV cells are text,
    exactly as written. key: the recipe's section, for messages.
    """
    try:
        files = _local_files(path, key)
        if files is None:
            return datasets.load_dataset(path, config, split=split, revision=revision)
        if not files:  # written by Dataset.save_to_disk
            stored = datasets.load_from_disk(path)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        kinds = {_FORMATS[Path(file).suffix] for file in files}
        if len(kinds) > 1:
            raise ValueError(f"{key}.path: {path} holds files of several kinds ({', '.join(sorted(kinds))})")
        options = _csv_as_text(files[0]) if kinds == {"csv"} else {}
        data_files = {split.partition("[")[0]: files}
        return datasets.load_dataset(kinds.pop(), data_files=data_files, split=split, **options)
    except (datasets.exceptions.DatasetsError, OSError, KeyError, StopIteration) as error:
        cause = error.__cause__ or error
        message = (str(cause).strip() or "it is empty").splitlines()[0]
        raise ValueError(f"{key}.path: {path}: cannot be loaded: {message}") from error
    except ValueError as error:
        text = str(error).splitlines()[0]
        raise ValueError(text if text.startswith(f"{key}.") else f"{key}.path: {path}: {text}") from error


def _csv_as_text(file: str) -> dict[str, Any]:
    with open(file, newline="") as lines:
        header = next(csv.reader(lines), [])
    return {
        "features": datasets.Features({name: datasets.Value("string") for name in header}),
        "keep_default_na": False,
    }


def _local_files(path: str, key: str) -> list[str] | None:
    """The files that a local path means, in order; [] for a folder of `save_to_disk`, None for a hub name."""
    here = Path(path).expanduser()
    if here.is_dir():
        if (here / "state.json").exists() or (here / "dataset_dict.json").exists():
            return []
        found = sorted(str(file) for file in here.iterdir() if file.suffix in _FORMATS)
    elif here.is_file():
        if here.suffix not in _FORMATS:
            raise ValueError(f"{key}.path: {path} is no {', '.join(_FORMATS)} file")
        found = [str(here)]
    elif glob.has_magic(path):
        found = sorted(file for file in glob.glob(str(here), recursive=True) if Path(file).suffix in _FORMATS)
    elif here.suffix in _FORMATS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{key}.path: there is no file or folder {path}")
    else:
        return None
    if not found:
        raise ValueError(f"{key}.path: {path} holds no {', '.join(_FORMATS)} file")
    return found


# ------------------------------------------------------------------------------------------------------- shaping


def _shape(
    rows: Dataset, data: DataConfig, kind: Kind, tokenizer: PreTrainedTokenizerBase, what: str
) -> tuple[Dataset, dict[str, Any]]:
    """(the rows with their prompts and completions, their report). what: which rows these are, for messages."""
    if not len(rows):
        raise ValueError(f"data: there are no {what}")
    _check_columns(rows, data, kind)
    ignored = sorted(_TRL_COLUMNS[kind] & set(rows.column_names))
    shaped = rows.map(
        lambda row, i: shape_row(row, data, kind, f"data: {what}: row {i}"),
        with_indices=True,
        remove_columns=[column for column in ignored if column not in ("prompt", *COMPLETIONS[kind])],
        desc=f"Shaping {what}",
        **_UNCACHED,
    )
    reasons: list[str] = shaped["drop_reason"][:]
    usable = [i for i, reason in enumerate(reasons) if not reason]
    lengths = _encoded_lengths(shaped, usable, kind, tokenizer, what)
    limit = data.max_prompt_tokens
    for i, length in zip(usable, lengths, strict=True):
        if limit is not None and length > limit:
            reasons[i] = "long prompt"
            if data.long_prompts == "error":
                raise ValueError(
                    f"data.max_prompt_tokens: {what}: row {i} has a prompt of {length} tokens, more than {limit}; "
                    "raise the limit, or write `long_prompts: drop`"
                )
    kept = [i for i, reason in enumerate(reasons) if not reason]
    dropped = dict(Counter(filter(None, reasons)))
    if not kept:
        raise ValueError(f"data: all {len(rows)} {what} were dropped: {dropped}")
    tokens = [length for i, length in zip(usable, lengths, strict=True) if not reasons[i]]
    report: dict[str, Any] = {
        "rows": len(kept),
        "prompt_tokens": {"mean": sum(tokens) / len(tokens), "max": max(tokens)},
        "dropped": dropped,
        "ignored_columns": ignored,
    }
    shaped = shaped.remove_columns("drop_reason")
    return shaped.select(kept) if dropped else shaped, report


def _check_columns(rows: Dataset, data: DataConfig, kind: Kind) -> None:
    columns = rows.column_names
    if kind == "grpo" and (clash := sorted(_REWARD_ARGUMENTS & set(columns))):
        raise ValueError(
            f"data: column {clash[0]!r} has the name of an argument that the trainer gives to rewards; "
            f"rename it in the file, for example to 'row_{clash[0]}'"
        )
    for key, column in columns_needed(rows[0], data, kind).items():
        _require_column(key, column, columns)


def _require_column(key: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise ValueError(
            f"data.{key}: there is no column {column!r}{near(column, columns)}; the columns are {', '.join(columns)}"
        )


def _with_sources(rows: Dataset, column: str, kind: Kind) -> Dataset:
    """The rows with the column of their sources as text: numbers are written out, what is missing stays None."""
    _require_column("source", column, rows.column_names)
    if column in ("prompt", *COMPLETIONS[kind]) or column in _TRL_COLUMNS[kind]:
        raise ValueError(f"data.source: {column!r} is a name that the trainer reads; rename the column, to 'source'")
    text = Value("string")
    if rows.features[column] == text:
        return rows
    names: list[str | None] = []
    for i, value in enumerate(rows[column]):
        if not isinstance(value, (str, int, float, NoneType)):
            raise ValueError(f"data.source: row {i} has {value!r} as its {column}; it must be text or a number")
        names.append(None if value is None else str(value))
    return rows.remove_columns(column).add_column(column, names, feature=text)


def _encoded_lengths(
    rows: Dataset, indices: list[int], kind: Kind, tokenizer: PreTrainedTokenizerBase, what: str
) -> list[int]:
    """The number of tokens of each prompt in `indices`; ValueError where the tokenizer loses text."""
    lengths: list[int] = []
    for start in range(0, len(indices), 1000):
        batch = rows[indices[start : start + 1000]]
        prompts, where = batch["prompt"], [f"data: {what}: row {i}" for i in indices[start : start + 1000]]
        if isinstance(prompts[0], list) and not tokenizer.chat_template:
            raise ValueError(
                "data: the prompts are chat messages, but the model's tokenizer has no chat template; "
                "write plain prompts (without `chat` and `system_prompt`), or take a chat model"
            )
        encoded = encode_prompts(prompts, tokenizer)
        for prompt, ids, row in zip(prompts, encoded, where, strict=True):
            check_encodable(text_of(prompt), ids, tokenizer, f"{row}: prompt")
        for name in COMPLETIONS[kind]:
            texts = [text_of(completion) for completion in batch[name]]
            targets = tokenizer(text=texts, add_special_tokens=False)["input_ids"]
            for text, ids, row in zip(texts, targets, where, strict=True):
                check_encodable(text, ids, tokenizer, f"{row}: {name}")
        lengths += map(len, encoded)
    return lengths
