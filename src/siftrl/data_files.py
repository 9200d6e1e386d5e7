"""Local data files: which files a path and a split mean, and the rows that stand in them, as they are written.

Free of torch and of `datasets`, so that a recipe can be checked against the head of a large file in no time.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from siftrl.recipe_text import near

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
EXACT = 2.0**53
"""Floats up to here hold whole numbers exactly."""
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_METADATA = "dataset_infos.json"
# the words that name a split in a file's name, as `datasets` reads them
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SEPARATORS = r"[-._ 0-9]"
_LONGEST_ROW = 1 << 26  # characters; whatever is longer is no row
_CHUNK = 1 << 20
_MESSAGE = {"role", "content", "from", "value"}
_SPACE = re.compile(r"\s*")
_EXPECTED = {"[": "a row", ",": "a row", "row": "a comma or the array's end"}  # what may follow in an array


def whole(value: Any) -> Any:
    """The cell, a whole float as the whole number that it is: 43.0 reads 43."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) <= EXACT else value


def split_names(split: str, key: str = "data") -> list[str]:
    """The splits that "train", "train[:10%]" or "train[:10%]+test" name, in order."""
    names = [re.fullmatch(r"\s*(\w+(?:\.\w+)*)\s*(\[[^\[\]]*\](\([^()]*\))?)?\s*", part) for part in split.split("+")]
    if not all(names):
        raise ValueError(f"{key}.split: {split!r} is no split; write for example train, train[:10%] or train+test")
    return [match[1] for match in names if match]


def local_files(path: str, split: str, key: str = "data") -> list[Path] | None:
    """The files that a local path means for a split, in order; None: `path` is a hub name.

    One file serves any split. Of a folder's files those are taken whose names hold the split's name (train.jsonl,
    train-00000-of-00002.parquet, gsm8k_train.csv) or another word for it (dev for validation); a folder where no name
    holds one is one split. A glob that matches files of one split serves any. For a folder written by
    `Dataset.save_to_disk` these are its .arrow files.

    key: the recipe's section, for messages. Raises ValueError where there is no such file, no file for the split, or
    files of several kinds.
    """
    names = split_names(split, key)
    here = Path(path).expanduser()
    if is_saved(path):
        return list(itertools.chain.from_iterable(_saved_files(here, name, key) for name in names))
    if here.is_dir():
        found = _usable([file for file in sorted(here.iterdir()) if not file.name.startswith(".")], path, key)
        chosen = [_of_split(found, name, path, key) for name in names]
    elif here.is_file():
        if here.suffix not in FORMATS:
            raise ValueError(f"{key}.path: {path} is no {', '.join(FORMATS)} file")
        chosen = [[here]]
    elif glob.has_magic(path):
        found = _usable(sorted(map(Path, glob.glob(str(here), recursive=True))), path, key)
        is_one = len({frozenset(_splits_named(file)) for file in found}) == 1
        chosen = [found] if is_one else [_of_split(found, name, path, key) for name in names]
    elif here.suffix in FORMATS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{key}.path: there is no file or folder {path}")
    else:
        return None
    files = list(dict.fromkeys(itertools.chain.from_iterable(chosen)))
    kinds = sorted({FORMATS[file.suffix] for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{key}.path: {path} holds files of several kinds ({', '.join(kinds)})")
    return files


def head(path: str, split: str, rows: int, key: str = "data") -> list[dict[str, Any]] | None:
    """At most `rows` first rows of what a local path holds for a split; None: `path` is a hub name.

    No more of a file is read than these rows need. Raises ValueError as `local_files` and `read_rows` do, and where
    there is no row.
    """
    files = local_files(path, split, key)
    if files is None:
        return None
    try:
        found = list(itertools.islice(itertools.chain.from_iterable(map(read_rows, files)), rows))
    except ValueError as error:
        raise ValueError(f"{key}.path: {error}") from error
    if not found:
        raise ValueError(f"{key}.path: {path} holds no rows")
    return found


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, one after another: JSON as `json.loads` gives it, CSV cells as text.

    A .json or .jsonl file holds one object a line, or one array of objects. Raises ValueError with the file and the
    line for what is no row.
    """
    if file.suffix == ".csv":
        return _decoded(file, _csv_rows)
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    if file.suffix == ".arrow":
        return _arrow_rows(file)
    return _decoded(file, _json_rows)


# ------------------------------------------------------------------------------------------------- files and splits


def is_saved(path: str) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    here = Path(path).expanduser()
    return (here / "state.json").exists() or (here / "dataset_dict.json").exists()


def _saved_files(folder: Path, split: str, key: str) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise ValueError(
                f"{key}.split: {folder} holds no split {split!r}{near(split, splits)}; its splits are "
                f"{', '.join(splits)}"
            )
        folder = folder / split
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    stored = state.get("_split")
    if stored is not None and split not in split_names(stored, key):
        raise ValueError(f"{key}.split: {folder} holds the split {stored}, not {split!r}; write `split: {stored}`")
    return [folder / part["filename"] for part in state["_data_files"]]


def _usable(files: list[Path], path: str, key: str) -> list[Path]:
    if packed := [file.name for file in files if file.suffix in _PACKED and Path(file.stem).suffix in FORMATS]:
        raise ValueError(f"{key}.path: {path}: {packed[0]} is packed; unpack it first")
    found = [file for file in files if file.suffix in FORMATS and file.name != _METADATA and file.is_file()]
    if not found:
        below = [file for file in files if file.is_dir() and any(part.suffix in FORMATS for part in file.iterdir())]
        hint = f"; its folder {below[0].name} does: write {below[0]}" if below else ""
        raise ValueError(f"{key}.path: {path} holds no {', '.join(FORMATS)} file{hint}")
    return found


def _words(file: Path) -> set[str]:
    return set(re.split(f"{_SEPARATORS}+", file.stem.lower()))


def _splits_named(file: Path) -> set[str]:
    """Which of train, validation and test the file's name holds."""
    return {split for split, words in _SPLIT_WORDS.items() if words & _words(file)}


def _of_split(files: list[Path], split: str, path: str, key: str) -> list[Path]:
    named = [f for f in files if split.lower() in _words(f) or re.match(f"{re.escape(split)}({_SEPARATORS}|$)", f.stem)]
    if named:
        return named
    for words in _SPLIT_WORDS.values():
        if split in words and (named := [file for file in files if words & _words(file)]):
            return named
    if not any(map(_splits_named, files)):
        return files
    names = ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")
    raise ValueError(
        f"{key}.split: no file in {path} is named after the split {split!r} ({names}); write another split, or a file "
        f"or glob as {key}.path"
    )


# ------------------------------------------------------------------------------------------------------------ rows


def _decoded(file: Path, rows: Any) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="" if rows is _csv_rows else "\n") as text:
        try:
            yield from rows(file, text)
        except UnicodeDecodeError as error:
            line, byte = _first_undecodable(file)
            raise ValueError(f"{file}: line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from error


def _first_undecodable(file: Path) -> tuple[int, int]:
    """(its line, the byte)."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError("every line is UTF-8")


def _csv_rows(file: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_ROW)
    reader = csv.reader(text, strict=True)
    try:
        # pandas leaves an index column without a name, and reads it so
        header = [name or f"Unnamed: {i}" for i, name in enumerate(next(reader, []))]
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"{file}: line 1: two columns are named {twice[0]!r}; rename one")
        if len(header) == 1 and (other := re.search("[;\t|]", header[0])):
            raise ValueError(f"{file}: line 1: the cells are separated by {other[0]!r}; separate them by commas")
        for cells in reader:
            if len(cells) != len(header):
                if not cells:
                    continue  # an empty line
                raise ValueError(
                    f"{file}: line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}; a cell "
                    "that holds a comma or a quote must stand in quotes"
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num}: {error}") from error


def _json_rows(file: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    start = text.read(_CHUNK).lstrip()
    text.seek(0)
    if start.startswith("["):
        yield from _array_rows(file, text)
        return
    rows = _line_rows(file, text)
    first, second = next(rows, None), next(rows, None)
    if first is not None and second is None and (inside := _rows_inside(first)):
        raise ValueError(_explain_object(file, inside))
    yield from (row for row in (first, second) if row is not None)
    yield from rows


def _line_rows(file: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    number = 0
    while line := text.readline(_LONGEST_ROW):
        number += 1
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == 1 and (opened := re.match(r'\s*\{\s*("([^"]+)"\s*:\s*[\[{])?', line + text.read(_CHUNK))):
                raise ValueError(_explain_object(file, opened[2])) from error
            raise ValueError(f"{file}: line {number}: is no JSON: {_reason(error)}") from error
        yield _object(row, f"{file}: line {number}")


def _array_rows(file: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    """The objects of one array, read as far as they are asked for."""
    decode = json.JSONDecoder().raw_decode
    part = text.read(_CHUNK)
    at, line, before = part.index("[") + 1, 1, "["  # before: what stands before `at`, a row or punctuation

    def place(position: int) -> str:
        return f"{file}: line {line + part.count(chr(10), 0, position)}"

    number = 0
    while True:
        at = _SPACE.match(part, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if at == len(part):
            line += part.count("\n")
            part, at = text.read(_CHUNK), 0
            if not part:
                raise ValueError(f"{place(0)}: the file ends inside its array")
        elif part[at] == "]" and before != ",":
            if rest := (part[at + 1 :] + text.read(_CHUNK)).strip():
                raise ValueError(f"{place(at)}: {rest[:80]!r} stands behind the array of rows")
            return
        elif (part[at] == ",") != (before == "row"):
            raise ValueError(f"{place(at)}: {part[at]!r} stands where {_EXPECTED[before]} must")
        elif part[at] == ",":
            at, before = at + 1, ","
        else:
            try:
                row, end = decode(part, at)
            except ValueError as error:
                cut = not isinstance(error, json.JSONDecodeError) or (
                    error.msg.startswith("Unterminated string") or error.pos > len(part) - 16
                )
                more = text.read(max(_CHUNK, len(part) - at)) if cut and len(part) - at < _LONGEST_ROW else ""
                if not more:
                    wrong = place(error.pos if isinstance(error, json.JSONDecodeError) else at)
                    raise ValueError(f"{wrong}: row {number} is no JSON: {_reason(error)}") from error
                line += part.count("\n", 0, at)
                part, at = part[at:] + more, 0
                continue
            yield _object(row, f"{place(at)}: row {number}")
            at, before, number = end, "row", number + 1


def _reason(error: ValueError) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {str(row)[:80]!r} is no row; a row is an object {{column: value}}")
    return row


def _rows_inside(row: dict[str, Any]) -> str | None:
    """The key under which a file's only object holds rows: a list of objects that are no chat messages."""
    for key, items in row.items():
        if (
            isinstance(items, list)
            and items
            and all(isinstance(one, dict) and not _MESSAGE & one.keys() for one in items)
        ):
            return key
    return None


def _explain_object(file: Path, key: str | None) -> str:
    inside = f"; take out what stands under {key!r}" if key is not None else ""
    return (
        f"{file}: the file is one JSON object, not rows: write one object a line, or an array of objects [{{...}}, ...]"
        f"{inside}"
    )


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, memory_map=True) as stored:
            for batch in stored.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error


def _arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as stored:
        for batch in pyarrow.ipc.open_stream(stored):
            yield from batch.to_pylist()
