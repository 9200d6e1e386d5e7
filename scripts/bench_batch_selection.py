"""Choosing rows of a batch: what scoring them costs, and how well few rows stand for many.

    python scripts/bench_batch_selection.py score --json score.json
    python scripts/bench_batch_selection.py coreset --json coreset.json

score: the nuclear norm and the embedding of a row's logits (utility_diversity), without the logits and from them.
coreset: facility location against a plain lazy greedy; the gradient of few rows against that of the whole batch, for
each way of choosing them, on a small trained model; what their features cost.
Each prints its tables; --json writes every figure. docs/benchmarks.md explains them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    run: Any = args.run
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=Path, help="file for all figures")
        sub.add_argument("--smoke", action="store_true", help="seconds, to see that it works; figures mean nothing")
        return sub

    score = command("score", score_command, "Time the scores of utility_diversity without and with logits.")
    score.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help="counted tokens of a row")
    score.add_argument("--vocabulary", nargs="+", type=int, default=[32_000, 151_936])
    score.add_argument("--width", nargs="+", type=int, default=[512, 1024], help="of the hidden states")
    score.add_argument("--rows", type=int, default=16, help="rows between two changes of the head")
    score.add_argument("--micro-batch", type=int, default=8, help="rows scored, and trained on, at once")
    score.add_argument("--repeats", type=int, default=3, help="timed pairs of all rows without and one row with logits")
    score.add_argument("--patience", type=float, default=4, help="one pair only where a row with logits takes longer")

    coreset = command("coreset", coreset_command, "Measure how well and how fast a few rows are found for many.")
    coreset.add_argument("--sizes", nargs="+", type=int, default=[128, 1024, 8192], help="rows of facility location")
    coreset.add_argument("--repeats", type=int, default=3, help="timed pairs of facility location")
    coreset.add_argument("--hidden-size", type=int, default=128, help="of the model")
    coreset.add_argument("--layers", type=int, default=4)
    coreset.add_argument(
        "--train-steps", nargs="+", type=int, default=[100, 600], help="SFT steps after which gradients are compared"
    )
    coreset.add_argument("--train-rows", type=int, default=32, help="rows of such a step")
    coreset.add_argument("--batches", type=int, default=20, help="candidate batches")
    coreset.add_argument("--candidates", type=int, default=128, help="rows of a candidate batch")
    coreset.add_argument("--keep", nargs="+", type=int, default=[64, 32])
    coreset.add_argument("--micro-batch", type=int, default=16, help="rows scored, and trained on, at once")
    return parser


def score_command(args: argparse.Namespace) -> int:
    from bench_score import run_score

    return run_score(args)


def coreset_command(args: argparse.Namespace) -> int:
    from bench_coreset import run_coreset

    return run_coreset(args)


if __name__ == "__main__":
    sys.exit(main())
