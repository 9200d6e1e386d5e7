"""`siftrl eval` on a tiny real model: its table, its JSON, its rows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import REAL_DATA

from siftrl import cli
from siftrl.data import load_data
from siftrl.models import load_tokenizer, save_scratch_model
from siftrl.recipe import DataConfig, ModelConfig, ScratchConfig


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "20+1=", "answer": "21"}\n')
    return tmp_path


def siftrl(*arguments: str, fails: bool = False) -> None:
    assert cli.main(["eval", *arguments]) == (2 if fails else 0)


def test_prints_a_table_and_writes_rows_to_train_on(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym")
    options = ["--prompt-template", "{metadata[expression]}=", "--reward", "reasoning_gym", "--samples", "2"]
    options += ["--limit", "5", "--max-tokens", "3", "--out", "out/rows.jsonl"]
    siftrl(tiny_model, "--data", "reasoning_gym:chain_sum", *options)
    printed = capsys.readouterr()
    assert "mean reward" in printed.out and "pass@2" in printed.out and "±" in printed.out
    assert "reasoning_gym:chain_sum: 5 rows\n" in printed.err
    lines = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(len(line["samples"]) == len(line["rewards"]) == 2 for line in lines)
    assert lines[0]["prompt"].endswith("=") and lines[0]["pass_rate"] == 0.0 and "data" not in lines[0]
    tokenizer = load_tokenizer(ModelConfig(path=tiny_model))
    rows = load_data(DataConfig(path="out/rows.jsonl"), "grpo", tokenizer).train
    assert rows["pass_rate"][:] == [0.0] * 5


def test_the_model_is_asked_as_the_flags_say_and_rewards_get_their_options(
    tiny_model: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "asked.py").write_text(
        "import json\n"
        "def asked(completions, prompts, *, name: str = '', **columns):\n"
        "    with open('seen.json', 'w') as file:\n"  # it runs in a process of its own
        "        json.dump([name, prompts[0]], file)\n"
        "    return [1.0] * len(completions)\n"
    )
    flags = ["--chat", "--system-prompt", "Add.", "--reward", "{name: 'asked:asked', weight: 3.0, options: {name: x}}"]
    siftrl(tiny_model, "--data", "sums=rows.jsonl", *flags, "--max-tokens", "2", "--json", "-")
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    assert json.loads((home / "seen.json").read_text()) == ["x", messages]
    document = json.loads(capsys.readouterr().out)  # nothing but the JSON
    assert document["model"] == tiny_model
    settings = {"engine": "transformers", "max_tokens": 2, "temperature": 0.0, "samples": 1, "seed": 0}
    assert document["settings"] == settings
    (found,) = document["data"]
    assert (found["name"], found["rows"], found["reward"], found["std_error"]) == ("sums", 2, 3.0, 0.0)


def test_dropped_rows_are_told(tiny_model: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": " ", "answer": "21"}\n')
    siftrl(tiny_model, "--data", "rows.jsonl", "--reward", "exact_match", "--max-tokens", "2", "--json", "a/b.json")
    printed = capsys.readouterr()
    assert "rows.jsonl: 1 rows, 1 dropped (empty prompt)" in printed.err and "mean reward" in printed.out
    assert json.loads(Path("a/b.json").read_text())["data"][0]["dropped"] == {"empty prompt": 1}


def test_a_reward_at_fault_is_named_with_its_data_set(
    tiny_model: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "wrong.py").write_text("def wrong(completions, **columns):\n    raise KeyError('gold')\n")
    sets = ["--data", "a=rows.jsonl", "--data", "b=rows.jsonl", "--reward", "wrong:wrong"]
    siftrl(tiny_model, *sets, "--max-tokens", "2", fails=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("siftrl: a: reward 'wrong:wrong': row 0: raised KeyError: 'gold'; prompt: '1+1='")


def test_what_the_model_cannot_read_names_the_flag(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    siftrl(tiny_model, "--data", "rows.jsonl", "--reward", "exact_match", "--max-tokens", "90", fails=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("siftrl: --max-tokens: the model's context of 64 tokens has no room for 90 after a prompt")


def test_word_problems_of_four_forms_in_one_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GSM8K, MAWPS, SVAMP and ASDiv as their authors' files are, each with its own columns."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"{REAL_DATA} is not there: the data sets are not part of the project")
    letters = "".join(sorted({letter for path in REAL_DATA.glob("*/test.jsonl") for letter in path.read_text()}))
    sizes = ScratchConfig(
        hidden_size=32, num_layers=1, num_heads=2, max_positions=2048, alphabet=letters + "é–—’“”£€°½"
    )
    save_scratch_model(sizes, home / "model", seed=0)
    (home / "my.py").write_text(
        "def gold(completions, *, column: str = 'answer', **columns):\n"
        "    return [float(bool(str(answer))) for answer in columns[column]]\n"
    )
    entries = {
        "gsm8k": ("prompt: question", "answer"),
        "mawps": ("prompt: input", "target"),
        "svamp": ('prompt_template: "{Body} {Question}"', "Answer"),
        "asdiv": ('prompt_template: "{body} {question}"', "answer"),
    }
    lines = [
        f"  - {{name: {name}, path: {REAL_DATA}/{name}/test.jsonl, {prompt}, rewards: "
        f"[{{name: 'my:gold', options: {{column: {column}}}}}]}}"
        for name, (prompt, column) in entries.items()
    ]
    (home / "suite.yaml").write_text("data:\n" + "\n".join(lines) + "\n")
    siftrl("model", "--suite", "suite.yaml", "--limit", "4", "--max-tokens", "2", "--out", "rows.jsonl")
    table = capsys.readouterr().out
    for name in entries:
        (row,) = [line for line in table.splitlines() if f"│ {name} " in line]
        assert "1.0000 ± 0.0000" in row and "│    4 │" in row
    written = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [line["data"] for line in written] == [name for name in entries for _ in range(4)]


@pytest.mark.slow
def test_held_out_rows_are_those_that_training_holds_out(tiny_model: str, home: Path) -> None:
    """From the end of a file, from a file of their own, or made: with and without the training rows beside them."""
    from siftrl.eval_command import _rows
    from siftrl.eval_sets import Measured
    from siftrl.row_limits import NO_LIMITS

    tokenizer: Any = load_tokenizer(ModelConfig(path=tiny_model))
    rows = [{"q": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[7:12]))
    gym = {"tasks": [{"name": "chain_sum"}, {"name": "basic_arithmetic"}], "size": 30}
    for data in (
        {"path": "train.jsonl", "prompt": "q", "eval": {"size": 6}, "limit": 9},
        {"path": "train.jsonl", "prompt": "q", "chat": True, "eval": {"path": "test.jsonl", "size": 3}},
        {"reasoning_gym": gym, "eval": {"size": 7}},
        {"reasoning_gym": gym, "prompt_template": "{question}=", "eval": {"size": 7, "seed": 9}},
    ):
        config = DataConfig.model_validate(data)
        trained = load_data(config, "grpo", tokenizer)
        assert trained.eval is not None
        found, dropped = _rows(Measured("x", config, [], held_out=True), tokenizer, NO_LIMITS)
        assert found.to_list() == trained.eval.to_list() and not dropped
        few, _ = _rows(Measured("x", config, [], held_out=True, limit=2), tokenizer, NO_LIMITS)
        assert few.to_list() == trained.eval.to_list()[:2]


@pytest.mark.engines
def test_both_engines_measure_the_same(tiny_model: str, home: Path) -> None:
    """Greedy completions of prompts of different lengths, from vLLM with arguments of its own and from transformers."""
    (home / "my.py").write_text(
        "def letters(completions, **columns):\n    return [sum(map(ord, text)) % 101 / 10 for text in completions]\n"
    )
    rows = "".join(json.dumps({"prompt": f"{10**n}+{chr(97 + n)}"}) + "\n" for n in range(12))
    (home / "rows.jsonl").write_text(rows)
    options = ["--data", "rows.jsonl", "--reward", "my:letters", "--max-tokens", "6"]
    siftrl(tiny_model, *options, "--json", "transformers.json")
    siftrl(tiny_model, *options, "--json", "vllm.json", "--engine", "vllm", "--engine-arg", "max_num_seqs=4")
    ours, theirs = (json.loads((home / f"{name}.json").read_text())["data"] for name in ("transformers", "vllm"))
    assert ours[0]["std_error"] > 0 and ours == theirs  # the completions differ from prompt to prompt
