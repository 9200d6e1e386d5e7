"""Evaluation: rewards of a model's completions on held-out prompts, on any rollout engine.

Shapes: n prompts, s samples (completions of one prompt).
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from siftrl import distributed
from siftrl.reward_guard import check_finite
from siftrl.rollout import Engine, Sampling
from siftrl.row_shapes import Prompt, encode_prompts, text_of


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What was measured on n prompts, s completions each.

    rewards: float [n, s], NaN where every reward is missing. lengths: int64 [n, s], tokens of each completion.
    cut: bool [n, s], completions that reached the limit without ending. texts: the completions, n lists of s.
    threshold: a completion with at least this reward is correct.
    """

    rewards: Tensor
    lengths: Tensor
    cut: Tensor
    texts: list[list[str]]
    threshold: float = 1.0

    @property
    def correct(self) -> Tensor:
        """bool [n, s]; a completion without a reward is not correct."""
        return self.rewards >= self.threshold - 1e-6

    @property
    def mean_reward(self) -> float:
        return self.rewards.nanmean().item()

    @property
    def std_error(self) -> float:
        """Standard error of the mean reward over prompts: completions of one prompt are no independent draws."""
        means = self.rewards.nanmean(1)
        return _std_error(means[~means.isnan()])

    @property
    def mean_length(self) -> float:
        return self.lengths.double().mean().item()

    @property
    def truncated(self) -> float:
        """Share of the completions that reached the limit of tokens without ending."""
        return self.cut.double().mean().item()

    @property
    def missing(self) -> float:
        """Share of the completions that no reward scored."""
        return self.rewards.isnan().double().mean().item()

    def first(self, num_prompts: int) -> EvalReport:
        """The report of the first `num_prompts` prompts alone."""
        return EvalReport(
            self.rewards[:num_prompts],
            self.lengths[:num_prompts],
            self.cut[:num_prompts],
            self.texts[:num_prompts],
            self.threshold,
        )

    def pass_at_k(self, ks: Sequence[int] | None = None) -> dict[str, float]:
        """pass@k for each k (default: the powers of 2 up to s), as plain JSON."""
        return {str(k): pass_at_k(self.correct, k) for k in self._ks(ks)}

    def pass_at_k_errors(self, ks: Sequence[int] | None = None) -> dict[str, float]:
        """The standard error of each pass@k over prompts."""
        return {str(k): _std_error(_chances(self.correct, k)) for k in self._ks(ks)}

    def _ks(self, ks: Sequence[int] | None) -> Sequence[int]:
        return [2**i for i in range(self.rewards.size(1).bit_length())] if ks is None else ks


def pass_at_k(correct: Tensor, k: int) -> float:
    """The chance that at least one of k completions is correct, estimated without bias from s >= k, mean over prompts.

        pass@k = E over prompts [ 1 - C(s - c, k) / C(s, k) ],   c correct of s

    Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374, equation 1.

    Args:
        correct: bool [n, s].
    """
    return _chances(correct, k).mean().item()


def _chances(correct: Tensor, k: int) -> Tensor:
    """float64 [n]: each prompt's term of pass@k."""
    num_samples = correct.size(1)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt; there are {num_samples}")
    fails = num_samples - correct.sum(1)
    chances = [1 - math.comb(int(failed), k) / math.comb(num_samples, k) for failed in fails]
    return torch.tensor(chances, dtype=torch.float64)


def _std_error(values: Tensor) -> float:
    """Of the mean of float [n]; NaN for fewer than two."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def score(
    rewards: Sequence[Callable[..., Any]],
    weights: Sequence[float],
    prompts: list[Any],
    completions: list[Any],
    columns: dict[str, list[Any]],
    completion_ids: list[list[int]] | None = None,
    trainer_state: TrainerState | None = None,
) -> Tensor:
    """Weighted sum of the rewards of m completions, as TRL's GRPO trainer sums them: float [m].

    A missing reward counts as 0 beside others; NaN where every reward is missing.
    trainer_state: what rewards see of the training; None: that of one which has not begun.
    """
    weight = torch.tensor(list(weights), dtype=torch.float32)
    arguments: dict[str, Any] = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    arguments |= columns | {"log_metric": lambda name, value: None, "log_extra": lambda column, values: None}
    arguments["trainer_state"] = trainer_state or TrainerState()
    scores = []
    for reward in rewards:
        values = reward(**arguments)
        if inspect.isawaitable(values):
            with ThreadPoolExecutor(1) as thread:  # a notebook's own event loop may be running in this one
                values = thread.submit(asyncio.run, _await(values)).result()
        scores.append([math.nan if value is None else float(value) for value in values])
    per_reward = torch.tensor(scores, dtype=torch.float32).T  # [m, rewards]
    check_finite(per_reward, weight, [getattr(reward, "__name__", type(reward).__name__) for reward in rewards])
    total = (per_reward * weight).nansum(1)
    return torch.where(per_reward.isnan().all(1), math.nan, total)


async def _await(values: Any) -> Any:
    return await values


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    rewards: Sequence[Callable[..., Any]],
    weights: Sequence[float],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    threshold: float = 1.0,
    tokenize: Callable[[list[Prompt]], list[list[int]]] | None = None,
    progress: bool = True,
    trainer_state: TrainerState | None = None,
) -> EvalReport:
    """Generate `samples` completions for each row of `dataset` (shaped by `siftrl.data`) and score them.

    A completion's randomness depends on `seed`, its prompt and its number alone, so neither `batch_size` nor how
    the rows are spread over ranks changes what is measured.

    Args:
        sampling: temperature 0 is greedy.
        batch_size: completions generated at once.
        tokenize: prompts to token ids; default: as the trainers do it.
        trainer_state: see `score`.
    """
    prompts: list[Prompt] = dataset["prompt"][:] if len(dataset) else []
    prompt_ids = (tokenize or (lambda texts: encode_prompts(texts, tokenizer)))(prompts) if prompts else []
    jobs = [(row, sample) for row in range(len(prompts)) for sample in range(samples)]
    # prompts of like length share a batch: less padding
    order = sorted(range(len(jobs)), key=lambda job: len(prompt_ids[jobs[job][0]]))
    ids: list[list[int]] = [[] for _ in jobs]
    for batch in _batches(order, batch_size, "Evaluating" if progress else None):
        batch_ids = [prompt_ids[jobs[job][0]] for job in batch]
        seeds = [_seed(seed, jobs[job][1], prompt) for job, prompt in zip(batch, batch_ids, strict=True)]
        generated = engine.generate(batch_ids, sampling, seeds if sampling.temperature else None)
        for job, completion in zip(batch, generated.ids, strict=True):
            ids[job] = completion
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # type: ignore[assignment]
    totals = torch.full((len(jobs),), math.nan)
    columns = [name for name in dataset.column_names if name != "prompt"]
    for batch in _batches(list(range(len(jobs))), batch_size, None):
        rows = [jobs[job][0] for job in batch]
        cells = dataset[rows]
        totals[batch] = score(
            rewards,
            weights,
            [prompts[row] for row in rows],
            [_as_completion(prompts[row], texts[job]) for row, job in zip(rows, batch, strict=True)],
            {name: _cells(name, cells[name]) for name in columns},
            [ids[job] for job in batch],
            trainer_state,
        )
    ended = [bool(row) and row[-1] in engine.eos_ids for row in ids]
    shape = (len(prompts), samples)
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    return EvalReport(
        rewards=totals.view(shape),
        lengths=lengths.view(shape),
        cut=((lengths >= sampling.max_tokens) & ~torch.tensor(ended, dtype=torch.bool)).view(shape),
        texts=[texts[i : i + samples] for i in range(0, len(texts), samples)],
        threshold=threshold,
    )


def _cells(name: str, cells: list[Any]) -> list[Any]:
    """A column for the rewards: the targets of SFT (`completion`) are text, as the answers of other columns are."""
    return [text_of(cell) if isinstance(cell, list) else cell for cell in cells] if name == "completion" else cells


def evaluate_on_ranks(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    rewards: Sequence[Callable[..., Any]],
    weights: Sequence[float],
    sampling: Sampling,
    *,
    spread: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """`summarise(evaluate(...))` over all ranks, the same on each. spread: each rank has an engine of its own, and
    generates for its share of the rows; else every rank asks one engine for all of them."""
    mine, share = rows, len(rows)
    if spread:
        world = distributed.world_size()
        own = list(range(distributed.rank(), len(rows), world))
        share = len(own)
        # every rank generates as many batches: with sharded weights a forward pass takes all ranks
        mine = rows.select(own + [0] * (-(-len(rows) // world) - share))
    report = evaluate(engine, tokenizer, mine, rewards, weights, sampling, **options).first(share)
    return summarise(distributed.gather_objects(report) if spread else [report])


def summarise(reports: Sequence[EvalReport], ks: Sequence[int] | None = None) -> dict[str, Any]:
    """Reports of different rows (one a rank) as one, in plain JSON; NaN becomes None."""
    whole = EvalReport(
        rewards=torch.cat([report.rewards for report in reports]),
        lengths=torch.cat([report.lengths for report in reports]),
        cut=torch.cat([report.cut for report in reports]),
        texts=[texts for report in reports for texts in report.texts],
        threshold=reports[0].threshold,
    )
    summary: dict[str, Any] = {
        "reward": whole.mean_reward,
        "std_error": whole.std_error,
        "pass_at_k": whole.pass_at_k(ks),
        "mean_length": whole.mean_length,
        "truncated": whole.truncated,
        "missing": whole.missing,
        "rows": len(whole.rewards),
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in summary.items()}


def _seed(seed: int, sample: int, prompt_ids: list[int]) -> int:
    digest = hashlib.blake2b(repr((seed, sample, prompt_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def _as_completion(prompt: Prompt, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _batches(items: list[int], size: int, progress: str | None) -> Any:
    from tqdm.auto import tqdm

    batches = [items[i : i + size] for i in range(0, len(items), size)]
    return tqdm(batches, desc=progress, unit="batch", disable=progress is None)
