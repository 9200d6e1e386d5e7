"""The arithmetic of the benchmarks of batch selection, and each command once in its `--smoke` setting."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_command

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_batch_learning  # noqa: E402
import bench_coreset  # noqa: E402
import bench_policy_coreset  # noqa: E402
import bench_score  # noqa: E402

from siftrl.coreset import facility_location  # noqa: E402
from siftrl.logits import Projection  # noqa: E402
from siftrl.types import Selection, Signals  # noqa: E402

MIB = 2**20


def test_both_ways_score_rows_alike_also_beyond_the_projections_period() -> None:
    rows = bench_score.Rows.random(rows=3, tokens=37, vocabulary=50, width=8)
    projection = Projection(50, rows=4, columns=6, positions=16)  # 37 positions are two periods and a part of one
    scores = bench_score.without_logits(rows, projection, micro_batch=2)
    assert scores.norms.shape == (3,) and scores.embeddings.shape == (3, 24)
    for row in range(3):
        norm, embedding = bench_score.from_logits(rows.hidden[row], rows.weight, projection)
        assert norm == pytest.approx(torch.linalg.matrix_norm(rows.hidden[row] @ rows.weight.T, "nuc").item(), rel=1e-5)
        assert scores.norms[row].item() == pytest.approx(norm.item(), rel=1e-5)
        assert embedding.norm() > 0
        torch.testing.assert_close(scores.embeddings[row], embedding, rtol=1e-4, atol=1e-5)
    assert (scores.norms[0] - scores.norms[1]).abs() > 1e-3  # not one row three times


def test_the_peak_is_that_of_the_call_alone() -> None:
    def large() -> int:
        return len(torch.ones(64 * MIB // 4))

    def small() -> int:
        return len(torch.ones(MIB // 4))

    for run, least, most in ((large, 60, 80), (small, 0, 8), (large, 60, 80)):  # freed blocks do not hide the next
        _, cost = bench_score.measure(run)
        if cost.memory is None:
            pytest.skip("the system does not tell the process's peak memory")
        assert least <= cost.memory / MIB <= most and cost.seconds > 0


def test_lazy_greedy_picks_the_largest_gain_first() -> None:
    """Points 0, 1, 10, 12 and s = 12 - distance. Over each row's worst, the gains are 22, 24, 24, 20: row 1, the first
    of equals. It leaves gains 1, 18, 18 for rows 0, 2, 3: row 2. That leaves 1 and 2: row 3, then row 0."""
    at = torch.tensor([0.0, 1.0, 10.0, 12.0])
    similarity = 12 - (at[:, None] - at).abs()
    assert bench_coreset.lazy_greedy(similarity.numpy(), 4) == [1, 2, 3, 0]
    assert bench_coreset.lazy_greedy(similarity.numpy(), 2) == [1, 2]
    points = torch.randint(100, (60, 2), generator=torch.Generator().manual_seed(0)).float()
    similarity = 300 - torch.cdist(points, points, p=1)  # whole numbers, so that both see the same ties
    assert bench_coreset.lazy_greedy(similarity.numpy(), 25) == facility_location(similarity, 25)[0].tolist()


def test_gradients_are_compared_by_tokens_and_weights() -> None:
    """g_1 = (1, 0) with 3 tokens, g_2 = (0, 2) with 1: the whole is (3/4, 1/2), of norm sqrt(13) / 4. Row 2 alone,
    (0, 2), has cosine (1/2) / (sqrt(13) / 4) and is (3/4, -3/2) off. With weights 1 and 3 the two are (1/2, 1)."""
    products, tokens = torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double(), torch.tensor([3, 1])
    norm = math.sqrt(13) / 4
    alone = bench_coreset.compare(torch.tensor([0.0, 1.0]).double(), tokens, products)
    assert alone == pytest.approx((0.5 / norm, math.hypot(0.75, 1.5) / norm))
    weighted = bench_coreset.compare(torch.tensor([1.0, 3.0]).double(), tokens, products)
    cosine = (0.5 * 0.75 + 1 * 0.5) / (norm * math.sqrt(1.25))
    assert weighted == pytest.approx((cosine, math.hypot(0.25, 0.5) / norm))
    assert bench_coreset.compare(torch.ones(2).double(), tokens, products) == pytest.approx((1, 0))


def test_the_compared_gradient_is_that_of_the_weighted_loss_of_the_kept_rows(tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    prompts, answers = [[5, 6], [7], [8, 9, 10]], [[11, 12], [13, 14, 15, 16], [17]]
    rows: Any = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    mixture = bench_coreset.Mixture(model, collate, rows, ["a"] * 3, steps=0, loss=0.0)

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        """Of sum_i w_i (loss of row i's tokens) / sum_i w_i n_i, all rows in one padded batch."""
        inputs = collate(rows)
        log_probs = model(**inputs, fused_lm_head=True).log_probs
        bears_loss = inputs["labels"][:, 1:] != -100
        loss = -(weights @ log_probs.sum(1)) / (weights @ bears_loss.sum(1).float())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()

    weights = torch.tensor([0.5, 0.0, 1.5])
    few, whole = gradient(weights), gradient(torch.ones(3))
    cosine, error = (few @ whole / (few.norm() * whole.norm())).item(), ((few - whole).norm() / whole.norm()).item()
    products = bench_coreset.gradient_products(mixture, range(3))
    found = bench_coreset.compare(weights.double(), torch.tensor([2, 4, 1]), products)
    assert found == pytest.approx((cosine, error), rel=1e-4)
    assert cosine < 0.95  # so that agreement means something


def test_rows_by_source_stand_for_their_sources_tokens() -> None:
    tokens = torch.tensor([2, 2, 2, 2, 2, 2, 30, 10])  # six rows of a, two of b: of four, three and one are kept
    signals = Signals(num_tokens=tokens, source=["a"] * 6 + ["b"] * 2)
    for seed in range(5):
        selection = bench_coreset.RowsBySource().select(signals, 4, torch.Generator().manual_seed(seed))
        kept = selection.indices.tolist()
        assert sum(row < 6 for row in kept) == 3 and len(set(kept)) == 4
        b = next(row for row in kept if row >= 6)
        ratio = (40 / tokens[b]) / (12 / 6)  # b's 40 tokens fall to one row, a's 12 to three of 2 each
        assert selection.weights[-1] / selection.weights[0] == pytest.approx(ratio.item())


def script(tmp_path: Path, command: str) -> tuple[dict[str, Any], list[list[str]]]:
    """The figures that it wrote, and the cells of the tables' rows that it printed."""
    figures = tmp_path / f"{command}.json"
    full = [sys.executable, str(SCRIPTS / "bench_batch_selection.py"), command, "--smoke", "--json", str(figures)]
    done = run_command(full)
    assert done.returncode == 0, f"{' '.join(full)}\n{done.stdout[-3000:]}\n{done.stderr[-4000:]}"
    assert "torch threads" in done.stdout  # the hardware
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return json.loads(figures.read_text()), [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_score_times_both_ways_and_finds_the_same_scores(tmp_path: Path) -> None:
    raw, cells = script(tmp_path, "score")
    assert [(case["tokens"], case["vocabulary"], case["width"]) for case in raw["cases"]] == [
        (8, 400, 16),
        (600, 400, 16),
    ]
    for case in raw["cases"]:
        assert case["norm_difference"] < 1e-5 and case["embedding_difference"] < 1e-5
        assert max(case["against_float64"].values()) < 1e-5
        seconds = case["seconds"]
        assert len(seconds["siftrl"]) == len(seconds["direct"]) == 3
        pairs = zip(seconds["siftrl"], seconds["siftrl, frozen head"], strict=True)
        assert all(whole > rows > 0 for whole, rows in pairs)
        median = {name: sorted(values)[1] for name, values in seconds.items()}
        row = next(row for row in cells if row[0] == f"{case['tokens']} x 400, 16")
        assert row[4] == f"**{median['direct'] / median['siftrl']:.1f}**"
        assert case["logits"] == 2 * case["tokens"] * 400 * 4


@pytest.mark.slow
def test_coreset_judges_every_method_early_and_late(tmp_path: Path) -> None:
    raw, cells = script(tmp_path, "coreset")
    for location in raw["facility_location"]:
        ours, theirs = location["objective"]
        assert ours == pytest.approx(theirs, rel=1e-6) and len(location["seconds"]["siftrl"]) == 2
    assert [phase["train_steps"] for phase in raw["phases"]] == [1, 2]
    assert sum(raw["rows"].values()) == 32
    for phase in raw["phases"]:
        judged = {(one["method"], one["keep"]): one["batches"] for one in phase["quality"]}
        assert list(judged) == [(name, 8) for name in bench_coreset.METHODS]
        for batches in judged.values():
            assert len(batches) == 2
            assert all(
                0 < batch["cosine"] < 1 and batch["error"] > 0.1 and 0 < batch["tokens"] < 1 for batch in batches
            )
        assert len({batches[0]["error"] for batches in judged.values()}) > 6  # they do choose different rows
        assert all(len(values) == 2 for values in phase["seconds"].values())
    late = {one["method"]: one["batches"] for one in raw["phases"][1]["quality"]}["uniform"]
    row = [row for row in cells if row[0] == "uniform"][1]
    assert row[2].startswith(f"{(late[0]['cosine'] + late[1]['cosine']) / 2:.3f} ± ")


def test_completions_are_compared_by_what_they_count_in_the_loss() -> None:
    """g_1 = (1, 0), g_2 = (0, 2), g_3 = 0, without an advantage, of 3, 1 and 4 tokens. Row 2 alone is, by rows, (0, 2)
    for (1/2, 1), by tokens for (3/4, 1/2). V sees the second coordinate only."""
    gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]).double()
    value = gradients[:, 1:]
    signals = Signals(num_tokens=torch.tensor([3, 1, 4]), advantages=torch.tensor([1.0, -1.0, 0.0]))
    rollout = bench_policy_coreset.Rollout(signals, value, (gradients @ gradients.T, value @ value.T))
    selection = Selection.of(torch.tensor([1]), 3)
    for loss, (first, second) in {"rows": (0.5, 1.0), "tokens": (0.75, 0.5)}.items():
        found, norm = bench_policy_coreset.against_all(rollout.counting(loss), selection), math.hypot(first, second)
        expected = {"cosine": second / norm, "error": math.hypot(first, 2 - second) / norm}
        assert found == pytest.approx(expected | {"value_cosine": 1, "value_error": (2 - second) / second})


def test_the_first_rollout_of_completions_stands_apart() -> None:
    """Per model the mean of the later rollouts: (2 + 4) / 2 and (4 + 6) / 2, which are 4 ± 1."""
    runs = []
    for errors in ([10.0, 2.0, 4.0], [20.0, 4.0, 6.0]):
        rollouts = [dict.fromkeys(bench_policy_coreset.FIGURES, error) for error in errors]
        one = {"loss": "rows", "keep": 0.5, "method": "uniform_rows", "rollouts": rollouts}
        runs.append({"quality": [one, one | {"loss": "tokens"}, one | {"keep": 0.25}, one | {"method": "other"}]})
    cells = bench_policy_coreset._cells(runs, "rows", 0.5, "uniform_rows")
    assert cells == ["uniform_rows", "0.5", *["4.000 ± 1.000"] * 4, *["15.000 ± 5.000"] * 2]


@pytest.mark.slow
def test_untrained_models_completions_are_judged_by_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_policy_coreset, "_warm_up", lambda *_: pytest.fail("it is trained"))
    figures = tmp_path / "figures.json"
    arguments = ["--smoke", "--seeds", "3", "--untrained", "--loss", "tokens", "--json", str(figures)]
    assert bench_policy_coreset.main(arguments) == 0
    (run,) = json.loads(figures.read_text())["runs"]
    assert run["seed"] == 3 and all(0 < usable <= 64 for usable in run["usable"])
    assert all(0.02 < reward < 0.2 for reward in run["rewards"])  # 1 character in 10 is a digit, 1 in 100 the right one
    judged = {(one["loss"], one["keep"], one["method"]): one["rollouts"] for one in run["quality"]}
    assert list(judged) == [("tokens", keep, name) for keep in (0.5, 0.25) for name in bench_policy_coreset.METHODS]
    assert all(len(rollouts) == 2 for rollouts in judged.values())
    assert len({rollouts[0]["error"] for rollouts in judged.values()}) == len(judged)  # they do choose different rows
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| uniform", "| gradient"))]
    half = judged["tokens", 0.5, "uniform_rows"]
    assert len(printed) == 10 and printed[0].startswith(f"| uniform_rows | 0.5 | {half[1]['cosine']:.3f} ± nan |")
    assert f" {half[0]['error']:.3f} ± nan | {half[0]['value_error']:.3f} ± nan |" in printed[0]


def learnt(arm: str, losses: list[float], seconds: float) -> dict[str, Any]:
    """A run of `bench_batch_learning.py` with a point every 10 steps."""
    points = []
    for index, loss in enumerate(losses):
        by_source = dict.fromkeys(bench_batch_learning.FAMILIES, loss)
        point = {"step": 10 * index, "seconds": seconds * index, "tokens": 100 * index, "loss": by_source}
        point |= {"accuracy": by_source, "loss_mixture": loss, "accuracy_mixture": loss}
        points.append(point | {"loss_mean": loss, "accuracy_mean": loss})
    return {"arm": arm, "seed": 0, "points": points, "selection": None}


def test_learning_is_measured_against_what_the_full_batch_spent() -> None:
    full, other = learnt("full batch", [4, 3, 2, 1], 2.0), learnt("uniform", [4, 2, 2.5, 1.5], 1.0)
    cost = bench_batch_learning.cost_to_reach
    assert cost(other["points"], 1.75, "seconds") == pytest.approx(2.75)
    assert cost(other["points"], 2.25, "tokens") == pytest.approx(225)  # below it once before, but not for good
    assert cost(other["points"], 1.0, "step") is None and cost(other["points"], 4.5, "step") == 0
    facts = {"cpu": "c", "cores": 2, "torch_threads": 1, "gpus": [], "load_before": 0.0, "versions": {}}
    text = bench_batch_learning.render([full, other], facts)
    assert "| uniform | never | never | never |" in text  # the full batch's end
    # 1.5, the level that both reach: the full batch after 25 of its 30 steps, uniform at its end
    assert "| full batch | 0.83 | 0.83 | 0.83 |" in text and "| uniform | 0.50 | 1.00 | 1.00 |" in text


@pytest.mark.slow
def test_learning_trains_an_arm_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--seeds", "0", "--arms", "full batch", "both", "--jobs", "2", "--steps", "4"]
    options += ["--eval-every", "2", "--rows", "400", "--batch", "16", "--width", "32", "--eval-size", "16"]
    command = [sys.executable, str(SCRIPTS / "bench_batch_learning.py"), "learn", *options]
    done = run_command(command)
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n" + "".join(
        p.read_text()[-2000:] for p in tmp_path.glob("*.log")
    )
    both = json.loads((tmp_path / "both-0.json").read_text())
    assert [point["step"] for point in both["points"]] == [0, 2, 4]
    assert both["selection"]["rows_read"] == 64 and both["selection"]["rows_trained"] == 32
    assert (tmp_path / "learning.png").stat().st_size > 1000 and "| both | 1 |" in (
        tmp_path / "learning.md"
    ).read_text()
    before = (tmp_path / "both-0.json").stat().st_mtime_ns
    assert run_command(command).returncode == 0
    assert (tmp_path / "both-0.json").stat().st_mtime_ns == before
