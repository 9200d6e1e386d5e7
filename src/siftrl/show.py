"""What `siftrl show` and `siftrl list` print, as text. This module must stay free of torch."""

from __future__ import annotations

import textwrap
from pathlib import Path

from siftrl import plugins
from siftrl.batch_arithmetic import batch_arithmetic, kept_rows, world_size
from siftrl.recipe import AnyStage, GRPOStage, Recipe
from siftrl.recipe_checks import gym_families, gym_settings, known_rows

_WIDTH = 110
_HOW = {
    "reward": "keys stand under `options`",
    "selector": "keys stand beside `name`. A batch selector also takes `keep` (default 0.5):\n"
    "a share of the rows that it is given (above 0, up to 1.0), or a number of rows over all ranks (from 1)",
}


def arithmetic_text(recipe: Recipe, stage: AnyStage, num_ranks: int | None = None) -> str:
    """A stage's batch arithmetic, one number a line, with how it comes about."""
    numbers = batch_arithmetic(stage, num_ranks or world_size(), known_rows(recipe.data_of(stage)))
    per_rank = f"{numbers.rows_per_rank} a rank / micro_batch_size {numbers.micro_batch_size}"
    lines: list[tuple[str, object, str]] = []
    what = {"sft": "rows", "dpo": "pairs", "grpo": "completions"}[stage.kind]
    if not isinstance(stage, GRPOStage):
        lines += [(f"{what} read a step" if stage.batch_selectors else f"{what} a step", numbers.rows, "")]
    else:
        selector = stage.prompt_selector
        options = selector.options if selector else {}
        chosen = selector.name if selector else "no selector"
        if selector and numbers.prompts_proposed is not None:
            chosen += f": {numbers.prompts_proposed / stage.prompts_per_step:g} for each kept"
        rounds = f", at most {options['max_rounds']} rounds" if options.get("max_rounds", 1) > 1 else ""
        lines += [
            ("prompts proposed", numbers.prompts_proposed or "unknown", f"{chosen}{rounds}"),
            ("prompts kept", numbers.prompts_kept, ""),
            ("completions a step", numbers.rows, f"{numbers.completions_per_prompt} for each prompt"),
        ]
    if numbers.rows_kept is not None:
        per_rank = f"{numbers.kept_per_rank} a rank / micro_batch_size {numbers.micro_batch_size}"
        lines.append((f"{what} trained on", numbers.rows_kept, _chain(stage, numbers.rows)))
    lines += [
        ("ranks", numbers.world_size, ""),
        ("micro-batches a rank", numbers.micro_batches_per_rank, per_rank),
        ("gradient accumulation", numbers.gradient_accumulation_steps, "micro-batches of one optimizer step"),
    ]
    if numbers.rollouts is not None:
        lines.append(("rollouts", numbers.rollouts, "steps that generate"))
    unknown = "set trainer.max_steps to fix it" if numbers.optimizer_steps is None else ""
    lines.append(("optimizer steps", numbers.optimizer_steps or "depends on the data", unknown))
    heading = f"stage {stage.name} ({stage.kind})"
    return "\n".join([heading, *(f"  {name:<22}{value!s:>9}  {note}".rstrip() for name, value, note in lines)])


def _chain(stage: AnyStage, rows: int) -> str:
    """What each batch selector of a step keeps: "64 -> utility_diversity 48 -> gradient_coreset 32"."""
    kept = kept_rows(rows, [selector.keep for selector in stage.batch_selectors])
    links = [f"{selector.name} {count}" for selector, count in zip(stage.batch_selectors, kept, strict=True)]
    return " -> ".join([str(rows), *links])


def plugins_text(kind: plugins.Kind) -> str:
    """Every plugin: its name, what it does, its keys with types and defaults."""
    blocks = []
    for name in plugins.names(kind):
        plugin, options = plugins.describe(kind, name)
        only = ", grpo only" if plugin.reads_rewards else ""
        role = f" ({plugin.role} selector{only})" if kind == "selector" else ""
        blocks.append("\n".join([f"{name}{role}", *_wrapped(plugin.summary, "  "), *_option_lines(options, "    ")]))
    return "\n\n".join([*blocks, f"In a recipe the {_HOW[kind]}.\nYour own: name: package.module:Name"])


def _option_lines(options: tuple[plugins.Option, ...], indent: str) -> list[str]:
    lines = []
    for option in options:
        default = f" = {option.default}" if option.default else " (required)" if not option.options else ""
        lines.append(f"{indent}{option.name}: {option.type}{default}")
        lines += _wrapped(option.doc, indent + "    ")
        lines += _option_lines(option.options, indent + "  ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def recipes_text(folder: Path) -> str:
    """The recipes in a folder, each with the comment that opens it."""
    blocks = []
    for path in sorted(folder.glob("*.yaml")):
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append("  " + line[1:].strip())
        blocks.append("\n".join([path.stem, *comment]))
    return "\n\n".join(blocks)


def tasks_text() -> str:
    """reasoning-gym's families, each with its settings and their defaults."""
    families = gym_families()
    if not families:
        return "reasoning-gym is not installed; pip install siftrl[reasoning-gym]"
    lines = []
    for family in sorted(families):
        settings = {name: default for name, default in gym_settings(family).items() if name not in ("seed", "size")}
        text = ", ".join(f"{name}={default}" for name, default in settings.items())
        lines += [family, *_wrapped(text, "    ")]
    return "\n".join(lines)
