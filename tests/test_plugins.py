"""Plugins: found by name, their options read from the source, checked, and made."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from siftrl import plugin_facts, plugins
from siftrl.plugins import PluginError

KINDS = [(kind, name) for kind in ("selector", "reward") for name in plugins.names(kind)]

OPTIONS_MODULE = '''
import raises_when_imported
from dataclasses import dataclass
from typing import Literal

Body = Literal["own", "policy"]
DEFAULT_RATE = 3e-4


@dataclass
class Inner:
    """rate: how fast."""

    rate: float = DEFAULT_RATE
    body: Body = "own"
    span: tuple[float, float] | None = None
'''
SELECTOR_MODULE = '''
"""A file's docstring."""

from __future__ import annotations

import raises_when_imported
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from siftrl.fields import Count, Share
from siftrl.types import PromptSelector
from inner_options import Inner

if TYPE_CHECKING:
    from raises_when_imported import Tensor

SIZE = 7


@dataclass
class Base:
    first: Count = 1
    shared: Share = 0.5


@dataclass
class Mine(Base, PromptSelector):
    """Keeps mine.

    shared: a share,
        in two lines.
    second, third: both.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"value"})
    size: int = SIZE
    shared: Share = 0.25
    _: KW_ONLY
    names: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    second: int = field(default=2)
    third: "int" = 3  # this wins
    state: dict[str, Any] = field(init=False, default_factory=dict)
    _hidden: int = 0
    required: str
    """What must be given."""

    def propose(self, candidates, keep: int, generator) -> Tensor: ...


class Plain:
    def select(self, signals, keep, generator): ...


class Both:
    def select(self, signals, keep, generator): ...
    def propose(self, candidates, keep, generator): ...
'''


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path with modules that must not be imported."""
    (tmp_path / "raises_when_imported.py").write_text("raise AssertionError('imported')")
    (tmp_path / "inner_options.py").write_text(OPTIONS_MODULE)
    (tmp_path / "my_selectors.py").write_text(SELECTOR_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for cache in (plugins.option_model, plugins.parse):
        cache.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def problem(kind: plugins.Kind, name: str, options: dict[str, Any]) -> str:
    with pytest.raises(PluginError) as caught:
        plugins.validate(kind, name, options)
    return str(caught.value)


# --------------------------------------------------------------------------------------- the plugins that are there


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_what_the_source_says_is_what_python_makes(kind: plugins.Kind, name: str) -> None:
    """The fields and defaults read from the source are those of the imported class."""
    plugin, options = plugins.describe(kind, name)
    assert plugin.summary
    required = {"response_format": {"pattern": "a"}, "reducible_loss": {"reference": "a/model"}}.get(name, {})
    made = plugins.load(kind, name, required)
    live = [field.name for field in dataclasses.fields(made) if field.init and not field.name.startswith("_")]
    assert [option.name for option in options] == live
    checked = plugins.validate(kind, name, required)
    plain = dataclasses.asdict(made)
    assert {key: plain[key] for key in checked} == checked
    plugins.check(made)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_every_key_says_what_it_does(kind: plugins.Kind, name: str) -> None:
    _, options = plugins.describe(kind, name)
    obvious = {"ignore_case", "max_grad_norm", "lora_rank", "weight_decay"}
    for option in [*options, *(inner for outer in options for inner in outer.options)]:
        assert option.doc or option.name in obvious, f"{name}.{option.name}"


def test_plugins_are_told_apart_by_their_methods() -> None:
    assert plugins.find("selector", "uniform").role == "prompt"
    assert plugins.find("reward", "exact_match").role == "reward"


def test_reading_options_imports_nothing_heavy() -> None:
    code = (
        "import sys; from siftrl import plugins\n"
        "for kind in ('selector', 'reward'):\n"
        "    for name in plugins.names(kind): plugins.describe(kind, name)\n"
        "assert not {'torch', 'transformers', 'reasoning_gym', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nested_options_become_their_dataclass() -> None:
    made = plugins.load("selector", "prompt_curriculum", {"candidates": 3, "value": {"reward_range": [0, 2]}})
    from siftrl.selectors.prompt_curriculum import PromptCurriculum
    from siftrl.value import ValueConfig

    assert type(made) is PromptCurriculum and made.candidates == 3
    assert made.value == ValueConfig(reward_range=(0.0, 2.0))


# ------------------------------------------------------------------------------------------------- your own


def test_options_follow_python_s_rules_for_dataclasses(modules: Path) -> None:
    checked = plugins.validate("selector", "my_selectors:Mine", {"required": "x", "maybe": {"span": [0, 1]}})
    inner = {"rate": 3e-4, "body": "own", "span": None}
    assert checked == {
        "first": 1,
        "shared": 0.25,
        "size": 7,
        "names": [],
        "inner": inner,
        "maybe": inner | {"span": [0.0, 1.0]},
        "second": 2,
        "third": 3,
        "required": "x",
    }
    assert "raises_when_imported" not in sys.modules


def test_options_are_described(modules: Path) -> None:
    plugin, options = plugins.describe("selector", "my_selectors:Mine")
    assert (plugin.summary, plugin.role) == ("Keeps mine.", "prompt")
    by_name = {option.name: option for option in options}
    assert by_name["shared"].doc == "a share, in two lines."
    assert (by_name["second"].doc, by_name["third"].doc) == ("both.", "this wins")
    assert (by_name["required"].doc, by_name["required"].default) == ("What must be given.", "")
    assert [(o.name, o.type, o.default, o.doc) for o in by_name["inner"].options] == [
        ("rate", "float", "DEFAULT_RATE", "how fast."),
        ("body", "Body", "'own'", ""),
        ("span", "tuple[float, float] | None", "None", ""),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "required: is required"),
        ({"required": "x", "firts": 1}, "firts: unknown key; did you mean 'first'?"),
        ({"required": "x", "first": 0}, "first: must be greater than or equal to 1, not the number 0"),
        ({"required": "x", "shared": 2}, "shared: must be less than or equal to 1, not the number 2"),
        ({"required": "x", "third": "3"}, "third: must be a whole number, not the text '3'"),
        ({"required": "x", "inner": {"rat": 1}}, "inner.rat: unknown key; did you mean 'rate'?"),
        ({"required": "x", "inner": {"body": "owm"}}, "inner.body: must be own or policy"),
        ({"required": "x", "maybe": 3}, "maybe: must be a mapping, not the number 3"),
        ({"required": "x", "state": {}}, "state: unknown key"),
        ({"required": "x", "_hidden": 1}, "_hidden: unknown key"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, modules: Path) -> None:
    assert message in problem("selector", "my_selectors:Mine", options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unifrom", "no selector 'unifrom'; did you mean 'uniform'?"),
        ("zzz", "no selector 'zzz'; write one of difficulty_pools, "),
        ("no_such_module:X", "no Python source of module 'no_such_module'"),
        ("my_selectors:Mime", "defines no 'Mime'; did you mean 'Mine'?"),
        ("my_selectors:SIZE", "must be a class with propose or select"),
        ("my_selectors:Both", "must have either propose (prompts) or select (batches)"),
        ("my_selectors:Base", "must have either propose (prompts) or select (batches)"),
    ],
)
def test_wrong_names_are_explained(name: str, message: str, modules: Path) -> None:
    assert message in problem("selector", name, {})


def test_a_batch_selector_is_no_prompt_selector(modules: Path) -> None:
    from siftrl.recipe import GRPOStage

    assert plugins.find("selector", "my_selectors:Plain").role == "batch"
    with pytest.raises(ValueError, match="selects inside a batch; write a selector of prompts"):
        GRPOStage.model_validate({"kind": "grpo", "prompt_selector": "my_selectors:Plain"})


def test_whether_a_selector_reads_rewards_is_read_from_its_class_or_their_bases(modules: Path) -> None:
    (modules / "attributes.py").write_text(
        textwrap.dedent("""
            from typing import ClassVar
            from siftrl.types import BatchSelector

            YES = True

            class Plain(BatchSelector):
                def select(self, signals, keep, generator): ...

            class Reads(Plain):
                reads_rewards: ClassVar[bool] = YES

            class Inherits(Reads): ...

            class Not(Reads):
                reads_rewards = True
                reads_rewards = False

            class Later(Plain):
                reads_rewards = compute()
        """)
    )
    expected = {"Plain": False, "Reads": True, "Inherits": True, "Not": False}
    assert {name: plugins.find("selector", f"attributes:{name}").reads_rewards for name in expected} == expected
    assert "'compute' is not known without importing attributes" in problem("selector", "attributes:Later", {})


def test_a_type_that_only_an_import_would_tell_is_an_error(modules: Path) -> None:
    (modules / "odd.py").write_text(
        textwrap.dedent("""
            import torch
            from dataclasses import dataclass

            @dataclass
            class Odd:
                device: torch.device = None
                def propose(self, candidates, keep, generator): ...
        """)
    )
    assert "odd.py: Odd.device: 'torch' is not known without importing odd" in problem("selector", "odd:Odd", {})


def test_a_file_with_an_error_says_where(modules: Path) -> None:
    (modules / "broken.py").write_text("x = 1\ndef (:\n")
    assert "broken.py:2: invalid syntax" in problem("reward", "broken:f", {})


def test_packages_are_not_imported_to_find_a_module(modules: Path) -> None:
    package = modules / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "light.py").write_text("from .other import score as reward")
    (package / "other.py").write_text("def score(completions, *, bonus: float = 1.0, **columns): ...")
    assert plugins.validate("reward", "heavy_package.light:reward", {}) == {"bonus": 1.0}


# ------------------------------------------------------------------------------------------------- rewards


REWARDS = '''
import functools
from dataclasses import dataclass


def short(completions, answer=None, *, limit: int = 3, labels, **columns):
    """1 below a limit.

    limit: characters.
    """
    return [float(len(text) < limit) for text in completions]


async def later(completions, **columns):
    return [0.0 for _ in completions]


@dataclass
class Scaled:
    by: float = 2.0

    def __post_init__(self):
        if self.by == 0:
            raise ValueError("by: 0 scores nothing; write another number")

    def __call__(self, completions, **columns):
        return [self.by for _ in completions]


made = functools.partial(short, limit=1)
'''


def test_a_function_s_keyword_options_are_bound(modules: Path) -> None:
    (modules / "my_rewards.py").write_text(REWARDS)
    assert plugins.validate("reward", "my_rewards:short", {}) == {"limit": 3}
    reward = plugins.load("reward", "my_rewards:short", {"limit": 2})
    assert reward(completions=["a", "abc"], labels=None) == [1.0, 0.0]
    assert reward.__name__ == "short"
    assert "limit: must be a whole number" in problem("reward", "my_rewards:short", {"limit": "2"})
    assert "labels: unknown key" in problem("reward", "my_rewards:short", {"labels": 1})


def test_rewards_may_be_coroutines_classes_or_made_objects(modules: Path) -> None:
    (modules / "my_rewards.py").write_text(REWARDS)
    assert inspect.iscoroutinefunction(plugins.load("reward", "my_rewards:later"))
    assert plugins.load("reward", "my_rewards:Scaled", {"by": 3})(["x"]) == [3.0]
    assert plugins.load("reward", "my_rewards:made")(["", "ab"], labels=None) == [1.0, 0.0]
    assert "reward 'my_rewards:made' has no options" in problem("reward", "my_rewards:made", {"limit": 1})
    with pytest.raises(PluginError, match="by: 0 scores nothing"):
        plugins.load("reward", "my_rewards:Scaled", {"by": 0})


# ------------------------------------------------------------------------------------------- live instances


def test_a_live_instance_is_checked_like_a_recipe() -> None:
    from siftrl.selectors.dynamic_sampling import DynamicSampling
    from siftrl.selectors.prompt_curriculum import PromptCurriculum
    from siftrl.value import ValueConfig

    plugins.check(PromptCurriculum(candidates=2, explore=0))
    for wrong, message in (
        (lambda: PromptCurriculum(candidates=0), "PromptCurriculum.candidates: must be greater than or equal to 1"),
        (lambda: PromptCurriculum(explore=1.5), "PromptCurriculum.explore: must be less than or equal to 1, not 1.5"),
        (lambda: PromptCurriculum(value=ValueConfig(lr=-1)), "ValueConfig.lr: must be greater than 0"),
        (lambda: PromptCurriculum(value=DynamicSampling()), "PromptCurriculum.value: must be a ValueConfig, not a Dyn"),
    ):
        with pytest.raises(PluginError, match=message):
            plugins.check(wrong())


# ---------------------------------------------------------------------------------- what is run from the source

STAND_INS = '''
import raises_when_imported
import math
from dataclasses import dataclass, field
from typing import ClassVar
from siftrl.types import PromptSelector
from siftrl.value import ValueConfig

FACTOR = 3

def twice(x):
    return 2 * x

@dataclass
class Field(PromptSelector):
    pool: int = 5
    def num_candidates(self, keep: int) -> raises_when_imported.Count: return keep * self.pool
    def propose(self, candidates, keep, generator): ...

@dataclass
class Helpers(Field):
    def num_candidates(self, keep):
        """Of a method, a function and a constant."""
        wanted = max(self._low(keep), FACTOR * keep)
        return wanted
    def _low(self, keep): return math.ceil(1.5 * twice(keep))

@dataclass
class Attribute(Field):
    MULTIPLE: ClassVar[int] = 7
    def __post_init__(self):
        if self.pool > 9:
            raise ValueError("pool: 9 at most")
        self.doubled = 2 * self.MULTIPLE
    @property
    def drawn(self): return self.doubled
    def num_candidates(self, keep): return self.drawn * keep

@dataclass
class Nested(Field):
    value: ValueConfig = field(default_factory=ValueConfig)
    def num_candidates(self, keep): return self.value.updates * keep

@dataclass
class Inherited(PromptSelector):
    def propose(self, candidates, keep, generator): ...

@dataclass
class Imports(Field):
    def num_candidates(self, keep): return raises_when_imported.draw(keep)

@dataclass
class ImportsInside(Field):
    def num_candidates(self, keep):
        import raises_when_imported
        return keep

@dataclass
class Opens(Field):
    def __post_init__(self): open("made_by_a_check", "w")
    def num_candidates(self, keep): return keep
'''


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_how_many_prompts_are_drawn_is_read_from_the_source(stand_ins: Path) -> None:
    for name, drawn in {
        "Field": 40,
        "Helpers": 24,
        "Attribute": 112,
        "Nested": 8,
        "Inherited": 8,
        "Imports": None,
        "ImportsInside": None,
        "Opens": 8,
    }.items():
        assert plugin_facts.num_candidates(f"stand_ins:{name}", {}, 8) == drawn, name
    assert plugin_facts.num_candidates("stand_ins:Field", {"pool": 3}, 8) == 24
    assert not (stand_ins / "made_by_a_check").exists(), "a check opens no file"


def test_the_source_says_of_siftrl_s_own_selectors_what_they_say_themselves() -> None:
    for name in plugins.names("selector"):
        if plugins.find("selector", name).role == "prompt":
            assert plugin_facts.num_candidates(name, {}, 8) == plugins.load("selector", name).num_candidates(8)


def test_what_a_class_says_of_its_options_counts_before_it_is_imported(stand_ins: Path) -> None:
    plugins.validate("selector", "stand_ins:Attribute", {"pool": 9})
    with pytest.raises(PluginError, match="^pool: 9 at most"):
        plugins.validate("selector", "stand_ins:Attribute", {"pool": 10})


def test_models_among_the_options_are_found() -> None:
    value = {"value": {"model": "a/model"}}
    assert plugin_facts.model_paths("selector", "prompt_curriculum", value) == [(("value", "model"), "a/model", True)]
    assert plugin_facts.model_paths("selector", "prompt_curriculum", {}) == []
    assert plugin_facts.model_paths("selector", "reducible_loss", {"reference": "x"}) == [(("reference",), "x", False)]
