"""`bench_batch_selection.py coreset`: how fast, and how well, few rows are found that stand for many.

First facility location alone, against a plain lazy greedy on the same similarities. Then what it is for: a small model
is trained on a mixture of four reasoning-gym families in unequal shares; of each candidate batch every method keeps
some rows; the gradient of their (weighted) loss, of all parameters, is compared with that of the whole batch. That is
done early and late in training; the model stays as it is meanwhile. Rows are scored and chosen by the code that
training uses.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from bench_common import Spread, hardware, hardware_text, table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from siftrl import batch_selection, plugins
from siftrl.coreset import budgets, facility_location, l1_similarity
from siftrl.gym_rows import make_rows
from siftrl.models import save_scratch_model
from siftrl.recipe import ReasoningGymConfig, ScratchConfig
from siftrl.run import write_json
from siftrl.scoring import Rows, Scorer
from siftrl.signals import Loss, Signal, ValueGradient
from siftrl.types import BatchSelector, Selection, Signals

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXTURE = [
    {"name": "chain_sum", "weight": 50, "config": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}},
    {"name": "spell_backward", "weight": 28, "config": {"min_word_len": 3, "max_word_len": 8}},
    {
        "name": "fraction_simplification",
        "weight": 18,
        "config": {"max_value": 30, "max_factor": 9, "styles": ["plain"]},
    },
    {"name": "products", "weight": 4, "config": {"max_terms": 2, "max_digits": 2}},
]
"""The last one is a small source for gradient_coreset (less than 5 % of the rows)."""
PROMPTS = {
    "chain_sum": "sum {expression} =",
    "spell_backward": "spell backward {word}:",
    "fraction_simplification": "simplify {numerator}/{denominator} =",
    "products": "product {expression} =",
}
"""Shorter than the library's own questions, so that a CPU serves."""
DRAWS = 20
"""Choices of a method that draws rows at random, in each batch: its own luck is not what is compared."""


@dataclass
class RowsBySource(BatchSelector):
    """The control for a coreset: random rows, but of each source its share, weighted by the tokens they stand for."""

    @property
    def weighted(self) -> bool:
        return True

    def select(self, signals: Signals, keep: int, generator: torch.Generator) -> Selection:
        assert signals.source is not None
        groups: dict[str | None, list[int]] = {}
        for row, source in enumerate(signals.source):
            groups.setdefault(source, []).append(row)
        quotas = budgets({source: len(rows) for source, rows in groups.items()}, keep)
        weights = torch.zeros(len(signals))
        for source, rows in groups.items():
            some = torch.tensor(rows)[torch.randperm(len(rows), generator=generator)[: quotas[source]]]
            weights[some] = signals.num_tokens[rows].sum() / signals.num_tokens[some].sum()
        kept = weights.nonzero().flatten()
        return Selection.of(kept, len(signals), weights=weights[kept])


def _coreset(**options: Any) -> Callable[[], BatchSelector]:
    return lambda: plugins.load("selector", "gradient_coreset", options)


METHODS: dict[str, Callable[[], BatchSelector]] = {
    "uniform": lambda: plugins.load("selector", "uniform_rows", {}),
    "uniform by source, weighted": RowsBySource,
    "high loss": lambda: plugins.load("selector", "high_loss", {}),
    "exact, clusters": _coreset(),
    "exact, none": _coreset(weights="none"),
    "exact, clusters, no history": _coreset(history=False),
    "exact, none, no history": _coreset(weights="none", history=False),
    "spsa, 1 a row, clusters": _coreset(estimate="spsa", weights="clusters"),
    "spsa, 1 a row, none": _coreset(estimate="spsa", weights="none"),
    "spsa, 8 a row, clusters": _coreset(estimate="spsa", perturbations=8, weights="clusters"),
    "spsa, 8 a row, none": _coreset(estimate="spsa", perturbations=8, weights="none"),
    "paper: true": _coreset(paper=True),
}
"""Label -> a new selector; those of gradient_coreset by estimate and weights."""
RANDOM = ("uniform", "uniform by source, weighted")
COSTS: dict[str, Signal] = {
    "losses": Loss(),
    "exact gradients": ValueGradient(),
    "spsa, 1 direction a row": ValueGradient("spsa", 1),
    "spsa, 8 directions a row": ValueGradient("spsa", 8),
    "spsa, 1 shared direction": ValueGradient("spsa", 1, shared=True),
}
TRAINING = "forward and backward of all rows"


def run_coreset(args: argparse.Namespace) -> int:
    if args.smoke:
        args.sizes, args.repeats, args.hidden_size, args.layers = [16, 64], 2, 32, 2
        args.train_steps, args.train_rows, args.batches, args.candidates, args.keep = [1, 2], 4, 2, 16, [8]
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    locations = [_facility_location(size, args.repeats) for size in tqdm(args.sizes, desc="facility location")]
    with tempfile.TemporaryDirectory() as folder:
        quality = _quality(args, Path(folder))
    settings = {name: given for name, given in vars(args).items() if name not in ("run", "json", "smoke")}
    raw = {"hardware": facts, "settings": settings, "facility_location": locations} | quality
    if args.json is not None:
        write_json(args.json, raw)
    print(f"\n{_render(raw)}")
    return 0


# ----------------------------------------------------------------------------------------------- facility location


def lazy_greedy(similarity: np.ndarray[Any, Any], budget: int) -> list[int]:
    """Rows in the order they are picked. similarity: [n, n], symmetric.

    A candidate's gain never grows, so an old one is an upper bound: only the top of the heap is counted anew.
    """
    best = similarity.min(axis=1)
    heap = [(-float((row - best).sum()), j) for j, row in enumerate(similarity)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < min(budget, len(similarity)):
        _, j = heapq.heappop(heap)
        fresh = (-float(np.maximum(similarity[j] - best, 0).sum()), j)
        if heap and fresh > heap[0]:
            heapq.heappush(heap, fresh)
        else:
            chosen.append(j)
            best = np.maximum(best, similarity[j])
    return chosen


def _facility_location(size: int, repeats: int) -> dict[str, Any]:
    """Seconds of both ways to choose half of `size` rows, in turns, and what they reach."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(size // 16, 1), 32, generator=generator)
    noise = 0.5 * torch.randn(size, 32, generator=generator)
    similarity = l1_similarity(centres[torch.randint(len(centres), (size,), generator=generator)] + noise)
    matrix, budget = similarity.numpy(), size // 2
    seconds: dict[str, list[float]] = {"siftrl": [], "lazy greedy": []}
    for repeat in range(repeats + 1):
        t0 = time.perf_counter()
        ours, _ = facility_location(similarity, budget)
        t1 = time.perf_counter()
        theirs = lazy_greedy(matrix, budget)
        t2 = time.perf_counter()
        if repeat > 0 or repeats == 0:  # the first pair warms both up
            seconds["siftrl"].append(t1 - t0)
            seconds["lazy greedy"].append(t2 - t1)
    reached = [_objective(similarity, ours), _objective(similarity, torch.tensor(theirs))]
    return {"rows": size, "budget": budget, "seconds": seconds, "objective": reached}


def _objective(similarity: Tensor, chosen: Tensor) -> float:
    return similarity[:, chosen].amax(1).double().sum().item()


# ------------------------------------------------------------------------------------------------ gradient quality


@dataclass(frozen=True)
class Mixture:
    """A model trained on the mixture, and rows of it that the model has not seen."""

    model: Any
    collate: DataCollatorForLanguageModeling
    rows: Rows  # "input_ids", "labels"
    sources: list[str]
    steps: int
    loss: float  # of a token, mean over the last 20 steps


def _quality(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    phases = []
    for mixture in _train(args, folder):
        quality, seconds = _phase(args, mixture)
        phases.append(
            {"train_steps": mixture.steps, "training_loss": mixture.loss, "quality": quality, "seconds": seconds}
        )
    return {
        "parameters": sum(p.numel() for p in mixture.model.parameters()),
        "rows": dict(Counter(mixture.sources)),
        "phases": phases,
    }


def _phase(args: argparse.Namespace, mixture: Mixture) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """What each method's choices come to in every candidate batch, and the seconds of what is measured for them."""
    scorers = {name: _scorer(mixture, [signal], args.micro_batch) for name, signal in COSTS.items()}
    selectors = {(name, keep): make() for keep in args.keep for name, make in METHODS.items()}
    found: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in selectors}
    seconds: dict[str, list[float]] = {name: [] for name in (*COSTS, TRAINING)}
    generator = torch.Generator().manual_seed(0)
    _score(mixture, scorers, range(args.candidates), args.micro_batch, seed=0)  # warms up
    for batch in tqdm(range(args.batches), desc="candidate batches", unit="batch"):
        ids = range(batch * args.candidates, (batch + 1) * args.candidates)
        signals, spent = _score(mixture, scorers, ids, args.micro_batch, seed=batch)
        for name, figure in spent.items():
            seconds[name].append(figure)
        products = gradient_products(mixture, ids), value_gradient_products(signals)
        for (name, keep), selector in selectors.items():
            draws = [
                _judged(selector, keep, signals, products, generator) for _ in range(DRAWS if name in RANDOM else 1)
            ]
            found[name, keep].append({figure: fmean(draw[figure] for draw in draws) for figure in draws[0]})
    return [{"method": name, "keep": keep, "batches": judged} for (name, keep), judged in found.items()], seconds


def _train(args: argparse.Namespace, folder: Path) -> Iterator[Mixture]:
    """The same model in training, whenever it has taken one of the numbers of steps that were asked for."""
    sizes = ScratchConfig(hidden_size=args.hidden_size, num_layers=args.layers, num_heads=4, max_positions=256)
    save_scratch_model(sizes, folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    rows, _ = _rows(tokenizer, max(args.train_steps) * args.train_rows, seed=0)
    unseen, sources = _rows(tokenizer, args.batches * args.candidates, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in tqdm(range(1, max(args.train_steps) + 1), desc="SFT steps", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 20)
        loss = token_mean_loss(model, collate(rows[(step - 1) * args.train_rows : step * args.train_rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step in args.train_steps:
            yield Mixture(model, collate, unseen, sources, step, fmean(losses[-20:]))


def _rows(tokenizer: Any, size: int, seed: int) -> tuple[Rows, list[str]]:
    """Rows of the mixture, where only the answer's tokens bear loss, and their families."""
    made = make_rows(ReasoningGymConfig(tasks=MIXTURE, size=size), size=size, seed=seed)  # type: ignore[arg-type]
    rows: Rows = []
    for row in made:
        text = PROMPTS[row["task"]].format(**row["metadata"])
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows, [row["task"] for row in made]


def token_mean_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    log_probs = model(**inputs, fused_lm_head=True).log_probs
    return -log_probs.sum() / (inputs["labels"][:, 1:] != -100).sum()


def _scorer(mixture: Mixture, needs: Sequence[Signal], micro_batch: int) -> Scorer:
    return Scorer(
        mixture.model,
        needs,
        mixture.collate,
        micro_batch_size=micro_batch,
        device=DEVICE,
        precision=contextlib.nullcontext,
    )


def _score(
    mixture: Mixture, scorers: dict[str, Scorer], ids: range, micro_batch: int, seed: int
) -> tuple[Signals, dict[str, float]]:
    """All signals of the rows at `ids`, and the seconds that each took, and a training step on all of them."""
    rows = [mixture.rows[i] for i in ids]
    signals = Signals(
        num_tokens=torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in rows]),
        num_all_tokens=torch.tensor([len(row["input_ids"]) for row in rows]),
        ids=torch.tensor(list(ids)),
        source=[mixture.sources[i] for i in ids],
        source_sizes=dict(Counter(mixture.sources)),
    )
    seconds: dict[str, float] = {}
    for name, scorer in scorers.items():
        with _timed(seconds, name):
            tensors, usable = scorer.score(rows, list(ids), seed)
        assert usable.all()
        signals.tensors |= tensors
    with _timed(seconds, TRAINING):
        by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))  # as they are scored
        for at in range(0, len(rows), micro_batch):
            token_mean_loss(mixture.model, mixture.collate(by_length[at : at + micro_batch])).backward()
    mixture.model.zero_grad()
    return signals, seconds


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


def gradient_products(mixture: Mixture, ids: range) -> Tensor:
    """float64 [B, B]: g_i . g_j, with g_i the gradient of row i's mean token loss with respect to all parameters.

    Every gradient that is compared is a combination of these rows' g_i, so its products with others follow from these.
    """
    parameters = list(mixture.model.parameters())
    gradients = torch.empty(len(ids), sum(p.numel() for p in parameters), device=DEVICE)
    for at, row in enumerate(ids):
        loss = token_mean_loss(mixture.model, mixture.collate([mixture.rows[row]]))
        gradients[at] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return (gradients @ gradients.T).double().cpu()


def value_gradient_products(signals: Signals) -> Tensor:
    """The same of the V projection's gradients alone: what the features are made of."""
    gradients = signals[ValueGradient()]
    dense = gradients.at(torch.arange(gradients.size), torch.arange(len(signals)))
    return (dense @ dense.T).double().cpu()


def _judged(
    selector: BatchSelector,
    keep: int,
    signals: Signals,
    products: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> dict[str, float]:
    """Let the selector choose, and compare what it chose with the whole batch."""
    start = time.perf_counter()
    usable = torch.ones(len(signals), dtype=torch.bool)
    selection = batch_selection.choose([batch_selection.Link(selector, keep)], signals, usable, generator)
    seconds = time.perf_counter() - start
    kept = torch.zeros(len(signals), dtype=torch.float64)
    kept[selection.indices] = selection.weights.double()
    cosine, error = compare(kept, signals.num_tokens, products[0])
    value_cosine, value_error = compare(kept, signals.num_tokens, products[1])
    share = signals.num_tokens[selection.indices].sum() / signals.num_tokens.sum()
    return {
        "cosine": cosine,
        "error": error,
        "value_cosine": value_cosine,
        "value_error": value_error,
        "tokens": share.item(),
        "select_seconds": seconds,
    }


def compare(weights: Tensor, num_tokens: Tensor, products: Tensor) -> tuple[float, float]:
    """Cosine of g^ and g, and |g^ - g| / |g|: g = sum_i n_i g_i / sum_i n_i, g^ = sum_i w_i n_i g_i / sum_i w_i n_i.

    weights: float64 [B], w_i, 0 where row i is not kept. num_tokens: int64 [B], n_i. products: float64 [B, B], the
    g_i . g_j.
    """
    whole = num_tokens / num_tokens.sum()
    few = weights * num_tokens / (weights * num_tokens).sum()
    whole = whole.to(few)
    norm = (whole @ products @ whole).sqrt()
    cosine = (few @ products @ whole) / ((few @ products @ few).sqrt() * norm)
    error = ((few - whole) @ products @ (few - whole)).clamp(min=0).sqrt() / norm
    return cosine.item(), error.item()


# ------------------------------------------------------------------------------------------------------- the tables


def _render(raw: dict[str, Any]) -> str:
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Settings: {raw['settings']}"]
    parts += ["Facility location:", _locations(raw["facility_location"])]
    parts.append(f"Model of {raw['parameters']:,} parameters; rows of the candidate batches: {raw['rows']}.")
    for phase in raw["phases"]:
        parts.append(
            f"After {phase['train_steps']} SFT steps (loss {phase['training_loss']:.3f} a token), the gradient of the "
            f"kept rows against that of all {raw['settings']['candidates']}: mean over the batches ± its standard error"
        )
        parts.append(_qualities(phase["quality"]))
    pooled = {name: [s for phase in raw["phases"] for s in phase["seconds"][name]] for name in (*COSTS, TRAINING)}
    parts += ["What is measured of a candidate batch, in turns:", _costs(pooled)]
    return "\n\n".join(parts) + "\n"


def _locations(locations: list[dict[str, Any]]) -> str:
    rows = []
    for found in locations:
        ours, theirs = (Spread.of(values) for values in found["seconds"].values())
        mine, reference = found["objective"]
        ratio = f"**{theirs.median / ours.median:.1f}**"
        rows.append(
            [
                f"{found['budget']} of {found['rows']}",
                ours.text(4),
                theirs.text(4),
                ratio,
                f"{mine / reference - 1:.1e}",
            ]
        )
    heading = ["rows kept", "siftrl, s: median (min..max)", "lazy greedy, s", "ratio", "objective, relative difference"]
    return table(heading, rows)


def _qualities(quality: list[dict[str, Any]]) -> str:
    rows = []
    for found in quality:
        figures = {name: [batch[name] for batch in found["batches"]] for name in found["batches"][0]}
        rows.append(
            [
                found["method"],
                found["keep"],
                *(_mean(figures[name]) for name in ("cosine", "error", "value_cosine", "value_error")),
                f"{fmean(figures['tokens']):.2f}",
                f"{1000 * Spread.of(figures['select_seconds']).median:.1f}",
            ]
        )
    heading = [
        "method",
        "rows kept",
        "cosine",
        "error",
        "cosine, V alone",
        "error, V alone",
        "share of tokens",
        "choosing, ms",
    ]
    return table(heading, rows)


def _mean(values: list[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{fmean(values):.3f} ± {error:.3f}"


def _costs(seconds: dict[str, list[float]]) -> str:
    base = Spread.of(seconds[TRAINING]).median
    rows = [
        [name, Spread.of(values).text(), f"{Spread.of(values).median / base:.2f}"] for name, values in seconds.items()
    ]
    return table(["of all rows", "s a batch: median (min..max)", f"ratio to {TRAINING}"], rows)
