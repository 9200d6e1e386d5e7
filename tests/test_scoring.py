"""Signals of padded and chunked rows, against those of each row alone from the model's own logits and autograd."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import sft_args, worded_sums
from families import FAMILIES, LAYOUTS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoConfig
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from siftrl import distributed, logits
from siftrl.gradients import Factored, Perturbed, RowGradients, direction
from siftrl.logits import Projection
from siftrl.parts import find_parts
from siftrl.scoring import Rows, ScoredBatch, Scorer
from siftrl.signals import (
    Embedding,
    Entropy,
    GradientNorm,
    Loss,
    NuclearNorm,
    ReferenceLoss,
    Signal,
    ValueGradient,
)
from siftrl.trainers.sft import SFTTrainer
from siftrl.types import BatchSelector

EVERY = FAMILIES | LAYOUTS
LENGTHS = (7, 12, 5, 9, 3)
"""In micro-batches of two every row but the longest is padded, or alone with the shortest."""
SMALL = Embedding(rows=4, columns=8, positions=6)
CHEAP = (Loss(), Entropy(), NuclearNorm(), NuclearNorm("all"), SMALL, ValueGradient())
SPSA = ValueGradient("spsa", perturbations=2, epsilon=0.05)


def make_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Rows:
    """Rows of tokens 1 to 49; the first third bears no loss, nor does one token in the middle of the longer ones."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 50, (length,), generator=rng)
        labels = ids.clone()
        labels[: length // 3] = -100
        if length > 6:
            labels[length // 2] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


ROWS = make_rows()


def scorer_of(model: Any, *needs: Signal, padded_to: int | None = None, **options: Any) -> Scorer:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    return Scorer(
        model,
        needs,
        DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=padded_to),
        **{
            "micro_batch_size": 2,
            "device": torch.device("cpu"),
            "precision": contextlib.nullcontext,
        }
        | options,
    )


def score(model: Any, *needs: Signal, rows: Rows = ROWS, seed: int = 3, **options: Any) -> dict[Signal, Any]:
    signals, finite = scorer_of(model, *needs, **options).score(rows, range(len(rows)), seed)
    assert finite.tolist() == [True] * len(rows)
    return signals


def dense(gradients: RowGradients) -> Tensor:
    """float32 [B, D]"""
    return gradients.total(torch.eye(len(gradients)))


# ---- one row alone


def logits_alone(model: Any, row: dict[str, Any]) -> Tensor:
    """[T, V], from one row without padding."""
    return model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]


def loss_alone(model: Any, row: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(logits_alone(model, row)[:-1].float(), torch.tensor(row["labels"][1:]))


def counted(row: dict[str, Any]) -> Tensor:
    """bool [T]: the positions that predict a token that bears loss."""
    return torch.tensor([*(label != -100 for label in row["labels"][1:]), False])


def matrix(module: Any) -> Tensor:
    """The module's matrix, [outputs, inputs]."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def gradients_alone(model: Any, rows: Rows = ROWS) -> Tensor:
    """float32 [B, D]: autograd's gradients of the V projection, or of its LoRA matrices one after the other."""
    sites, gradients = find_parts(model).sites, []
    for row in rows:
        found = torch.autograd.grad(loss_alone(model, row), [site.module.weight for site in sites])
        parts = []
        for site, gradient in zip(sites, found, strict=True):
            gradient = gradient.T if isinstance(site.module, Conv1D) else gradient
            parts.append((gradient if site.columns is None else gradient[site.columns]).flatten())
        gradients.append(torch.cat(parts))
        assert gradients[-1].abs().max() > 1e-3
    return torch.stack(gradients)


def head_gradient_norms_alone(model: Any) -> Tensor:
    """float32 [B], with a head of its own, so that tied embeddings do not add to its gradient."""
    parts, norms = find_parts(model, need_value=False), []
    bias = getattr(parts.head, "bias", None)
    for row in ROWS:
        weight = parts.head.weight.detach().clone().requires_grad_()
        states = parts.decoder(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).last_hidden_state[0]
        logits = parts.logit_scale * nn.functional.linear(states.detach(), weight, bias)
        torch.testing.assert_close(logits, logits_alone(model, row), rtol=1e-4, atol=1e-4)
        nn.functional.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:])).backward()
        assert weight.grad is not None
        norms.append(weight.grad.norm())
    return torch.stack(norms)


@torch.no_grad()
def signals_alone(model: Any) -> dict[Signal, Tensor]:
    """What CHEAP asks for."""
    found: dict[Signal, list[Tensor]] = {signal: [] for signal in CHEAP[:-1]}
    projection = Projection(64, SMALL.rows, SMALL.columns, SMALL.positions)
    for row in ROWS:
        logits = logits_alone(model, row)
        completion = logits[counted(row)]
        log_p = completion.log_softmax(-1)
        found[Loss()].append(loss_alone(model, row))
        found[Entropy()].append(-(log_p.exp() * log_p).sum(-1).mean())
        found[NuclearNorm()].append(torch.linalg.svdvals(completion.double()).sum().float())
        found[NuclearNorm("all")].append(torch.linalg.svdvals(logits.double()).sum().float())
        found[SMALL].append(projection.embed_logits(logits[None], counted(row)[None])[0])
    with torch.enable_grad():
        gradients = gradients_alone(model)
    return {signal: torch.stack(values) for signal, values in found.items()} | {ValueGradient(): gradients}


def assert_near(found: dict[Signal, Any], expected: dict[Signal, Any], tolerance: float = 1e-5) -> None:
    """Every row's values, relative to the largest of the row."""
    assert found.keys() == expected.keys()
    for signal, values in found.items():
        a, b = (dense(v) if isinstance(v, RowGradients) else v for v in (values, expected[signal]))
        assert a.shape == b.shape and a.dtype == torch.float32, signal
        a, b = a.view(len(a), -1), b.view(len(b), -1)
        errors = (a - b).abs().amax(1) / b.abs().amax(1)
        assert errors.max() < tolerance, (signal, errors)


@pytest.mark.parametrize("family", EVERY)
def test_signals_are_those_of_each_row_alone(family: str) -> None:
    model = EVERY[family]()
    expected = signals_alone(model)
    assert len(set(expected[Loss()].tolist())) == len(ROWS)
    if family == "gemma2":  # its logits are not linear in the hidden states
        assert_near(score(model, *CHEAP), expected)
        return
    expected[GradientNorm()] = head_gradient_norms_alone(model)
    assert_near(score(model, *CHEAP, GradientNorm()), expected)
    hidden = (NuclearNorm(), NuclearNorm("all"), SMALL, GradientNorm())  # these alone take another way
    assert_near(score(model, *hidden), {signal: expected[signal] for signal in hidden})


def test_gradient_norm_refuses_logits_that_are_not_linear() -> None:
    with pytest.raises(ValueError, match="gradient_norm needs logits that are linear.*choose another batch_selector"):
        score(FAMILIES["gemma2"](), GradientNorm())


def with_lora(family: str, targets: list[str], rank: int = 2, **options: Any) -> Any:
    """An adapter with a B that is not zero, and dropout."""
    model = get_peft_model(
        FAMILIES[family](),
        LoraConfig(r=rank, lora_alpha=8, target_modules=targets, lora_dropout=0.5, task_type="CAUSAL_LM", **options),
    )
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    return model


LORAS: dict[str, Callable[[], Any]] = {
    "llama": lambda: with_lora("llama", ["q_proj", "v_proj"]),
    "phi3": lambda: with_lora("phi3", ["qkv_proj"]),
    "gpt2": lambda: with_lora("gpt2", ["c_attn"], fan_in_fan_out=True),
}


@pytest.mark.parametrize("family", LORAS)
def test_lora_gradients_are_those_of_a_then_b(family: str) -> None:
    model = LORAS[family]().eval()
    a, b = find_parts(model).sites
    expected = signals_alone(model)
    found = score(model.train(), *CHEAP)
    size_b = 2 * (len(b.columns) if b.columns is not None else b.module.out_features)
    assert dense(found[ValueGradient()]).shape == (5, 2 * a.module.in_features + size_b)
    assert_near(found, expected)


def test_v_may_be_clamped_in_place() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = OlmoConfig(**sizes, num_attention_heads=4, clip_qkv=0.5, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    expected = gradients_alone(model)
    assert_near(score(model, ValueGradient()), {ValueGradient(): expected})
    config.clip_qkv = 100.0
    assert not torch.allclose(gradients_alone(model), expected, rtol=0.01)  # so some of V was beyond 0.5


def test_rows_without_labels_are_all_loss() -> None:
    model = FAMILIES["llama"]()
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    whole = [row | {"labels": row["input_ids"]} for row in rows]
    found = score(model, Loss(), rows=rows)[Loss()]
    torch.testing.assert_close(found, torch.stack([loss_alone(model, row) for row in whole]).detach())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_without_loss_tokens_are_zero(family: str) -> None:
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in ROWS[:3]] + ROWS[3:]
    needs = (*CHEAP, SPSA) if family == "gemma2" else (*CHEAP, SPSA, GradientNorm())
    found = score(FAMILIES[family](), *needs, rows=rows)
    for signal, values in found.items():
        values = dense(values) if isinstance(values, RowGradients) else values
        is_zero = [not values[row].any() for row in range(5)]
        assert is_zero == ([False] * 5 if signal == NuclearNorm("all") else [True] * 3 + [False] * 2), signal


# ---- SPSA


MOVED = ("llama", "phi3", "gpt2", "gpt_neox", "falcon", "gemma2", "gemma3", "mixtral", "opt", "bloom", "deepseek_v3")
"""V alone, V in one matrix with others, transposed, with a soft cap, with experts, in latent attention."""


def moved_slopes(model: Any, row: dict[str, Any], drawn: Perturbed, epsilon: float) -> list[float]:
    """(loss(W + eps z) - loss(W - eps z)) / 2 eps, with the weights themselves changed."""
    sites = find_parts(model).sites
    slopes = []
    for seed in drawn.seeds:
        losses = []
        for sign in (1, -1):
            before = [site.module.weight.detach().clone() for site in sites]
            for site, z in zip(sites, direction(seed, drawn.shapes), strict=True):
                weight = matrix(site.module).data
                weight.index_add_(0, torch.arange(len(z)) if site.columns is None else site.columns, sign * epsilon * z)
            with torch.no_grad():
                losses.append(float(loss_alone(model, row)))
            for site, weight in zip(sites, before, strict=True):
                site.module.weight.data.copy_(weight)
        slopes.append((losses[0] - losses[1]) / (2 * epsilon))
    return slopes


@pytest.mark.parametrize(
    "family, shared",
    [*((family, False) for family in (*MOVED, "lora llama", "lora phi3")), ("llama", True), ("lora phi3", True)],
)
def test_slopes_are_those_of_moved_weights(family: str, shared: bool) -> None:
    model = LORAS[family[5:]]().eval() if family.startswith("lora") else EVERY[family]()
    signal = ValueGradient("spsa", perturbations=2, epsilon=0.05, shared=shared)
    found = score(model, signal)[signal].mine
    for row, gradient in found.items():
        expected = moved_slopes(model, ROWS[row], gradient, 0.05)
        assert max(map(abs, expected)) > 1e-2
        assert gradient.slopes.tolist() == pytest.approx(expected, abs=2e-4)


def test_directions_are_one_a_row_and_perturbation_unless_shared() -> None:
    def seeds(shared: bool, seed: int) -> list[tuple[int, ...]]:
        signal = ValueGradient("spsa", perturbations=2, shared=shared)
        found = score(FAMILIES["llama"](), signal, seed=seed)[signal].mine
        return [found[row].seeds for row in range(5)]

    own, again, other = seeds(False, 3), seeds(False, 3), seeds(False, 4)
    assert own == again and len({seed for row in own + other for seed in row}) == 20
    one, later = seeds(True, 3), seeds(True, 4)
    assert one == [one[0]] * 5 and len({*one[0], *later[0]}) == 4


def test_slopes_are_the_gradient_along_the_directions() -> None:
    model, signal = FAMILIES["llama"](), ValueGradient("spsa", perturbations=4, epsilon=1e-3)
    found = score(model, signal)[signal].mine
    for row, gradient in enumerate(gradients_alone(model)):
        z = torch.stack([direction(seed, found[row].shapes)[0].flatten() for seed in found[row].seeds])
        torch.testing.assert_close(found[row].slopes, z @ gradient, rtol=1e-2, atol=1e-2)


def test_many_perturbations_are_near_the_gradient() -> None:
    model = with_lora("llama", ["v_proj"], rank=1).eval()  # D = 32 + 16
    signal = ValueGradient("spsa", perturbations=200, epsilon=1e-2)
    rows = ROWS[:2]
    estimate = dense(score(model, signal, rows=rows)[signal])
    for found, exact in zip(estimate, gradients_alone(model, rows), strict=True):
        # over draws of n directions: cosine near sqrt(n / (n + D + 1)) = 0.90, projection 1 +- sqrt(2 / n) = 0.1
        assert nn.functional.cosine_similarity(found, exact, 0) > 0.84
        assert float(found @ exact / exact.square().sum()) == pytest.approx(1, abs=0.25)


# ---- chunks, padding, ranks


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_chunks_and_padding_do_not_show(family: str) -> None:
    needs = (*CHEAP, SPSA) if family == "gemma2" else (*CHEAP, SPSA, GradientNorm())
    expected = score(EVERY[family](), *needs, micro_batch_size=1)
    for options in ({"micro_batch_size": 3}, {"micro_batch_size": 16}, {"micro_batch_size": 2, "padded_to": 32}):
        # a slope is a difference of losses over 2 eps = 0.1
        assert_near(score(EVERY[family](), *needs, **options), expected, tolerance=2e-4)


def test_chunks_hold_rows_of_like_length_longest_first() -> None:
    chunks = []

    @dataclass(frozen=True)
    class Chunk(Signal):
        def of(self, batch: ScoredBatch) -> Tensor:
            chunks.append((list(batch.rows), list(batch.ids), tuple(batch.labels.shape)))
            return batch.num_tokens

    scorer_of(FAMILIES["llama"](), Chunk()).score(ROWS, [70, 10, 50, 30, 90], 3)
    assert chunks == [([1, 3], [10, 30], (2, 12)), ([0, 2], [70, 50], (2, 7)), ([4], [90], (1, 3))]


def test_factors_hold_real_tokens_only() -> None:
    found = score(FAMILIES["llama"](), ValueGradient(), micro_batch_size=5)[ValueGradient()].mine
    # V has 16 x 32 = 512 numbers, a token's factors 48: beyond 10 tokens the matrix is smaller
    kept = {row: gradient for row, gradient in found.items() if isinstance(gradient, Factored)}
    assert {row: len(gradient.pairs[0][0]) for row, gradient in kept.items()} == {0: 7, 2: 5, 3: 9, 4: 3}


def test_the_rows_order_does_not_show() -> None:
    needs = (*CHEAP, GradientNorm())
    order = torch.tensor([4, 2, 0, 3, 1])
    expected = {signal: values[order] for signal, values in score(FAMILIES["llama"](), *needs).items()}
    found = score(FAMILIES["llama"](), *needs, rows=[ROWS[row] for row in order])
    assert_near(found, expected)


def test_ranks_share_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = (*CHEAP, SPSA, GradientNorm())
    alone = score(FAMILIES["llama"](), *needs)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_", lambda tensors: None)
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item])
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        scorer = scorer_of(FAMILIES["llama"](), *needs)
        assert scorer.parts.linear_head  # the probe is over
        with calls_of(scorer.model) as calls:
            ranks.append(scorer.score(ROWS, range(5), 3)[0])
        assert calls["decoder"] == 2 * 5  # two chunks each, though there are three
    for signal, values in alone.items():
        first, second = (found[signal] for found in ranks)
        if isinstance(values, RowGradients):
            assert sorted([*first.mine, *second.mine]) == list(range(5)) and len(first.mine) == 3
            first, second, values = dense(first), dense(second), dense(values)
        assert torch.equal(first + second, values), signal  # the other rank's rows are zeros


# ---- nothing is left behind


def state_of(model: nn.Module) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "modules": [id(module) for module in modules],
        "training": [module.training for module in modules],
        "hooks": [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "weights": [(id(parameter), float(parameter.double().sum())) for parameter in model.parameters()],
        "gradients": [parameter.grad is not None for parameter in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def trained_model() -> Any:
    """In training mode with dropout in attention, but for one module; one weight of the last block is frozen."""
    model = FAMILIES["llama"]().train()
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    model.model.layers[1].mlp.eval()
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    return model


EVERYTHING = (*CHEAP, GradientNorm(), SPSA)


def test_scoring_leaves_no_trace_and_no_dropout() -> None:
    expected = score(FAMILIES["llama"](), *EVERYTHING)
    model = trained_model()
    scorer = scorer_of(model, *EVERYTHING)
    before = state_of(model)
    assert_near(scorer.score(ROWS, range(5), 3)[0], expected, tolerance=1e-6)
    assert state_of(model) == before
    once, twice = logits_alone(model, ROWS[0]), logits_alone(model, ROWS[0])
    assert once.requires_grad and not torch.equal(once, twice)  # dropout is on again


@dataclass(frozen=True)
class Broken(Signal):
    """Asks for the losses, then fails."""

    takes_output: ClassVar[bool] = True

    def of(self, batch: ScoredBatch) -> Any:
        assert batch.losses.requires_grad
        raise RuntimeError("it broke")


@pytest.mark.parametrize("failing_pass", [None, 1, 2, 4])
def test_failures_leave_no_trace(failing_pass: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model()
    needs = (Broken(), ValueGradient()) if failing_pass is None else EVERYTHING
    scorer = scorer_of(model, *needs)
    norm, calls = model.model.norm, Counter[str]()
    forward = norm.forward

    def failing(hidden: Tensor) -> Tensor:
        calls["norm"] += 1
        if calls["norm"] == failing_pass:
            raise RuntimeError("it broke")
        return forward(hidden)

    assert scorer.parts.block is model.model.layers[1]  # the probe is over
    monkeypatch.setattr(norm, "forward", failing)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="it broke"):
        scorer.score(ROWS, range(5), 3)
    assert state_of(model) == before
    assert failing_pass is None or calls["norm"] == failing_pass


# ---- nothing is computed that is not asked for


@contextlib.contextmanager
def calls_of(model: Any) -> Iterator[Counter[str]]:
    """How often the model, its decoder, its first and last block and its head are called."""
    calls: Counter[str] = Counter()
    watched = {
        "model": model,
        "decoder": model.model,
        "first": model.model.layers[0],
        "last": model.model.layers[-1],
        "head": model.lm_head,
    }

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any, **__: Any) -> None:
            calls[name] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in watched.items()]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "family, needs, model_calls, decoder_calls, first_block_calls",
    [
        ("llama", (NuclearNorm(),), 0, 1, 1),
        ("llama", (SMALL, NuclearNorm(), NuclearNorm("all")), 0, 1, 1),
        ("llama", (Loss(),), 1, 1, 1),
        ("llama", CHEAP, 1, 1, 1),
        ("llama", (ValueGradient("spsa", perturbations=3),), 7, 7, 1),
        ("llama", (*CHEAP, SPSA), 5, 5, 1),
        ("llama", (ValueGradient(), ValueGradient(epsilon=1e-2)), 1, 1, 1),
        ("gemma2", (NuclearNorm(), SMALL), 1, 1, 1),
        ("gemma2", (Loss(), NuclearNorm(), SMALL), 2, 2, 2),  # these logits are made apart
    ],
)
def test_passes_of_a_chunk(
    family: str, needs: tuple[Signal, ...], model_calls: int, decoder_calls: int, first_block_calls: int
) -> None:
    scorer = scorer_of(FAMILIES[family](), *needs)
    assert len(scorer.parts.sites) == bool(scorer.gradients)  # the probe is over
    with calls_of(scorer.model) as calls:
        scorer.score(ROWS, range(5), 3)
    assert (calls["model"], calls["decoder"]) == (3 * model_calls, 3 * decoder_calls)
    assert (calls["first"], calls["last"]) == (3 * first_block_calls, 3 * decoder_calls)
    assert calls["head"] == (3 if family == "gemma2" else 0)  # the fused head reads its weight alone


def test_hidden_states_alone_take_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the fused head was run")

    scorer = scorer_of(FAMILIES["llama"](), NuclearNorm(), SMALL)
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction.apply", refuse)
    scorer.score(ROWS, range(5), 3)
    with pytest.raises(AssertionError, match="the fused head was run"):
        scorer_of(FAMILIES["llama"](), NuclearNorm(), Loss()).score(ROWS, range(5), 3)


@pytest.mark.parametrize("is_trained", [False, True])
def test_what_follows_from_the_head_is_computed_when_it_changes(
    is_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    gram, fold = logits.head_gram, Projection.fold

    def counting_gram(*args: Any) -> Tensor:
        calls["gram"] += 1
        return gram(*args)

    def counting_fold(*args: Any) -> Tensor:
        calls["fold"] += 1
        return fold(*args)

    monkeypatch.setattr(logits, "head_gram", counting_gram)
    monkeypatch.setattr(Projection, "fold", counting_fold)
    model = FAMILIES["llama"]()
    model.lm_head.requires_grad_(is_trained)
    needs = (NuclearNorm(), NuclearNorm("all"), SMALL)
    scorer = scorer_of(model, *needs)
    first, _ = scorer.score(ROWS, range(5), 3)
    assert calls == {"gram": 1, "fold": 1}
    if is_trained:
        model.lm_head.weight.data *= 2
    second, _ = scorer.score(ROWS, range(5), 4)
    assert calls == ({"gram": 2, "fold": 2} if is_trained else {"gram": 1, "fold": 1})
    factor = 2 if is_trained else 1
    assert_near(second, {signal: factor * values for signal, values in first.items()})


@pytest.mark.parametrize("other, has_graph", [(Loss(), False), (SPSA, False), (ValueGradient(), True)])
def test_a_graph_is_kept_for_exact_gradients_only(other: Signal, has_graph: bool) -> None:
    @dataclass(frozen=True)
    class Graph(Signal):
        takes_output: ClassVar[bool] = True

        def of(self, batch: ScoredBatch) -> Tensor:
            assert batch.output.log_probs.requires_grad == batch.losses.requires_grad == has_graph
            return batch.losses.detach()

    score(FAMILIES["llama"](), Graph(), other)


# ---- precision and what trainers do to models


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def cosines(a: RowGradients, b: RowGradients) -> Tensor:
    return nn.functional.cosine_similarity(dense(a), dense(b))


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "lora llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the weights
def test_bfloat16_is_near_float32(family: str, dtype: torch.dtype) -> None:
    def build() -> Any:
        return LORAS["llama"]() if family == "lora llama" else FAMILIES[family]()

    needs = (*CHEAP, GradientNorm())
    exact = score(build(), *needs)
    model = build().to(dtype)
    seen: set[torch.dtype] = set()
    scorer = scorer_of(model, *needs, precision=bfloat16)
    scorer.parts.block.register_forward_hook(
        lambda *_: seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
    )
    found, finite = scorer.score(ROWS, range(5), 3)
    assert seen == {torch.bfloat16} and finite.all()
    assert cosines(found.pop(ValueGradient()), exact.pop(ValueGradient())).min() > 0.995
    assert not torch.equal(found[Loss()], exact[Loss()])
    assert_near(found, exact, tolerance=0.04)


@pytest.mark.parametrize("needs", [(NuclearNorm(),), (GradientNorm(),), (Loss(),), (ValueGradient(),)])
def test_every_signal_is_computed_in_the_precision_of_training(needs: tuple[Signal, ...]) -> None:
    model, seen = FAMILIES["llama"](), []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    scorer = scorer_of(model, *needs, precision=bfloat16)
    assert scorer.parts.linear_head
    seen.clear()
    scorer.score(ROWS, range(5), 3)
    assert seen == [torch.bfloat16] * 3


def test_a_norm_in_float32_goes_into_a_head_in_bfloat16() -> None:
    """On a GPU autocast computes LayerNorm in float32, whatever its weights are."""

    def widen(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.float() if torch.is_autocast_enabled("cpu") else output

    model = FAMILIES["llama"]().bfloat16()
    needs = (Loss(), NuclearNorm(), SMALL, GradientNorm())
    expected = score(model, *needs, precision=bfloat16)
    model.model.norm.register_forward_hook(widen)
    assert_near(score(model, *needs, precision=bfloat16), expected, tolerance=0.01)


class NormSelector(BatchSelector):
    """Needs hidden states only."""

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({NuclearNorm()})


def test_the_trainer_scores_in_its_own_precision(tiny_model: str, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    selector = NormSelector()
    trainer = SFTTrainer(
        tiny_model, sft_args(tmp_path, bf16=True), train_dataset=worded_sums(), batch_selector=selector
    )
    assert trainer.row_selection is not None
    scorer = trainer.row_selection.scorer
    measure = scorer.score

    def watched(*args: Any) -> None:
        module = scorer.parts.block.mlp.down_proj
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        found = measure(*args)
        handle.remove()
        raise InterruptedError(found)

    scorer.score = watched  # type: ignore[assignment, method-assign]
    with pytest.raises(InterruptedError):
        trainer.train()
    assert set(seen) == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing() -> None:
    expected = score(FAMILIES["llama"](), *EVERYTHING)
    model = FAMILIES["llama"]()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_near(score(model.train(), *EVERYTHING), expected, tolerance=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_router_logits_change_nothing(family: str) -> None:
    expected = score(FAMILIES[family](), *EVERYTHING)
    model = FAMILIES[family]()
    model.config.output_router_logits = True
    assert_near(score(model.train(), *EVERYTHING), expected, tolerance=1e-6)


# ---- rows that are not finite


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe"])
def test_a_row_with_a_nan_is_reported_and_alone(family: str) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2] = rows[2] | {"input_ids": [50 if at == 2 else token for at, token in enumerate(rows[2]["input_ids"])]}
    sound = score(FAMILIES[family](), *EVERYTHING)
    others = torch.tensor([0, 1, 3, 4])
    for signal in EVERYTHING:
        model = FAMILIES[family]()
        model.get_input_embeddings().weight.data[50] = torch.nan
        found, finite = scorer_of(model, signal).score(rows, range(5), 3)
        assert finite.tolist() == [True, True, False, True, True], signal
        assert_near({signal: found[signal][others]}, {signal: sound[signal][others]}, tolerance=1e-4)


def test_finite_rows_are_finite_in_every_signal() -> None:
    @dataclass(frozen=True)
    class Infinite(Signal):
        row: int

        def of(self, batch: ScoredBatch) -> Tensor:
            return torch.tensor([[1.0, torch.inf if row == self.row else 2.0] for row in batch.rows])

    scorer = scorer_of(FAMILIES["llama"](), Infinite(1), NuclearNorm(), Infinite(4))
    assert scorer.score(ROWS, range(5), 3)[1].tolist() == [True, False, True, True, False]


# ---- the reference model


def test_the_reference_is_asked_once_a_row(tiny_model: str) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    for parameter in policy.parameters():
        parameter.data.add_(0.05)
    signal = ReferenceLoss(tiny_model)
    scorer = scorer_of(policy, signal, Loss())
    asked: list[int] = []
    scorer.references[tiny_model].model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        theirs = torch.stack([loss_alone(reference, row) for row in ROWS])
        ours = torch.stack([loss_alone(policy, row) for row in ROWS])
    found, _ = scorer.score(ROWS, [70, 10, 50, 30, 90], 3)
    assert_near(found, {signal: theirs, Loss(): ours})
    assert (theirs - ours).abs().min() > 1e-3 and asked == [2, 2, 1]

    for parameter in policy.parameters():  # the policy moves on, the reference stays
        parameter.data.add_(0.05)
    found, _ = scorer.score([ROWS[4], ROWS[0]], [90, 70], 4)
    assert_near({signal: found[signal]}, {signal: theirs[[4, 0]]})
    assert len(asked) == 3
    found, _ = scorer.score([ROWS[1], ROWS[3]], [10, 31], 5)  # the second is another row of the data
    assert len(asked) == 4
    assert_near({signal: found[signal]}, {signal: theirs[[1, 3]]})


def test_the_reference_alone_runs_no_policy(tiny_model: str) -> None:
    scorer = scorer_of(AutoModelForCausalLM.from_pretrained(tiny_model), ReferenceLoss(tiny_model))
    assert scorer.parts.linear_head  # the probe is over
    with calls_of(scorer.model) as calls:
        scorer.score(ROWS, range(5), 3)
    assert calls["decoder"] == calls["head"] == 0


def test_a_reference_with_another_vocabulary_is_refused(tiny_model: str) -> None:
    with pytest.raises(ValueError, match="has a vocabulary of .* tokens, the trained model one of 64.*same tokenizer"):
        scorer_of(FAMILIES["llama"](), ReferenceLoss(tiny_model))
