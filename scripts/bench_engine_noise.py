"""What TRL's corrections for the engine's probabilities leave of long completions, when the engine is only noisy.

Simulated: for each token the trainer's log-probability less the engine's is normal with standard deviation s and mean
-s^2 / 2, so that exp of it has mean 1 under the engine that drew the token. s follows from the mean absolute gap that
`sampling/sampling_logp_difference/mean` shows. The corrections are the trainers' own (`siftrl.policy`).

    python scripts/bench_engine_noise.py --gaps 0.012 0.04 --lengths 256 1024 4096
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from siftrl.policy import engine_corrections

MODES = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
CHUNK = 512


def drawn_gaps(mean_gap: float, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """float32 [rows, length]: log p of the trainer less log p of the engine."""
    spread = mean_gap * math.sqrt(math.pi / 2)  # the mean of |x| for a normal x is s * sqrt(2 / pi)
    return torch.randn(rows, length, generator=generator) * spread - spread**2 / 2


def effect(mode: str, mean_gap: float, length: int, rows: int, clip: float, seed: int) -> tuple[float, float, float]:
    """(masked, mean weight, effective share) of `rows` completions of `length` tokens.

    masked: share of completions without any weight. effective share: (sum w)^2 / (n sum w^2) of the n tokens' weights:
    as many evenly weighted tokens give as precise a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    masked, total, squares, count = 0.0, 0.0, 0.0, 0
    for first in range(0, rows, CHUNK):
        gaps = drawn_gaps(mean_gap, min(CHUNK, rows - first), length, generator)
        everywhere = torch.ones_like(gaps, dtype=torch.bool)
        weights = engine_corrections(gaps, torch.zeros_like(gaps), everywhere, mode, None, clip).double()
        masked += float((weights == 0).all(1).sum())
        weights = weights.expand(-1, length)
        total, squares, count = total + float(weights.sum()), squares + float((weights**2).sum()), count + gaps.numel()
    return masked / rows, total / count, total**2 / (count * squares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.012, 0.04], help="mean absolute gap, nats a token")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of a completion")
    parser.add_argument("--rows", type=int, default=4096, help="completions drawn for each figure")
    parser.add_argument("--clip", type=float, default=3.0, help="vllm_importance_sampling_clip_max")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| gap a token | tokens | mode | completions masked | mean weight | effective share |")
    print("| --- | --- | --- | --- | --- | --- |")
    for gap in args.gaps:
        for length in args.lengths:
            for mode in MODES:
                masked, mean, share = effect(mode, gap, length, args.rows, args.clip, args.seed)
                print(f"| {gap} | {length:,} | `{mode}` | {masked:.1%} | {mean:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
