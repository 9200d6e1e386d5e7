"""What TRL's corrections for the engine's probabilities leave of long completions, when the engine is only noisy.

Simulated: for each token the trainer's log-probability less the engine's is normal with standard deviation s and mean
-s^2 / 2, so that exp of it has mean 1 under the engine that drew the token. s follows from the mean absolute gap that
`sampling/sampling_logp_difference/mean` shows. The corrections are the trainers' own (`siftrl.policy`).

    python scripts/engine_noise.py --gaps 0.012 0.04 --lengths 256 1024 4096

`measure` looks at real gaps: a model in bfloat16 draws completions, and is compared with itself as it is trained, with
float32 weights under bfloat16 autocast.

    python scripts/engine_noise.py measure models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import math
from typing import Any

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


def measure(folder: str, rows: int, length: int, seed: int) -> None:
    """Print what the simulation supposes of the gaps: their size, shape, and that neighbours are independent."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from siftrl.rollout import Sampling, TransformersEngine, row_seeds

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    prompt = tokenizer("Once upon a time").input_ids
    endless = TransformersEngine(engine, tokenizer, eos_ids=[len(tokenizer) + 1])  # never drawn
    drawn = endless.generate([prompt] * rows, Sampling(length), row_seeds(seed, rows=range(rows))).ids
    ids = torch.tensor([prompt + row for row in drawn], device=device)

    @torch.no_grad()
    def log_probs(model: Any) -> Tensor:
        chunks = [model(chunk).logits[:, :-1].float().log_softmax(-1) for chunk in ids.split(4)]
        return torch.cat(chunks).gather(2, ids[:, 1:, None])[:, len(prompt) - 1 :, 0].cpu()

    theirs = log_probs(engine)
    with torch.autocast(device, torch.bfloat16):
        gaps = log_probs(trained) - theirs
    centred = (gaps - gaps.mean()) / gaps.std()
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean()
    print(
        f"{rows} x {length} tokens on {device}: mean absolute gap {gaps.abs().mean():.4f}, standard deviation ", end=""
    )
    print(f"{gaps.std():.4f}, kurtosis {(centred**4).mean():.1f}, correlation of neighbours {neighbours:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simulate", "measure"], nargs="?", default="simulate")
    parser.add_argument("model", nargs="?", help="measure: a model's folder")
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.012, 0.04], help="mean absolute gap, nats a token")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of a completion")
    parser.add_argument("--rows", type=int, help="completions for each figure (4096; measure: 8 of the first length)")
    parser.add_argument("--clip", type=float, default=3.0, help="vllm_importance_sampling_clip_max")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "measure":
        measure(args.model, args.rows or 8, args.lengths[0], args.seed)
        return
    print("| gap a token | tokens | mode | completions masked | mean weight | effective share |")
    print("| --- | --- | --- | --- | --- | --- |")
    for gap in args.gaps:
        for length in args.lengths:
            for mode in MODES:
                masked, mean, share = effect(mode, gap, length, args.rows or 4096, args.clip, args.seed)
                print(f"| {gap} | {length:,} | `{mode}` | {masked:.1%} | {mean:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
