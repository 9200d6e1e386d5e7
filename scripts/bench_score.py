"""`bench_batch_selection.py score`: the scores of utility_diversity without a row's logits, and from them.

Both compute the nuclear norm and the embedding of the same rows' logits Z = H W^T [T, V]. siftrl takes them from the
hidden states H [T, d] and from two small products of the head W [V, d], which are counted once for all rows: training
moves the head between two batches. The direct way builds Z, takes its singular values and transforms it by FFT along
both sides, as the method's paper has it (arXiv 2510.16882). They take turns: all rows, one row, all rows, one row.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from bench_common import Spread, hardware, hardware_text, table
from torch import Tensor
from tqdm.auto import tqdm
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from siftrl import logits
from siftrl.run import write_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POWER = 0.6
"""Direction i of a hidden state is i^-POWER as strong as the first: a spectrum that decays, as real ones do."""
MIB = 2**20
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds, and the most memory beyond what was in use before, in bytes (None where the system does not tell)."""

    seconds: float
    memory: int | None


@dataclass(frozen=True, slots=True)
class Rows:
    """hidden: float32 [B, T, d]. weight: float32 [V, d]. All positions count."""

    hidden: Tensor
    weight: Tensor

    @classmethod
    def random(cls, rows: int, tokens: int, vocabulary: int, width: int) -> Rows:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, tokens, width, generator=generator)
        hidden *= torch.arange(1, width + 1) ** -POWER
        hidden[:, :, 0] += 3  # the direction that all tokens of a language model share
        hidden /= hidden.square().mean(2, keepdim=True).sqrt()
        weight = torch.randn(vocabulary, width, generator=generator).mul_(0.02)
        return cls(hidden.to(DEVICE), weight.to(DEVICE))


@dataclass(frozen=True, slots=True)
class Scores:
    """norms: float32 [B]. embeddings: float32 [B, r1 * r2]. head_seconds: for what follows from the head alone."""

    norms: Tensor
    embeddings: Tensor
    head_seconds: float


def run_score(args: argparse.Namespace) -> int:
    if args.smoke:
        args.tokens, args.vocabulary, args.width, args.rows, args.micro_batch = [8, 600], [400], [16], 3, 2
    facts = hardware()
    print(f"hardware: {hardware_text(facts)}")
    _case(argparse.Namespace(rows=2, micro_batch=2, repeats=1, patience=1), 32, 256, 64)  # warms the libraries up
    cases = []
    sizes = list(itertools.product(args.vocabulary, args.width, args.tokens))
    for vocabulary, width, tokens in tqdm(sizes, desc="sizes", unit="size"):
        cases.append(_case(args, tokens, vocabulary, width))
    settings = {name: getattr(args, name) for name in ("rows", "micro_batch", "repeats", "patience")}
    raw = {"hardware": facts, "settings": settings, "cases": cases}
    if args.json is not None:
        write_json(args.json, raw)
    print(f"\n{_render(raw)}")
    return 0


def without_logits(rows: Rows, projection: logits.Projection, micro_batch: int) -> Scores:
    """Of all rows, `micro_batch` of them at once."""
    start = _now()
    gram, folded = logits.head_gram(rows.weight, None), projection.fold(rows.weight, None)
    head_seconds = _now() - start
    norms, embeddings = [], []
    for hidden in rows.hidden.split(micro_batch):
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        norms.append(logits.nuclear_norms(hidden, mask, gram))
        embeddings.append(projection.embed(hidden, mask, folded))
    return Scores(torch.cat(norms), torch.cat(embeddings), head_seconds)


def from_logits(hidden: Tensor, weight: Tensor, projection: logits.Projection) -> tuple[Tensor, Tensor]:
    """Nuclear norm (float32 []) and embedding (float32 [r1 * r2]) of one row; hidden: float32 [T, d].

    Positions beyond the projection's T0 are added to those T0 before, which is what its period means.
    """
    z = hidden @ weight.T
    norm = torch.linalg.svdvals(z).sum()
    left_signs, left, right_signs, right = (draw.to(z.device) for draw in projection.draws)
    columns = torch.fft.fft(z * right_signs.to(z), dim=1).real[:, right]  # [T, r2]
    period = len(left_signs)
    padded = torch.nn.functional.pad(columns, (0, 0, 0, -len(columns) % period))
    folded = padded.view(-1, period, len(right)).sum(0) * left_signs[:, None].to(z)
    scale = math.sqrt(2 / len(left)) * math.sqrt(2 / len(right))
    return norm, scale * torch.fft.fft(folded, dim=0).real[left].flatten()


def train_head(rows: Rows, micro_batch: int) -> int:
    """What training does with the logits of one micro-batch: forward and backward through TRL's fused head.

    Of its positions no more than TRL's head works on at once: the others would take time and no memory but that of
    their hidden states' gradients. Returns how many those are. On a CPU that head holds several copies of its tile.
    """
    hidden = rows.hidden[:micro_batch].flatten(0, 1)[:TOKEN_CHUNK_SIZE].requires_grad_()
    weight = rows.weight.detach().requires_grad_()
    targets = torch.arange(len(hidden), device=hidden.device) % len(weight)
    outputs = ("entropy", "is_top1")  # besides the log-probabilities: what TRL's SFT trainer asks for
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    )
    (-log_probs.mean()).backward()
    return len(hidden)


def measure(run: Callable[[], Result]) -> tuple[Result, Cost]:
    """Run it, and see what it took. On a CPU the memory is the process's, freed blocks given back beforehand."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
    else:
        before = _reset_peak()
    start = _now()
    result = run()
    seconds = _now() - start
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else _resident("VmHWM")
    return result, Cost(seconds, None if before is None else max(peak - before, 0))


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak() -> int | None:
    """Bytes resident now, from which on the peak is recorded anew; None where this is not Linux, or is not allowed."""
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else a freed block that is used again would not be counted
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """A field of the process's status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _case(args: argparse.Namespace, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """Every figure of rows of one size."""
    rows = Rows.random(args.rows, tokens, vocabulary, width)
    projection = logits.Projection(vocabulary)
    with_head, rows_alone, direct, memory, direct_memory = [], [], [], [], []
    norm_differences, embedding_differences = [], []
    for repeat in range(args.repeats):
        scores, cost = measure(functools.partial(without_logits, rows, projection, args.micro_batch))
        with_head.append(cost.seconds / args.rows)
        rows_alone.append((cost.seconds - scores.head_seconds) / args.rows)
        memory.append(cost.memory)
        row = repeat % args.rows
        (norm, embedding), cost = measure(functools.partial(from_logits, rows.hidden[row], rows.weight, projection))
        direct.append(cost.seconds)
        direct_memory.append(cost.memory)
        norm_differences.append(abs(scores.norms[row] / norm - 1).item())
        embedding_differences.append(((scores.embeddings[row] - embedding).norm() / embedding.norm()).item())
        if cost.seconds > args.patience:
            break
    exact = float64_norm(rows.hidden[row], rows.weight)
    exact_differences = {"siftrl": abs(scores.norms[row] / exact - 1).item(), "direct": abs(norm / exact - 1).item()}
    trained_on, training = measure(functools.partial(train_head, rows, args.micro_batch))
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "seconds": {"siftrl": with_head, "siftrl, frozen head": rows_alone, "direct": direct},
        "training_seconds": training.seconds * tokens / trained_on,
        "norm_difference": max(norm_differences),
        "against_float64": exact_differences,
        "embedding_difference": max(embedding_differences),
        "memory": {"siftrl": _largest(memory), "direct": _largest(direct_memory), "training": training.memory},
        "logits": min(args.micro_batch, args.rows) * tokens * vocabulary * 4,
    }


def float64_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """The nuclear norm of one row's logits (hidden [T, d], weight [V, d]), from a QR of the head in float64."""
    root = torch.linalg.qr(weight.double(), mode="r").R
    return torch.linalg.svdvals(hidden.double() @ root.T).sum()


def _largest(memory: list[int | None]) -> int | None:
    known = [figure for figure in memory if figure is not None]
    return max(known, default=None)


def _render(raw: dict[str, Any]) -> str:
    settings = raw["settings"]
    times, memories = [], []
    for case in raw["cases"]:
        size = f"{case['tokens']} x {case['vocabulary']:,}, {case['width']}"
        ours, frozen, direct = (Spread.of(values) for values in case["seconds"].values())
        times.append(
            [
                size,
                ours.text(4),
                frozen.text(4),
                f"{direct.text()}, n = {len(case['seconds']['direct'])}",
                f"**{direct.median / ours.median:.1f}**",
                f"{direct.median / frozen.median:.1f}",
                f"{case['training_seconds']:.3f}",
                f"{case['norm_difference']:.1e}",
                f"{case['against_float64']['siftrl']:.1e}",
                f"{case['against_float64']['direct']:.1e}",
                f"{case['embedding_difference']:.1e}",
            ]
        )
        memory = case["memory"]
        figures = [memory["siftrl"], memory["training"], memory["direct"], case["logits"]]
        memories.append([size, *("?" if figure is None else f"{figure / MIB:,.0f}" for figure in figures)])
    size = "T x V, d"
    heading = [size, f"siftrl, head counted once in {settings['rows']} rows, s a row: median (min..max)"]
    heading += ["siftrl, frozen head, s a row", "direct, s a row", "ratio", "ratio, frozen head"]
    heading += ["training the head, s a row", "largest relative difference: nuclear norm"]
    heading += ["siftrl to float64", "direct to float64", "embedding"]
    micro = settings["micro_batch"]
    memory_heading = [size, f"siftrl, {micro} rows at once, MiB", f"training the head on {micro} rows, MiB"]
    memory_heading += ["direct, one row, MiB", f"plain logits of {micro} rows alone, MiB"]
    parts = [f"Hardware: {hardware_text(raw['hardware'])}", f"Settings: {settings}"]
    parts += [table(heading, times), "Most memory beyond the hidden states and the head:"]
    return "\n\n".join([*parts, table(memory_heading, memories)]) + "\n"
