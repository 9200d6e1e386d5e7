"""GRPO that trains on chosen completions: what is chosen, what a selector sees, and how it fails."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import letter_sum
from grpo_runs import Watching, build, log_probs, run, selector, small_first, teaching
from keeping import First, Unmeasured, logged, losses
from torch import Tensor
from transformers import AutoModelForCausalLM

from siftrl.signals import Loss, ValueGradient
from siftrl.trainers import rows as row_ops
from siftrl.trainers.grpo import GRPOTrainer

pytestmark = pytest.mark.slow


def test_selectors_see_one_of_the_same_and_its_weight_is_theirs(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    chooser = Unmeasured()
    trainer = build(
        tiny_model, tmp_path, sums, chooser, Watching, reward=letter_sum, max_completion_length=1, temperature=0.12
    )
    trainer.train()
    lines = [json.loads(line)["completions"] for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    for seen, kept, rows in zip(chooser.seen, chooser.kept, lines, strict=True):
        taught = [row for row in rows if row.get("why") != "no advantage" and row.get("why") != "fill"]
        copies = [row for row in taught if row.get("why") == "a copy"]
        assert len(seen) == len(taught) - len(copies) and int(seen.copies.sum()) == len(taught)
        assert torch.equal(seen.shares, (seen.copies * seen.num_tokens).float())  # dapo: tokens
        weights = [row["weight"] for row in taught if row["chosen"]]
        counts = seen.copies[kept.indices].float()
        assert weights == pytest.approx((counts * len(counts) / counts.sum()).tolist(), rel=1e-5)
    assert any(row.get("why") == "a copy" for rows in lines for row in rows)


def test_rows_without_an_advantage_take_no_ones_place(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """14 of 16 are kept: all that have an advantage, and others only because they are too few; those are not run."""
    chooser = Unmeasured()
    trainer = run(
        build(
            tiny_model,
            tmp_path,
            sums,
            chooser,
            Watching,
            keep=14,
            reward=small_first,
            max_steps=3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    mixed: list[bool] = []
    for rows, line, batches in zip(trainer.rollout_rows, lines, trainer.batches, strict=True):
        advantages = [row["advantages"].item() for row in rows]
        taught = {index for index, advantage in enumerate(advantages) if abs(advantage) > 1e-6}
        mixed.append(0 < len(taught) < 14)
        if not taught:  # see the test above
            continue
        chosen = {index for index, row in enumerate(line["completions"]) if row["chosen"]}
        assert chosen == taught
        assert all(row["why"] == "no advantage" for row in line["completions"] if not row["chosen"])
        assert [row["advantage"] for row in line["completions"]] == pytest.approx(advantages, rel=1e-4)
        assert [sums[row["id"]]["prompt"] for row in line["completions"]] == decoded(trainer, rows)
        (batch,) = batches
        assert len(batch["advantages"]) == len(taught)
        assert batch["num_items_in_batch"] >= batch["completion_mask"].sum()
    assert any(mixed)


def decoded(trainer: Any, rows: list[dict[str, Tensor]]) -> list[str]:
    return trainer.processing_class.batch_decode([row["prompt_ids"] for row in rows], skip_special_tokens=True)


def test_a_kl_penalty_has_every_kept_completion_run(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    trainer = run(
        build(tiny_model, tmp_path, sums, Unmeasured(), Watching, keep=0.5, reward=small_first, beta=0.1, max_steps=2)
    )
    assert logged(trainer, "rows_run") == [8, 8]
    lines = [json.loads(line)["completions"] for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [sum(row["chosen"] for row in rows) for rows in lines] == [8, 8]
    assert any(row.get("why") == "fill" and row["advantage"] == 0 for rows in lines for row in rows)
    assert all(sum(len(batch["advantages"]) for batch in batches) == 8 for batches in trainer.batches)


def test_free_selectors_before_it_spare_the_scoring(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """8 of 16 survive the first selector, so 8 are scored."""
    chooser = First()
    trainer = run(build(tiny_model, tmp_path, sums, [(Unmeasured(), 0.5), (chooser, 0.5)], reward=letter_sum))
    assert logged(trainer, "rows_scored") == [8] * 3 and logged(trainer, "rows_trained") == [4] * 3
    assert [len(signals) for signals in chooser.seen] == [8] * 3


def test_optimizer_steps_of_one_rollout(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """4 micro-batches of 4 in 2 optimizer steps become 2 of 4 in 2; each kept row is in one of them, twice over."""
    chooser = Unmeasured()
    trainer = run(
        build(
            tiny_model,
            tmp_path,
            sums,
            chooser,
            Watching,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            num_iterations=2,
            max_steps=8,
            reward=letter_sum,
        )
    )
    args = trainer.args
    assert (args.gradient_accumulation_steps, args.steps_per_generation, args.generation_batch_size) == (1, 2, 16)
    assert len(chooser.seen) == 2  # 2 optimizer steps x 2 iterations a rollout
    for step, batches in enumerate(trainer.batches):
        kept = [trainer.rollout_rows[step][index]["advantages"].item() for index in teaching(chooser, trainer, step)]
        assert [len(batch["advantages"]) for batch in batches] == [4, 4]
        assert sorted(torch.cat([batch["advantages"] for batch in batches]).tolist()) == sorted(kept)


@pytest.mark.parametrize("save", [2, 3])
def test_resuming_is_exact(tiny_model: str, sums: Any, tmp_path: Path, save: int) -> None:
    """All three selections; step 3 is in the middle of a rollout."""

    def start(folder: str, checkpoint: Path | None = None) -> Any:
        chain = [(selector("utility_diversity"), 12), (selector("gradient_coreset"), 8)]
        trainer = build(
            tiny_model,
            tmp_path / folder,
            sums,
            chain,
            prompt_selector=selector("prompt_curriculum", fallback=False),
            reward=letter_sum,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            max_steps=6,
            save_strategy="steps",
            save_steps=save,
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer

    whole = start("whole")
    resumed = start("resumed", tmp_path / "whole" / f"checkpoint-{save}")
    assert losses(resumed)[-(6 - save) :] == losses(whole)[-(6 - save) :]
    for mine, yours in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, yours)
    logs = [(tmp_path / folder / "selection.jsonl").read_text().splitlines() for folder in ("whole", "resumed")]
    assert logs[1] and logs[0][-len(logs[1]) :] == logs[1]
    assert whole.sift_summary()["selection"]["rows_trained"] == resumed.sift_summary()["selection"]["rows_trained"]
    with pytest.raises(ValueError, match="written with batch_selector utility_diversity -> gradient_coreset, this run"):
        args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer = build(
            tiny_model, tmp_path / "other", sums, None, prompt_selector=selector("prompt_curriculum"), **args
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save}"))


@pytest.mark.parametrize("prompts", [None, "uniform"])
def test_prompts_whose_completions_will_be_long_are_rolled_out_first(
    tiny_model: str, sums: Any, tmp_path: Path, prompts: str | None
) -> None:
    """With what was learned of lengths; each completion keeps the seed of its place in TRL's order or the choice."""

    def start(folder: str, by_length: bool) -> Any:
        chosen = selector(prompts) if prompts else None
        trainer = build(
            tiny_model, tmp_path / folder, sums, Unmeasured(), Watching, prompt_selector=chosen, reward=letter_sum
        )
        # lengths that the prompts tell: longer ones for larger first digits
        trainer.lengths.predict = lambda ids, tokens, predicted: ids.double() if by_length else -ids.double()
        trainer.train()
        return trainer

    long_first, short_first = start("long", True), start("short", False)
    for mine, theirs in zip(long_first.rollout_rows[:1], short_first.rollout_rows[:1], strict=True):
        ids = [int(row["ids"]) for row in mine[::4]]
        assert ids == sorted(ids, reverse=True) and ids != sorted(ids)
        assert [int(row["ids"]) for row in theirs[::4]] == ids[::-1]
        completions = [[row["completion_ids"].tolist() for row in rows] for rows in (mine, theirs)]
        groups = [[rows[at : at + 4] for at in range(0, 16, 4)] for rows in completions]
        assert groups[0] == groups[1][::-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 7}, r"7 of 8 completions .* keep 4 or 8"),
        ({"keep": 17}, "batch_selector: 17 rows are more than the 8"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6, "keep": 8}, "one must be a multiple"),
        ({"source_column": "family"}, "there is no column 'family'"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    tiny_model: str, sums: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build(tiny_model, tmp_path, sums, Unmeasured(), per_device_train_batch_size=4, **changes)


def test_spsa_sees_the_policy_loss(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """Slopes along random directions are those of the exact gradient."""
    chooser = Probing()
    run(build(tiny_model, tmp_path, sums, chooser, reward=letter_sum, max_steps=1, max_completion_length=12))
    (signals,) = chooser.seen
    exact, probed = (signals[signal].total(torch.eye(len(signals))) for signal in sorted(chooser.needs, key=repr))
    assert exact.norm() > 0
    # E[z z^T g] = g: over 64 directions of 64 x 64 numbers the estimates are noisy, but lie on g's side
    cosines = torch.cosine_similarity(exact, probed, dim=1)
    assert cosines.min() > 0.03 and cosines.mean() > 0.08, cosines


@dataclass
class Probing(First):
    needs: ClassVar[frozenset[Any]] = frozenset({ValueGradient(), ValueGradient("spsa", perturbations=64)})


@dataclass
class Asking(First):
    needs: ClassVar[frozenset[Any]] = frozenset({ValueGradient()})


class Comparing(GRPOTrainer):
    """Compares each row's signal with autograd of TRL's own loss of that row alone; collects their norms' ratios."""

    ratios: list[Tensor]

    def _keep_completions(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        kept = super()._keep_completions(batch)
        signals = self.chain[0].selector.seen[-1]
        rows = [row for row in row_ops.split(batch) if row["advantages"].abs() > 1e-6]
        assert len(rows) == len(signals)
        value = self.model.model.layers[-1].self_attn.v_proj.weight
        for place, row in enumerate(rows):
            one = row_ops.join([row], 0, torch.device("cpu")) | {"num_items_in_batch": torch.tensor(1.0)}
            loss = self._compute_loss(self.model, one)
            if self.loss_type in ("dapo", "cispo"):
                loss = loss / len(row["completion_ids"])
            expected = torch.autograd.grad(loss, value)[0].flatten()
            mine = signals[ValueGradient()].at(torch.arange(len(expected)), torch.tensor([place]))[0]
            assert torch.cosine_similarity(mine, expected, dim=0) > 1 - 1e-5
            self.ratios.append(expected.norm() / mine.norm())
        return kept


@pytest.mark.parametrize(
    ("kind", "changes"), [("grpo", {"beta": 0.3}), ("dapo", {}), ("cispo", {"epsilon_high": 5.0}), ("sapo", {})]
)
def test_the_scored_gradient_is_that_of_trls_loss(
    tiny_model: str, sums: Any, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "max_completion_length": 12, "max_grad_norm": 0}
    trainer = build(
        tiny_model,
        tmp_path,
        sums,
        Asking(),
        Comparing,
        reward=letter_sum,
        loss_type=kind,
        temperature=0.7,
        **options,
        **changes,
    )
    trainer.ratios = []
    trainer.train()
    ratios = torch.stack(trainer.ratios)  # one factor for all rows: what TRL divides by
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-3, atol=0)


def test_figures_count_by_the_advantage(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    """Loss: |A| times the mean over tokens of -log p."""
    chooser = First()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = run(build(model, tmp_path, sums, chooser, Watching, reward=letter_sum, max_steps=1, temperature=0.5))
    rows = [trainer.rollout_rows[0][index] for index in teaching(chooser, trainer)]
    with torch.no_grad():
        expected = [row["advantages"].abs() * -log_probs(before, row, 0.5).mean() for row in rows]
    torch.testing.assert_close(chooser.seen[0][Loss()][:8].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_budget_stops_the_scoring_and_says_so_once(
    tiny_model: str, sums: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousandth of a step is too little for any: after the steps that measure, rows are taken at random."""
    trainer = run(build(tiny_model, tmp_path, sums, First(), max_overhead=1e-3, max_steps=8, reward=letter_sum))
    scored = logged(trainer, "rows_scored")
    assert min(scored[:2]) > 12 and scored[-1] == 0  # all that have an advantage, then none
    assert logged(trainer, "rows_trained") == [8] * 8
    said = [record.message for record in caplog.records if "max_overhead" in record.message]
    assert len(said) == 1 and "more than 0%" in said[0]
    shares = logged(trainer, "share_of_time")
    assert len(shares) == 8 and shares[-1] < shares[1]


def test_a_budget_without_a_selector_limits_nothing(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    trainer = run(build(tiny_model, tmp_path, sums, None, max_overhead=0.1, skip_zero_advantage=True, max_steps=2))
    assert logged(trainer, "rows_scored") == [0, 0]


def test_completions_that_are_masked_for_their_length_count_as_the_longest(
    tiny_model: str, sums: Any, tmp_path: Path
) -> None:
    """Of a random model's completions nearly all come to the limit of 6 tokens; their masks are empty."""
    trainer = build(
        tiny_model, tmp_path, sums, Unmeasured(), Watching, reward=letter_sum, mask_truncated_completions=True
    )
    seen: list[Tensor] = []
    trainer.lengths.observe = lambda ids, tokens, predicted, lengths: seen.append(lengths)
    trainer.train()
    masked = [row for row in trainer.rollout_rows[0] if not row["completion_mask"].any()]
    assert len(masked) > 8
    assert seen[0].min() > 3
