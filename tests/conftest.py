"""Small real things that many tests share: a tiny model with its tokenizer, and sums to train it on."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ENVIRONMENT = dict(os.environ)
"""For processes that tests start: an engine in this process would leave its ranks and ports in theirs."""
REAL_DATA = Path(os.environ.get("SIFTRL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""GSM8K, MAWPS, SVAMP and ASDiv as their authors' files are, which are not part of the project; tests skip without."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """A failure says how the machine was: many an engine fails on a machine that is out of memory or overloaded."""
    report: pytest.TestReport = yield
    if report.failed:
        free = psutil.virtual_memory().available / 2**30
        disk = psutil.disk_usage(str(Path(__file__).parent)).free / 2**30
        busiest = sorted(psutil.process_iter(["cmdline", "cpu_times"]), key=_cpu_seconds, reverse=True)[:6]
        lines = [f"{call.duration:.0f} s, load {os.getloadavg()}, free: {free:.1f} GiB of memory, {disk:.1f} of disk"]
        lines += [f"{_cpu_seconds(p):7.0f} CPU s  {' '.join(p.info['cmdline'] or [])[:150]}" for p in busiest]
        report.sections.append(("the machine", "\n".join(lines)))
    return report


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.info["cpu_times"]
    return times.user + times.system if times else 0.0


@pytest.fixture()
def data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write a .jsonl file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random 2-layer Qwen3 and a character tokenizer; vLLM for CPUs needs heads of at least 32."""
    from siftrl.models import save_scratch_model
    from siftrl.recipe import ScratchConfig

    folder = tmp_path_factory.mktemp("tiny_model")
    sizes = ScratchConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64, max_positions=64)
    save_scratch_model(sizes, folder, seed=0)
    return str(folder)


@pytest.fixture()
def sums() -> Any:
    """48 prompts 'a+b=' with their answers."""
    from datasets import Dataset

    pairs = [(a, b) for a in range(8) for b in range(6)]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs], "answer": [str(a + b) for a, b in pairs]})


def digit_share(completions: list[str], **columns: Any) -> list[float]:
    """A reward that random models earn: the share of digits among the completion's characters."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def letter_sum(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between nearly all completions, so that all have an advantage."""
    return [sum(map(ord, text)) % 101 / 10 for text in completions]


SMALL_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 7,
}
"""What the trainers' settings share: 16 rows a step in 2 micro-batches, on a CPU."""


def grpo_args(folder: Path, **changes: Any) -> Any:
    """A small CPU GRPOConfig: 4 prompts x 4 completions in 2 micro-batches, one optimizer step a rollout."""
    from trl import GRPOConfig

    options = SMALL_RUN | {"output_dir": str(folder), "num_generations": 4, "max_completion_length": 6}
    return GRPOConfig(**(options | changes))


def worded_sums() -> Any:
    """48 sums with answers of different lengths, in two sources: 'words' has 6 of them."""
    from datasets import Dataset

    pairs = [(a, b) for a in range(8) for b in range(6)]
    return Dataset.from_dict(
        {
            "prompt": [f"{a}+{b}=" for a, b in pairs],
            "completion": [str(a + b) + "!" * (a * b % 4) for a, b in pairs],
            "source": ["words" if index % 8 == 0 else "sums" for index in range(len(pairs))],
        }
    )


def sft_args(folder: Path, **changes: Any) -> Any:
    """A small CPU SFTConfig: 16 rows a step in micro-batches of 8."""
    from trl import SFTConfig

    options = SMALL_RUN | {"output_dir": str(folder), "lr_scheduler_type": "constant"}
    return SFTConfig(**(options | changes))


@pytest.fixture(autouse=True)
def _engines_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """An engine holds a GiB and dozens of threads: those of earlier tests would starve what later ones start."""
    yield
    if request.node.get_closest_marker("engines"):
        from siftrl.rollout import free_memory

        free_memory()
