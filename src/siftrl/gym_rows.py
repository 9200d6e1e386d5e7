"""Rows of the reasoning-gym library: made to a recipe's settings, and scored by the library's own scorers.

A row carries `task` (the family), `task_config` (its settings, JSON) and `entry` (the library's own record of the
question, JSON), which is all that the scorer needs: rows survive files, processes and shuffling.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from siftrl.recipe_text import choose, near

if TYPE_CHECKING:
    from siftrl.recipe import ReasoningGymConfig

_MIXER = "composite"  # the library's own mixture of families; here `tasks` with weights does that


def make_rows(
    config: ReasoningGymConfig, *, size: int, seed: int, exclude: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """`size` rows, the families in the shares of their weights, none whose question is in `exclude`.

    The same arguments give the same rows; rows of different seeds are drawn independently.
    Raises ValueError for an unknown family or setting, and where a family has too few different questions.
    """
    total = sum(task.weight for task in config.tasks)
    bounds, passed = [0], 0.0
    for task in config.tasks:
        passed += task.weight
        bounds.append(round(size * passed / total))
    rows: list[dict[str, Any]] = []
    for i, task in enumerate(config.tasks):
        source = _rows_of(task.name, task.config, (seed, i), f"data.reasoning_gym.tasks.{i}", exclude)
        rows += (next(source) for _ in range(bounds[i + 1] - bounds[i]))
    random.Random(seed).shuffle(rows)
    return rows


def score(answer: str | None, task: str, task_config: str, entry: str) -> float:
    """The library's score of an answer, usually between 0 and 1; None is no answer.

    Some scorers raise on text they cannot read. That is a wrong answer (0.0), as long as the row is sound, that is,
    as long as the library can score the answer it gave itself.
    """
    dataset, record = _dataset(task, task_config), decode(entry)
    try:
        return float(dataset.score_answer(answer, record))
    except Exception:
        dataset.score_answer(record["answer"], record)
        return 0.0


def encode(value: Any) -> str:
    """JSON text that `decode` turns back into an equal value; some scorers need tuples and number keys back."""
    return json.dumps(_tagged(value), ensure_ascii=False)


def decode(text: str) -> Any:
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"__tuple__": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _tagged(item) for key, item in value.items()}
        return {"__items__": [[_tagged(key), _tagged(item)] for key, item in value.items()]}
    return value


def _untagged(value: dict[str, Any]) -> Any:
    if value.keys() == {"__tuple__"}:
        return tuple(value["__tuple__"])
    if value.keys() == {"__items__"}:
        return {key: item for key, item in value["__items__"]}
    return value


def _rows_of(
    name: str, settings: dict[str, Any], key: tuple[int, int], where: str, exclude: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Rows of one family without end. The library's row i of seed s is row 0 of seed s + i, so seeds are hashed."""
    task_config = json.dumps(settings, sort_keys=True)
    misses = 0
    for chunk in range(10**9):
        digest = hashlib.blake2b(repr((*key, name, chunk)).encode(), digest_size=4).digest()
        dataset = _family(name, settings, int.from_bytes(digest) >> 1, where)
        for i in range(len(dataset)):
            try:
                entry = dataset[i]
            except (ValueError, IndexError, KeyError) as error:  # some settings fail only here
                raise ValueError(f"{where}.config: {name} refuses these settings: {error}") from error
            if entry["question"] in exclude:
                misses += 1
                if misses > 10_000:
                    raise ValueError(
                        f"{where}: {name} gave {misses - 1} questions in a row that are held out; "
                        "lower data.eval.size or give the family settings with more different questions"
                    )
                continue
            misses = 0
            yield {
                "question": entry["question"],
                "answer": entry["answer"],
                "task": name,
                "task_config": task_config,
                "entry": encode(entry),
                "metadata": entry["metadata"],
            }


@functools.lru_cache(maxsize=256)
def _dataset(task: str, task_config: str) -> Any:
    return _family(task, json.loads(task_config), 0, "task_config")


def _family(name: str, settings: dict[str, Any], seed: int, where: str) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        raise ValueError(f"{where}: not installed; pip install 'siftrl[reasoning-gym]'") from error
    if name not in DATASETS or name == _MIXER:
        families = [family for family in DATASETS if family != _MIXER]
        raise ValueError(f"{where}.name: reasoning-gym has no family {name!r}{near(name, families)}")
    known = [f.name for f in fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
    for setting in settings:
        if setting not in known:
            hint = choose(setting, known)
            raise ValueError(f"{where}.config.{setting}: {name} has no such setting{hint}")
    try:
        return create_dataset(name, **settings, seed=seed, size=1000)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}.config: {name} refuses these settings: {error}") from error
