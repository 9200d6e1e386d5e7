"""Figures of logits that are never built, against those of logits built explicitly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from siftrl import logits as logits_module
from siftrl.logits import (
    Projection,
    direct_nuclear_norms,
    head_gram,
    last_layer_gradient_norms,
    nuclear_norms,
)

COUNTS = (5, 1, 9, 0)
WIDE, TALL = 24, 6
"""Hidden widths above and below the largest count."""


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


def counted_mask(total: int = 50) -> Tensor:
    """bool [4, total] with COUNTS positions set at random, neither the first nor the last."""
    mask = torch.zeros(len(COUNTS), total, dtype=torch.bool)
    for row, count in enumerate(COUNTS):
        mask[row, torch.randperm(total - 2, generator=rng(row))[:count] + 1] = True
    return mask


def explicit(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Each row's Z, float64 [n, V]."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    return [row[kept] for row, kept in zip(logits, mask, strict=True)]


def sum_of_singular_values(logits: Tensor) -> float:
    return float(torch.linalg.svdvals(logits).sum())


def relative_error(found: Tensor, expected: float) -> float:
    return abs(float(found) - expected) / expected


# ---- nuclear norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("vocabulary", [40, 8])  # 8: fewer than positions, and than WIDE, where W^T W is singular
@pytest.mark.parametrize("width", [WIDE, TALL])
def test_nuclear_norms(width: int, vocabulary: int, with_bias: bool, dtype: torch.dtype) -> None:
    mask = counted_mask()
    hidden = normal(*mask.shape, width).to(dtype)
    weight, bias = normal(vocabulary, width, seed=1), normal(vocabulary, seed=2) if with_bias else None
    rows = explicit(hidden, mask, weight, bias)
    hidden[~mask] = torch.nan  # whatever padding holds
    expected = [sum_of_singular_values(row) for row in rows[:3]] + [0.0]
    gram = head_gram(weight, bias)
    assert gram.dtype == torch.float64 and gram.shape == (width + with_bias,) * 2
    found = nuclear_norms(hidden, mask, gram)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    padded = torch.full((*mask.shape, vocabulary), torch.nan, dtype=torch.float64)
    for row, (kept, values) in enumerate(zip(mask, rows, strict=True)):
        padded[row, kept] = values
    assert direct_nuclear_norms(padded, mask).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_nuclear_norm_by_hand() -> None:
    # W = [[3, 0], [0, 4]]: the rows (1, 0) and (0, 1) give Z = W^T, with singular values 3 and 4
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    mask = torch.tensor([[True, False, True]])
    hidden = torch.tensor([[[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]]])
    assert nuclear_norms(hidden, mask, head_gram(weight, None)).tolist() == pytest.approx([7.0])
    # one position: the norm of its logits, (3 + 2, 0 + 12) with a bias (2, 12)
    single = torch.tensor([[True, False, False]])
    gram = head_gram(weight, torch.tensor([2.0, 12.0]))
    assert nuclear_norms(hidden, single, gram).tolist() == pytest.approx([13.0])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_of_the_vocabulary_add_up(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, mask = normal(7, 5), normal(7, seed=1), counted_mask()
    logits, projection = normal(*mask.shape, 7, seed=2), Projection(7, rows=2, columns=3, positions=4)
    whole = torch.cat([weight, bias[:, None]], dim=1).double()
    folded = projection.fold(weight, bias)
    embedded, norms = projection.embed_logits(logits, mask), direct_nuclear_norms(logits, mask)
    monkeypatch.setattr(logits_module, "CHUNK", chunk)
    torch.testing.assert_close(head_gram(weight, bias), whole.T @ whole)
    torch.testing.assert_close(projection.fold(weight, bias), folded)
    torch.testing.assert_close(projection.embed_logits(logits, mask), embedded)
    torch.testing.assert_close(direct_nuclear_norms(logits, mask), norms)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("num, width", [(60, 90), (90, 60)])
def test_nuclear_norms_beside_one_dominating_direction(num: int, width: int, ratio: float, where: str) -> None:
    hidden, weight = normal(num, width).double(), normal(150, width, seed=1).double()
    loading, direction = normal(150, 1, seed=2).double(), normal(width, seed=3).double()
    if where == "hidden":
        hidden += ratio * loading[:num] * direction
    else:
        weight += ratio * loading * direction
    expected = sum_of_singular_values(hidden @ weight.T)
    mask = torch.ones(1, num, dtype=torch.bool)
    assert relative_error(nuclear_norms(hidden[None], mask, head_gram(weight, None)), expected) < 1e-6
    assert relative_error(direct_nuclear_norms((hidden @ weight.T)[None], mask), expected) < 1e-6


def test_nuclear_norm_of_equal_hidden_states() -> None:
    # Rank 1 and 400 positions: 399 squared singular values are rounding noise, whose roots add up to about 1e-6.
    hidden, weight = normal(1, 500).double().expand(400, 500), normal(600, 500, seed=1).double()
    expected = math.sqrt(400) * float((hidden[0] @ weight.T).norm())
    mask = torch.ones(1, 400, dtype=torch.bool)
    assert relative_error(nuclear_norms(hidden[None], mask, head_gram(weight, None)), expected) < 1e-7
    assert relative_error(direct_nuclear_norms((hidden @ weight.T)[None], mask), expected) < 1e-7


@pytest.mark.parametrize("width", [WIDE, TALL])
def test_doubtful_rows_take_singular_values_of_their_own_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, weight = counted_mask(), normal(40, width, seed=1)
    hidden, gram = normal(*mask.shape, width), head_gram(weight, None)
    usual = nuclear_norms(hidden, mask, gram)
    direct = direct_nuclear_norms(hidden @ weight.T, mask)
    factored: list[tuple[int, ...]] = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(logits_module, "DOUBTFUL", 0.0)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a: factored.append(tuple(a.shape)) or svdvals(a))
    torch.testing.assert_close(nuclear_norms(hidden, mask, gram), usual)
    assert factored == [(9, width)] * 3  # the row without counted positions is sure to be 0
    torch.testing.assert_close(direct_nuclear_norms(hidden @ weight.T, mask), direct)
    assert factored[3:] == [(5, 40), (1, 40), (9, 40)]


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    mask, weight = counted_mask(), normal(40, WIDE, seed=1)
    hidden, gram = normal(*mask.shape, WIDE), head_gram(weight, None)
    expected = nuclear_norms(hidden, mask, gram)
    hidden[2, mask[2]] = torch.inf
    for found in (nuclear_norms(hidden, mask, gram), direct_nuclear_norms(hidden @ weight.T, mask)):
        assert found.isnan().tolist() == [False, False, True, False]
        torch.testing.assert_close(found[:2], expected[:2])
    weight[3, 1] = torch.nan
    assert nuclear_norms(hidden, mask, head_gram(weight, None)).isnan().all()


# ---- projections


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("isometric", [False, True])
def test_projection_is_signs_fft_and_subsampling(isometric: bool, with_bias: bool, dtype: torch.dtype) -> None:
    rows, columns, positions, vocabulary = 3, 5, 16, 40
    projection = Projection(vocabulary, rows, columns, positions, seed=7, isometric=isometric)
    mask = counted_mask()
    hidden = normal(*mask.shape, WIDE).to(dtype)
    weight, bias = normal(vocabulary, WIDE, seed=1), normal(vocabulary, seed=2) if with_bias else None
    signs_1, index_1, signs_2, index_2 = projection.draws
    expected = []
    for logits in explicit(hidden, mask, weight, bias):
        padded = torch.zeros(positions, vocabulary, dtype=torch.float64)
        padded[: len(logits)] = logits
        along_vocabulary = torch.fft.fft(padded * signs_2).real[:, index_2]
        embedded = torch.fft.fft(along_vocabulary * signs_1[:, None], dim=0).real[index_1]
        published = embedded * math.sqrt(vocabulary / columns) * math.sqrt(positions / rows)
        ours = embedded * math.sqrt(2 / columns) * math.sqrt(2 / rows)
        expected.append((ours if isometric else published).flatten())
    hidden[~mask] = torch.nan
    found = projection.embed(hidden, mask, projection.fold(weight, bias))
    assert found.dtype == torch.float32 and found.shape == (4, rows * columns)
    scale = float(torch.stack(expected).abs().max())
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=0, atol=1e-6 * scale)
    logits = torch.full((*mask.shape, vocabulary), torch.nan)
    for row, (kept, values) in enumerate(zip(mask, explicit(hidden, mask, weight, bias), strict=True)):
        logits[row, kept] = values.float()
    found = projection.embed_logits(logits, mask)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=0, atol=1e-6 * scale)


def test_projection_takes_positions_modulo() -> None:
    projection = Projection(40, rows=2, columns=3, positions=4)
    logits = normal(1, 10, 40)
    summed = torch.zeros(1, 4, 40)
    for t in range(10):
        summed[0, t % 4] += logits[0, t]
    found = projection.embed_logits(logits, torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(found, projection.embed_logits(summed, torch.ones(1, 4, dtype=torch.bool)))


@pytest.mark.parametrize("isometric, ratio", [(True, 1.0), (False, 32 * 1001 / 4)])
def test_projection_keeps_the_norm_on_average(isometric: bool, ratio: float) -> None:
    logits, mask = normal(1, 20, 1001), torch.ones(1, 20, dtype=torch.bool)
    squares = [
        Projection(1001, positions=32, seed=seed, isometric=isometric).embed_logits(logits, mask).square().sum()
        for seed in range(400)
    ]
    counted = logits[0].square().sum(dim=1)
    counted[[0, 16]] *= 2  # cos(0) and cos(pi idx) are 1 or -1, where the mean of cos^2 is 1/2 elsewhere
    assert float(torch.stack(squares).mean()) == pytest.approx(ratio * float(counted.sum()), rel=0.02)


def test_projections_follow_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = Projection(1000, seed=3).draws
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, Projection(1000, seed=3).draws, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, Projection(1000, seed=4).draws, strict=True))
    signs_1, index_1, signs_2, index_2 = first
    assert signs_1.unique().tolist() == signs_2.unique().tolist() == [-1, 1]
    assert abs(float(signs_2.double().mean())) < 0.1
    assert len(signs_1) == 512 and len(index_1) == 8 and len(index_2) == 128 and int(index_2.max()) > 900


def test_cosines_are_exact_for_large_vocabularies() -> None:
    projection = Projection(152_000, columns=2)
    _, _, signs, index = projection.draws
    v = 151_999
    for column, frequency in enumerate(index.tolist()):
        expected = math.sqrt(2 / 2) * int(signs[v]) * math.cos(2 * math.pi * (v * frequency % 152_000) / 152_000)
        found = projection.right(v, v + 1, torch.device("cpu"))[0, column]
        assert float(found) == pytest.approx(expected, rel=1e-6)


# ---- the last layer's gradient


@pytest.mark.parametrize("with_bias", [False, True])
def test_last_layer_gradient_norms(with_bias: bool) -> None:
    mask, vocabulary = counted_mask(), 40
    head = nn.Linear(WIDE, vocabulary, bias=with_bias)
    hidden = normal(*mask.shape, WIDE)
    labels = torch.randint(vocabulary, mask.shape, generator=rng(4)).masked_fill(~mask, -100)
    expected = []
    for states, targets in zip(hidden[:3], labels, strict=False):
        head.zero_grad()
        nn.functional.cross_entropy(head(states), targets, ignore_index=-100).backward()
        expected.append(float(head.weight.grad.norm()))
    hidden[~mask] = torch.nan
    found = last_layer_gradient_norms(hidden, head, labels, mask.sum(dim=1))
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == pytest.approx([*expected, 0.0], rel=1e-5)
    halved = last_layer_gradient_norms(hidden, head, labels, 2 * mask.sum(dim=1))
    assert halved.tolist() == pytest.approx([value / 2 for value in expected] + [0.0], rel=1e-5)


def test_last_layer_gradient_norm_by_hand() -> None:
    # two classes, zero weights: p = (1/2, 1/2), so e = (-1/2, 1/2) or (1/2, -1/2), and h = (3, 4) for both tokens
    head = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(head.weight)
    hidden = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]] * 2)
    labels = torch.tensor([[0, 0], [0, 1]])  # the same gradient twice: |e| |h| = 5 / sqrt 2; and opposite ones
    found = last_layer_gradient_norms(hidden, head, labels, torch.tensor([2, 2]))
    assert found.tolist() == pytest.approx([5 / math.sqrt(2), 0.0])


def test_last_layer_gradient_norms_in_bfloat16() -> None:
    mask = counted_mask()
    head = nn.Linear(WIDE, 40, bias=False).bfloat16()
    hidden = normal(*mask.shape, WIDE).bfloat16()
    labels = torch.randint(40, mask.shape, generator=rng(4)).masked_fill(~mask, -100)
    errors = [head(states[kept]).float().softmax(-1) for states, kept in zip(hidden, mask, strict=True)]
    expected = []
    for states, kept, targets, error in zip(hidden, mask, labels, errors, strict=True):
        error = error.detach() - nn.functional.one_hot(targets[kept], 40)
        expected.append(float((error.T @ states[kept].float()).norm()) / max(int(kept.sum()), 1))
    found = last_layer_gradient_norms(hidden, head, labels, mask.sum(dim=1))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


# ---- precision


def test_autocast_and_fast_products_change_nothing() -> None:
    mask, vocabulary = counted_mask(), 40
    hidden, weight, bias = normal(*mask.shape, WIDE), normal(vocabulary, WIDE, seed=1), normal(vocabulary, seed=2)
    logits = hidden @ weight.T + bias
    labels = torch.randint(vocabulary, mask.shape, generator=rng(4)).masked_fill(~mask, -100)
    projection = Projection(vocabulary)

    def everything() -> list[Tensor]:
        gram, folded = head_gram(weight, bias), projection.fold(weight, bias)
        return [
            gram,
            folded,
            nuclear_norms(hidden, mask, gram),
            projection.embed(hidden, mask, folded),
            projection.embed_logits(logits, mask),
            last_layer_gradient_norms(hidden, lambda h: h[:, :1] * bias, labels, mask.sum(dim=1)),
        ]

    expected = everything()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            assert (hidden[0] @ weight.T).dtype == torch.bfloat16
            found = everything()
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    for ours, reference in zip(found, expected, strict=True):
        assert torch.equal(ours, reference)
