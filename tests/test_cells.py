"""Cells arrive as they are written: in data sets, prompts, targets, golds, and in what rewards are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import REAL_DATA, write_rows
from datasets import Dataset, Features, Value

from siftrl import plugins
from siftrl.cells import JsonCell, read_dataset, with_whole_numbers
from siftrl.data import load_data, load_rows
from siftrl.models import character_tokenizer
from siftrl.recipe import DataConfig

TOKENIZER = character_tokenizer()
MIXED: list[dict[str, Any]] = [
    {"q": "a", "text": "43", "deep": {"a": 1}, "day": "2020-01-01", "yes": True, "big": 2**70, "number": 18},
    {"q": "b", "text": 43, "deep": {"b": [1, {"c": None}]}, "day": "x", "yes": None, "big": 1, "number": 2.5},
    {"q": "c", "text": None, "deep": "{}", "day": "007", "yes": False, "big": -(2**63), "number": 0.1 + 0.2},
]


pytestmark = pytest.mark.usefixtures("data_cache")


def test_a_data_set_gives_back_what_json_loads_gives(tmp_path: Path) -> None:
    rows = read_dataset([Path(write_rows(tmp_path / "rows.jsonl", MIXED))])
    assert list(rows) == MIXED and rows[1]["deep"] == {"b": [1, {"c": None}]}
    assert [type(value) for value in rows["text"][:]] == [str, int, type(None)]
    assert rows.features["q"] == Value("string") and rows.features["yes"] == Value("bool")


def test_values_survive_map_filter_select_and_disk(tmp_path: Path) -> None:
    rows = read_dataset([Path(write_rows(tmp_path / "rows.jsonl", MIXED))])

    def marked(row: Any) -> Any:
        row["text"], row["mark"] = row["text"], 1  # read, and given back
        return row

    for changed in (
        rows.map(lambda row: {"mark": str(row["text"]) + str(row["deep"])}),
        rows.map(lambda batch: {"mark": list(map(str, batch["deep"]))}, batched=True, batch_size=2),
        rows.map(marked),
        rows.map(lambda row: {**row, "mark": 1}),
        rows.filter(lambda row: row["text"] != "44").add_column("mark", [1, 2, 3]),
    ):
        assert list(changed.remove_columns("mark")) == MIXED
        assert changed.features["deep"] == JsonCell()
    assert rows.select([2, 0])["text"][:] == [None, "43"]
    rows.save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"))) == MIXED
    again = Dataset.from_list(MIXED, features=Features({**rows.features, "q": JsonCell()}))
    assert list(again) == MIXED


def test_changed_files_are_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for number in (1, 2):
        assert load_rows(write_rows(path, [{"a": number}]))["a"][:] == [number]
    assert len(list((tmp_path / "cache" / "siftrl").iterdir())) == 2  # and no half-written file


def test_half_a_character_is_named_with_its_column(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n')
    with pytest.raises(
        ValueError, match="data.path: .*rows.jsonl: column 'a' holds half of a surrogate pair: '.ud83d'"
    ):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_rows_that_lack_a_column_have_none_there(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"a": 1}, {"b": [2, "x"]}])
    assert list(load_rows(path)) == [{"a": 1, "b": None}, {"a": None, "b": [2, "x"]}]


def test_whole_floats_of_stored_columns_read_as_whole_numbers() -> None:
    rows = Dataset.from_dict({"a": [43.0, 2.5, None], "b": [1.0, None, 3.0], "c": [0.5, 1e300, float("inf")]})
    found = with_whole_numbers(rows)
    assert found.column_names == ["a", "b", "c"]
    assert repr(found[:]) == "{'a': [43, 2.5, None], 'b': [1, None, 3], 'c': [0.5, 1e+300, inf]}"


@pytest.mark.parametrize(
    "answers",
    [
        ["2020-01-01", "2021-05-05"],
        ["2020-01-01T08:00:00", "2021-05-05T10:00:00"],
        [18, 2.5],
        [43.0, 26.0],
        [43.0, 2.5],
        [12345678901234567890, 1],
        ["007", 7],
        ["true", True],
        ["1e3", "None"],
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_targets_and_golds_are_what_is_written(tmp_path: Path, answers: list[Any], form: str) -> None:
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        write_rows(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        try:
            Dataset.from_list(rows).to_parquet(path)
        except (ValueError, TypeError, OverflowError):
            pytest.skip("no column of Arrow holds these")
        if list(datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "x"))["answer"]) != answers:
            pytest.skip("no column of Arrow holds these")
    written = [str(int(a)) if isinstance(a, float) and a.is_integer() else str(a) for a in answers]
    sft = load_data(DataConfig(path=str(path), prompt="question", completion="answer"), "sft", TOKENIZER).train
    assert sft["completion"][:] == written
    template = DataConfig(path=str(path), prompt_template="{question}: {answer}")
    assert load_data(template, "grpo", TOKENIZER).train["prompt"][:] == [f"q{i}: {w}" for i, w in enumerate(written)]
    gold = load_data(DataConfig(path=str(path), prompt="question"), "grpo", TOKENIZER).train["answer"][:]
    assert gold == answers and list(map(str, gold)) == written
    assert plugins.load("reward", "exact_match", {})(completions=written, answer=gold) == [1.0, 1.0]


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nq1,007\nq2,43.0\nq3,2020-01-01\n", encoding="utf-8-sig")
    rows = load_rows(str(tmp_path / "rows.csv"))
    assert rows["answer"][:] == ["007", "43.0", "2020-01-01"] and rows.column_names == ["question", "answer"]


@pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real data in {REAL_DATA}; SIFTRL_TEST_DATA names another folder"
)
def test_real_files_arrive_as_they_are() -> None:
    """All cells of GSM8K, MAWPS, SVAMP and ASDiv; each folder by its splits."""
    sizes = {("gsm8k", "train"): 7473, ("gsm8k", "test"): 1319, ("mawps", "test"): 2065}
    for (name, split), size in (sizes | {("svamp", "test"): 1000, ("asdiv", "test"): 2215}).items():
        rows = load_rows(str(REAL_DATA / name), split=split)
        written = [json.loads(line) for line in (REAL_DATA / name / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == size and list(rows) == written
    assert load_rows(str(REAL_DATA / "mawps"), split="test")["target"][:2] == [43, 26]
    answers = load_rows(str(REAL_DATA / "svamp"), split="test")["Answer"][:]
    assert all(isinstance(answer, int) for answer in answers)
    with pytest.raises(ValueError, match="data.split: no file in .*mawps is named after the split 'train'"):
        load_rows(str(REAL_DATA / "mawps"))


@pytest.mark.slow
def test_rewards_get_what_json_loads_gives(tmp_path: Path, tiny_model: str) -> None:
    """Through TRL's reward call; a column has the name under which rows once held their place."""
    from conftest import grpo_args

    from siftrl.selectors.uniform_rows import UniformRows
    from siftrl.trainers.grpo import GRPOTrainer

    seen: dict[str, dict[str, Any]] = {}
    rows = [{"q": f"{i}+1=", **MIXED[i % 3], "siftrl_row": f"mine {i}", "drop_reason": i} for i in range(12)]
    rows = [row | {"q": f"{i}+1="} for i, row in enumerate(rows)]

    def reward(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
        for i, prompt in enumerate(prompts):
            seen[prompt] = {name: columns[name][i] for name in rows[0] if name != "q"}
        return [float(len(text)) for text in completions]

    data = load_data(DataConfig(path=write_rows(tmp_path / "rows.jsonl", rows), prompt="q"), "grpo", TOKENIZER).train
    options: dict[str, Any] = {"batch_selector": UniformRows(), "keep": 0.5}
    GRPOTrainer(
        model=tiny_model,
        reward_funcs=[reward],
        args=grpo_args(tmp_path, max_steps=2),
        train_dataset=data,
        processing_class=TOKENIZER,
        **options,
    ).train()
    assert len(seen) >= 4
    for row in rows:
        if row["q"] in seen:
            assert seen[row["q"]] == {name: value for name, value in row.items() if name != "q"}
