"""The command line. Arguments and recipes are checked first, and torch is imported afterwards.

Exit codes: 0 done; 1 siftrl stopped the run, or it crashed; 2 a mistake of the user's; 130 interrupted. What siftrl
itself raises is one line on standard error (with SIFTRL_TRACEBACK=1 the traceback); other errors keep theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from siftrl import __version__, eval_arguments, eval_plan
from siftrl.recipe_text import RecipeError

RECIPES = Path(__file__).parent / "recipes"
_RECIPE_HELP = "a YAML file, or the name of a recipe that comes with siftrl (siftrl list recipes)"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parse(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # rewards and selectors of the user's: `my_rewards:score`
    try:
        return args.run(args)
    except RecipeError as error:
        return _fail(error)
    except ValueError as error:
        if os.environ.get("SIFTRL_TRACEBACK") or not _ours(error.__traceback__):
            raise
        return _fail(error)
    except (RuntimeError, ArithmeticError) as error:
        if os.environ.get("SIFTRL_TRACEBACK") or not _ours(error.__traceback__):
            raise
        _fail(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `siftrl show r.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(error: Exception) -> int:
    print("siftrl: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def _ours(trace: TracebackType | None) -> bool:
    """Whether siftrl raised an error: its ValueErrors are the user's to mend, a library's deserve a traceback."""
    source = traceback.extract_tb(trace)[-1].filename
    package = Path(__file__).resolve().parent
    homes = (package, (package / "selectors").resolve(), (package / "rewards").resolve())
    return any(Path(source).resolve().is_relative_to(home) for home in homes)


def find_recipe(name: str) -> Path:
    """The recipe file: a path, or the name of one that comes with siftrl."""
    packaged = RECIPES / f"{name}.yaml"
    return packaged if packaged.is_file() and not Path(name).exists() else Path(name)


# ------------------------------------------------------------------------------------------------------- the parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    # Overrides may stand on both sides of an option, which argparse alone does not allow.
    args, rest = parser.parse_known_args(arguments)
    if "overrides" in args:
        args.overrides += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in args.overrides]
    if rest:
        parser.error(f"unknown argument {rest[0]!r}; `siftrl {args.command} --help` shows what there is")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siftrl", description="Post-train language models on the data worth training on."
    )
    parser.add_argument("--version", action="version", version=f"siftrl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a recipe", description="Run a recipe, stage by stage.")
    _add_recipe(train)
    train.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    train.set_defaults(run=_train)

    validate = commands.add_parser(
        "validate", help="check a recipe without running it", description="Check a recipe; nothing is run or loaded."
    )
    show = commands.add_parser(
        "show", help="print a recipe, defaults included, and its batch arithmetic", description="Print a recipe."
    )
    for command, run in ((validate, _validate), (show, _show)):
        _add_recipe(command)
        command.add_argument(
            "--ranks", type=eval_arguments.count, help="processes that it will run on (default: WORLD_SIZE, or 1)"
        )
        command.add_argument(
            "--not-here",
            action="store_true",
            help="do not look for the packages, files and models that the recipe needs",
        )
        command.set_defaults(run=run)
    validate.add_argument(
        "--rows",
        type=eval_arguments.count,
        metavar="N",
        help="print N prompts, and what the rewards say of their right answers",
    )

    listing = commands.add_parser(
        "list",
        help="list selectors, rewards, recipes, or reasoning-gym's tasks",
        description="List what there is, with the keys that each takes.",
    )
    listing.add_argument("what", choices=["selectors", "rewards", "recipes", "tasks"])
    listing.set_defaults(run=_list)

    schema = commands.add_parser(
        "schema",
        help="print the JSON schema of recipes, for editors",
        description="Print the JSON schema of recipes. After `siftrl schema > recipe.schema.json`, an editor with the "
        "YAML language server checks a recipe that begins with "
        "`# yaml-language-server: $schema=recipe.schema.json`.",
    )
    schema.set_defaults(run=_schema)

    measure = commands.add_parser(
        "eval",
        help="mean reward and pass@k of a recipe's model, a run's, or any model",
        description="Generate completions for the prompts of data sets and score them: what `siftrl train` measures "
        "on held-out rows, or any model on any rows.",
    )
    eval_arguments.add_arguments(measure)
    measure.set_defaults(run=_eval)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help=_RECIPE_HELP)
    command.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="set a key of the recipe, for example seed=1 or stages.grpo.trainer.max_steps=50",
    )


# ----------------------------------------------------------------------------------------------------- the commands


def _train(args: argparse.Namespace) -> int:
    from siftrl.preflight import load_checked
    from siftrl.run import Interrupted, check_folder

    recipe, lines = load_checked(find_recipe(args.recipe), args.overrides)
    if os.environ.get("RANK", "0") == "0":  # the other ranks may come when the first has made the folder
        check_folder(recipe, args.resume)
        print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)

    from siftrl.pipeline import run_recipe

    try:
        run_recipe(recipe, resume=args.resume)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop.message, file=sys.stderr)
        return 130
    return 0


def _validate(args: argparse.Namespace) -> int:
    from siftrl.preflight import load_checked

    path = find_recipe(args.recipe)
    recipe, lines = load_checked(path, args.overrides, num_ranks=args.ranks, here=not args.not_here)
    print(f"{path}: a valid recipe, stages: {', '.join(stage.name for stage in recipe.stages)}")
    print("".join(f"  {line}\n" for line in lines), end="")
    if args.rows is not None:
        from siftrl.show_rows import rows_text

        print(rows_text(recipe, args.rows))
    return 0


def _show(args: argparse.Namespace) -> int:
    from siftrl.recipe import dump, load_recipe
    from siftrl.show import arithmetic_text

    recipe = load_recipe(
        find_recipe(args.recipe), args.overrides, num_ranks=args.ranks, check_installed=not args.not_here
    )
    print(dump(recipe))
    for stage in recipe.stages:
        print("\n".join(f"# {line}".rstrip() for line in arithmetic_text(recipe, stage, args.ranks).splitlines()))
    return 0


def _list(args: argparse.Namespace) -> int:
    from siftrl import show

    if args.what == "recipes":
        print(show.recipes_text(RECIPES))
    elif args.what == "tasks":
        print(show.tasks_text())
    else:
        print(show.plugins_text("selector" if args.what == "selectors" else "reward"))
    return 0


def _schema(args: argparse.Namespace) -> int:
    from siftrl.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
    return 0


def _eval(args: argparse.Namespace) -> int:
    plan = eval_plan.make_plan(args, find_recipe)
    for line in eval_plan.look_at(plan):
        print(line, file=sys.stderr)

    from siftrl.eval_command import run_plan

    return run_plan(plan)
