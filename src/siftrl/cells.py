"""Cells as they are written: rows of local files as a data set that gives each value back, whatever stands beside it.

An Arrow column has one type; JSON's do not. A column whose cells are all text, all whole numbers, all fractions or all
true and false is stored as such, any other as JSON text that is read again when a row is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets.arrow_writer import TypedSequence
from datasets.features.features import register_feature

from siftrl.data_files import EXACT, read_rows, whole

_ROWS_AT_ONCE = 10_000
_STORED_AS = b"1"
"""How rows are stored: another number wherever the same file would give other columns."""
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_ARROW: dict[type, str] = {str: "string", int: "int64", float: "float64", bool: "bool"}


@dataclass
class JsonCell:
    """The feature type of a column of any JSON values. (That of `datasets` reads the text "43" as a number.)"""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="SiftJsonCell", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else _Json(_as_json(value))

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)


class _Json(str):
    """JSON text, to tell it from a cell that is text."""


def _arrow_array(sequence: TypedSequence, type: Any = None) -> Any:
    """What `Dataset.map` writes of a column of `JsonCell`; `datasets` has no encoding of one's own there."""
    feature = sequence.try_type if sequence.type is None else sequence.type
    if not isinstance(feature, JsonCell):
        return _own_arrow_array(sequence, type)
    sequence._inferred_type = feature
    cells = [cell if isinstance(cell, _Json) else feature.encode_example(cell) for cell in sequence.data]
    return pa.array(cells, feature.pa_type)


_own_arrow_array = TypedSequence._arrow_array
TypedSequence._arrow_array = _arrow_array  # type: ignore[method-assign, assignment]
with warnings.catch_warnings():  # that registering features is experimental
    warnings.simplefilter("ignore", UserWarning)
    register_feature(JsonCell, "SiftJsonCell")


def read_dataset(files: list[Path]) -> Dataset:
    """The rows of .json, .jsonl and .csv files, in order; a column that a row lacks is None there.

    They are stored in the cache of `datasets`, under their content's hash, and mapped into memory from there. Raises
    ValueError as `read_rows` does, and where there is no row.
    """
    digest = hashlib.sha256(_STORED_AS)
    for file in files:
        with file.open("rb") as content:
            digest.update(file.suffix.encode() + hashlib.file_digest(content, "sha256").digest())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "siftrl"
    stored = folder / f"{digest.hexdigest()}.arrow"
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        features = _features(files)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        try:
            with pa.OSFile(part, "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
                for rows in _chunks(files):
                    writer.write_table(_table(rows, features))
            os.replace(part, stored)
        finally:
            Path(part).unlink(missing_ok=True)
    return Dataset.from_file(str(stored))


def with_whole_numbers(rows: Dataset) -> Dataset:
    """The rows with the whole floats of their columns of floats as whole numbers."""
    for name, feature in rows.features.items():
        if feature not in (Value("float64"), Value("float32")):
            continue
        column = rows.with_format("arrow")[name][:] if len(rows) else pa.chunked_array([[]], "float64")
        is_whole = pc.and_(pc.equal(pc.floor(column), column), pc.less_equal(pc.abs(column), EXACT))
        if pc.all(is_whole).as_py():
            rows = rows.cast_column(name, Value("int64"))
        elif pc.any(is_whole).as_py():
            order = rows.column_names
            cells = [JsonCell().encode_example(whole(cell)) for cell in column.to_pylist()]
            rows = rows.remove_columns(name).add_column(name, cells, feature=Value("string"))
            rows = rows.cast_column(name, JsonCell()).select_columns(order)
    return rows


def _chunks(files: list[Path]) -> Iterator[list[dict[str, Any]]]:
    rows: Iterable[dict[str, Any]] = itertools.chain.from_iterable(map(read_rows, files))
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        yield chunk


def _features(files: list[Path]) -> Features:
    """The type of each column, in the order in which they appear first."""
    types: dict[str, set[type]] = {}
    for rows in _chunks(files):
        for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
            cells = _column(rows, name)
            found = set(map(type, cells))
            if int in found and max(abs(cell) for cell in cells if type(cell) is int) >= 2**63:
                found.add(object)
            types.setdefault(name, set()).update(found)
    if not types:
        raise ValueError(f"{files[0]} holds no rows")
    features = Features()
    for name, found in types.items():
        found.discard(type(None))
        (only,) = found if len(found) == 1 else (object,)
        features[name] = Value(_ARROW[only]) if only in _ARROW else JsonCell() if found else Value("string")
    return features


def _column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [whole(row.get(name)) for row in rows]


def _table(rows: list[dict[str, Any]], features: Features) -> pa.Table:
    types = dict(zip(features, features.arrow_schema.types, strict=True))
    columns = []
    for name, feature in features.items():
        cells = _column(rows, name)
        if isinstance(feature, JsonCell):
            cells = list(map(feature.encode_example, cells))
        try:
            columns.append(pa.array(cells, types[name]))
        except UnicodeEncodeError as error:
            raise ValueError(f"column {name!r} holds half of a surrogate pair: {ascii(error.object)[:80]}") from error
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)
