"""What the documentation shows works: recipes validate, commands parse, examples run, keys and links are right."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from siftrl import cli, eval_plan, eval_sets, plugins, recipe
from siftrl.recipe_text import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
README = ROOT / "README.md"
SECTIONS: dict[str, Any] = {
    "Top level": recipe.Recipe,
    "model": recipe.ModelConfig,
    "model.scratch": recipe.ScratchConfig,
    "model.lora": recipe.LoraConfig,
    "data": recipe.DataConfig,
    "data.reasoning_gym": recipe.ReasoningGymConfig,
    "data.reasoning_gym.tasks[]": recipe.ReasoningGymTask,
    "data.eval": recipe.EvalDataConfig,
    "rewards[]": recipe.RewardConfig,
    "stages[]": recipe.Stage,
    "stages[] with kind: sft": recipe.SFTStage,
    "stages[] with kind: dpo": recipe.DPOStage,
    "stages[].signals": recipe.SignalsConfig,
    "stages[].selection": recipe.SelectionConfig,
    "stages[] with kind: grpo": recipe.GRPOStage,
    "stages[].rollout": recipe.RolloutConfig,
    "stages[].eval": recipe.EvalConfig,
    "distribution": recipe.DistributionConfig,
    "checkpoint": recipe.CheckpointConfig,
    "logging": recipe.LoggingConfig,
    "output": recipe.OutputConfig,
}


@dataclass(frozen=True)
class Block:
    """A fenced block: ```language info."""

    page: Path
    line: int
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w+) ?(.*)\n([\s\S]*?)^\1```$", text, re.MULTILINE):
            indent, language, info, body = match.groups()
            line = text.count("\n", 0, match.start()) + 1
            if language in languages:
                body = "".join(row.removeprefix(indent) for row in body.splitlines(keepends=True))
                found.append(Block(page, line, language, info, body))
    return found


YAML = blocks("yaml")
BASE = """
model: {path: some/model}
data: {path: data.jsonl, eval: {size: 8}}
rewards: [exact_match]
stages: [{kind: KIND, trainer: {max_steps: 1}}]
"""
PARTS = {"part": "grpo", "sft part": "sft"}
"""How a block that shows a part of a recipe is marked: mark -> the kind of stage that its stage keys are for."""


def write_example_files(folder: Path) -> None:
    for block in blocks("python"):
        if block.info.startswith("file="):
            path = folder / block.info.removeprefix("file=")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


@pytest.fixture()
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages show, as the current and importable one."""
    write_example_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]
    plugins.option_model.cache_clear()
    return tmp_path


# ------------------------------------------------------------------------------------------------------- recipes


def test_the_pages_show_recipes() -> None:
    assert {block.page.name for block in YAML if block.info == "recipe"} >= {"README.md", "recipes.md"}
    assert {block.page.name for block in YAML if block.info == "sft part"} >= {"batch_selection.md", "recipes.md"}


@pytest.mark.parametrize("block", YAML, ids=str)
def test_every_yaml_block_is_a_recipe_or_part_of_one(block: Block, examples: Path) -> None:
    """`yaml recipe`: a whole recipe. `yaml part`, `yaml sft part`: keys of a recipe, or else of its stage.
    `yaml suite`: what `siftrl eval --suite` reads."""
    if block.info == "suite":
        eval_sets.Suite.model_validate(parse_yaml(block.text))
        return
    assert block.info in ("recipe", *PARTS), f"{block}: mark the block as `yaml recipe` or one of {', '.join(PARTS)}"
    content = parse_yaml(block.text)
    if block.info in PARTS:
        whole = parse_yaml(BASE.replace("KIND", PARTS[block.info]))
        for key, value in content.items():
            (whole if key in recipe.Recipe.model_fields else whole["stages"][0])[key] = value
        content = whole
    file = examples / "recipe.yaml"
    file.write_text(recipe.dump_yaml(content), encoding="utf-8")
    loaded = recipe.load_recipe(file, check_installed=False)
    for stage in loaded.stages:
        for reward in loaded.rewards_of(stage):
            plugins.load("reward", reward.name, reward.options)
        if stage.kind == "grpo" and stage.prompt_selector:
            plugins.load("selector", stage.prompt_selector.name, stage.prompt_selector.options)
        for selector in stage.batch_selectors:
            plugins.load("selector", selector.name, selector.options)


# ---------------------------------------------------------------------------------------------------------- keys


def as_text(model: Any, name: str) -> str:
    """A key's default as the tables write it."""
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if hasattr(default, "model_dump"):
        return "see below"
    return f"`{json.dumps(default)}`"


def table(text: str) -> dict[str, str]:
    """key -> default of the first table in `text`."""
    rows: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            name, default = [cell.strip() for cell in line.strip("|").split(" | ")][:2]
            rows[name.strip("` ")] = default
        elif rows:
            break
    return rows


def section(title: str) -> str:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    match = re.search(rf"^#+ {re.escape(title)}$([\s\S]*?)(?=^#|\Z)", text.partition("# Every key")[2], re.MULTILINE)
    assert match, f"recipes.md has no section {title}"
    return match[1]


@pytest.mark.parametrize("title", SECTIONS)
def test_recipes_md_has_every_key_with_its_default(title: str) -> None:
    model = SECTIONS[title]
    shown = table(section(title))
    names = set(model.model_fields)
    if issubclass(model, recipe.Stage) and model is not recipe.Stage:
        names -= set(recipe.Stage.model_fields) | {"kind"}
    if model is recipe.Stage:
        assert shown.pop("kind") == "required"
    assert set(shown) == names
    for name in names - {"name"}:
        assert shown[name] == as_text(model, name), name


def test_every_section_of_the_recipe_is_covered() -> None:
    known = {name for name in dir(recipe) if isinstance(getattr(recipe, name), type)}
    models = {name for name in known if issubclass(getattr(recipe, name), recipe.Section)}
    assert models - {"Section"} == {model.__name__ for model in SECTIONS.values()}


def key_tables() -> dict[str, dict[str, str]]:
    tables = {}
    for page in PAGES:
        for part in re.split(r"<!-- keys: ", page.read_text(encoding="utf-8"))[1:]:
            name, _, rest = part.partition(" -->\n")
            tables[name] = table(rest) if rest.startswith("|") else {}
    return tables


@pytest.mark.parametrize("kind", ["selector", "reward"])
def test_every_plugin_is_documented_with_its_keys(kind: Any) -> None:
    tables = key_tables()
    for name in plugins.names(kind):
        model = plugins.option_model(kind, name)
        assert set(tables[name]) == set(model.model_fields), name
        assert tables[name] == {key: as_text(model, key) for key in model.model_fields}, name
    value = plugins.option_model("selector", "prompt_curriculum").model_fields["value"].annotation
    assert value is not None
    assert tables["value"] == {key: as_text(value, key) for key in value.model_fields}


# ------------------------------------------------------------------------------------------------------ commands


def commands() -> list[tuple[str, list[str]]]:
    """Every command line in a ```bash block, as words."""
    found = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                found.append((str(block), words))
    return found


def siftrl_arguments(words: list[str]) -> list[str] | None:
    """What siftrl's parser gets of a command line, through whichever launcher; None for other commands."""
    if words[0] == "siftrl":
        return words[1:]
    if "scripts/train.py" in words:
        return ["train", *words[words.index("scripts/train.py") + 1 :]]
    if "siftrl" in words and words[words.index("siftrl") - 1] in ("-m", "--module"):
        return words[words.index("siftrl") + 1 :]
    return None


def num_ranks(words: list[str]) -> int:
    """How many processes a launcher's command line starts; the hostfile that is shown has 2 x 8."""
    options = dict(zip(words, words[1:], strict=False))
    if "--hostfile" in options:
        return 16
    ranks = int(options.get("--nnodes", 1))
    for name in ("--num_gpus", "--num_accelerators", "--nproc-per-node", "--num_processes", "--ranks"):
        ranks *= int(options.get(name, 1))
    return ranks


OURS = [(where, rest, num_ranks(words)) for where, words in commands() if (rest := siftrl_arguments(words)) is not None]


def test_every_command_of_siftrl_is_shown() -> None:
    assert {rest[0] for _, rest, _ in OURS} == {"train", "validate", "show", "list", "eval", "schema"}


@pytest.mark.parametrize(("where", "arguments", "ranks"), OURS, ids=[f"{where}-{rest[0]}" for where, rest, _ in OURS])
def test_every_command_parses(
    where: str, arguments: list[str], ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and its overrides and number of ranks fit its recipe; `my-recipe.yaml` is the README's."""
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    args = cli._parse(arguments)
    if "recipe" in args:
        path = ROOT / cli.find_recipe(args.recipe)  # an absolute path stays as it is
        if args.recipe == "my-recipe.yaml":
            path = tmp_path / "my-recipe.yaml"
            path.write_text(next(block.text for block in YAML if block.page == README and block.info == "recipe"))
        recipe.load_recipe(path, args.overrides, num_ranks=ranks, check_installed=False)
    if args.command == "eval":
        check_evaluation(args, tmp_path, monkeypatch)


def check_evaluation(args: argparse.Namespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`siftrl eval` knows what to measure, where `runs/NAME` is a run of the recipe NAME, and suites are as shown."""
    made = folder / args.target
    if args.target.startswith("runs/") and made.name != "model":
        for place in ("model", *(f"stages/{args.stage}" for _ in filter(None, [args.stage]))):
            (made / place).mkdir(parents=True)
            (made / place / "config.json").write_text("{}")
        shown = [block.text for block in YAML if block.info == "recipe" and f"# {made.name}.yaml" in block.text]
        (made / "recipe.yaml").write_text(shown[0] if shown else cli.find_recipe(made.name).read_text())
    if args.suite:
        (folder / args.suite).write_text(next(block.text for block in YAML if f"# {args.suite}" in block.text))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(eval_plan, "require_installed", lambda *_: None)
    eval_plan.make_plan(args, cli.find_recipe)


def test_commands_name_files_and_targets_that_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for where, words in commands():
        if words[0] == "make":
            assert words[1] in targets, where
        for word in words:
            if word.startswith(("scripts/", "recipes/", ".venv/bin/pytest", "tests/")) and not word.startswith(".venv"):
                assert (ROOT / word).is_file(), f"{where}: {word}"


# --------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```[\s\S]*?```", "", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```[\s\S]*?```", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        goal = (page.parent / file).resolve() if file else page
        assert goal.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(goal), f"{page.name}: {target}"


# ------------------------------------------------------------------------------------------------------ examples


def run_python_of(page: Path, folder: Path, model: str) -> dict[str, Any]:
    """Run a page's Python blocks that are no files, one after another, with `model` in place of the quickstart's."""
    (folder / "runs" / "quickstart").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "model").symlink_to(model)
    namespace: dict[str, Any] = {"__name__": page.stem}
    code = [block for block in blocks("python") if block.page == page and not block.info]
    assert code
    for block in code:
        exec(compile(block.text, str(block), "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(
    tiny_model: str, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a random model where the quickstart would have left a trained one."""
    namespace = run_python_of(README, examples, tiny_model)
    sft = namespace["sft"]
    assert (sft.state.global_step, sft.rows_read, sft.rows_trained) == (10, 640, 320)
    trainer = namespace["trainer"]
    assert trainer.state.global_step == 20 and trainer.rollouts == trainer.row_selection.rows_read == 20 * 64
    assert trainer.args.per_device_train_batch_size == 16  # of 64 completions 16 are trained on
    assert trainer.prompt_selector.target == pytest.approx(0.8 - 0.5 * 19 / 20)  # the override was in use
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"\d+ \d+ \w+ ", line)]
    assert len(printed) == 20 * 8 and {line[2] for line in printed} <= {"uniform", "score", "explore"}
    assert (examples / "runs" / "easy-to-hard" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_the_python_of_batch_selection_runs_as_it_stands(
    tiny_model: str, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run_python_of(ROOT / "docs" / "batch_selection.md", examples, tiny_model)["trainer"]
    printed = re.findall(r"^(\d) Counter\(\{'\+': (\d+), '-': (\d+)\}\) \d+$", capsys.readouterr().out, re.MULTILINE)
    assert [step for step, _, _ in printed] == ["1", "2", "3", "4", "5"]
    assert all(int(plus) + int(minus) == 64 for _, plus, minus in printed)
    assert (trainer.rows_read, trainer.rows_trained) == (5 * 64, 5 * 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("my_package.spread_losses:SpreadLosses", {"skip": 0.25}), ("my_package.hardest_token:CalmRows", {})],
)
def test_the_batch_selectors_shown_train_from_a_recipe(
    tiny_model: str, examples: Path, name: str, options: dict[str, Any]
) -> None:
    rows = [{"prompt": "+".join(["1"] * n) + "=", "completion": str(n)} for n in range(1, 25)]
    (examples / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "sft",
        "rows_per_step": 12,
        "micro_batch_size": 4,
        "batch_selector": {"name": name, "keep": 4, **options},
        "trainer": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
    }
    content = {"model": {"path": tiny_model}, "data": {"path": "data.jsonl"}, "stages": [stage]}
    (examples / "run.yaml").write_text(recipe.dump_yaml(content))
    assert cli.main(["train", "run.yaml"]) == 0
    steps = [json.loads(line) for line in (examples / "runs" / "run" / "selection.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        ranked = sorted(step["candidates"], key=lambda c: c["score"])
        # of 12 rows the easiest 9 are looked at, and 4 of those kept: places 0, 9/4, 18/4 and 27/4, rounded down
        places, why = ({0, 2, 4, 6}, "spread") if "Spread" in name else ({0, 1, 2, 3}, "calm")
        assert {place for place, c in enumerate(ranked) if c["chosen"]} == places
        assert {c["why"] for c in ranked if c["chosen"]} == {why}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("my_package.my_file:MySelector", "longest"), ("my_package.rarely_seen:RarelySeen", "rare")],
)
def test_the_selectors_shown_train_from_a_recipe(tiny_model: str, examples: Path, name: str, expected: str) -> None:
    """A prompt selector with a reward and a batch selector of one's own; another reward differs among completions."""
    rows = [{"prompt": "+".join(["1"] * n) + "=", "answer": str(n)} for n in range(1, 13)]
    (examples / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    brevity = {"name": "my_package.rewards:brevity", "options": {"limit": 50}}
    (examples / "run.yaml").write_text(
        recipe.dump_yaml(
            {
                "model": {"path": tiny_model},
                "data": {"path": "data.jsonl"},
                "rewards": [brevity, {"name": "response_format", "options": {"pattern": "[a-z][^a-z]*"}}],
                "stages": [
                    {
                        "kind": "grpo",
                        "prompts_per_step": 2,
                        "completions_per_prompt": 8,
                        "micro_batch_size": 4,
                        "prompt_selector": {"name": name, "candidates": 4},
                        "batch_selector": {"name": "my_package.both_sides:BothSides", "keep": 4},
                        "rollout": {"max_completion_tokens": 4},
                        "trainer": {"max_steps": 3, "use_cpu": True, "disable_tqdm": True},
                    }
                ],
            }
        )
    )
    assert cli.main(["train", "run.yaml"]) == 0
    lines = [json.loads(line) for line in (examples / "runs" / "run" / "selection.jsonl").read_text().splitlines()]
    steps, rollouts = ([line for line in lines if kind in line] for kind in ("candidates", "completions"))
    assert len(steps) == len(rollouts) == 3
    check_both_sides(rollouts)
    seen: list[int] = []
    for step in steps:
        kept = [c["id"] for c in step["candidates"] if c["chosen"]]
        if expected == "longest":
            assert sorted(kept) == sorted(c["id"] for c in step["candidates"])[-2:]
        else:
            times = [seen.count(c["id"]) for c in step["candidates"]]
            assert sorted(seen.count(row) for row in kept) == sorted(times)[:2]
            assert all(c["why"] == "rare" for c in step["candidates"] if c["chosen"])
        seen += kept


def check_both_sides(rollouts: list[dict[str, Any]]) -> None:
    """2 of the 4 completions kept did better than their prompt's mean, as far as there are so many."""
    balanced = 0
    for rollout in rollouts:
        advantages = [c["advantage"] for c in rollout["completions"] if c.get("why") != "no advantage"]
        kept = [c["advantage"] for c in rollout["completions"] if c["chosen"]]
        better, worse = (sorted((a for a in advantages if sign * a > 0), key=abs) for sign in (1, -1))
        if min(len(better), len(worse)) >= 2:
            assert sorted(kept) == sorted(better[-2:] + worse[-2:])
            balanced += 1
    assert balanced
