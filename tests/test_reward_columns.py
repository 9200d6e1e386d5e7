"""What rewards declare: the columns that they read, and whether they judge row by row; read without importing them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from siftrl import plugins
from siftrl.plugins import PluginError, columns_read

OWN = """
import raises_when_imported
from dataclasses import dataclass
from typing import ClassVar


def plain(completions, answer, source, hint=None, *, labels, limit: int = 3, prompts, log_metric, **columns): ...
def any_column(completions, **columns): ...
def no_column(completions): ...
async def later(prompts, completions, trainer_state, entry, **columns): ...
made = later


@dataclass
class Declares:
    reads: ClassVar = ("{column}|answer", "entry", "{other}")
    row_by_row: ClassVar[bool] = True
    column: str | None = None
    other: str | None = None
    count: int = 1
    def __call__(self, completions, **columns): ...


@dataclass
class Inherits(Declares):
    column: str | None = "gold"


@dataclass
class Parameters:
    def __call__(self, completions, answer, **columns): ...


class ByParameters(Parameters): ...


class AnyColumn:
    row_by_row = False
    def __call__(self, completions, **columns): ...


class NoComma(AnyColumn):
    reads = ("answer")


@dataclass
class NoOption(Declares):
    reads: ClassVar = ("{colum}",)


@dataclass
class NoName(Declares):
    reads: ClassVar = ("{count}",)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_when_imported.py").write_text("raise AssertionError('imported')")
    (tmp_path / "own_rewards.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(tmp_path)
    for cache in (plugins.option_model, plugins.parse):
        cache.cache_clear()


@pytest.mark.parametrize(
    ("name", "options", "columns"),
    [
        ("exact_match", {}, (("answer",),)),
        ("exact_match", {"column": "target"}, (("target",),)),
        ("math_verify", {}, (("answer", "solution"),)),
        ("math_verify", {"column": "gold"}, (("gold",),)),
        ("reasoning_gym", {}, (("task",), ("task_config",), ("entry",))),
        ("response_format", {"pattern": "a"}, ()),
        ("own_rewards:plain", {}, (("answer",), ("source",), ("labels",))),
        ("own_rewards:any_column", {}, None),
        ("own_rewards:no_column", {}, ()),
        ("own_rewards:later", {}, (("entry",),)),
        ("own_rewards:made", {}, None),  # only an import would tell
        ("own_rewards:Declares", {}, (("answer",), ("entry",))),
        ("own_rewards:Declares", {"other": "b"}, (("answer",), ("entry",), ("b",))),
        ("own_rewards:Inherits", {}, (("gold",), ("entry",))),
        ("own_rewards:Inherits", {"column": None}, (("answer",), ("entry",))),
        ("own_rewards:Parameters", {}, (("answer",),)),
        ("own_rewards:ByParameters", {}, (("answer",),)),
        ("own_rewards:AnyColumn", {}, None),
    ],
)
def test_the_columns_that_a_reward_reads(own: None, name: str, options: dict[str, Any], columns: Any) -> None:
    assert columns_read(plugins.find("reward", name), options) == columns


def test_which_rewards_judge_row_by_row(own: None) -> None:
    assert all(plugins.find("reward", name).row_by_row for name in plugins.names("reward"))
    expected = {"plain": False, "Declares": True, "Inherits": True, "Parameters": False, "AnyColumn": False}
    assert {name: plugins.find("reward", f"own_rewards:{name}").row_by_row for name in expected} == expected


def test_the_class_that_the_docs_show_declares_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "ends.py").write_text(page.partition("file=my_package/ends.py\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    plugin = plugins.find("reward", "ends:EndsWithAnswer")
    assert (columns_read(plugin, {"column": "gold"}), plugin.row_by_row) == ((("gold",),), True)
    assert plugins.load("reward", "ends:EndsWithAnswer")(["so 4", "5"], answer=[4, 4]) == [1, 0]


@pytest.mark.parametrize("name", plugins.names("reward"))
def test_what_the_source_declares_is_what_python_has(name: str) -> None:
    made = plugins.load("reward", name, {"pattern": "a"} if name == "response_format" else {})
    assert (made.reads, made.row_by_row) == (plugins.find("reward", name).reads, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoComma", r"class NoComma: reads must be a tuple of column names, for example \(\"answer\",\), not 'answer'"),
        (
            "NoOption",
            "class NoOption: reads: '{colum}': 'colum' is no option that names a column; did you mean 'column'",
        ),
        ("NoName", "class NoName: reads: '{count}': 'count' is no option that names a column"),
    ],
)
def test_a_declaration_that_cannot_be_is_an_error(own: None, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        columns_read(plugins.find("reward", f"own_rewards:{name}"), {})
