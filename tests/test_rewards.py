from __future__ import annotations

import asyncio
import functools
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import run_command

from siftrl.data import load_data
from siftrl.models import character_tokenizer
from siftrl.plugins import load
from siftrl.recipe import DataConfig, RewardConfig
from siftrl.reward_guard import RewardError, guard, load_rewards


def messages(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


# ------------------------------------------------------------------------------------------------------ plugins


def test_exact_match_options() -> None:
    answers = ["4", "4", "Four", None]
    completions = [" 4\n", "44", "four", "4"]
    assert load("reward", "exact_match")(completions, answer=answers) == [1, 0, 0, None]
    assert load("reward", "exact_match", {"ignore_case": True})(messages(*completions), answer=answers)[2] == 1
    assert load("reward", "exact_match", {"strip": False})(completions, answer=answers)[0] == 0
    tagged = load("reward", "exact_match", {"extract": "<a>(.*?)</a>", "column": "gold"})
    assert tagged(["<a>1</a> no, <a>2</a>", "2", "<a>3</a>"], gold=[2, 2, 2]) == [1, 0, 0]
    with pytest.raises(ValueError, match="extract: .* no regular expression"):
        load("reward", "exact_match", {"extract": "("})


def test_a_missing_column_names_those_that_are_there() -> None:
    for name in ("exact_match", "math_verify"):
        with pytest.raises(ValueError, match=f"{name}: the data has no column 'answer'; .* source; set .*column"):
            load("reward", name)(["4"], prompts=["2+2="], source=["a"])
    with pytest.raises(ValueError, match="no column 'task'; did you mean 'tasks'"):
        load("reward", "reasoning_gym")(["4"], tasks=["x"])


def test_math_verify_judges_equivalence_also_outside_the_main_thread() -> None:
    completions = [r"So it is $\boxed{0.5}$.", r"$\frac{2}{4}$", "the answer is 3", "no idea", "1/2"]
    gold = [r"\frac{1}{2}", "$1/2$", "3", r"\frac{1}{2}", ""]
    assert load("reward", "math_verify")(completions, answer=gold) == [1, 1, 1, 0, None]
    assert load("reward", "math_verify")(completions, solution=gold) == [1, 1, 1, 0, None]
    guarded = guard(load("reward", "math_verify", {"boxed_only": True}), "m", time_limit=60, on_error="stop")
    assert guarded(messages(*completions), answer=gold) == [1, 0, 0, 0, None]


def test_response_format() -> None:
    form = load("reward", "response_format", {"tags": ["think", "answer"]})
    right, swapped = "<think>a\nb</think>\n<answer>c</answer>", "<answer>c</answer><think>a</think>"
    texts = [
        right,
        swapped,
        f"{right} and more",
        "<think>a</think>",
        "c",
        "<think>a</think>" * 2 + "<answer>c</answer>",
    ]
    assert form(texts) == [1, 0, 0, 0, 0, 0]
    partial = load("reward", "response_format", {"tags": ["think", "answer"], "partial": True})
    assert partial(texts) == [1, 0.75, 0.75, 0.5, 0, 0.5]
    assert load("reward", "response_format", {"pattern": r"\d+"})(messages("12 ", "a12")) == [1, 0]
    with pytest.raises(ValueError, match="give one of `pattern` and `tags`"):
        load("reward", "response_format")


def test_reasoning_gym_scores_rows_of_the_data_module() -> None:
    tasks = [{"name": "chain_sum"}, {"name": "letter_counting"}]
    data = DataConfig.model_validate({"reasoning_gym": {"tasks": tasks, "size": 6}})
    rows = load_data(data, "grpo", character_tokenizer()).train
    columns = {name: rows[name][:] for name in rows.column_names}
    reward = load("reward", "reasoning_gym")
    assert reward(columns["answer"], **columns) == [1.0] * 6
    assert all(value < 1 for value in reward(["none"] * 6, **columns))
    tagged = load("reward", "reasoning_gym", {"tag": "answer", "full_marks_only": True})
    texts = [f"<answer>1</answer> rather <answer> {answer} </answer>" for answer in columns["answer"]]
    assert tagged(messages(*texts), **columns) == [1.0] * 6
    assert tagged(columns["answer"], **columns) == [0.0] * 6


# -------------------------------------------------------------------------------------------------------- guard

COLUMNS: dict[str, Any] = {
    "prompts": [f"p{i}" for i in range(4)],
    "completions": ["a", "b", "bad", "d"],
    "answer": ["1", "2", "3", "4"],
    "trainer_state": SimpleNamespace(global_step=3),
}


def raises_on_bad(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("no such word")
    return [float(number) for number in answer]


def hangs_on_bad(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    if "bad" in completions:
        time.sleep(30)
    return [float(number) for number in answer]


def one_value(value: Any) -> Any:
    return lambda completions, answer, **columns: [
        value if text == "bad" else float(number) for text, number in zip(completions, answer, strict=True)
    ]


def drops_bad(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(number) for text, number in zip(completions, answer, strict=True) if text != "bad"]


FAULTS = {
    "raises": (raises_on_bad, "raised KeyError: 'no such word'"),
    "hangs": (hangs_on_bad, r"took longer than 0\.\d+ s"),
    "nan": (one_value(math.nan), "returned nan, which is no finite number"),
    "inf": (one_value(math.inf), "returned inf"),
    "text": (one_value("1.0"), "returned '1.0'"),
    "count": (drops_bad, "returned 0 values for 1 rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("is_async", [False, True])
def test_stop_names_the_reward_the_row_and_the_text(fault: str, is_async: bool) -> None:
    reward, cause = FAULTS[fault]
    with pytest.raises(RewardError, match=cause) as caught:
        call(reward, is_async, on_error="stop")
    for part in ("'words'", "row 2", "'p2'", "'bad'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("is_async", [False, True])
def test_missing_scores_the_rows_at_fault_as_none_and_counts_them(fault: str, is_async: bool) -> None:
    logged: list[tuple[str, float]] = []
    guarded, values = call(
        FAULTS[fault][0], is_async, on_error="missing", log_metric=lambda *entry: logged.append(entry)
    )
    assert values == [1, 2, None, 4]
    assert guarded.missing == 1 and logged == [("rewards/words/missing", 0.25)]


def call(reward: Any, is_async: bool, *, on_error: Any, **columns: Any) -> Any:
    async def asynchronous(completions: list[str], **given: Any) -> Any:
        if reward is hangs_on_bad and "bad" in completions:
            await asyncio.sleep(30)
        return reward(completions, **given)

    guarded: Any = guard(asynchronous if is_async else reward, "words", time_limit=0.2, on_error=on_error)
    values = guarded(**COLUMNS, **columns)
    return guarded, asyncio.run(values) if is_async else values


def test_a_sound_reward_passes_unchanged() -> None:
    def some(completions: list[str], **columns: Any) -> list[Any]:
        assert columns["trainer_state"] == COLUMNS["trainer_state"]
        return [None, True, torch.tensor(0.5), 2]

    guarded = guard(some, "some")
    assert guarded(**COLUMNS) == [None, 1.0, 0.5, 2.0] and guarded.missing == 0
    assert guarded.__name__ == "some"
    assert guard(lambda completions, **columns: [None] * 4, "none")(**COLUMNS) == [None] * 4


def test_rewards_see_the_callers_gradient_mode() -> None:
    modes: list[bool] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        modes.append(torch.is_grad_enabled())
        return [0.0] * len(completions)

    with torch.no_grad():
        guard(reward, "mode")(["a"])
    assert modes == [False]


def test_a_reward_that_always_hangs_is_given_up_after_three_limits() -> None:
    def hangs(completions: list[str], **columns: Any) -> list[float]:
        time.sleep(30)
        return []

    guarded = guard(hangs, "hangs", time_limit=0.2, on_error="missing")
    start = time.monotonic()
    assert guarded(**COLUMNS) == [None] * 4
    assert 0.5 < time.monotonic() - start < 1.5


def test_a_fault_that_no_row_shows_alone_stops_without_naming_a_row() -> None:
    def needs_one(completions: list[str], **columns: Any) -> list[float]:
        return [1.0]

    with pytest.raises(RewardError, match="returned 1 values for 4 rows, for 4 rows at once; no row alone"):
        guard(needs_one, "one")(**COLUMNS)
    assert guard(needs_one, "one", on_error="missing")(**COLUMNS) == [1.0] * 4


def test_trl_tells_guarded_async_rewards_from_others() -> None:
    from trl.trainer.utils import is_async_callable

    async def asynchronous(completions: list[str], **columns: Any) -> list[float]:
        return [0.0]

    assert is_async_callable(guard(asynchronous, "a"))
    assert is_async_callable(guard(functools.partial(asynchronous, extra=1), "a"))
    assert not is_async_callable(guard(raises_on_bad, "a"))


@pytest.mark.slow
def test_a_reward_that_holds_the_interpreter_ends_the_process(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import re\nfrom siftrl.reward_guard import guard\n"
        "def runaway(completions, **columns):\n    return [float(bool(re.match('(a+)+$', c))) for c in completions]\n"
        "guard(runaway, 'runaway', time_limit=0.5)(['a' * 60 + 'b'])\n"
    )
    done = run_command([sys.executable, str(script)])
    assert done.returncode == 1 and "in runaway" in done.stderr


def test_load_rewards_builds_guarded_plugins_with_their_options() -> None:
    configs = [
        RewardConfig.model_validate({"name": "exact_match", "options": {"column": "gold"}, "weight": 2.0}),
        RewardConfig.model_validate({"name": "response_format", "options": {"pattern": ".*"}, "on_error": "missing"}),
    ]
    rewards, weights = load_rewards(configs)
    assert weights == [2.0, 1.0]
    assert [reward.__name__ for reward in rewards] == ["exact_match", "response_format"]
    assert rewards[0](["4"], gold=["4"]) == [1.0]
    with pytest.raises(
        RewardError, match="reward 'exact_match': row 0: raised ValueError: exact_match: the data has no"
    ):
        rewards[0](["4"], answer=["4"])
