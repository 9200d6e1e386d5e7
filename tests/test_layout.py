"""The folders that plugins and recipes lie in: seen from the package, and harmless to Python's own modules."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from siftrl import plugins

ROOT = Path(__file__).parents[1]
LINKED = ("selectors", "rewards", "recipes")


@pytest.mark.parametrize("folder", LINKED)
def test_the_package_sees_the_top_level_folders(folder: str) -> None:
    link = ROOT / "src" / "siftrl" / folder
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", ["selectors", "rewards"])
def test_plugin_folders_are_no_packages(folder: str) -> None:
    # With an __init__.py, `selectors` would hide the standard module that asyncio and subprocess import.
    assert not (ROOT / folder / "__init__.py").exists()
    assert not [path for path in (ROOT / folder).iterdir() if path.suffix != ".py" and path.name != "__pycache__"]


@pytest.mark.parametrize("code", ["import asyncio, subprocess, selectors; selectors.DefaultSelector", "import siftrl"])
def test_python_works_from_the_root(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", ["selector", "reward"])
def test_no_plugin_has_the_name_of_a_standard_module(kind: plugins.Kind) -> None:
    assert plugins.names(kind)
    assert not set(plugins.names(kind)) & sys.stdlib_module_names


def test_plugins_are_imported_once() -> None:
    """Through the package only: a bare `import rewards.…` would make a second copy of each class."""
    made = plugins.load("reward", "exact_match")
    assert type(made).__module__ == "siftrl.rewards.exact_match"
    assert "rewards.exact_match" not in sys.modules


@pytest.mark.parametrize(
    "module",
    [
        *("cli", "recipe", "recipe_text", "recipe_checks", "trainer_checks", "plugins", "plugin_source", "schema"),
        *(
            "plugin_stand_in",
            "plugin_facts",
            "show",
            "show_rows",
            "fields",
            "preflight",
            "model_files",
            "data_files",
            "row_shapes",
        ),
        *("eval_arguments", "eval_plan", "eval_sets"),
    ],
)
def test_modules_that_check_recipes_are_free_of_torch(module: str) -> None:
    code = f"import sys, siftrl.{module}; assert not {{'torch', 'transformers', 'trl'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_plugins_and_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    build = (
        "import os, sys; from setuptools import build_meta as backend\n"
        "print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"
    )
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    copy = tmp_path / "copy"
    for name in filter(None, files):  # a clone: without build leftovers, with the links as links
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    wanted = {
        "siftrl/py.typed",
        "siftrl/trl_options.json",
        *(
            f"siftrl/{path.relative_to(ROOT)}"
            for folder in ("selectors", "rewards")
            for path in (ROOT / folder).glob("*.py")
        ),
        *(f"siftrl/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").glob("*.yaml")),
        *(f"siftrl/{path.relative_to(ROOT)}" for path in (ROOT / "recipes/deepspeed").glob("*.json")),
    }
    for kind in ("wheel", "sdist"):
        subprocess.run([sys.executable, "-c", build, kind, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        assert {f"src/{name}" for name in wanted} <= {name.partition("/")[2] for name in archive.getnames()}
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import siftrl; assert siftrl.__file__.startswith(sys.argv[1])\n"
        "from siftrl.recipe import load_recipe; from siftrl.cli import find_recipe\n"
        "from siftrl.deepspeed_config import deepspeed_config\n"
        "recipe = load_recipe(find_recipe('grpo-qwen3-4b-zero3'), check_installed=False)\n"
        "assert deepspeed_config(recipe)['zero_optimization']['stage'] == 3"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "installed"), sysconfig.get_path("purelib")],
        cwd=tmp_path,
        check=True,
    )
