"""Batch selectors that rank rows by one figure: their choice by hand, and what all of them promise the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from siftrl import plugins
from siftrl.selectors.gradient_norm import LargeGradients
from siftrl.selectors.hard_batches import HardBatches
from siftrl.selectors.high_entropy import HighEntropy
from siftrl.selectors.high_loss import HighLoss
from siftrl.selectors.reducible_loss import ReducibleLoss
from siftrl.selectors.rows_by_length import RowsByLength
from siftrl.selectors.uniform_rows import UniformRows
from siftrl.signals import Entropy, GradientNorm, Loss, ReferenceLoss
from siftrl.types import BatchSelector, Selection, Signals

ALL: dict[str, Callable[[], BatchSelector]] = {
    "uniform_rows": UniformRows,
    "high_loss": HighLoss,
    "high_loss, sum": lambda: HighLoss(normalise=False),
    "gradient_norm": LargeGradients,
    "high_entropy": HighEntropy,
    "reducible_loss": lambda: ReducibleLoss("reference"),
    "rows_by_length": RowsByLength,
    "hard_batches": lambda: HardBatches(batch=2),
}
RANKED = [name for name in ALL if name not in ("uniform_rows", "hard_batches")]


def signals(values: dict[Any, list[float]] | None = None, tokens: list[int] | None = None) -> Signals:
    """Four rows unless told otherwise, of one token each."""
    tensors = {signal: torch.tensor(numbers) for signal, numbers in (values or {}).items()}
    num = len(next(iter(tensors.values()))) if tensors else 4
    all_tokens = torch.tensor([9, 2, 2, 4]) if num == 4 else torch.full((num,), 9)
    return Signals(num_tokens=torch.tensor(tokens or [1] * num), num_all_tokens=all_tokens, tensors=tensors)


def everything(values: list[float]) -> Signals:
    """Every signal that the selectors here ask for, all with the same values; the reference model's loss is 0."""
    numbers = {
        Loss(): values,
        Entropy(): values,
        GradientNorm(): values,
        ReferenceLoss("reference"): [0.0] * len(values),
    }
    return signals(numbers)


def select(selector: BatchSelector, given: Signals, keep: int, seed: int = 0) -> Selection:
    return selector.select(given, keep, torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- by hand


def test_high_loss_keeps_the_worst_rows() -> None:
    selector, given = HighLoss(), signals({Loss(): [1.0, 4.0, 2.0, 3.0]})
    selection = select(selector, given, 2)
    assert selection.indices.tolist() == [1, 3]
    assert selection.scores.tolist() == [1.0, 4.0, 2.0, 3.0]
    assert selector.metrics() == {"kept_loss": 3.5, "mean_loss": 2.5}
    assert selector.needs == {Loss()}


def test_high_loss_of_the_whole_row_favours_long_rows() -> None:
    given = signals({Loss(): [1.0, 4.0, 2.0, 3.0]}, tokens=[10, 1, 3, 1])  # sums 10, 4, 6, 3
    selector = HighLoss(normalise=False)
    selection = select(selector, given, 2)
    assert selection.indices.tolist() == [0, 2]
    assert selection.scores.tolist() == [10.0, 4.0, 6.0, 3.0]
    assert selector.metrics() == {"kept_loss": 8.0, "mean_loss": 5.75}


def test_gradient_norm_keeps_the_largest() -> None:
    selector = LargeGradients()
    selection = select(selector, signals({GradientNorm(): [0.5, 0.25, 2.0, 1.25]}), 2)
    assert (selection.indices.tolist(), selector.needs) == ([2, 3], {GradientNorm()})
    assert selector.metrics() == {"kept_norm": 1.625, "mean_norm": 1.0}


def test_high_entropy_keeps_the_least_sure() -> None:
    selector = HighEntropy()
    selection = select(selector, signals({Entropy(): [0.5, 1.5, 0.25, 0.75]}), 3)
    assert (selection.indices.tolist(), selector.needs) == ([1, 3, 0], {Entropy()})
    assert selector.metrics() == {"kept_entropy": pytest.approx(2.75 / 3), "mean_entropy": 0.75}


def test_reducible_loss_takes_the_reference_s_loss_off() -> None:
    selector = ReducibleLoss("a/model")
    assert selector.needs == {Loss(), ReferenceLoss("a/model")}
    # The first has the highest loss, but the reference finds it just as hard: noise. The last is forgotten.
    given = signals({Loss(): [5.0, 3.0, 2.0, 1.0], ReferenceLoss("a/model"): [5.0, 1.0, 0.5, 1.5]})
    selection = select(selector, given, 2)
    assert selection.scores.tolist() == [0.0, 2.0, 1.5, -0.5]
    assert selection.indices.tolist() == [1, 2]
    metrics = {"kept_reducible_loss": 1.75, "mean_reducible_loss": 0.75, "mean_reference_loss": 2.0}
    assert selector.metrics() == metrics


@pytest.mark.parametrize(
    ("prefer", "count", "chosen", "metrics"),
    [
        ("long", "completion", [1, 3], {"kept_tokens": 6.5, "mean_tokens": 4.25}),  # of 1, 7, 3, 6
        ("short", "completion", [0, 2], {"kept_tokens": 2.0, "mean_tokens": 4.25}),
        ("long", "all", [0, 3], {"kept_tokens": 6.5, "mean_tokens": 4.25}),  # of 9, 2, 2, 4
        ("short", "all", [1, 2], {"kept_tokens": 2.0, "mean_tokens": 4.25}),
    ],
)
def test_rows_by_length(prefer: Any, count: Any, chosen: list[int], metrics: dict[str, float]) -> None:
    selector = RowsByLength(prefer=prefer, count=count)
    selection = select(selector, signals(tokens=[1, 7, 3, 6]), 2)
    assert (selection.indices.tolist(), selector.metrics()) == (chosen, metrics)
    assert not selector.needs


def test_uniform_rows_are_the_generator_s_and_equally_likely() -> None:
    times = torch.zeros(4)
    for seed in range(1000):
        selection = select(UniformRows(), signals(), 2, seed)
        times[selection.indices] += 1
        assert selection.indices.tolist() == select(UniformRows(), signals(), 2, seed).indices.tolist()
    assert times.sum() == 2000
    # The chance of each is 1/2: 500 times, with a standard deviation of 16.
    assert ((times - 500).abs() < 65).all()
    assert selection.probability.tolist() == [0.5] * 4


# ------------------------------------------------------------------------------------------- hard mini-batches


def test_hard_batches_are_kept_whole() -> None:
    # Mini-batches of 2 with means 2, 3, 1.5, 1: the harder half is (2, 3) and (0, 1), although row 4 has a high loss.
    losses = [1.0, 3.0, 3.5, 2.5, 2.75, 0.25, 1.0, 1.0]
    selector = HardBatches(batch=2, share=0.5)
    selection = select(selector, signals({Loss(): losses}), 4)
    assert selection.indices.tolist() == [2, 3, 0, 1]
    assert selection.reasons == ("hard batch",) * 4
    assert selection.scores.tolist() == [2.0, 2.0, 3.0, 3.0, 2.75, 0.25, 1.0, 1.0]
    assert selector.metrics() == {"kept_loss": 2.5, "mean_loss": 1.875, "hard_batches": 0.5, "filled": 0.0}


def test_too_few_hard_batches_are_filled_up_and_too_many_are_cut() -> None:
    given = signals({Loss(): [1.0, 3.0, 3.5, 2.5, 2.75, 0.25, 1.0, 1.0]})
    selector = HardBatches(batch=2, share=0.25)
    selection = select(selector, given, 4)  # one of four is hard, then the rows with losses 3 and 2.75
    assert selection.indices.tolist() == [2, 3, 1, 4]
    assert selection.reasons == ("hard batch", "hard batch", "fill", "fill")
    assert selector.metrics()["filled"] == 0.5
    assert select(HardBatches(batch=2, share=1.0), given, 3).indices.tolist() == [2, 3, 0]
    nothing = select(HardBatches(batch=2, share=0.0), given, 3)
    assert (nothing.indices.tolist(), nothing.reasons) == ([2, 1, 4], ("fill",) * 3)


def test_hard_is_measured_against_the_last_steps() -> None:
    selector = HardBatches(batch=2, share=0.5, window=4)
    select(selector, signals({Loss(): [9.0, 9.0, 8.0, 8.0]}), 2)
    easy = signals({Loss(): [1.0, 3.0, 1.0, 1.5]})  # means 2 and 1.25, below 9 and 8: none is in the upper half
    selection = select(selector, easy, 2)
    assert (selection.indices.tolist(), selection.reasons) == ([1, 3], ("fill", "fill"))
    assert selector.metrics()["hard_batches"] == 0.0
    # 9 and 8 have left the window: of 2, 1.25, 2, 1.25 the first is in the upper half.
    selection = select(selector, easy, 2)
    assert (selection.indices.tolist(), selection.reasons) == ([0, 1], ("hard batch", "hard batch"))


def test_the_last_mini_batch_may_be_short() -> None:
    selector = HardBatches(batch=3, share=0.5)
    selection = select(selector, signals({Loss(): [1.0, 2.0, 3.0, 2.5]}), 2)  # means 2 and 2.5
    assert selection.indices.tolist() == [3, 2]
    assert selection.reasons == ("hard batch", "fill")


def test_a_share_of_the_window_is_not_rounded_up() -> None:
    """0.1 * 30 is 3.0000000000000004: three of thirty are hard, not four."""
    losses = [float(value) for value in range(30)]
    selection = select(HardBatches(batch=1, share=0.1), signals({Loss(): losses}), 5)
    assert selection.reasons == ("hard batch",) * 3 + ("fill",) * 2


def test_hard_batches_go_on_where_they_stopped() -> None:
    def steps(selector: HardBatches, seeds: range) -> list[tuple[list[int], tuple[str, ...]]]:
        chosen = []
        for seed in seeds:
            losses = torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 4 / (seed + 1)
            selection = select(selector, signals({Loss(): losses.tolist()}), 5)
            chosen.append((selection.indices.tolist(), selection.reasons))
        return chosen

    whole, first = (HardBatches(batch=2, share=0.5, window=30) for _ in range(2))
    expected = steps(whole, range(6))
    assert steps(first, range(3)) == expected[:3]
    second = HardBatches(batch=2, share=0.5, window=30)
    second.load_state_dict(first.state_dict())
    assert steps(second, range(3, 6)) == expected[3:]
    fresh = HardBatches(batch=2, share=0.5, window=30)
    assert steps(fresh, range(3, 6)) != expected[3:], "the state matters here"


# ------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ALL)
def test_the_selection_is_well_formed(name: str) -> None:
    selector = ALL[name]()
    given = everything([0.5, 2.0, 1.0, 1.5])
    assert set(selector.needs) <= set(given.tensors)
    selection = select(selector, given, 3)
    assert selection.indices.dtype == torch.int64 and len(set(selection.indices.tolist())) == 3
    assert selection.weights.tolist() == [1.0] * 3 and len(selection.reasons) == 3
    assert selection.scores.shape == selection.probability.shape == (4,)
    assert not selector.weighted


@pytest.mark.parametrize("name", RANKED)
def test_ties_go_to_the_first_row(name: str) -> None:
    given = everything([1.0] * 4)
    assert select(ALL[name](), given, 3).indices.tolist() == [0, 1, 2]


def test_ties_go_to_the_first_row_among_many() -> None:
    """Sorting is stable at every size; an unstable one may pass with four rows."""
    given = everything([1.0] * 1000)
    for name in RANKED:
        assert select(ALL[name](), given, 600).indices.tolist() == list(range(600)), name


@pytest.mark.parametrize("name", ALL)
def test_as_many_as_there_are_keeps_all(name: str) -> None:
    selection = select(ALL[name](), everything([0.5, 2.0, 1.0, 1.5]), 4)
    assert sorted(selection.indices.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [name for name in ALL if "," not in name])
def test_they_are_found_by_name_as_batch_selectors(name: str) -> None:
    assert plugins.find("selector", name).role == "batch"
    options = {"reference": "a/model"} if name == "reducible_loss" else {}
    made = plugins.load("selector", name, options)
    assert type(made) is type(ALL[name]())
    assert made.state_dict() == ({"recent": []} if name == "hard_batches" else {})


def test_wrong_keys_are_named() -> None:
    with pytest.raises(plugins.PluginError, match="reference: is required"):
        plugins.validate("selector", "reducible_loss", {})
    with pytest.raises(plugins.PluginError, match="prefer: must be long or short, not the text 'longest'"):
        plugins.validate("selector", "rows_by_length", {"prefer": "longest"})
    with pytest.raises(plugins.PluginError, match="share: must be less than or equal to 1"):
        plugins.validate("selector", "hard_batches", {"share": 1.5})
