"""The policy loss of single rows, at the moment of their rollout.

TRL's loss types differ in how they clip the importance ratio r_t = pi(y_t) / pi_old(y_t) and in what they divide by.
When rows are chosen, pi is pi_old, r_t = 1 and nothing is clipped: then every type has the same gradient,
    -A c_t grad log pi(y_t),    c_t the correction for the rollout engine's own probabilities (1 without one),
and differs only in what a row counts. So a row's loss here is the mean over its n loss-bearing tokens, and its share
in the batch's loss is 1 or n (`counts_rows`). A KL penalty adds beta grad KL_t, with the estimator
    KL_t = pi_ref / pi - log(pi_ref / pi) - 1    (Schulman, "Approximating KL Divergence", k3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from siftrl.scoring import ScoredBatch

IGNORED = -100


def counts_rows(loss_type: str) -> bool:
    """Whether a loss type averages each row's tokens first, so that rows count the same whatever their length."""
    return loss_type in ("grpo", "sapo")


def divides_by_rows(loss_type: str) -> bool:
    """Whether a loss type divides a step's loss by its rows; else by its tokens."""
    return loss_type in ("grpo", "sapo", "dr_grpo", "luspo")


def row_losses(
    log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    corrections: Tensor,
    reference: Tensor | None = None,
    beta: float = 0.0,
    correct_kl: bool = False,
) -> Tensor:
    """float32 [B]: losses with the gradient above. The value is the mean of -A c_t log pi(y_t), so that differences of
    values (SPSA) are slopes of the policy loss, too, but for `correct_kl`.

    log_probs: float [B, T]. mask: bool [B, T], tokens that bear loss. advantages: float [B]. corrections: float
    [B, T], c_t. reference: float [B, T], the reference model's log-probabilities, for `beta`. correct_kl: KL_t is
    multiplied by r_t (TRL's `use_bias_correction_kl`).
    """
    log_probs = log_probs.float()
    losses = -advantages[:, None] * corrections * log_probs
    if reference is not None:
        gap = reference - log_probs
        ratios = torch.exp(log_probs - log_probs.detach())
        losses = losses + beta * (torch.exp(gap) - gap - 1) * (ratios if correct_kl else 1.0)
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def engine_corrections(
    log_probs: Tensor, sampling: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """What corrects for the rollout engine's own probabilities: float [B, T], or [B, 1] of whole completions.

    exp(log pi(y_t) - log pi_engine(y_t)), or of its sum over a completion's tokens, clipped to [low, high] or set to 0
    outside of it: TRL's `vllm_importance_sampling_mode` token_truncate, token_mask, sequence_truncate, sequence_mask.

    log_probs, sampling: float [B, T], the model's and the engine's; where the latter is NaN nothing is corrected.
    mask: bool [B, T], tokens that bear loss.
    """
    gaps = torch.nan_to_num((log_probs.detach().float() - sampling) * mask, nan=0.0)
    of, _, cut = mode.partition("_")
    ratios = torch.exp(gaps.sum(1, keepdim=True) if of == "sequence" else gaps)
    if cut == "truncate":
        return ratios.clamp(min=low, max=high)
    outside = (ratios < (-math.inf if low is None else low)) | (ratios > (math.inf if high is None else high))
    return ratios.masked_fill(outside, 0.0)


def scored_losses(batch: ScoredBatch, beta: float, correct_kl: bool, corrections: Tensor | None = None) -> Tensor:
    """float32 [B]: `row_losses` of a batch that is being scored, see `collate`.

    corrections: float, broadcast to [B, T - 1]; None: 1.
    """
    given, log_probs = batch.given, batch.output.log_probs
    return row_losses(
        log_probs,
        bears_loss(batch),
        given["advantages"],
        torch.ones_like(log_probs) if corrections is None else corrections,
        given["reference"][:, 1:] if "reference" in given else None,
        beta,
        correct_kl,
    )


def bears_loss(batch: ScoredBatch) -> Tensor:
    """bool [B, T - 1]: which next tokens bear loss."""
    return batch.labels[:, 1:] != IGNORED


def collate(rows: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Completions with their prompts, for scoring: padded on the right, everything at its token's place.

    rows: as `as_row` makes them. Returns "input_ids", "attention_mask" and "labels", int64 [B, T]; "advantages",
    float32 [B]; and where the rows have them "reference" and "sampling", float32 [B, T].
    """
    lengths = [len(row["input_ids"]) for row in rows]
    fills = {"input_ids": pad_token_id, "labels": IGNORED, "reference": 0.0, "sampling": 0.0}
    batch = {"attention_mask": torch.zeros(len(rows), max(lengths), dtype=torch.int64)}
    for index, length in enumerate(lengths):
        batch["attention_mask"][index, :length] = 1
    for name in fills.keys() & rows[0].keys():
        batch[name] = torch.stack(
            [torch.cat([row[name], row[name].new_full((max(lengths) - len(row[name]),), fills[name])]) for row in rows]
        )
    batch["advantages"] = torch.stack([row["advantages"] for row in rows]).float()
    return batch


def as_row(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row of a generation batch (see `siftrl.trainers.rows`) as `collate` takes it."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    made = {
        "input_ids": torch.cat([prompt, completion]),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), completion.masked_fill(~loss_mask(row), IGNORED)]),
        "advantages": row["advantages"],
    }
    for name, key in (("reference", "ref_per_token_logps"), ("sampling", "sampling_per_token_logps")):
        if key in row:
            made[name] = torch.cat([torch.zeros(len(prompt)), row[key].float()])
    return made


def loss_mask(row: dict[str, Tensor]) -> Tensor:
    """bool [T]: the tokens of a row's completion that bear loss, not those that a tool wrote."""
    mask = row["completion_mask"].bool()
    return mask & row["tool_mask"].bool() if "tool_mask" in row else mask


# ----------------------------------------------------------------------------------------- the kept rows' own loss


def row_scale(loss_type: str, tokens: Tensor, step_rows: float, step_tokens: float, micro_batches: int) -> float:
    """What TRL's loss of a micro-batch is multiplied by, so that the optimizer step's is the kept rows' own.

    The step's loss is sum_i w_i l_i / sum_i w_i over its rows for types that divide by rows, with l_i a row's mean
    (grpo, sapo) or sum (dr_grpo, luspo) over tokens, and sum_i w_i sum_t l_it / sum_i w_i n_i for the others.
    TRL divides by what lies in a micro-batch, and takes the mean over micro-batches and ranks. That is the same only
    where all hold as many rows (for bnpo: tokens); rows of like length lie together here.

    tokens: int64 [r], loss-bearing tokens of the micro-batch's rows. step_rows, step_tokens: rows and tokens
    of the whole optimizer step, counted with the rows' weights. micro_batches: of the step, over all ranks.
    """
    if loss_type in ("dapo", "cispo", "vespo"):  # divided by `num_items_in_batch`
        return 1.0
    if loss_type == "bnpo":
        return float(tokens.sum()) * micro_batches / step_tokens
    return len(tokens) * micro_batches / step_rows


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(scales)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scales,) = ctx.saved_tensors
        return gradients[0] * scales[:, None].to(gradients[0]), None


def scale_gradient(values: Tensor, scales: Tensor) -> Tensor:
    """`values` (float [B, T]) as they are, whose gradient is multiplied by `scales` (float [B]), row by row.

    A row's loss depends on its own log-probabilities only, so this weighs all that it holds, the KL penalty and the
    entropy bonus too, whatever the loss type, and leaves ratios and clipping alone.
    """
    scaled: Tensor = _ScaleGradient.apply(values, scales)
    return scaled
