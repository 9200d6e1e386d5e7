"""Completions that the correction for the engine's probabilities takes out of the loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import letter_sum
from grpo_runs import build, run, selector

from siftrl.trainers.grpo import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import engine_noise


class NoisyEngine(GRPOTrainer):
    """Rolls out as an engine would that reports probabilities, those of every fourth completion far too low."""

    _corrects_engine = True  # type: ignore[assignment]
    all_off = False

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        ids, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        reported = []
        for number, (prompt, completion) in enumerate(zip(prompt_ids, ids, strict=True)):
            tokens = torch.tensor([prompt + completion])
            with torch.no_grad():
                found = self._get_per_token_logps_and_entropies(
                    self.model, tokens, torch.ones_like(tokens), len(completion)
                )
            off = 5.0 if number % 4 == 0 or self.all_off else 0.0
            reported.append([logp - off for logp in found[0][0].tolist()])
        return ids, reported


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_no_selector_chooses_a_completion_that_the_loss_would_not_count(
    tiny_model: str, sums: Any, tmp_path: Path, mode: str
) -> None:
    options: dict[str, Any] = {"max_steps": 1, "vllm_importance_sampling_mode": mode, "reward": letter_sum}
    trainer = run(build(tiny_model, tmp_path, sums, selector("high_loss"), NoisyEngine, **options))
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    rows = next(line["completions"] for line in lines if "completions" in line)
    whole = [row["chosen"] for row in rows]
    masked = [row.get("why") == "no weight" for row in rows]
    figures = trainer.state.log_history[0]
    assert sum(whole) == 8 and figures["sampling/masked"] == 0
    if mode == "token_truncate":  # every completion keeps a weight
        assert not any(masked) and "batch/no_weight" not in figures
        return
    assert 1 <= sum(masked) <= 4 and figures["batch/no_weight"] == sum(masked)
    assert not any(chosen and zero for chosen, zero in zip(whole, masked, strict=True))


def test_where_none_has_a_weight_the_step_goes_on_and_says_so(tiny_model: str, sums: Any, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, sums, selector("high_loss"), NoisyEngine, max_steps=1, reward=letter_sum)
    trainer.all_off = True
    figures = run(trainer).state.log_history[0]
    assert figures["sampling/masked"] == 1 and figures["batch/rows_trained"] == 8


def test_engine_noise_costs_long_completions_their_weight_unless_it_is_corrected_token_by_token() -> None:
    """The default of recipes stands on this; docs/rollouts.md has the figures."""
    found = {mode: engine_noise.effect(mode, 0.04, 1024, 512, 3.0, 0) for mode in engine_noise.MODES}
    masked, mean, share = found["sequence_mask"]
    assert masked > 0.03 and mean < 0.6 and share < 0.5
    assert found["sequence_truncate"][0] == 0 and found["sequence_truncate"][1] < 0.8
    assert found["token_truncate"] == pytest.approx((0, 1, 1), abs=0.01)
    # the weight under the engine that drew the tokens has mean 1 before it is clipped
    assert engine_noise.effect("sequence_truncate", 0.012, 256, 4096, 1e9, 0)[1] == pytest.approx(1, abs=0.02)
