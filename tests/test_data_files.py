from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from siftrl.data_files import head, local_files, read_rows, split_names

ROWS: list[dict[str, Any]] = [
    {"question": "q1", "answer": "007", "more": {"a": None}},
    {"question": "q 2", "answer": 2.5, "even": [1, "x"]},
    {"question": "é", "answer": 12345678901234567890},
]


def names(path: Path, split: str) -> list[str]:
    return [file.name for file in local_files(str(path), split) or []]


def put(folder: Path, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).write_text(json.dumps({"name": file}))
    return folder


# ------------------------------------------------------------------------------------------------ files and splits


def test_a_folder_gives_a_split_its_own_files(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "a", "test.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "gsm_dev.json"
    )
    (folder / "README.md").write_text("read me")
    assert names(folder, "train") == names(folder, "train[:10%]") == [f"train-0000{i}-of-00002.jsonl" for i in (0, 1)]
    assert names(folder, "validation") == ["gsm_dev.json"]
    assert names(folder, "test+train[:5]")[0] == "test.jsonl" and len(names(folder, "test+train[:5]")) == 3
    parts = put(tmp_path / "mawps", "addsub.jsonl", "singleop.jsonl", "test.jsonl")
    assert names(parts, "test") == ["test.jsonl"] and names(parts, "addsub") == ["addsub.jsonl"]
    with pytest.raises(
        ValueError, match="data.split: no file in .*mawps is named after the split 'train' .*addsub.jsonl"
    ):
        local_files(str(parts), "train")


def test_files_without_a_splits_name_are_one_split_and_one_file_serves_any(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", "1.jsonl", "2.jsonl", ".hidden.jsonl", "dataset_infos.json")
    assert names(folder, "train") == names(folder, "test") == ["1.jsonl", "2.jsonl"]
    assert names(put(tmp_path / "b", "test.jsonl") / "test.jsonl", "train") == ["test.jsonl"]
    assert names(tmp_path / "b" / "t*.jsonl", "train") == ["test.jsonl"]  # all that it matches is of one split
    put(tmp_path / "b", "train.jsonl")
    assert names(tmp_path / "b" / "t*.jsonl", "train") == ["train.jsonl"]
    assert local_files("openai/gsm8k", "train") is None


def test_a_saved_data_set_honours_the_split(tmp_path: Path) -> None:
    both = {name: datasets.Dataset.from_list([{"name": name}] * 3) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert head(str(tmp_path / "both"), "test[:50%]", 9) == [{"name": "test"}] * 3
    with pytest.raises(ValueError, match="data.split: .* holds no split 'tes'; did you mean 'test'"):
        local_files(str(tmp_path / "both"), "tes")
    datasets.Dataset.from_list([{"name": "one"}], split="train").save_to_disk(tmp_path / "one")
    assert head(str(tmp_path / "one"), "train", 9) == [{"name": "one"}]
    with pytest.raises(ValueError, match="holds the split train, not 'test'; write `split: train`"):
        local_files(str(tmp_path / "one"), "test")


@pytest.mark.parametrize("split", ["train[:10%", "", "train,test", "tr ain"])
def test_what_is_no_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match="data.eval.split: .* is no split"):
        split_names(split, "data.eval")


def test_packed_files_and_files_one_folder_down_are_named(tmp_path: Path) -> None:
    put(tmp_path / "data", "train.jsonl")
    with pytest.raises(ValueError, match=f"holds no .*; its folder data does: write {tmp_path}/data"):
        local_files(str(tmp_path), "train")
    with pytest.raises(ValueError, match="more.jsonl.gz is packed; unpack it first"):
        local_files(str(put(tmp_path / "data", "more.jsonl.gz")), "train")


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("indent", [None, 1])
def test_json_rows_are_what_json_loads_gives(
    tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siftrl.data_files._CHUNK", 7)  # every row is cut by the end of a piece that is read
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False))
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    assert list(read_rows(tmp_path / "rows.json")) == list(read_rows(tmp_path / "rows.jsonl")) == ROWS
    (tmp_path / "empty.json").write_text("[ ]\n")
    assert list(read_rows(tmp_path / "empty.json")) == []
    with pytest.raises(ValueError, match="data.path: .*empty.json holds no rows"):
        head(str(tmp_path / "empty.json"), "train", 3)


def test_csv_cells_are_text_behind_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer\r\n"a, ""b""\nc",007\r\n\r\nd,\r\n', encoding="utf-8-sig")
    assert list(read_rows(tmp_path / "rows.csv")) == [
        {"question": 'a, "b"\nc', "answer": "007"},
        {"question": "d", "answer": ""},
    ]


def test_parquet_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"a": 1.5, "b": "x"}] * 600).to_parquet(tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == [{"a": 1.5, "b": "x"}] * 600


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"q,a\n1,2\n1,2,3\n", "a.csv: line 3: 3 cells, but the header has 2"),
        ("a.csv", b"q,a\n1\n", "a.csv: line 2: 1 cells, but the header has 2"),
        ("a.csv", b"q,q\n1,2\n", "line 1: two columns are named 'q'"),
        ("a.csv", b"q;a\n1;2\n", "line 1: the cells are separated by ';'"),
        ("a.csv", b'q,a\n1,"2\n3,4\n', "line 3: unexpected end of data"),
        ("a.csv", b"q,a\n1,caf\xe9\n", "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", b'{"q": 1}\n{"q": "\xe9"}\n', "a.jsonl: line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"q": 1}\n'.encode("utf-16"), "a.jsonl: line 1: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"q": 1}\n{"q": \n', r"a.jsonl: line 2: is no JSON: Expecting value \(column"),
        ("a.jsonl", b'{"q": 1}\n["a", 1]\n', "line 2: .* is no row; a row is an object"),
        ("a.json", b'[{"q": 1},\n{"q": x}]', "a.json: line 2: row 1 is no JSON: Expecting value"),
        ("a.json", b'[{"q": 1},\n{"q": 2}', "a.json: line 2: the file ends inside its array"),
        ("a.json", b'[{"q": 1},\n{"q": ', "a.json: line 2: row 1 is no JSON"),
        ("a.json", b'[{"q": 1}\n{"q": 2}]', "line 2: '{' stands where a comma or the array's end must"),
        ("a.json", b'[{"q": 1},\n 7]', "line 2: row 1: '7' is no row"),
        ("a.json", b'[{"q": 1}]\n[{"q": 2}]', r"stands behind the array of rows"),
        ("a.json", b'{"version": 1, "data": [{"q": 1}, {"q": 2}]}', "one JSON object, not rows: .* under 'data'"),
        ("a.json", b'{\n "data": [\n {"q": 1}\n]\n}', "one JSON object, not rows: .* under 'data'"),
        ("a.json", b'{\n "q": 1\n}', "one JSON object, not rows"),
        ("a.parquet", b"PAR", "a.parquet: cannot be read"),
    ],
)
def test_what_is_no_row_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        head(str(tmp_path / name), "train", 9)
    assert str(caught.value).startswith("data.path: ") and "\n" not in str(caught.value)


def test_a_row_of_messages_is_no_object_around_the_rows(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert list(read_rows(tmp_path / "rows.jsonl")) == [row]


def test_the_head_of_a_large_file_is_read_in_no_time(tmp_path: Path) -> None:
    """Files with a hole of 10 GB behind the first rows: whoever reads on meets it."""
    row = json.dumps({"question": "q", "answer": "a"})
    for name, text in {
        "rows.json": f"[{row}, {row},",
        "rows.jsonl": f"{row}\n{row}\n",
        "rows.csv": "question,answer\nq,a\nq,a\n",
        "object.json": '{"data": [' + row,
    }.items():
        with (tmp_path / name).open("w") as file:
            file.write(text)
            file.truncate(10 << 30)
        start = time.monotonic()
        if name == "object.json":
            with pytest.raises(ValueError, match="one JSON object, not rows"):
                head(str(tmp_path / name), "train", 2)
        else:
            assert len(head(str(tmp_path / name), "train", 2) or []) == 2
        assert time.monotonic() - start < 1, name


def test_reading_needs_neither_torch_nor_datasets(tmp_path: Path) -> None:
    put(tmp_path / "a", "train.jsonl")
    code = (
        "import sys; from siftrl.data_files import head; print(head(sys.argv[1], 'train', 3))\n"
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0 and "train.jsonl" in done.stdout, done.stderr


def test_rows_come_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": 1}\n{"q": 2}\nbroken')
    assert list(itertools.islice(read_rows(tmp_path / "rows.jsonl"), 2)) == [{"q": 1}, {"q": 2}]
