"""DPO with batch selection, on a tiny real model: what a pair's loss and signals are, and what is trained on."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL_RUN
from datasets import Dataset
from keeping import First, logged, losses
from launch import run_ranks
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig
from trl import DPOTrainer as TRLDPOTrainer

from siftrl import DPOTrainer, pipeline, plugins
from siftrl.pairs import PAIR_LOSSES, PairLoss
from siftrl.recipe import RecipeError, load_recipe
from siftrl.signals import Embedding, Entropy, GradientNorm, Loss, NuclearNorm, ReferenceLoss, ValueGradient
from siftrl.trainers.held_out import held_out_loss

pytestmark = pytest.mark.slow


def preferences() -> Dataset:
    """48 sums: the right answer, and one that is wrong in length or in value; 6 of them are from the source 'words'."""
    rows = [(a, b) for a in range(8) for b in range(6)]
    return Dataset.from_dict(
        {
            "prompt": [f"{a}+{b}=" for a, b in rows],
            "chosen": [str(a + b) for a, b in rows],
            "rejected": [str(a + 2 * b + 1) + "?" * (a % 3) for a, b in rows],
            "source": ["words" if index % 8 == 0 else "sums" for index in range(len(rows))],
        }
    )


def dpo_args(folder: Path, **changes: Any) -> DPOConfig:
    """A small CPU DPOConfig: 16 pairs a step in micro-batches of 8."""
    return DPOConfig(**(SMALL_RUN | {"output_dir": str(folder), "lr_scheduler_type": "constant"} | changes))


def shaken(path: str, seed: int = 1) -> Any:
    """The tiny model with noise in its weights: a reference that the policy differs from, so that losses differ."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def build(model: Any, folder: Path, selector: Any, data: Any = None, **changes: Any) -> DPOTrainer:
    ours = ("keep", "candidates", "source_column", "scoring_batch_size", "peft_config", "ref_model", "eval_dataset")
    options = {name: changes.pop(name) for name in ours if name in changes}
    data = preferences() if data is None else data
    return DPOTrainer(model, args=dpo_args(folder, **changes), train_dataset=data, batch_selector=selector, **options)


def train(*args: Any, **changes: Any) -> DPOTrainer:
    trainer = build(*args, **changes)
    trainer.train()
    return trainer


def sequence(row: dict[str, Any], which: str) -> tuple[Tensor, int]:
    """The prompt with one of its completions, int64 [1, T], and the prompt's length."""
    return torch.tensor([row["prompt_ids"] + row[f"{which}_ids"]]), len(row["prompt_ids"])


def log_prob(model: Any, row: dict[str, Any], which: str) -> Tensor:
    """float64: log pi(completion | prompt), through the logits."""
    ids, start = sequence(row, which)
    logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum()


def pair_loss(model: Any, reference: Any, row: dict[str, Any], beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (h_chosen - h_rejected)), by hand."""
    chosen, rejected = (log_prob(model, row, which) for which in ("chosen", "rejected"))
    with torch.no_grad():
        before = log_prob(reference, row, "chosen") - log_prob(reference, row, "rejected")
    return -logsigmoid(beta * (chosen - rejected - before))


# ------------------------------------------------------------------------------------------ losses are what they were


def test_without_a_selector_the_losses_are_trls_bit_for_bit(tiny_model: str, tmp_path: Path) -> None:
    ours = train(tiny_model, tmp_path / "ours", None, max_steps=3, learning_rate=1e-2)
    args = dpo_args(tmp_path / "theirs", max_steps=3, learning_rate=1e-2)
    theirs = TRLDPOTrainer(tiny_model, args=args, train_dataset=preferences())
    theirs.train()
    assert losses(ours) == losses(theirs) and len(set(losses(ours))) == 3
    for mine, yours in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_keeping_all_pairs_is_trls_loss_of_the_batch(tiny_model: str, tmp_path: Path) -> None:
    """16 pairs in one micro-batch: the same pairs in the same order have the same loss in TRL's trainer, to the bit."""
    batches: list[Any] = []
    trainer = build(
        *(tiny_model, tmp_path, First()),
        ref_model=shaken(tiny_model),
        keep=1.0,
        max_steps=1,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
    )
    collate, trainer.data_collator = trainer.data_collator, lambda rows: batches.append(rows) or collate(rows)
    trainer.train()
    theirs = TRLDPOTrainer(
        tiny_model,
        shaken(tiny_model),
        dpo_args(tmp_path / "theirs"),
        train_dataset=preferences(),
        data_collator=collate,
    )
    loss = theirs.compute_loss(theirs.model, collate(batches[-1]))
    assert len(batches[-1]) == 16 and losses(trainer) == [loss.item()]
    assert abs(loss.item() - math.log(2)) > 1e-3


@pytest.fixture(scope="module")
def theirs(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> TRLDPOTrainer:
    args = dpo_args(tmp_path_factory.mktemp("theirs"), label_smoothing=0.1, beta=0.5)
    return TRLDPOTrainer(shaken(tiny_model, 2), shaken(tiny_model), args, train_dataset=preferences())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_loss_type_is_trls(theirs: TRLDPOTrainer, name: str) -> None:
    batch = theirs.data_collator([theirs.train_dataset[row] for row in range(5, 11)])
    theirs.loss_types = [name, "sigmoid"]
    theirs.loss_weights = [2.0, 0.5]
    with torch.no_grad():
        policy = theirs.compute_ref_log_probs(theirs.model, batch)
        reference = theirs.compute_ref_log_probs(theirs.ref_model, batch)
        chosen, rejected = (mine - its for mine, its in zip(policy, reference, strict=True))
        loss = PairLoss([name, "sigmoid"], [2.0, 0.5], beta=0.5, label_smoothing=0.1)
        lengths = batch["completion_mask"].sum(1).chunk(2)
        found = loss(chosen, rejected, *lengths)
        assert len(set(found.tolist())) == 6
        assert found.mean().item() == pytest.approx(theirs.compute_loss(theirs.model, batch).item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("precompute", [False, True])
def test_weighted_step_is_the_weighted_mean_over_kept_pairs(tiny_model: str, tmp_path: Path, precompute: bool) -> None:
    """sum_i w_i L_i / k over the 8 kept pairs, in 2 micro-batches."""
    selector, reference = First(weigh=True), shaken(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = train(
        *(model, tmp_path, selector),
        ref_model=reference,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        precompute_ref_log_probs=precompute,
        optim="sgd",
        max_grad_norm=0,
        learning_rate=0.5,
    )
    assert trainer.args.gradient_accumulation_steps == 2
    kept = selector.seen[0].ids[selector.kept[0].indices].tolist()
    weights = torch.arange(1.0, 9.0, dtype=torch.float64) / 4.5
    mine = torch.stack([pair_loss(before, reference, trainer.train_dataset[row]) for row in kept])
    (weights * mine / 8).sum().backward()
    assert losses(trainer)[0] == pytest.approx(mine.mean().item(), rel=1e-5)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5 * old.grad, atol=1e-6, rtol=1e-4)


def test_fewer_usable_pairs_than_micro_batches_still_step(tiny_model: str, tmp_path: Path) -> None:
    """3 pairs with both completions in 4 micro-batches of 2: the gradient is that of the 3 pairs' mean."""
    reference = shaken(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = build(
        *(model, tmp_path, First(), preferences().select(range(16))),
        ref_model=reference,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        optim="sgd",
        max_grad_norm=0,
        learning_rate=0.5,
    )
    rows = trainer._columns
    trainer._columns = rows.map(lambda row, i: row if i < 3 else {"rejected_ids": []}, with_indices=True)
    trainer.train()
    assert logged(trainer, "rows_trained") == [3] and logged(trainer, "no_tokens") == [13]
    torch.stack([pair_loss(before, reference, rows[row]) for row in range(3)]).mean().backward()
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5 * old.grad, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- signals

SPSA = ValueGradient("spsa")
ALL = (Loss(), ValueGradient(), SPSA, Entropy(), NuclearNorm(), Embedding(columns=16))


def test_signals_of_pairs_by_hand(tiny_model: str, tmp_path: Path) -> None:
    selector, reference = First(wants=ALL), shaken(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    trainer = build(model, tmp_path, selector, ref_model=reference, scoring_batch_size=3, beta=0.5)
    assert trainer.row_selection is not None
    scorer = trainer.row_selection.scorer
    rows, described = trainer.draw_candidates()
    found, finite = scorer.score(rows[:8], None, seed=5)
    assert finite.all() and described.shares is not None and described.shares.tolist() == [1.0] * 16
    value = model.model.layers[-1].self_attn.v_proj.weight
    for place, row in enumerate(rows[:8]):
        loss = pair_loss(model, reference, row, beta=0.5)
        (gradient,) = torch.autograd.grad(loss, value)
        assert found[Loss()][place].item() == pytest.approx(loss.item(), rel=1e-5)
        exact, estimate = (found[signal].mine[place] for signal in (ValueGradient(), SPSA))
        torch.testing.assert_close(exact.dense(), gradient.flatten(), atol=1e-7, rtol=1e-3)
        (slope,), (direction,) = estimate.slopes, estimate.seeds
        along = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(direction))
        assert slope.item() == pytest.approx((gradient * along).sum().item(), rel=0.02, abs=2e-3)
        logits = []
        for which in ("chosen", "rejected"):
            ids, start = sequence(row, which)
            logits.append(model(input_ids=ids).logits[0, start - 1 : -1].detach())
        entropy = sum(torch.distributions.Categorical(logits=z).entropy().mean() for z in logits) / 2
        norm = sum(torch.linalg.matrix_norm(z, "nuc") for z in logits) / 2
        assert found[Entropy()][place].item() == pytest.approx(entropy.item(), rel=1e-4)
        assert found[NuclearNorm()][place].item() == pytest.approx(norm.item(), rel=1e-3)
        assert described.num_tokens[place] == len(row["chosen_ids"]) + len(row["rejected_ids"])
        assert described.num_all_tokens[place] == described.num_tokens[place] + 2 * len(row["prompt_ids"])
    swapped = [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows[:8]]
    back = scorer.score(swapped, None, seed=5)[0]
    torch.testing.assert_close(back[ALL[-1]], -found[ALL[-1]])
    assert found[ALL[-1]].norm(dim=1).min() > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
        {"precompute_ref_log_probs": True, "loss_type": "ipo"},
        {"gradient_checkpointing": True, "max_length": 6, "loss_type": ["sigmoid", "hinge"], "loss_weights": [1, 0.5]},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_scored_losses_are_those_that_are_trained_on(tiny_model: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    chain = [(plugins.load("selector", "high_loss"), 0.75), (plugins.load("selector", "gradient_coreset"), 8)]
    trainer = train(*(tiny_model, tmp_path, chain), source_column="source", max_steps=10, learning_rate=3e-2, **changes)
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    assert logged(trainer, "rows_trained") == [8] * 10 and trainer.model.training
    assert trainer.row_selection is not None
    rows, _ = trainer.draw_candidates()
    trained = [parameter.requires_grad for parameter in trainer.model.parameters()]
    scored = trainer.row_selection.scorer.score(rows, None, seed=0)[0][Loss()]
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == trained and any(trained)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert scored.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_kept_are_the_pairs_that_are_ordered_worst(tiny_model: str, tmp_path: Path) -> None:
    reference = shaken(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = train(model, tmp_path, plugins.load("selector", "high_loss"), ref_model=reference, keep=4, max_steps=1)
    (line,) = [json.loads(text) for text in (tmp_path / "selection.jsonl").read_text().splitlines()]
    by_hand = {c["id"]: pair_loss(before, reference, trainer.train_dataset[c["id"]]).item() for c in line["candidates"]}
    worst = sorted(by_hand, key=lambda row: -by_hand[row])[:4]
    assert {c["id"] for c in line["candidates"] if c["chosen"]} == set(worst)


# ------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 9}, "9 of 16 rows are kept.*keep 8 or 16"),
        ({"candidates": 64}, "a step reads 64 candidate rows, but the data set has 48"),
        ({"selector": First(wants=[GradientNorm()])}, "GradientNorm is a figure of one sequence's own loss"),
        ({"selector": First(wants=[ReferenceLoss("there")])}, "ReferenceLoss is a figure of one sequence's own loss"),
        ({"loss_type": "aot"}, "loss_type aot does not work with batch_selector"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type sft does not work with batch_selector"),
        ({"ld_alpha": 0.5}, "ld_alpha does not work with a batch_selector that measures"),
        ({"source_column": "sourse"}, "there is no column 'sourse'"),
    ],
)
def test_refused_before_the_run_starts(tiny_model: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny_model, tmp_path, changes.pop("selector", First()), **changes)


def test_selector_of_rewards_is_refused(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LargestAdvantage reads rewards.*for GRPOTrainer"):
        build(tiny_model, tmp_path, plugins.load("selector", "largest_advantage"))


# -------------------------------------------------------------------------------------------------- in a recipe


def test_dpo_stage_of_a_recipe_trains_on_the_kept_pairs(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preferences().rename_columns({"chosen": "better", "rejected": "worse"}).to_json("pairs.jsonl")
    stage = {
        "kind": "dpo",
        "rows_per_step": 16,
        "micro_batch_size": 4,
        "batch_selector": [{"name": "high_loss", "keep": 0.75}, {"name": "gradient_coreset", "keep": 8}],
        "trainer": {"max_steps": 2, "loss_type": ["sigmoid_norm"], "disable_tqdm": True},
    }
    data = {"path": "pairs.jsonl", "chosen": "better", "rejected": "worse", "source": "source", "eval": {"size": 8}}
    recipe = {"model": {"path": tiny_model}, "data": data, "stages": [stage], "logging": {"every": 1}}
    Path("small.yaml").write_text(yaml.safe_dump(recipe))
    pipeline.run_recipe(load_recipe("small.yaml"))
    (summary,) = json.loads(Path("runs/small/summary.json").read_text())["stages"]
    assert (summary["kind"], summary["steps"], summary["selection"]["rows_trained"]) == ("dpo", 2, 16)
    assert summary["data"]["sources"] == {"sums": 35, "words": 5}
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert before.keys() == after.keys() == {"loss", "accuracy", "margin", "rows"} and after["rows"] == 8
    assert (before["accuracy"], before["margin"]) == (0, 0) and after["loss"] != before["loss"]
    trained = AutoModelForCausalLM.from_pretrained("runs/small/model", dtype="float32").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.rewards=[exact_match]", "stages.0.rewards: has no effect in a dpo stage"),
        ("stages.0.trainer.betta=1.0", "unknown option of TRL's DPOConfig; did you mean 'beta'"),
        ("stages.0.batch_selector=reward_variance", "reads rewards, which a dpo stage has none of"),
        ("stages.0.batch_selector={name: high_loss, keep: 9}", "micro_batch_size 8 does not divide the 9 rows"),
        ("data={reasoning_gym: {tasks: [{name: chain_sum}]}}", "reasoning_gym makes no preference pairs"),
    ],
)
def test_refused_in_a_recipe(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model: {path: a/model}\ndata: {path: pairs.jsonl}\nstages: [{kind: dpo}]\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override], check_installed=False)


# --------------------------------------------------------------------------------------------------- resume


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_resumed_run_ends_where_the_whole_one_did(tiny_model: str, tmp_path: Path) -> None:
    """Adapters, across the end of a pass over the data: 3 steps a pass, stopped after 2 of 4."""

    def make(folder: Path) -> DPOTrainer:
        chain = [
            (plugins.load("selector", "utility_diversity", {"memory": 16}), 0.75),
            (plugins.load("selector", "gradient_coreset", {"estimate": "spsa"}), 8),
        ]
        return build(
            *(tiny_model, folder, chain),
            source_column="source",
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            learning_rate=1e-2,
        )

    whole, first = make(tmp_path / "whole"), make(tmp_path / "parts")
    whole.train()
    first.add_callback(StopAt(3))
    first.train()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-3", ignore_errors=True)
    second = make(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for mine, yours in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, yours)
    read = [(tmp_path / run / "selection.jsonl").read_text() for run in ("whole", "parts")]
    assert read[0] == read[1] and (second.rows_read, second.rows_trained) == (64, 32)
    assert second.sift_summary()["tokens"] == whole.sift_summary()["tokens"] > 0


# --------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.engines
def test_two_ranks_choose_and_learn_as_one(tiny_model: str, tmp_path: Path) -> None:
    """16 pairs are scored 6 at a time: one rank has a chunk more than the other, which runs one all the same."""
    chain = [["utility_diversity", {}, 12], ["gradient_coreset", {}, 8]]
    preferences().to_json(tmp_path / "pairs.jsonl")
    selectors = [(plugins.load("selector", name, options), keep) for name, options, keep in chain]
    single = build(
        *(tiny_model, tmp_path / "one", selectors),
        source_column="source",
        scoring_batch_size=6,
        learning_rate=1e-2,
        eval_dataset=preferences().select(range(7)),
    )
    single.train()
    options = ["--model", tiny_model, "--chain", json.dumps(chain), "--data", str(tmp_path / "pairs.jsonl")]
    reports = run_ranks("dpo", 2, tmp_path / "two", *options, "--micro", "4")
    chosen = []
    for run in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / run / "selection.jsonl").read_text().splitlines()]
        chosen.append([[c["id"] for c in line["candidates"] if c["chosen"]] for line in lines])
    assert chosen[0] == chosen[1] and all(len(rows) == 8 for rows in chosen[0])
    for report in reports:
        assert report["world"] == 2
        assert report["losses"] == pytest.approx(losses(single), rel=1e-4)
        assert report["held_out"] == reports[0]["held_out"]
        assert report["held_out"] == pytest.approx(held_out_loss(single), rel=1e-4)
