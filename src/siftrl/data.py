"""Data sets: rows in, rows that the trainers, the rewards and the evaluation understand out.

Every row that comes out has `prompt` (a text, or chat messages), for SFT also `completion`, for DPO `chosen` and
`rejected` (of the same kind), and all of its other columns, which reach the rewards. What does not fit is a clear error
or a counted drop.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from siftrl.cells import read_dataset, with_whole_numbers
from siftrl.data_files import FORMATS, is_saved, local_files, split_names, whole
from siftrl.gym_rows import make_rows
from siftrl.recipe_text import near
from siftrl.reward_columns import TRL_ARGUMENTS
from siftrl.row_encoding import Measured, measure
from siftrl.row_limits import NO_LIMITS, RowLimits
from siftrl.row_shapes import COMPLETIONS, Kind, Prompt, columns_needed, fill, shape_row, template_columns

if TYPE_CHECKING:
    from siftrl.recipe import DataConfig, EvalDataConfig

# columns that change what TRL takes a data set for; models of text only are trained here
_TRL_COLUMNS: dict[Kind, set[str]] = {
    "grpo": {"image", "images"},
    "dpo": {
        *("image", "images", "tools", "chat_template_kwargs"),
        *("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"),
    },
    "sft": {
        *("image", "images", "messages", "conversations", "text", "tools", "chat_template_kwargs"),
        *("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths"),
    },
}
_SOURCES_REPORTED = 20
_ROWS_AT_ONCE = 1000
_TEXT = Value("string")
_MESSAGES = datasets.List({"role": Value("string"), "content": Value("string")})


@dataclass(frozen=True, slots=True)
class DataSplits:
    """train, eval: rows to train on and held-out rows (None: none asked for). report: what was counted."""

    train: Dataset
    eval: Dataset | None
    report: dict[str, Any]


def load_data(
    data: DataConfig, kind: Kind, tokenizer: PreTrainedTokenizerBase, limits: RowLimits = NO_LIMITS
) -> DataSplits:
    """Load, check and shape the rows of a stage. The same recipe gives the same rows in the same order.

    Held-out rows never occur in training: equal prompts are taken out of the training rows and counted.
    With `data.source` the training rows' column of that name is text, or None where it is missing.
    limits: what the stage and its model take of a row (`siftrl.row_limits`).
    report: {"rows", "prompt_tokens": {"mean", "max"}, "dropped": {reason: count}, "cut": rows that are longer than
    `limits.max_length`, "ignored_columns": names that TRL would misread}, with `data.source` also "sources": {name:
    rows} of the 20 largest ("": missing), and all but that for the held-out rows under "eval".
    Raises ValueError for missing columns, empty sets, rows that make no sense, rows that the tokenizer cannot encode
    or the model cannot read, and too few rows for a step.
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
    train, report = _shape(train_rows, filled, kind, tokenizer, limits, "training rows")
    held_out = None
    if eval_rows is not None:
        is_made = data.eval is not None and data.eval.path is None
        held_out, eval_report = _shape(eval_rows, filled if is_made else data, kind, tokenizer, limits, "held-out rows")
        known = {_key(prompt) for prompt in held_out["prompt"]}
        others = [i for i, prompt in enumerate(train["prompt"]) if _key(prompt) not in known]
        if not others:
            raise ValueError("data.eval: every training prompt is also held out; hold out other rows")
        if len(others) < len(train):
            report["dropped"]["also held out"] = len(train) - len(others)
            train = train.select(others)
        report["eval"] = eval_report
    limits.check_rows(len(train))
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

    Cells of local .json, .jsonl and .csv files are what is written there (`siftrl.cells`), but for whole floats: 43.0
    reads 43, whatever the source. Slices such as "train[:10%]" work. key: the recipe's section, for messages.
    """
    try:
        if local_files(path, split, key) is None:
            rows = datasets.load_dataset(path, config, split=split, revision=revision)
            return with_whole_numbers(rows)
        parts = {name: _local_rows(path, name, key) for name in split_names(split, key)}
        return parts[split] if list(parts) == [split] else _sliced(parts, split, key)
    except (datasets.exceptions.DatasetsError, OSError, KeyError, StopIteration) as error:
        cause = error.__cause__ or error
        message = (str(cause).strip() or "it is empty").splitlines()[0]
        raise ValueError(f"{key}.path: {path}: cannot be loaded: {message}") from error
    except ValueError as error:
        text = str(error).splitlines()[0]
        where = "" if text.startswith(f"{key}.") else f"{key}.path: " if path in text else f"{key}.path: {path}: "
        raise ValueError(where + text) from error


def _sliced(parts: dict[str, Dataset], split: str, key: str) -> Dataset:
    """What "train[:10%]+test" means of whole splits."""
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(p) for name, p in parts.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{key}.split: {split!r}: {str(error).splitlines()[0]}") from error
    # fmt: off
    return datasets.concatenate_datasets([parts[part.splitname].select(range(part.from_, part.to)) for part in slices])
    # fmt: on


def _local_rows(path: str, split: str, key: str) -> Dataset:
    """All rows of one split."""
    files = local_files(path, split, key)
    assert files is not None
    if is_saved(path):
        stored = datasets.load_from_disk(path)
        return with_whole_numbers(stored[split] if isinstance(stored, datasets.DatasetDict) else stored)
    if FORMATS[files[0].suffix] == "parquet":
        named = {"train": list(map(str, files))}
        return with_whole_numbers(datasets.load_dataset("parquet", data_files=named, split="train"))
    return read_dataset(files)


# ------------------------------------------------------------------------------------------------------- shaping


def _shape(
    rows: Dataset,
    data: DataConfig,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits,
    what: str,
) -> tuple[Dataset, dict[str, Any]]:
    """(the rows with their prompts and completions, their report). what: which rows these are, for messages."""
    if not len(rows):
        raise ValueError(f"data: there are no {what}")
    _check_columns(rows, data, kind)
    made = ("prompt", *COMPLETIONS[kind])
    ignored = sorted(_TRL_COLUMNS[kind] & set(rows.column_names) - {data.source})
    read = _columns_read(rows, data, kind)
    form = _form(rows, read, data, kind, what)  # of all rows; what has no prompt is empty in it
    is_chat = form == _MESSAGES
    if is_chat and not tokenizer.chat_template:
        raise ValueError(
            "data: the prompts are chat messages, but the model's tokenizer has no chat template; "
            "write plain prompts (without `chat` and `system_prompt`), or take a chat model"
        )
    reasons = [""] * len(rows)
    measured: list[Measured | None] = [None] * len(rows)

    def shape_batch(*columns_and_indices: Any) -> dict[str, list[Any]]:
        *cells, indices = columns_and_indices
        shaped: dict[str, list[Any]] = {name: [] for name in made}
        for i, values in zip(indices, zip(*cells, strict=True), strict=True):
            row, reasons[i] = shape_row(dict(zip(read, values, strict=True)), data, kind, f"data: {what}: row {i}")
            if not reasons[i] and isinstance(row["prompt"], list) != is_chat:
                raise ValueError(f"data: {what}: row {i}: one set cannot hold both plain prompts and chat messages")
            for name in made:
                shaped[name].append(([] if is_chat else "") if reasons[i] else row[name])
        places = [place for place, i in enumerate(indices) if not reasons[i]]
        usable = {name: [cells[place] for place in places] for name, cells in shaped.items()}
        where = [f"data: {what}: row {indices[place]}" for place in places]
        for place, found in zip(places, measure(usable, where, tokenizer, limits, data), strict=True):
            measured[indices[place]] = found
            reasons[indices[place]] = found.drop_reason
        return shaped

    features = datasets.Features({name: rows.features[name] for name in rows.column_names if name not in ignored})
    shaped = rows.map(
        shape_batch,
        batched=True,
        batch_size=_ROWS_AT_ONCE,
        with_indices=True,
        input_columns=read,
        remove_columns=[column for column in ignored if column not in made],
        features=datasets.Features({**features, **dict.fromkeys(made, form)}),
        desc=f"Shaping {what}",
        load_from_cache_file=False,
        new_fingerprint=Hasher.hash((rows._fingerprint, data.model_dump_json(), kind, what)),  # else the closure's hash
    )
    kept = [i for i, reason in enumerate(reasons) if not reason]
    dropped = dict(Counter(filter(None, reasons)))
    if not kept:
        raise ValueError(f"data: all {len(rows)} {what} were dropped: {dropped}{_advice(dropped, measured, limits)}")
    found = [one for i in kept if (one := measured[i]) is not None]
    report: dict[str, Any] = {
        "rows": len(kept),
        "prompt_tokens": {
            "mean": sum(one.num_prompt for one in found) / len(found),
            "max": max(one.num_prompt for one in found),
        },
        "dropped": dropped,
        "ignored_columns": ignored,
    }
    if limits.max_length is not None:
        report["cut"] = sum(one.is_cut for one in found)
    return shaped.select(kept) if dropped else shaped, report


def _form(rows: Dataset, read: list[str], data: DataConfig, kind: Kind, what: str) -> Any:
    """The feature type of prompts and completions: that of the first row that can be used."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows.select_columns(read)[start : start + _ROWS_AT_ONCE]
        for i, values in enumerate(zip(*(batch[name] for name in read), strict=True), start=start):
            row, reason = shape_row(dict(zip(read, values, strict=True)), data, kind, f"data: {what}: row {i}")
            if not reason:
                return _MESSAGES if isinstance(row["prompt"], list) else _TEXT
    return _TEXT


def _advice(dropped: dict[str, int], measured: list[Measured | None], limits: RowLimits) -> str:
    if limits.max_length is None or not any("max_length" in reason for reason in dropped):
        return ""
    longest = max(one.num_all for one in measured if one is not None)
    return (
        f"; their prompts alone fill trainer.max_length ({limits.max_length} tokens), which leaves no token to learn: "
        f"raise it (the longest row has {longest} tokens)"
    )


def _columns_read(rows: Dataset, data: DataConfig, kind: Kind) -> list[str]:
    """The columns that prompts and completions are made of."""
    if data.prompt_template is not None:
        wanted = template_columns(data.prompt_template)
    else:
        wanted = [data.prompt or "prompt"]
    wanted += [getattr(data, name) or name for name in COMPLETIONS[kind]]
    return [name for name in dict.fromkeys(wanted) if name in rows.column_names] or rows.column_names[:1]


def _check_columns(rows: Dataset, data: DataConfig, kind: Kind) -> None:
    columns = rows.column_names
    if kind == "grpo" and (clash := sorted(TRL_ARGUMENTS & set(columns))):
        raise ValueError(
            f"data: column {clash[0]!r} has the name of an argument that the trainer gives to rewards; "
            f"rename it in the file, for example to 'row_{clash[0]}'"
        )
    if data.prompt_template is not None:
        for column in template_columns(data.prompt_template):
            _require_column("prompt_template", column, columns)
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
        names.append(None if value is None else str(whole(value)))
    return rows.remove_columns(column).add_column(column, names, feature=text)
