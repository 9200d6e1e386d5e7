"""The completions of a rollout that are trained on: from all ranks' rows to micro-batches of the kept ones.

Rows are those of `siftrl.trainers.rows`, with "rewards" and "ids" (of the prompt's row in the data set) in addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig

from siftrl import batch_selection, policy
from siftrl.batch_arithmetic import kept_rows
from siftrl.calibration import group_statistics
from siftrl.recipe_text import RecipeError
from siftrl.trainers import rows as row_ops
from siftrl.types import Selection, Signals

Row = dict[str, Tensor]


def describe(
    rows: Sequence[Row],
    num_generations: int,
    loss_type: str,
    sources: Sequence[str | None] | None = None,
    source_sizes: dict[str | None, int] | None = None,
) -> Signals:
    """What is known of B completions without a pass through the model. Completions of one prompt come together."""
    ids = torch.stack([row["ids"] for row in rows])
    num_tokens = torch.tensor([int(policy.loss_mask(row).sum()) for row in rows])
    return Signals(
        num_tokens=num_tokens,
        num_all_tokens=torch.tensor([len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]),
        ids=ids,
        source=None if sources is None else [sources[index] for index in ids.tolist()],
        source_sizes=source_sizes,
        shares=torch.ones(len(rows)) if policy.counts_rows(loss_type) else num_tokens.float(),
        rewards=torch.stack([row["rewards"] for row in rows]).float(),
        advantages=torch.stack([row["advantages"] for row in rows]).float(),
        groups=torch.arange(len(rows)) // num_generations,
    )


def teaches(signals: Signals, num_generations: int, of_totals: bool = True) -> Tensor:
    """bool [B]: the rows whose policy loss has a gradient.

    Rounding leaves tiny advantages in groups whose rewards are all the same, so those are told by their rewards.
    of_totals: advantages are those of the total rewards; else several rewards' own were added up, which a group may
    have though its totals are the same.
    """
    assert signals.rewards is not None and signals.advantages is not None
    found = (signals.advantages.abs() > 1e-6) & (signals.num_tokens > 0)
    if of_totals:
        differ = group_statistics(signals.rewards.view(-1, num_generations)).effective()
        found &= differ.repeat_interleave(num_generations)
    return found


def with_copies(rows: Sequence[Row], signals: Signals, teaching: Tensor) -> Signals:
    """The signals with `copies`: how many completions of its prompt are token for token a row's own, with the same
    advantage; counted in the first of them, 0 in the others. Rows that do not teach (bool [B]) count 1.

    Such rows have the same gradient, so that one of them, weighted, gives that of all. `shares` are multiplied.
    """
    assert signals.groups is not None and signals.shares is not None
    counts = torch.ones(len(rows), dtype=torch.int64)
    first: dict[tuple[Any, ...], int] = {}
    for index in teaching.nonzero().flatten().tolist():
        row = rows[index]
        said = (row["completion_ids"].numpy().tobytes(), policy.loss_mask(row).numpy().tobytes())
        original = first.setdefault((int(signals.groups[index]), row["advantages"].item(), *said), index)
        if original != index:
            counts[original] += 1
            counts[index] = 0
    return dataclasses.replace(signals, copies=counts, shares=signals.shares * counts)


def fill(selection: Selection, spare: Tensor, keep: int, copies: Tensor, generator: torch.Generator) -> Selection:
    """The selection with rows of `spare` (int64 [n]) behind it, at random, until it stands for `keep` rows.

    copies: int64 [B], for how many rows each one stands.
    """
    stands_for = int(copies[selection.indices].sum())
    if stands_for >= keep:
        return selection
    more = spare[torch.randperm(len(spare), generator=generator)[: keep - stands_for]]
    weight = float(selection.weights.sum()) / stands_for if stands_for else 1.0  # what one row weighs there
    return dataclasses.replace(
        selection,
        indices=torch.cat([selection.indices, more]),
        weights=torch.cat([selection.weights, torch.full((len(more),), weight)]),
        reasons=selection.reasons + ("fill",) * len(more),
    )


def step_scale(signals: Signals, selection: Selection, teaching: Tensor, loss_type: str) -> float:
    """What the kept rows' advantages are multiplied by, so that the step is as long as that of all rows.

    The policy loss of all B rows is sum_{teaching i} l_i / D_all, D their number or their tokens, whatever `loss_type`
    divides by. That of the kept ones is sum_{chosen i} w_i l_i / D_kept: they stand for the teaching rows alone, and
    without a factor it would be up to D_all / D_teaching times as long. The factor is

        (D_teaching / D_all) · (D_kept / D_chosen),    D_kept, D_chosen weighted, D_chosen without those that fill up.

    Advantages are multiplied and not gradients, since a KL penalty is a mean over the kept rows as it is one over all.
    teaching: bool [B]. 1 where no row that teaches was chosen.
    """
    sizes = torch.ones(len(signals)) if policy.divides_by_rows(loss_type) else signals.num_tokens.float()
    weighed = sizes[selection.indices] * selection.weights
    chosen = float(weighed[teaching[selection.indices]].sum())
    if chosen == 0:
        return 1.0
    return float(sizes[teaching].sum() / sizes.sum()) * float(weighed.sum()) / chosen


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How kept rows are divided: `updates` optimizer steps, each of `micro_batches` on each of `ranks`."""

    updates: int
    micro_batches: int
    ranks: int


def micro_batches(
    rows: Sequence[Row],
    signals: Signals,
    selection: Selection,
    runs: Tensor,
    layout: Layout,
    loss_type: str,
    generator: torch.Generator,
) -> list[list[tuple[list[Row], Tensor]]]:
    """Deal the kept rows. Returns [rank][micro-batch] -> its rows, and what each one's gradient is multiplied by.

    runs: bool [B]; kept rows that are not run count in the loss's denominator, which is all that they would do. There
    a row counts as often as its weight says. Rows of an optimizer step are drawn at random, and then dealt by length,
    so that little is padded and ranks finish together. A rank that has no row left runs one with the factor 0: ranks
    take every pass together.
    """
    assert signals.num_all_tokens is not None
    order = torch.randperm(len(selection.indices), generator=generator)
    dealt: list[list[tuple[list[Row], Tensor]]] = [[] for _ in range(layout.ranks)]
    for places in order.tensor_split(layout.updates):
        indices, weights = selection.indices[places], selection.weights[places]
        step_tokens = max(float((signals.num_tokens[indices] * weights).sum()), 1.0)
        is_run = runs[indices]
        run, run_weights = indices[is_run], weights[is_run]
        lengths = signals.num_all_tokens[run].tolist()
        for rank, batches in enumerate(batch_selection.deal(lengths, layout.ranks, layout.micro_batches)):
            for mine in batches:
                if not mine:
                    dealt[rank].append(([rows[int(selection.indices[0])]], torch.zeros(1)))
                    continue
                tokens = signals.num_tokens[run[mine]]
                in_step = layout.micro_batches * layout.ranks
                scale = policy.row_scale(loss_type, tokens, float(weights.sum()), step_tokens, in_step)
                dealt[rank].append(([rows[row] for row in run[mine].tolist()], run_weights[mine] * scale))
    return dealt


def padding_share(dealt: Sequence[Sequence[tuple[list[Row], Tensor]]]) -> float:
    """Share of the micro-batches' tokens that is padding, over all ranks."""
    real = padded = 0
    for batches in dealt:
        for rows, _ in batches:
            prompts, completions = ([len(row[name]) for row in rows] for name in ("prompt_ids", "completion_ids"))
            real += sum(prompts) + sum(completions)
            padded += len(rows) * (max(prompts) + max(completions))
    return 1 - real / padded


def as_batch(
    rows: list[Row], scales: Tensor, length: float, num_items: Tensor, pad_token_id: int, device: torch.device
) -> dict[str, Any]:
    """A micro-batch as TRL's loss takes it. length: of the step, see `step_scale`. num_items: loss-bearing tokens of
    the rollout's kept rows, weighted."""
    batch = row_ops.join(rows, pad_token_id, device)
    batch["advantages"] = batch["advantages"] * length
    batch["num_items_in_batch"] = num_items.to(device)
    batch["row_scales"] = scales.to(device)
    return batch


def for_kept_rows(args: GRPOConfig, keeps: Sequence[float | int]) -> GRPOConfig:
    """`args`, which describe the rollouts, for the rows that are trained on: fewer micro-batches, as many optimizer
    steps. `generation_batch_size` stays the rollouts'. Raises ValueError where the rows do not divide."""
    rows, world, micro = args.generation_batch_size, args.world_size, args.per_device_train_batch_size
    try:
        kept = kept_rows(rows, keeps)[-1]
    except RecipeError as error:
        raise ValueError(f"batch_selector: {error.problem}") from None
    per_rollout, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
    if kept == rows:
        return args
    updates = max(per_rollout // accumulation, 1)
    rollouts = max(accumulation // per_rollout, 1)  # rollouts in one optimizer step
    if per_rollout * rollouts != accumulation * updates:
        raise ValueError(
            f"batch_selector: of steps_per_generation {per_rollout} and gradient_accumulation_steps {accumulation} one "
            "must be a multiple of the other; an optimizer step takes whole rollouts, or whole shares of one"
        )
    per_update = kept // updates // world
    micro = min(micro, max(per_update, 1))
    if kept != per_update * updates * world or per_update % micro:
        step = world * updates * micro
        near = " or ".join(str(number) for number in (kept // step * step, kept // step * step + step) if number)
        raise ValueError(
            f"batch_selector: {kept} of {rows} completions are kept, which do not divide over {world} ranks and "
            f"{updates} optimizer steps a rollout in micro-batches of {micro} (per_device_train_batch_size); keep "
            f"{near}"
        )
    micro_steps = per_update // micro
    # Anew, not changed in place: DeepSpeed's settings are derived from these numbers. GRPOConfig would have
    # the rollout's rows follow from those trained on, and whole groups among them; what it derives is put right below.
    changed = dataclasses.replace(
        args,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=micro_steps * rollouts,
        steps_per_generation=micro_steps * updates,
        generation_batch_size=None,
        num_generations=max(kept, 2),
        num_generations_eval=args.num_generations_eval or args.num_generations,
    )
    changed.generation_batch_size = rows
    changed.num_generations, changed.num_generations_eval = args.num_generations, args.num_generations_eval
    return changed
