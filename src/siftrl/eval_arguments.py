"""The arguments of `siftrl eval`. This module must stay free of torch."""

from __future__ import annotations

import argparse
from pathlib import Path

GYM_ROWS = 256
"""Rows that reasoning-gym makes for `--data reasoning_gym:FAMILY` without a limit."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of `siftrl eval`. A flag that is not given is None: the recipe, or else a default, says it."""
    command.add_argument(
        "target",
        metavar="RECIPE|RUN|MODEL",
        help="a recipe: its model on its held-out rows; a run's folder: the trained model, likewise; "
        "or a model's folder or hub name, with --data and --reward",
    )
    command.add_argument(
        "overrides", metavar="key=value", nargs="*", help="set a key of the recipe, or model.KEY of a model"
    )
    command.add_argument("--stage", metavar="NAME", help="of a run: the model after this stage; whose settings count")
    data = command.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="[NAME=]DATA",
        action="append",
        default=[],
        help="a file, folder or hub name, or reasoning_gym:FAMILY; may be repeated",
    )
    data.add_argument("--suite", metavar="FILE.yaml", type=Path, help="several data sets, each with keys of its own")
    data.add_argument("--split", help="the split of --data (default: test)")
    data.add_argument("--prompt", help="the column with the prompt (default: prompt; question for reasoning_gym)")
    data.add_argument("--prompt-template", help='makes the prompt out of columns, for example "{question}="')
    data.add_argument("--chat", action="store_true", default=None, help="ask as a user in the model's chat template")
    data.add_argument("--system-prompt", metavar="TEXT", help="a system message in front; prompts are then chats")
    data.add_argument(
        "--limit", type=count, help=f"only the first rows (reasoning_gym makes that many; {GYM_ROWS} without it)"
    )
    command.add_argument(
        "--reward",
        action="append",
        default=[],
        help="a reward's name, package.module:name, or as in a recipe: '{name: math_verify, options: {...}}'; "
        "may be repeated",
    )
    drawn = command.add_argument_group("completions")
    drawn.add_argument("--samples", type=count, help="completions a prompt (default: 1)")
    drawn.add_argument("--k", type=counts, default=[], metavar="K,...", help="which pass@k to report, for example 1,4")
    drawn.add_argument("--temperature", type=_temperature, help="0: greedy (default: 0 for one sample, else 1)")
    drawn.add_argument("--max-tokens", type=count, help="of a completion (default: 512)")
    drawn.add_argument("--batch-size", type=count, help="completions at once (default: 256)")
    drawn.add_argument("--seed", type=_seed, help="of the completions (default: 0)")
    drawn.add_argument("--engine", choices=["transformers", "vllm"], help="(default: transformers)")
    drawn.add_argument(
        "--engine-arg", metavar="key=value", action="append", default=[], help="of vllm.LLM; may be repeated"
    )
    output = command.add_argument_group("output")
    output.add_argument("--json", metavar="FILE|-", help="write the figures as JSON; -: to standard output")
    output.add_argument("--out", metavar="FILE.jsonl", type=Path, help="write each prompt's completions and rewards")


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def counts(text: str) -> list[int]:
    return sorted({count(part.strip()) for part in text.split(",")})


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 2**32 - 1")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value and not 1e-3 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 (greedy), or a number from 0.001 on")
    return value
