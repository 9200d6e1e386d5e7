"""Utility and diversity: choices by hand in the plane, and the published variant against explicit logits."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from siftrl import plugins
from siftrl.logits import Projection, head_gram, nuclear_norms
from siftrl.selectors.utility_diversity import UtilityDiversity
from siftrl.signals import Embedding, NuclearNorm
from siftrl.types import Selection, Signals

PLANE = {"rows": 1, "columns": 2}
"""Embeddings of two numbers."""


def plane(utility: list[float], points: list[tuple[float, float]], **changes: Any) -> Signals:
    """Rows with embeddings in the plane, for a selector with PLANE's sizes."""
    num = len(utility)
    tensors = {NuclearNorm(): torch.tensor(utility), Embedding(**PLANE): torch.tensor(points)}
    fields: dict[str, Any] = {"num_tokens": torch.ones(num, dtype=torch.int64), "tensors": tensors}
    return Signals(**(fields | changes))


def select(selector: UtilityDiversity, signals: Signals, keep: int) -> Selection:
    return selector.select(signals, keep, torch.Generator())


# ---- our variant


def test_rows_are_picked_one_by_one() -> None:
    selector = UtilityDiversity(alpha=2.0, **PLANE)
    first = plane([1.0, 3.0, 2.0, 2.0], [(0, 0), (3, 4), (3, 5), (3, 0)])
    selection = select(selector, first, 2)
    # nothing to compare with: row 1 by its utility. Then 1 + 2 * 5, 2 + 2 * 1 and 2 + 2 * 4 for rows 0, 2 and 3,
    # and after row 0 was picked, row 3 is nearest to that: 2 + 2 * 3.
    assert selection.indices.tolist() == [1, 0]
    assert selection.scores.tolist() == pytest.approx([11.0, 3.0, 4.0, 8.0])
    assert selection.reasons == ("score", "score") and selection.weights.tolist() == [1, 1]
    assert selector.state_dict()["memory"].tolist() == [[3, 4], [0, 0]]
    figures = selector.metrics()
    assert figures["kept_utility"] == 2 and figures["mean_utility"] == 2
    assert figures["kept_diversity"] == pytest.approx(5 / 2)
    assert figures["mean_diversity"] == pytest.approx((5 + 0 + 1 + 3) / 4)
    assert figures["memory"] == 2 / 1024

    # Memory (3, 4) and (0, 0): mean distances 2.5, 2.5 + 5 and (sqrt 153 + 15) / 2
    second = plane([0.0, 0.0, 0.0], [(1.5, 2.0), (6.0, 8.0), (6.0, 8.5)])
    selection = select(selector, second, 3)
    far = (math.hypot(3, 4.5) + math.hypot(6, 8.5)) / 2
    assert selection.indices.tolist() == [2, 0, 1]  # row 1 is 0.5 from row 2
    assert selection.scores.tolist() == pytest.approx([2 * 2.5, 2 * 0.5, 2 * far])


def test_the_first_pick_has_the_published_score() -> None:
    generator = torch.Generator().manual_seed(0)
    points, remembered = torch.randn(9, 2, generator=generator), torch.randn(5, 2, generator=generator)
    utility = torch.rand(9, generator=generator)
    signals = plane(utility.tolist(), points.tolist())
    selector = UtilityDiversity(alpha=0.7, **PLANE)
    selector.load_state_dict({"memory": remembered})
    selection = select(selector, signals, 1)
    published = utility + 0.7 * (points[:, None] - remembered).square().sum(2).sqrt().mean(1)
    assert selection.indices.tolist() == [int(published.argmax())]
    assert selection.scores[selection.indices].tolist() == pytest.approx([float(published.max())])


@pytest.mark.parametrize("num_remembered", [0, 1024])
def test_of_two_equal_rows_one_is_kept(num_remembered: int) -> None:
    # Rows 0 and 3 are the same and of the highest utility; 4 is the same but for noise.
    points = [(10.0, 0.0), (0.0, 10.0), (0.0, -10.0), (10.0, 0.0), (10.01, 0.0), (-10.0, 0.0)]
    signals = plane([20.0, 16.0, 15.0, 20.0, 19.9, 14.0], points)
    selector = UtilityDiversity(alpha=1.0, **PLANE)
    selector.load_state_dict({"memory": torch.zeros(num_remembered, 2)})  # all rows are 10 from it
    assert sorted(select(selector, signals, 4).indices.tolist()) == [0, 1, 2, 5]
    published = torch.tensor([20.0, 16.0, 15.0, 20.0, 19.9, 14.0]) + (10 if num_remembered else 0)
    assert published.argsort(descending=True, stable=True)[:4].tolist() == [0, 3, 4, 1]  # without the distance to picks


def test_equal_rows_return_when_nothing_else_is_left() -> None:
    signals = plane([5.0, 5.0, 1.0], [(1.0, 0.0), (1.0, 0.0), (0.0, 0.0)])
    assert select(UtilityDiversity(alpha=10.0, **PLANE), signals, 3).indices.tolist() == [0, 2, 1]
    # Row 1 scores 5, row 2 scores 1 + alpha: a utility that no diversity makes up for.
    assert select(UtilityDiversity(alpha=3.0, **PLANE), signals, 2).indices.tolist() == [0, 1]


def test_equal_rows_are_equal_among_many() -> None:
    """Long embeddings, near each other, and many rows: distances then come from a matrix product, where float32 would
    lose them."""
    embeddings = 100 + 0.01 * torch.randn(60, 1024, generator=torch.Generator().manual_seed(0))
    tensors = {NuclearNorm(): torch.ones(120), Embedding(): torch.cat([embeddings, embeddings])}
    chosen = select(UtilityDiversity(), Signals(torch.ones(120, dtype=torch.int64), tensors=tensors), 60).indices
    assert sorted((chosen % 60).tolist()) == list(range(60))


def test_ties_go_to_the_first() -> None:
    square = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    assert select(UtilityDiversity(alpha=1.0, **PLANE), plane([1.0] * 4, square), 4).indices.tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("keep", [3, 5])
def test_all_are_kept_when_there_are_no_more(keep: int) -> None:
    signals = plane([1.0, 2.0, 3.0], [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)])
    assert sorted(select(UtilityDiversity(**PLANE), signals, keep).indices.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("tokens", ["completion", "all"])
def test_normalised_by_the_counted_tokens(tokens: Any) -> None:
    counts = {"completion": [4, 1, 9, 0], "all": [16, 1, 25, 4]}[tokens]
    given = {
        NuclearNorm(tokens): torch.tensor([8.0, 1.0, 0.0, 0.0]),
        Embedding(tokens, **PLANE): torch.tensor([[8.0, 0.0], [3.0, 0.0], [0.0, 15.0], [0.0, 0.0]]),
    }
    signals = Signals(num_tokens=torch.tensor([4, 1, 9, 0]), num_all_tokens=torch.tensor([16, 1, 25, 4]), tensors=given)
    selector = UtilityDiversity(tokens=tokens, normalise=True, **PLANE)
    selection = select(selector, signals, 4)
    expected = [[8 / math.sqrt(counts[0]), 0], [3, 0], [0, 15 / math.sqrt(counts[2])], [0, 0]]
    assert selection.scores.isfinite().all()
    torch.testing.assert_close(selector.state_dict()["memory"], torch.tensor(expected)[selection.indices])
    assert selector.metrics()["mean_utility"] == pytest.approx((8 / counts[0] + 1) / 4)


@pytest.mark.parametrize("memory, rows", [(0, []), (1, [3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])])
def test_memory_forgets_the_oldest(memory: int, rows: list[int]) -> None:
    selector = UtilityDiversity(alpha=0.0, memory=memory, **PLANE)
    for step in (0, 2):  # by utility: row 0 before 1, 2 before 3
        signals = plane([1.0, 2.0], [(step + 1.0, 0.0), (float(step), 0.0)])
        assert select(selector, signals, 2).indices.tolist() == [1, 0]
    assert selector.state_dict()["memory"].tolist() == [[row, 0] for row in rows]
    assert selector.metrics()["memory"] == (len(rows) / memory if memory else 0)
    select(selector, signals, 2)  # goes on, also without any memory


@pytest.mark.parametrize("paper", [False, True])
def test_goes_on_from_its_state(paper: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    selector = UtilityDiversity(memory=5, paper=paper)

    def batch() -> Signals:
        tensors: dict[Any, Tensor] = {}
        for signal in selector.needs:
            shape = (8, 1024) if isinstance(signal, Embedding) else (8,)
            tensors[signal] = torch.rand(shape, generator=generator)
        return Signals(num_tokens=torch.ones(8, dtype=torch.int64), tensors=tensors)

    for _ in range(2):
        select(selector, batch(), 3)
    file = io.BytesIO()
    torch.save(selector.state_dict(), file)
    file.seek(0)
    resumed = UtilityDiversity(memory=5, paper=paper)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    following = batch()
    ours, theirs = select(selector, following, 3), select(resumed, following, 3)
    assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.scores, theirs.scores)
    assert not torch.equal(select(UtilityDiversity(memory=5, paper=paper), following, 3).scores, ours.scores)


def test_what_is_measured() -> None:
    ours = {NuclearNorm("completion"), Embedding("completion", 8, 128, 512, 0, isometric=True)}
    published = {NuclearNorm("all"), Embedding("all", 8, 128, 512, 0, isometric=False)}
    assert UtilityDiversity().needs == ours
    assert UtilityDiversity(paper=True).needs == published
    assert UtilityDiversity(tokens="all", rows=2, seed=4).needs == {
        NuclearNorm("all"),
        Embedding("all", rows=2, seed=4),
    }


# ---- the published variant


def test_paper_is_the_published_method_on_explicit_logits() -> None:
    vocabulary, width, positions, rows, columns, memory = 600, 3, 64, 3, 5, 6
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary, width, generator=generator)
    projection = Projection(vocabulary, rows, columns, positions, seed=2, isometric=False)
    signs_1, index_1, signs_2, index_2 = projection.draws
    selector = UtilityDiversity(memory=memory, rows=rows, columns=columns, positions=positions, seed=2, paper=True)
    norm, embedding = NuclearNorm("all"), Embedding("all", rows, columns, positions, 2, isometric=False)
    queue: list[Tensor] = []
    decided_by_diversity = 0
    for _ in range(3):
        hidden = torch.randn(8, positions, width, generator=generator)
        counts = torch.randint(positions - 4, positions + 1, (8,), generator=generator)
        mask = torch.arange(positions) < counts[:, None]

        utility, embedded, diversity = [], [], []
        for row in range(8):
            logits = hidden[row, : counts[row]].double() @ weight.double().T
            utility.append(float(torch.linalg.svdvals(logits).sum()))
            padded = torch.zeros(positions, vocabulary, dtype=torch.float64)
            padded[: len(logits)] = logits
            right = torch.fft.fft(padded * signs_2, dim=1).real[:, index_2] * math.sqrt(vocabulary / columns)
            left = torch.fft.fft(right * signs_1[:, None], dim=0).real[index_1] * math.sqrt(positions / rows)
            embedded.append(left.flatten())
            distances = [float((left.flatten() - other).square().sum().sqrt()) for other in queue]
            diversity.append(sum(distances) / len(distances) if distances else 0.0)
        scores = [u + 2.5e-3 * d for u, d in zip(utility, diversity, strict=True)]
        best = sorted(range(8), key=lambda row: -scores[row])[:4]
        decided_by_diversity += set(best) != set(sorted(range(8), key=lambda row: -utility[row])[:4])
        queue = (queue + [embedded[row] for row in best])[-memory:]

        tensors = {
            norm: nuclear_norms(hidden, mask, head_gram(weight, None)),
            embedding: projection.embed(hidden, mask, projection.fold(weight, None)),
        }
        signals = Signals(num_tokens=torch.ones(8, dtype=torch.int64), num_all_tokens=counts, tensors=tensors)
        selection = select(selector, signals, 4)
        assert selection.indices.tolist() == best
        assert selection.scores.tolist() == pytest.approx(scores, rel=1e-5)
        remembered = selector.state_dict()["memory"].double()
        scale = float(torch.stack(queue).abs().max())
        torch.testing.assert_close(remembered, torch.stack(queue), rtol=0, atol=1e-6 * scale)
    assert decided_by_diversity


def test_paper_keeps_duplicates_as_published() -> None:
    tensors = {
        NuclearNorm("all"): torch.tensor([9.0, 9.0, 8.99]),
        Embedding("all", isometric=False, **PLANE): torch.tensor([[0.0, 0.0], [0.0, 0.0], [100.0, 0.0]]),
    }
    signals = Signals(num_tokens=torch.ones(3, dtype=torch.int64), tensors=tensors)
    assert select(UtilityDiversity(paper=True, **PLANE), signals, 2).indices.tolist() == [0, 1]


@pytest.mark.parametrize(
    "option, written",
    [
        ({"alpha": 3.0}, "alpha: 3.0"),
        ({"tokens": "completion"}, "completion"),
        ({"normalise": True}, "normalise: true"),
    ],
)
def test_paper_refuses_what_contradicts_it(option: dict[str, Any], written: str) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"{name}.*contradicts paper: true; leave {name} out, or write paper: false"):
        UtilityDiversity(paper=True, **option)
    with pytest.raises(ValueError, match=written):
        plugins.load("selector", "utility_diversity", {"paper": True, **option})


def test_paper_takes_what_it_fixes() -> None:
    selector = plugins.load("selector", "utility_diversity", {"paper": True, "alpha": 2.5e-3, "tokens": "all"})
    assert selector.alpha == 2.5e-3 and selector.needs == UtilityDiversity(paper=True).needs
    assert UtilityDiversity()._alpha == 10.0


def test_recipe_keys_are_checked() -> None:
    with pytest.raises(plugins.PluginError, match="memory|greater"):
        plugins.validate("selector", "utility_diversity", {"memory": -1})
    assert plugins.validate("selector", "utility_diversity", {"memory": 0})["memory"] == 0
    assert plugins.find("selector", "utility_diversity").role == "batch"
