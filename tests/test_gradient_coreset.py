"""Gradient coresets: by hand on a few rows, and the published variant against loops over single numbers."""

from collections import Counter

import pytest
import torch

from siftrl import plugins
from siftrl.selectors.gradient_coreset import GradientCoreset
from siftrl.signals import ValueGradient
from siftrl.types import Signals


class Rows:
    """`RowGradients` on one tensor, float [B, D]."""

    def __init__(self, values):
        self.values, self.size = values, values.shape[1]

    def total(self, weights, transform=None):
        return weights @ (self.values if transform is None else transform(self.values))

    def at(self, coordinates, rows):
        return self.values[rows][:, coordinates]


class Anything(dict):
    def __missing__(self, signal):
        return self["gradients"]


def batch(gradients, source=None, sizes=None, tokens=None, shares=None):
    """Signals of rows with these gradients (a list of lists, or float [B, D]). sizes: of sources; theirs here."""
    values = torch.as_tensor(gradients, dtype=torch.float32)
    source = None if source is None else list(source)
    sizes = sizes if sizes or source is None else dict(Counter(source))
    tokens = torch.ones(len(values), dtype=torch.int64) if tokens is None else torch.tensor(tokens)
    return Signals(
        num_tokens=tokens,
        source=source,
        source_sizes=sizes,
        shares=None if shares is None else torch.tensor(shares),
        tensors=Anything(gradients=Rows(values)),
    )


def select(selector, keep, *args, **kwargs):
    return selector.select(batch(*args, **kwargs), keep, torch.Generator().manual_seed(0))


LINE = [[0.0], [1.0], [4.0], [9.0]]
"""Medoids 1, 3, 2, 0 in this order; see tests/test_coreset.py."""


# ---- one source, by hand


def test_medoids_and_their_weights_by_hand():
    selector = GradientCoreset(history=False)
    selection = select(selector, 2, LINE)
    assert selection.indices.tolist() == [1, 3] and selection.reasons == ("medoid", "medoid")
    assert selection.weights.tolist() == [1.5, 0.5]  # clusters 0 1 2 and 3
    assert selection.scores.tolist() == [0, 3, 0, 1] and selection.probability.tolist() == [0, 1, 0, 1]
    figures = selector.metrics()
    assert figures["sources"] == 1 and figures["small_share"] == 0
    assert figures["mean_cluster"] == 2 and figures["largest_cluster"] == 3
    assert figures["coverage"] == pytest.approx((8 + 9 + 6 + 9) / (4 * 9))
    assert selector.weighted and not GradientCoreset(weights="none").weighted
    unweighted = select(GradientCoreset(history=False, weights="none"), 2, LINE)
    assert unweighted.indices.tolist() == [1, 3] and unweighted.weights.tolist() == [1, 1]


def test_weights_count_tokens():
    selection = select(GradientCoreset(history=False), 2, LINE, tokens=[10, 4, 6, 5])
    weights = torch.tensor([20 / 4, 5 / 5])  # tokens of the cluster over the medoid's own
    assert torch.allclose(selection.weights, weights * 2 / weights.sum())


def test_weights_count_rows_where_the_loss_does():
    tokens = [10, 4, 6, 5]
    selection = select(GradientCoreset(history=False), 2, LINE, tokens=tokens, shares=[1.0] * 4)
    assert selection.weights.tolist() == [1.5, 0.5]  # clusters of 3 rows and of 1
    # Two sources: each row of a large one stands for rows of its own, the only one of the small one for itself.
    gradients, source = [[0.0], [1.0], [50.0], [4.0], [9.0]], ["a", "a", "b", "a", "a"]
    selection = select(GradientCoreset(small=["b"], history=False), 3, gradients, source, tokens=[9, 5, 7, 5, 5])
    assert selection.weights.tolist() == pytest.approx([19 / 5 / 5.8 * 3, 1 / 5.8 * 3, 1 / 5.8 * 3])
    rows = select(GradientCoreset(small=["b"], history=False), 3, gradients, source, shares=[1.0] * 5)
    assert rows.indices.tolist() == [1, 2, 4] and rows.weights.tolist() == pytest.approx([1.8, 0.6, 0.6])


def test_all_rows_kept_in_the_batchs_order():
    for history in (True, False):
        selection = select(GradientCoreset(history=history), 4, LINE, tokens=[1, 2, 3, 4])
        assert selection.indices.tolist() == [0, 1, 2, 3] and selection.weights.tolist() == [1, 1, 1, 1]


def test_equal_rows():
    selector = GradientCoreset(history=False)
    selection = select(selector, 2, [[2.0, 1.0]] * 5)
    assert selection.indices.tolist() == [0, 1] and selection.scores.tolist() == [4, 1, 0, 0, 0]
    assert selector.metrics()["coverage"] == 1


def test_only_the_largest_mean_coordinates_are_compared():
    # Coordinate 0 has mean 0 and would pair 0 with 2, 1 with 3; coordinate 1 has mean 3 and pairs 0 with 1.
    gradients = [[50.0, 1.0], [-50.0, 1.0], [50.0, 5.0], [-50.0, 5.0]]
    assert select(GradientCoreset(history=False, coordinates=1), 2, gradients).indices.tolist() == [0, 2]
    assert select(GradientCoreset(history=False, coordinates=2), 2, gradients).indices.tolist() == [0, 1]


def test_history_divides_as_adam_does():
    selector = GradientCoreset(beta1=0.5, beta2=0.75, eps=1e-12)
    first = [[8.0, 1.0], [8.0, 1.0]]
    select(selector, 2, first)  # all kept: m = (4, 1/2), v = (16, 1/4), step 1
    state = selector.state_dict()
    assert state["m"].tolist() == [4, 0.5] and state["v"].tolist() == [16, 0.25] and state["step"] == 1
    # Step 2, m_hat = (m + g) / 2 / (3/4), v_hat = (3 v + g^2) / 4 / (7/16), row by row:
    gradients = [[8.0, 0.0], [8.0, 3.0], [9.0, 0.0], [9.0, 3.0]]
    steps = [
        [(m + g) / 2 / 0.75 / ((3 * v + g * g) / 4 / 0.4375) ** 0.5 for g, m, v in ((a, 4, 16), (b, 0.5, 0.25))]
        for a, b in gradients
    ]
    assert steps[1][1] - steps[0][1] > 5 * abs(steps[2][0] - steps[0][0])  # raw: 3 against 1
    selection = select(selector, 2, gradients)
    # Coordinate 1 tells the rows apart most: 0 with 2, 1 with 3.
    assert selection.indices.tolist() == [0, 1] and selection.scores.tolist() == [2, 2, 0, 0]
    # The history: the mean over rows 0 and 1 that were kept.
    state = selector.state_dict()
    assert state["m"].tolist() == pytest.approx([(4 + 8) / 2, (0.5 + 1.5) / 2])
    assert state["v"].tolist() == pytest.approx([(3 * 16 + 64) / 4, (3 * 0.25 + 4.5) / 4]) and state["step"] == 2


def test_the_first_step_compares_signs():
    # g / (|g| + eps): 0, 1, 2 are alike, whatever their lengths; raw gradients set 2 apart.
    gradients = [[1.0, 1.0], [2.0, 1.0], [90.0, 3.0], [1.0, -1.0]]
    assert select(GradientCoreset(), 2, gradients).scores.tolist() == [3, 0, 0, 1]
    assert select(GradientCoreset(history=False), 2, gradients).scores.tolist() == [3, 0, 1, 0]


def test_without_history_there_is_no_state():
    selector = GradientCoreset(history=False)
    select(selector, 2, LINE)
    assert selector.state_dict() == {"m": None, "v": None, "step": 0}


# ---- sources


def test_small_sources_are_kept_whole():
    gradients = [[0.0], [1.0], [50.0], [4.0], [60.0], [9.0]]
    source = ["a", "a", "b", "a", "c", "a"]
    selector = GradientCoreset(history=False, small=["b", "c"])
    selection = select(selector, 4, gradients, source, tokens=[1, 1, 7, 1, 9, 1])
    assert selection.indices.tolist() == [1, 2, 4, 5]
    assert selection.reasons == ("medoid", "small source", "small source", "medoid")
    weights = torch.tensor([3.0, 1.0, 1.0, 1.0])  # a row kept whole stands for itself only
    assert torch.allclose(selection.weights, weights * 4 / weights.sum())
    assert selection.scores.tolist() == [0, 3, 1, 0, 1, 1]
    figures = selector.metrics()
    assert figures["sources"] == 3 and figures["small_share"] == 0.5
    assert figures["mean_cluster"] == 2 and figures["largest_cluster"] == 3


def test_small_is_a_share_of_the_whole_data_set():
    source = ["a", "b", "a", "b", "a", "b"]  # alike here, but not in the data
    gradients = [[0.0], [50.0], [1.0], [60.0], [9.0], [70.0]]
    sizes = {"a": 900, "b": 99, "rare": 1}
    selection = select(GradientCoreset(history=False, small=0.1), 4, gradients, source, sizes)
    assert selection.indices.tolist() == [1, 2, 3, 5]
    assert selection.reasons == ("small source", "medoid", "small source", "small source")
    # a share of exactly `small` is not below it
    selection = select(GradientCoreset(history=False, small=0.099), 4, gradients, source, sizes)
    assert selection.reasons == ("medoid",) * 4
    assert select(GradientCoreset(history=False, small=0), 4, gradients, source, sizes).reasons == ("medoid",) * 4


def test_large_sources_share_what_is_left():
    source = ["a"] * 6 + ["b"] * 3 + ["c"]
    gradients = [[float(i)] for i in range(10)]
    selection = select(GradientCoreset(history=False, small=["c"]), 7, gradients, source)
    kept = Counter(source[i] for i in selection.indices.tolist())
    assert kept == {"a": 4, "b": 2, "c": 1}  # of 6 places 2/3 and 1/3
    # each source is weighed up to its own rows
    for name, rows in (("a", 6), ("b", 3), ("c", 1)):
        assert sum(selection.scores[i] for i in range(10) if source[i] == name) == rows


def test_sources_have_their_own_coordinates_and_distances():
    # "a" differs in coordinate 0 only, "b" in coordinate 1 only; over all rows coordinate 1 is the larger.
    a = [[1.0, 0.0], [1.1, 0.0], [3.0, 0.0], [3.1, 0.0]]
    b = [[0.0, 10.0], [0.0, 90.0], [0.0, 11.0], [0.0, 91.0]]
    selection = select(GradientCoreset(history=False, coordinates=1, small=[]), 4, a + b, ["a"] * 4 + ["b"] * 4)
    chosen = selection.indices.tolist()
    assert sum(i in (0, 1) for i in chosen) == 1 and sum(i in (2, 3) for i in chosen) == 1
    assert sum(i in (4, 6) for i in chosen) == 1 and sum(i in (5, 7) for i in chosen) == 1


def test_small_sources_that_exceed_the_budget_share_it():
    gradients = [[0.0], [1.0], [4.0], [9.0], [20.0], [30.0], [40.0]]
    source = ["a", "a", "a", "a", "b", "b", "big"]
    selection = select(GradientCoreset(history=False, small=["a", "b"]), 3, gradients, source)
    assert selection.indices.tolist() == [1, 3, 4] and selection.reasons == ("medoid",) * 3
    assert selection.scores.tolist() == [0, 3, 0, 1, 2, 0, 0]  # nothing of "big"
    exactly = select(GradientCoreset(history=False, small=["a", "b"]), 6, gradients, source)
    assert exactly.indices.tolist() == [0, 1, 2, 3, 4, 5] and exactly.reasons == ("small source",) * 6


def test_rows_without_a_source_are_a_source():
    gradients = [[0.0], [50.0], [1.0], [4.0], [9.0], [60.0]]
    source = ["a", None, "a", "a", "a", None]
    sizes = {"a": 1000, None: 10}
    selection = select(GradientCoreset(history=False), 4, gradients, source, sizes)
    assert selection.indices.tolist() == [1, 2, 4, 5]
    assert selection.reasons == ("small source", "medoid", "medoid", "small source")
    large = select(GradientCoreset(history=False, small=["a"]), 5, gradients, source, sizes)
    assert large.reasons.count("small source") == 4 and large.reasons.count("medoid") == 1


def test_without_a_source_column_no_source_is_small():
    assert select(GradientCoreset(history=False, small=0.9), 2, LINE).indices.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"'rare'.*no source; name their column in data\.source"):
        select(GradientCoreset(small=["rare"]), 2, LINE)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"no row has the source 'theoremq'; did you mean 'theoremqa'"):
        select(GradientCoreset(small=["theoremq"]), 2, LINE, ["gsm", "theoremqa", "gsm", None])


# ---- what it is for


def test_weights_bring_the_gradient_nearer_to_the_batchs():
    # 14 rows around one gradient, 2 around another: unweighted, the two medoids count alike.
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 40, generator=rng)[torch.tensor([0] * 14 + [1] * 2)]
    gradients = centres + 0.1 * torch.randn(16, 40, generator=rng)
    tokens = torch.randint(5, 50, (16,), generator=rng)

    def mean(rows, weights):
        weights = weights * tokens[rows]
        return (weights[:, None] * gradients[rows]).sum(0) / weights.sum()

    whole = mean(torch.arange(16), torch.ones(16))
    error = {}
    for weights in ("clusters", "none"):
        selection = select(GradientCoreset(weights=weights, history=False), 2, gradients, tokens=tokens.tolist())
        error[weights] = float((mean(selection.indices, selection.weights) - whole).norm())
    assert error["clusters"] < 0.2 * error["none"]


# ---- the published variant


def published(gradients, source, small, keep, coordinates, eps, history):
    """One step of CoLM, number by number. history: {"m", "v", "t"}, changed in place. Returns the kept rows."""
    b1, b2 = 0.9, 0.999
    num, size = len(gradients), len(gradients[0])
    t = history["t"] + 1
    steps = []
    for i in range(num):
        step = []
        for d in range(size):
            m = (b1 * history["m"][d] + (1 - b1) * gradients[i][d]) / (1 - b1**t)
            v = (b2 * history["v"][d] + (1 - b2) * gradients[i][d] ** 2) / (1 - b2**t)
            step.append(m / (v**0.5 + eps))
        steps.append(step)
    kept = [i for i in range(num) if source[i] in small]
    large = sorted({s for s in source if s not in small})
    num_large, left = num - len(kept), keep - len(kept)
    from_large = []
    for name in large:
        rows = [i for i in range(num) if source[i] == name]
        budget = left * len(rows) // num_large
        assert budget * num_large == left * len(rows)  # no rounding here
        mean = [abs(sum(steps[i][d] for i in rows) / len(rows)) for d in range(size)]
        largest = sorted(range(size), key=lambda d: -mean[d])[:coordinates]
        distance = [[sum(abs(steps[i][d] - steps[j][d]) for d in largest) for j in rows] for i in rows]
        furthest = max(max(row) for row in distance)
        medoids = []
        for _ in range(budget):
            reached = []
            for j in range(len(rows)):
                served = [max(furthest - distance[i][k] for k in [*medoids, j]) for i in range(len(rows))]
                reached.append(-1 if j in medoids else sum(served))
            medoids.append(reached.index(max(reached)))
        from_large += [rows[j] for j in medoids]
    for d in range(size):
        mean = sum(gradients[i][d] for i in from_large) / len(from_large)
        square = sum(gradients[i][d] ** 2 for i in from_large) / len(from_large)
        history["m"][d] = b1 * history["m"][d] + (1 - b1) * mean
        history["v"][d] = b2 * history["v"][d] + (1 - b2) * square
    history["t"] = t
    return sorted(kept + from_large)


def test_the_published_variant():
    rng = torch.Generator().manual_seed(3)
    # With a tiny eps the first step compares signs, which is full of ties.
    selector = GradientCoreset(paper=True, small=["rare", "odd"], coordinates=5, eps=0.3)
    source = ["math"] * 8 + ["rare", "odd"] + ["code"] * 4
    history = {"m": [0.0] * 12, "v": [0.0] * 12, "t": 0}
    for _ in range(4):
        order = torch.randperm(14, generator=rng).tolist()
        sources = [source[i] for i in order]
        gradients = torch.randn(14, 12, generator=rng) + torch.linspace(-1, 1, 12)
        selection = select(selector, 8, gradients, sources)
        expected = published(gradients.double().tolist(), sources, {"rare", "odd"}, 8, 5, 0.3, history)
        assert selection.indices.tolist() == expected
        assert selection.weights.tolist() == [1] * 8
        state = selector.state_dict()
        assert state["m"].tolist() == pytest.approx(history["m"], abs=1e-6)
        assert state["v"].tolist() == pytest.approx(history["v"], abs=1e-6) and state["step"] == history["t"]


def test_only_the_published_history_leaves_small_sources_out():
    gradients, source = [[2.0], [4.0], [100.0], [6.0]], ["a", "a", "rare", "a"]
    for paper, mean in ((True, 4.0), (False, 112 / 4)):
        selector = GradientCoreset(paper=paper, small=["rare"])
        select(selector, 4, gradients, source)
        assert selector.state_dict()["m"].tolist() == pytest.approx([0.1 * mean])
    selector = GradientCoreset(paper=True, small=["a", "rare"])
    select(selector, 2, gradients, source)
    assert selector.state_dict() == {"m": None, "v": None, "step": 0}  # nothing of large sources


def test_what_is_measured():
    assert GradientCoreset().needs == {ValueGradient()}
    assert GradientCoreset(estimate="spsa", perturbations=4, epsilon=0.01).needs == {
        ValueGradient("spsa", perturbations=4, epsilon=0.01)
    }
    assert GradientCoreset(paper=True).needs == {ValueGradient("spsa", perturbations=1, epsilon=1e-3, shared=True)}
    written_out = GradientCoreset(paper=True, estimate="spsa", shared=True, weights="none", perturbations=1)
    assert written_out.needs == GradientCoreset(paper=True).needs
    assert not written_out.weighted and not GradientCoreset(paper=True).weighted


@pytest.mark.parametrize(
    "options, message",
    [
        ({"paper": True, "estimate": "exact"}, "estimate: exact contradicts paper: true; write estimate: spsa"),
        ({"paper": True, "shared": False}, "shared: false contradicts paper: true; write shared: true"),
        ({"paper": True, "weights": "clusters"}, "weights: clusters contradicts paper: true; write weights: none"),
        ({"paper": True, "perturbations": 2}, "perturbations: 2 contradicts paper: true; write perturbations: 1"),
        ({"paper": True, "history": False}, "history: false contradicts paper: true; write history: true"),
        ({"perturbations": 2}, "perturbations is for spsa .* write estimate: spsa"),
        ({"estimate": "exact", "epsilon": 0.1}, "epsilon is for spsa .* write estimate: spsa"),
        ({"shared": True}, "shared is for spsa .* write estimate: spsa"),
        ({"beta2": 1.0}, "beta2 must be below 1"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradientCoreset(**options)
    with pytest.raises(plugins.PluginError, match=message):
        plugins.load("selector", "gradient_coreset", options)


def test_state_round_trip_goes_on_alike():
    rng = torch.Generator().manual_seed(5)
    batches = [torch.randn(12, 30, generator=rng) * torch.logspace(-3, 3, 30) for _ in range(4)]
    selector, fresh, resumed = GradientCoreset(), GradientCoreset(), GradientCoreset()
    for gradients in batches[:3]:
        select(selector, 5, gradients)
    resumed.load_state_dict(selector.state_dict())
    after, again = select(selector, 5, batches[3]), select(resumed, 5, batches[3])
    assert torch.equal(after.indices, again.indices) and torch.equal(after.weights, again.weights)
    assert all(torch.equal(selector.state_dict()[name], resumed.state_dict()[name]) for name in ("m", "v"))
    assert selector.state_dict()["step"] == resumed.state_dict()["step"] == 4
    assert not torch.equal(after.indices, select(fresh, 5, batches[3]).indices)  # the history matters here


def test_recipe_keys():
    options = plugins.validate("selector", "gradient_coreset", {"small": ["a", "b"], "coordinates": 64})
    assert options["small"] == ["a", "b"] and options["estimate"] is None
    assert plugins.load("selector", "gradient_coreset", options).small == ["a", "b"]
    assert plugins.load("selector", "gradient_coreset", {"small": 0.2}).small == 0.2
    with pytest.raises(plugins.PluginError):
        plugins.load("selector", "gradient_coreset", {"small": 1.5})


def test_noisy_gradients_are_not_weighed_by_default():
    assert GradientCoreset().weighted and not GradientCoreset(estimate="spsa").weighted
    assert (
        GradientCoreset(estimate="spsa", weights="clusters").weighted and not GradientCoreset(weights="none").weighted
    )
