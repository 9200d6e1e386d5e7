from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import odd_rewards
import psutil
import pytest
import torch
from conftest import grpo_args
from launch import run_command

from siftrl.evaluate import score
from siftrl.plugins import load
from siftrl.recipe import RewardConfig
from siftrl.reward_guard import (
    RewardError,
    check_finite,
    close_rewards,
    guard,
    load_reward_states,
    load_rewards,
    reward_states,
    time_limit_of,
)


def in_worker(name: str, **keys: Any) -> Any:
    return load_rewards([RewardConfig.model_validate({"name": f"odd_rewards:{name}", **keys})])[0][0]


def processes() -> list[psutil.Process]:
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if any("reward_process" in part for part in child.cmdline())]


def is_gone(pid: int) -> bool:
    """Whether a process ends within some seconds: what is killed takes a moment."""
    until = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def rows() -> Iterator[Any]:
    """A reward that judges row by row, half a second a row, where rows at fault are missing."""
    reward = in_worker("RowByRow", time_limit=0.5, on_error="missing")
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def whole() -> Iterator[Any]:
    """A function, which is given whole calls."""
    reward = in_worker("whole", time_limit=0.5, options={"factor": 2.0})
    yield reward
    reward.close()


# -------------------------------------------------------------------------------------------------- time and death


def test_a_row_that_hangs_or_ends_the_process_costs_that_row_alone(rows: Any) -> None:
    texts = ["1"] * 100
    faults = {3: "die", 20: "spin", 21: "crash", 60: "raise", 61: "exit", 62: "interrupt", 63: "1e39", 99: "nan"}
    for row, text in faults.items():
        texts[row] = text
    texts[40] = "none"
    logged: list[Any] = []
    values = rows(
        texts,
        log_metric=lambda name, value: logged.append((name, round(value, 3))),
        log_extra=lambda column, cells: logged.append((column, cells)),
    )
    assert [row for row, value in enumerate(values) if value != 1.0] == sorted([*faults, 40])
    assert rows.missing == len(faults)
    sound = [text if row not in faults or text in ("1e39", "nan") else None for row, text in enumerate(texts)]
    lengths = [len(text) for text in sound if text is not None]
    assert logged == [
        ("length", round(sum(lengths) / len(lengths), 3)),
        ("text", sound),
        ("rewards/odd_rewards:RowByRow/missing", 0.08),
    ]


@pytest.mark.slow
def test_a_killed_worker_takes_its_processes_with_it(rows: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert rows([f"child {pids} own", "1", f"child {pids} same"]) == [None, 1.0, None]
    own, same = map(int, pids.read_text().split())
    assert is_gone(own) and is_gone(same)


@pytest.mark.slow
def test_more_workers_help_with_a_long_call_alone() -> None:
    before = len(processes())
    reward = in_worker("RowByRow", workers=2)
    assert reward(["1"] * 64) == [1.0] * 64 and len(processes()) == before + 1
    texts = [f"sleep {i}" for i in range(64)]
    assert reward(texts) == list(range(64)) and len(processes()) == before + 2
    reward.close()
    assert len(processes()) == before


CAUSES = {
    "spin": r"took longer than 0\.\d+ s",
    "raise": "raised KeyError: 'no such word'",
    "exit": "raised SystemExit: 0",
    "interrupt": "raised KeyboardInterrupt",
    "die": r"ended its process \(exit code 0\)",
    "crash": r"ended its process \(SIGSEGV\)",
    "1e39": r"returned 2e\+39, which is not finite in float32",
}


@pytest.mark.parametrize("text", [pytest.param("spin", marks=pytest.mark.slow), *list(CAUSES)[1:]])
def test_a_reward_that_judges_calls_is_named_with_its_row_too(whole: Any, text: str) -> None:
    with pytest.raises(RewardError, match=f"'odd_rewards:whole': row 2: {CAUSES[text]}.*; prompt: 'p'; completion"):
        whole(["1", "1", text], prompts=["p"] * 3)
    assert whole(["1", "3"], prompts=["p"] * 2) == [2.0, 6.0]


def test_a_call_may_take_longer_the_more_rows_it_has() -> None:
    assert [time_limit_of(60.0, rows) for rows in (1, 64, 128, 1024)] == [60, 60, 120, 960]
    assert time_limit_of(None, 1024) is None


def test_the_users_interrupt_stays_one_and_the_next_call_gets_its_own_answer(rows: Any) -> None:
    # SIGINT raises KeyboardInterrupt, as at the second Ctrl-C of a run; an engine of another test may have changed that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            rows(["7", "hang"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert rows(["1", "2"]) == [1.0, 2.0]


def test_thousand_rows_cost_little_more_than_in_this_process(rows: Any) -> None:
    columns = {"prompts": ["p"] * 1024, "answer": ["1"] * 1024, "completion_ids": [[1] * 20] * 1024}
    here = guard(load("reward", "odd_rewards:RowByRow"), "here")

    def seconds(reward: Any) -> float:
        start = time.perf_counter()
        assert reward(["1"] * 1024, **columns) == [1.0] * 1024
        return time.perf_counter() - start

    assert min(seconds(rows) for _ in range(3)) < 0.3 + min(seconds(here) for _ in range(3))


# ------------------------------------------------------------------------------------------- what a worker is and sees


def test_a_worker_is_a_fresh_process_and_a_reward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    about = in_worker("about")
    for reward in (about, guard(load("reward", "odd_rewards:about"), "here")):
        completions, ids, answer = ["a", "b"], [[1], [2]], ["x", "y"]
        logged: dict[str, Any] = {}
        state = SimpleNamespace(global_step=3, log_history=[{"loss": 1.0}], model=torch.nn.Linear(1, 1))
        columns = {"completion_ids": ids, "answer": answer, "trainer_state": state, "log_extra": logged.__setitem__}
        assert reward(completions, **columns) == [0.5, 0.5]
        assert (completions, ids, answer, state.global_step) == (["a", "b"], [[1], [2]], ["x", "y"], 3)
        facts = json.loads(logged["facts"][0])
        assert facts["step"] == 3
        if reward is about:
            worker = facts["pid"]
            assert not facts["torch"] and facts["group"] and facts["main_thread"] and facts["main"] is None
            assert facts["environment"] == {"RANK": None, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            assert worker != os.getpid()
    about.close()
    assert is_gone(worker)


def test_a_column_named_like_an_option_does_not_replace_it(whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    here = guard(load("reward", "odd_rewards:whole", {"factor": 2.0}), "here")
    for reward in (whole, here):
        with caplog.at_level(logging.WARNING):
            assert reward(["1", "2"], factor=[5, 5]) == [2.0, 4.0]
        assert "is not given the data's column 'factor': it has an option of that name" in caplog.text
        caplog.clear()


@pytest.mark.slow
def test_the_state_survives_a_killed_worker_and_goes_into_checkpoints() -> None:
    counting = in_worker("Counting", time_limit=0.5, on_error="missing")
    assert counting(["1", "1"]) == [2.0, 2.0]
    assert counting(["raise"]) == [None]  # twice: the call, and the row by itself
    assert counting(["spin"]) == [None]
    assert counting(["1"]) == [3.0]  # calls at fault leave no trace
    saved = reward_states([abs, counting])
    assert saved == {"1 odd_rewards:Counting": {"seen": 3}}
    load_reward_states([abs, counting], {"1 odd_rewards:Counting": {"seen": 10}})
    assert counting(["1"]) == [11.0]
    counting.close()
    here = guard(odd_rewards.Counting(), "here")
    load_reward_states([here], {"0 here": {"seen": 5}})
    assert here(["1"]) == [6.0] and reward_states([here]) == {"0 here": {"seen": 6}}


def test_an_async_reward_is_awaited_in_its_worker() -> None:
    reward = in_worker("awaited", time_limit=5)
    assert asyncio.run(reward(["1", "2"])) == [1.0, 2.0]
    assert score([reward], [2.0], ["p"], ["3"], {}).tolist() == [6.0]
    with pytest.raises(RewardError, match="row 0: raised SystemExit"):
        asyncio.run(reward(["exit"]))
    assert asyncio.run(reward(["4"])) == [4.0]
    reward.close()


def test_what_cannot_be_sent_is_named(whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RewardError, match="'odd_rewards:whole': column 'lock' cannot be sent .*; write `workers: 0`"):
        whole(["1"], lock=[threading.Lock()])
    in_worker("whole", workers=3).close()
    assert "'odd_rewards:whole': has one worker, not 3: it does not declare `row_by_row = True`" in caplog.text


def test_what_stays_in_the_trainers_process_says_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    before = len(processes())
    with caplog.at_level(logging.INFO):
        assert in_worker("reads_environments")(["a"]) == [float(os.getpid())]
        assert in_worker("whole", workers=0)(["2"]) == [2.0]
        guard(odd_rewards.whole, "live")
    assert "'odd_rewards:reads_environments': runs in the trainer's process: it reads `environments`" in caplog.text
    assert "'odd_rewards:whole': runs in the trainer's process: `workers` is 0" in caplog.text
    assert "'live': runs in the trainer's process: it is a Python object of a script's" in caplog.text
    assert len(processes()) == before


@pytest.mark.slow
def test_a_reward_that_holds_a_model_or_cannot_be_built_elsewhere_stays(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held.py").write_text(
        "import os, sys, torch\n"
        "model = torch.nn.Linear(1, 1)\n"
        "def score(completions, **columns):\n    return [float(os.getpid())] * len(completions)\n"
    )
    (tmp_path / "activation.py").write_text(
        "import os, torch\n"
        "model = torch.nn.GELU()\n"  # transformers keeps some: no weights, no model
        "def score(completions, **columns):\n    return [float(os.getpid())] * len(completions)\n"
    )
    (tmp_path / "only_here.py").write_text(
        "import os, sys\n"
        "class Score:\n"
        "    def __init__(self):\n        if 'pytest' not in sys.modules:\n            raise RuntimeError('no GPU')\n"
        "    def __call__(self, completions, **columns):\n        return [float(os.getpid())] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ["held:score", "only_here:Score", "activation:score"]
    rewards, _ = load_rewards([RewardConfig(name=name) for name in names])
    *here, elsewhere = [reward(["a"])[0] for reward in rewards]
    assert here == [float(os.getpid())] * 2 and elsewhere != os.getpid()
    close_rewards(rewards)
    assert "runs in the trainer's process: it holds a model" in caplog.text
    assert "runs in the trainer's process: building it there raised RuntimeError: no GPU" in caplog.text


# ----------------------------------------------------------------------------------------- what a faulty answer is


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ({"a": 1.0}, "returned dict, not a list of 1 numbers"),
        ({1.0}, "returned set, not a list"),
        ("1", "returned str, not a list"),
        (1.0, "returned float, not a list"),
        ([-3.5e38], "returned -3.5e.38, which is not finite in float32"),
        ([1, 2], "returned 2 values for 1 rows"),
    ],
)
def test_an_answer_without_an_order_or_beyond_float32_is_refused(answer: Any, cause: str) -> None:
    with pytest.raises(RewardError, match=f"'r': row 0: {cause}"):
        guard(lambda completions: answer, "r")(["a"])


def test_lazy_answers_are_made_inside_the_limit() -> None:
    def lazy(completions: list[str]) -> Iterator[float]:
        time.sleep(5)
        yield 1.0

    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(5)
        return [1.0]

    for reward in (lazy, lambda completions: later(completions), lambda completions: map(odd_rewards.obey, ["hang"])):
        with pytest.raises(RewardError, match=r"row 0: took longer than 0\.1 s"):
            guard(reward, "r", time_limit=0.1)(["a"])

    async def stream(completions: list[str]) -> Any:
        for text in completions:
            yield float(text)

    assert guard(stream, "r")(["1", "2"]) == [1.0, 2.0]
    with pytest.raises(RewardError, match="row 0: raised ValueError: could not convert"):
        guard(lambda completions: map(float, completions), "r")(["x"])


@pytest.mark.parametrize("limit", [5.0, None])
@pytest.mark.parametrize("text", ["exit", "interrupt"])
def test_a_reward_that_ends_the_process_is_named_in_the_trainers_process_too(text: str, limit: float | None) -> None:
    with pytest.raises(RewardError, match="row 0: raised (SystemExit|KeyboardInterrupt)"):
        guard(odd_rewards.whole, "r", time_limit=limit)([text])

    async def asynchronous(completions: list[str]) -> list[float]:
        return [odd_rewards.obey(text) for text in completions]

    with pytest.raises(RewardError, match="row 0: raised (SystemExit|KeyboardInterrupt)"):
        asyncio.run(guard(asynchronous, "r", time_limit=limit)([text]))


def test_a_reward_beyond_float32_is_named_whoever_gave_it() -> None:
    def large(completions: list[str], **columns: Any) -> list[float]:
        return [3e38]

    with pytest.raises(RewardError, match=r"reward 'large': row 0: 3e\+38 x its weight 2 is not finite in float32"):
        score([large], [2.0], ["p"], ["c"], {})
    check_finite(torch.tensor([[3e38, float("nan")]]), torch.tensor([1.0, 5.0]), ["a", "b"])
    with pytest.raises(RewardError, match="the weighted sum of the rewards a, b is not finite"):
        check_finite(torch.tensor([[3e38, 3e38]]), torch.ones(2), ["a", "b"])
    with pytest.raises(RewardError, match="reward 'b': row 1: inf"):
        check_finite(torch.tensor([[1.0, 1.0], [1.0, float("inf")]]), torch.ones(2), ["a", "b"])


@pytest.mark.slow
def test_the_trainer_names_plain_functions_too_and_keeps_the_state_of_guarded_rewards(
    tiny_model: str, sums: Any, tmp_path: Path
) -> None:
    from siftrl.trainers.grpo import GRPOTrainer

    does: list[Any] = []

    def plain(completions: list[str], **columns: Any) -> list[float]:
        return [does[0]() for _ in completions]

    counting = guard(odd_rewards.Counting(), "counting", on_error="missing")  # no completion is a number
    trainer = GRPOTrainer(tiny_model, [plain, counting], grpo_args(tmp_path), train_dataset=sums)
    does[:] = [lambda: sys.exit(0)]
    with pytest.raises(RewardError, match="a reward raised SystemExit: 0"):
        trainer.train()
    does[:] = [lambda: 1e39]
    with pytest.raises(RewardError, match="reward 'plain': row 0: inf x its weight 1 is not finite in float32"):
        trainer.train()
    trainer.load_rank_state({"rewards": {"1 counting": {"seen": 7}}})
    assert trainer.rank_state()["rewards"] == {"1 counting": {"seen": 7}}


# ------------------------------------------------------------------------------------------------------- the end


def test_closed_workers_are_gone_and_a_fork_does_not_keep_or_end_them() -> None:
    before = set(processes())
    reward = in_worker("whole")
    (mine,) = set(processes()) - before
    fork = os.fork()
    if fork == 0:
        reward.close()  # not this process's to end
        os._exit(0)
    os.waitpid(fork, 0)
    assert reward(["1"]) == [1.0]
    close_rewards([abs, reward])
    assert not mine.is_running()


SCRIPT = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
from siftrl.recipe import RewardConfig
from siftrl.reward_guard import load_rewards
assert __name__ == "__main__", "a worker imported the script that trains"
print("script", flush=True)
reward = load_rewards([RewardConfig(name="odd_rewards:RowByRow")])[0][0]
print(reward(["1"]), flush=True)
if sys.argv[1] == "killed":
    threading.Timer(1, os.kill, (os.getpid(), 9)).start()
    reward([f"child {{sys.argv[2]}} same"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "ended"])
def test_no_worker_outlives_its_trainer(how: str, tmp_path: Path) -> None:
    script, pids = tmp_path / "train.py", tmp_path / "pids"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    done = run_command([sys.executable, str(script), how, str(pids)], grace=5)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    assert done.stdout.split("\n") == ["script", "[1.0]", ""]
    if how == "killed":
        assert is_gone(int(pids.read_text()))


@pytest.mark.slow
def test_a_run_that_a_reward_ends_has_failed_and_says_why(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("import sys\ndef leaves(completions, **columns):\n    sys.exit(0)\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(12)))
    recipe = {
        "name": "r",
        "model": {"path": tiny_model},
        "data": {"path": "rows.jsonl", "eval": {"size": 4}},
        "rewards": ["my_rewards:leaves"],
        "stages": [
            {
                "kind": "grpo",
                "prompts_per_step": 2,
                "completions_per_prompt": 4,
                "rollout": {"max_completion_tokens": 8},
                "eval": {},
            }
        ],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    done = run_command([sys.executable, "-m", "siftrl", "train", "r.yaml"], cwd=tmp_path, grace=5)
    assert done.returncode not in (0, 130), done.stderr
    # at the held-out evaluation, before the first step
    assert "siftrl: reward 'my_rewards:leaves': row 0: raised SystemExit: 0; prompt: '" in done.stderr


def test_the_worker_module_imports_no_torch() -> None:
    code = "import sys, siftrl.reward_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
