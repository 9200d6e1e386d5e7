"""SFT with batch selection, on a tiny real model: what is trained on, how it is counted, and how it fails."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sft_args, worded_sums
from datasets import Dataset
from keeping import First, logged, losses
from launch import run_ranks
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTTrainer as TRLSFTTrainer

from siftrl import SFTTrainer, plugins
from siftrl.trainers import selected_rows

pytestmark = pytest.mark.slow


def train(model: Any, folder: Path, selector: Any, data: Dataset | None = None, **changes: Any) -> SFTTrainer:
    ours = ("keep", "candidates", "source_column", "scoring_batch_size", "peft_config", "processing_class")
    options = {name: changes.pop(name) for name in ours if name in changes}
    trainer = SFTTrainer(
        model, sft_args(folder, **changes), train_dataset=data or worded_sums(), batch_selector=selector, **options
    )
    trainer.train()
    return trainer


def token_losses(model: Any, row: dict[str, Any]) -> Tensor:
    """float64 [n]: the losses of the row's loss-bearing tokens."""
    ids = torch.tensor([row["input_ids"]])
    logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    found = -logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return found[torch.tensor(row["labels"][1:]) != -100]


def test_the_optimizers_work_on_a_gpu_is_not_the_selections_cost(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU goes on with the optimizer's step after Python has left it: here for 0.2 s."""
    monkeypatch.setattr(selected_rows, "settle", lambda device: time.sleep(0.2))
    trainer = train(tiny_model, tmp_path, First(), max_steps=2)
    assert trainer.clock.seconds["policy_update"] > 0.4 > trainer.clock.seconds["select"]


# ------------------------------------------------------------------------------------------ losses are what they were


def test_without_a_selector_the_losses_are_trls_bit_for_bit(tiny_model: str, tmp_path: Path) -> None:
    ours = train(tiny_model, tmp_path / "ours", None, max_steps=4)
    theirs = TRLSFTTrainer(tiny_model, sft_args(tmp_path / "theirs", max_steps=4), train_dataset=worded_sums())
    theirs.train()
    assert losses(ours) == losses(theirs)
    for mine, yours in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_keeping_all_rows_is_one_step_on_the_whole_batch(tiny_model: str, tmp_path: Path) -> None:
    """The loss is the mean over all tokens of 16 rows, and the step's gradient is that mean's."""
    selector = First()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = train(model, tmp_path, selector, keep=1.0, max_steps=1, optim="sgd", max_grad_norm=0, learning_rate=0.5)
    rows = [trainer.train_dataset[i] for i in selector.seen[0].ids.tolist()]
    loss = torch.cat([token_losses(before, row) for row in rows]).mean()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5 * old.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "packed", [{}, {"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}]
)
def test_weighted_step_is_the_weighted_mean_over_kept_tokens(
    tiny_model: str, tmp_path: Path, packed: dict[str, Any]
) -> None:
    """loss = sum_i w_i sum_t l_it / sum_i w_i n_i over the 8 kept rows, in 2 micro-batches, padded or packed."""
    selector = First(weigh=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = train(
        model,
        tmp_path,
        selector,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        optim="sgd",
        max_grad_norm=0,
        learning_rate=0.5,
        **packed,
    )
    assert trainer.args.gradient_accumulation_steps == 2
    assert trainer.data_collator.padding_free == bool(packed)
    kept = selector.seen[0].ids[selector.kept[0].indices].tolist()
    weights = torch.arange(1.0, 9.0, dtype=torch.float64) / 4.5
    assert selector.kept[0].weights.tolist() == pytest.approx(weights.tolist())
    per_row = [token_losses(before, trainer.train_dataset[row]) for row in kept]
    total = sum(w * mine.sum() for w, mine in zip(weights, per_row, strict=True))
    loss = total / sum(w * len(mine) for w, mine in zip(weights, per_row, strict=True))
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5 * old.grad, atol=1e-6, rtol=1e-4)


def test_dropped_rows_get_no_training_pass(tiny_model: str, tmp_path: Path) -> None:
    """Of 16 rows read, 16 are scored without gradient, and the 4 kept ones alone are trained on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    passes: dict[bool, int] = {True: 0, False: 0}

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs["input_ids"].shape != (2, 8):  # the probe of the model's parts
            passes[module.training] += len(kwargs["input_ids"])

    model.model.register_forward_hook(count, with_kwargs=True)
    trainer = train(model, tmp_path, First(), keep=4, max_steps=3)
    assert passes == {True: 12, False: 48}
    assert (trainer.rows_read, trainer.rows_trained) == (48, 12)
    assert logged(trainer, "rows_trained") == [4, 4, 4]
    assert trainer.args.per_device_train_batch_size == 4 and trainer.args.gradient_accumulation_steps == 1


def test_every_row_is_read_once_a_pass(tiny_model: str, tmp_path: Path) -> None:
    selector = First()
    trainer = train(tiny_model, tmp_path, selector, num_train_epochs=2, max_steps=-1)
    assert trainer.state.global_step == 6  # 48 rows in steps of 16, twice
    read = torch.cat([signals.ids for signals in selector.seen])
    assert read[:48].sort().values.tolist() == read[48:].sort().values.tolist() == list(range(48))
    assert read[:48].tolist() != read[48:].tolist()


# --------------------------------------------------------------------------------------- settings that must work


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")},
        {"peft_config": LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")},
        {"pad_to_multiple_of": 8},
        {"completion_only_loss": False},
        {"padding_free": True, "max_length": None, "gradient_checkpointing": True},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_chain_of_both_methods_trains_under(tiny_model: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    chain = [
        (plugins.load("selector", "utility_diversity"), 0.75),
        (plugins.load("selector", "gradient_coreset"), 8),
    ]
    trainer = train(tiny_model, tmp_path, chain, source_column="source", max_steps=12, learning_rate=3e-2, **changes)
    assert logged(trainer, "rows_trained") == [8] * 12
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    assert trainer.model.training


def test_only_the_assistants_tokens_count(tiny_model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    chats = [
        [
            {"role": "user", "content": f"{a}+1="},
            {"role": "assistant", "content": str(a + 1)},
            {"role": "user", "content": "+1="},
            {"role": "assistant", "content": str(a + 2)},
        ]
        for a in range(16)
    ]
    selector = First()
    train(
        tiny_model,
        tmp_path,
        selector,
        Dataset.from_dict({"messages": chats}),
        assistant_only_loss=True,
        processing_class=tokenizer,
        max_steps=1,
    )
    expected = [len(str(a + 1)) + len(str(a + 2)) + 2 for a in selector.seen[0].ids.tolist()]
    assert selector.seen[0].num_tokens.tolist() == expected


# ------------------------------------------------------------------------------------------------- bad input


def with_nan(model: Any, token: str, tiny_model: str) -> Any:
    """The model, with NaN where it reads `token`."""
    row = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids(token)
    embedding = model.get_input_embeddings()

    def poison(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.where((args[0] == row)[..., None], float("nan"), output)

    embedding.register_forward_hook(poison)
    return model


def test_row_with_nan_is_dropped_counted_and_recorded(tiny_model: str, tmp_path: Path) -> None:
    model = with_nan(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"), "7", tiny_model)
    trainer = train(model, tmp_path, plugins.load("selector", "high_loss"), max_steps=3, learning_rate=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    seven = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("7")
    poisoned = [seven in ids for ids in trainer.train_dataset["input_ids"]]
    bad = [c for line in lines for c in line["candidates"] if poisoned[c["id"]]]
    assert len(bad) > 5 and all(c["why"] == "not finite" and not c["chosen"] and c["score"] is None for c in bad)
    assert sum(logged(trainer, "not_finite")) == len(bad)
    assert logged(trainer, "rows_trained") == [8, 8, 8]


def test_nan_everywhere_stops_the_run(tiny_model: str, tmp_path: Path) -> None:
    model = with_nan(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"), "=", tiny_model)
    with pytest.raises(FloatingPointError, match="step 1: every candidate row has a NaN or infinite Loss"):
        train(model, tmp_path, plugins.load("selector", "high_loss"))


def test_rows_without_completion_tokens_are_never_chosen(tiny_model: str, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        tiny_model,
        sft_args(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4),
        train_dataset=worded_sums(),
        batch_selector=First(),
        keep=12,
    )
    # TRL ends every completion with <eos>, so there is always one: take the labels of every fourth row away
    trainer._columns = trainer._columns.map(
        lambda row, i: row if i % 4 else {"labels": [-100] * len(row["labels"])}, with_indices=True
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    empty = [c for line in lines for c in line["candidates"] if c["id"] % 4 == 0]
    assert len(empty) == 12 and all(c["tokens"] == 0 and c["why"] == "no tokens" for c in empty)
    assert sum(logged(trainer, "no_tokens")) == 12
    # steps with fewer than 12 usable rows train on those there are
    assert all(kept <= 12 for kept in logged(trainer, "rows_trained")) and min(logged(trainer, "rows_trained")) < 12


def test_fewer_usable_rows_than_micro_batches_still_step(tiny_model: str, tmp_path: Path) -> None:
    """2 usable rows in 4 micro-batches: two of them hold a row without labels; the loss is the 2 rows' mean."""
    selector = First()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = copy.deepcopy(model)
    trainer = SFTTrainer(
        model,
        sft_args(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8, max_steps=1),
        train_dataset=worded_sums().select(range(16)),
        batch_selector=selector,
    )
    trainer._columns = trainer._columns.map(
        lambda row, i: row if i < 2 else {"labels": [-100] * len(row["labels"])}, with_indices=True
    )
    trainer.train()
    assert trainer.args.gradient_accumulation_steps == 4 and logged(trainer, "rows_trained") == [2]
    loss = torch.cat([token_losses(before, trainer._columns[row]) for row in range(2)]).mean()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)


def test_no_row_has_completion_tokens(tiny_model: str, tmp_path: Path) -> None:
    trainer = SFTTrainer(tiny_model, sft_args(tmp_path), train_dataset=worded_sums(), batch_selector=First())
    trainer._columns = trainer._columns.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="none of the 16 candidate rows has a token that bears loss"):
        trainer.train()


def test_missing_sources_form_a_source_of_their_own(tiny_model: str, tmp_path: Path) -> None:
    data = worded_sums().map(lambda row: {"source": None if row["source"] == "words" else row["source"]})
    selector = plugins.load("selector", "gradient_coreset", {"small": 0.2})
    trainer = train(tiny_model, tmp_path, selector, data, source_column="source", max_steps=3)
    assert trainer._source_sizes == {"sums": 42, None: 6}
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    small = [c for line in lines for c in line["candidates"] if c["source"] is None]
    assert len(small) == 6 and all(c["chosen"] and c["why"] == "small source" for c in small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 7}, "7 of 16 rows are kept.*in micro-batches of 4.*keep 4 or 8"),
        ({"keep": 17}, "17 rows are more than the 16 to choose from"),
        ({"candidates": 64}, "a step reads 64 candidate rows, but the data set has 48"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy does not work with batch_selector"),
        ({"source_column": "sourse"}, "there is no column 'sourse'"),
        ({"selector": First(weigh=True), "loss_type": "dft"}, "First weights its rows, which loss_type dft"),
        ({"selector": First(weigh=True), "label_smoothing_factor": 0.1}, "First weights its rows"),
        ({"selector": First(weigh="yes")}, "First.weigh: must be a valid boolean"),  # type: ignore[arg-type]
    ],
)
def test_refused_before_the_run_starts(tiny_model: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4} | changes
    with pytest.raises(ValueError, match=message):
        train(tiny_model, tmp_path, changes.pop("selector", First()), **changes)


def test_streamed_data_is_refused(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load it without streaming"):
        train(tiny_model, tmp_path, First(), worded_sums().to_iterable_dataset())


def test_other_weights_than_declared_stop_the_run(tiny_model: str, tmp_path: Path) -> None:
    class Undeclared(First):
        weighted = False  # type: ignore[assignment]

    with pytest.raises(ValueError, match="Undeclared: it returned weights other than 1"):
        train(tiny_model, tmp_path, Undeclared(weigh=True))


# --------------------------------------------------------------------------------------------------- resume


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def chain_with_memory() -> list[tuple[Any, float]]:
    return [
        (plugins.load("selector", "utility_diversity", {"memory": 16}), 0.75),
        (plugins.load("selector", "gradient_coreset", {"estimate": "spsa"}), 8),  # type: ignore[list-item]
    ]


def test_resumed_run_ends_where_the_whole_one_did(tiny_model: str, tmp_path: Path) -> None:
    """Across the end of a pass over the data: 3 steps a pass, stopped after 4 of 7."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2}

    def build(folder: Path) -> SFTTrainer:
        return SFTTrainer(
            tiny_model,
            sft_args(folder, **options),
            train_dataset=worded_sums(),
            batch_selector=chain_with_memory(),
            source_column="source",
        )

    whole = build(tmp_path / "whole")
    whole.train()
    first = build(tmp_path / "parts")
    first.add_callback(StopAt(5))
    first.train()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-5", ignore_errors=True)
    second = build(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for mine, yours in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, yours)
    read = [(tmp_path / run / "selection.jsonl").read_text() for run in ("whole", "parts")]
    assert read[0] == read[1]  # step 5 was written anew
    assert (second.rows_read, second.rows_trained) == (whole.rows_read, whole.rows_trained) == (112, 56)
    assert second.sift_summary()["tokens"] == whole.sift_summary()["tokens"]


def test_resume_with_another_chain_is_refused(tiny_model: str, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, First(), max_steps=1, save_strategy="steps", save_steps=1)
    other = SFTTrainer(tiny_model, sft_args(tmp_path), train_dataset=worded_sums(), batch_selector=chain_with_memory())
    with pytest.raises(ValueError, match="with batch_selector keeping, this run has utility_diversity -> g"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# --------------------------------------------------------------------------------------------------- several ranks

CHAIN = [["gradient_norm", {}, 14], ["utility_diversity", {}, 12], ["gradient_coreset", {}, 8]]


@pytest.fixture(scope="module")
def one_rank(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[int]]]:
    out = tmp_path_factory.mktemp("one_rank")
    report = run_ranks("sft", 1, out, "--model", tiny_model, "--chain", json.dumps(CHAIN), "--micro", "8")[0]
    return report, chosen(out)


def chosen(out: Path) -> list[list[int]]:
    """For each step, the data-set rows that were trained on, in the candidates' order."""
    lines = [json.loads(line) for line in (out / "selection.jsonl").read_text().splitlines()]
    return [[c["id"] for c in line["candidates"] if c["chosen"]] for line in lines]


@pytest.mark.engines
@pytest.mark.parametrize("deepspeed", [None, "zero1", "zero2", "zero3"])
def test_two_ranks_choose_and_learn_as_one(
    tiny_model: str, tmp_path: Path, one_rank: tuple[dict[str, Any], list[list[int]]], deepspeed: str | None
) -> None:
    """Both methods in a chain, with sources and weights, scored 3 at a time so that one rank has a chunk more than the
    other: the head and the last block are sharded under ZeRO-3."""
    single, kept = one_rank
    options = ["--model", tiny_model, "--chain", json.dumps(CHAIN), "--micro", "4"]
    options += ["--deepspeed", deepspeed] if deepspeed else []
    reports = run_ranks("sft", 2, tmp_path, *options, deepspeed=deepspeed is not None)
    assert chosen(tmp_path) == kept and all(len(rows) == 8 for rows in kept)
    for report in reports:
        assert report["world"] == 2
        assert report["losses"] == pytest.approx(single["losses"], rel=1e-4)
        assert report["selection"]["rows_trained"] == 24
        assert report["held_out"] == pytest.approx(single["held_out"], rel=1e-4)  # 11 rows
        assert (report["reward"], report["rewarded"]) == (pytest.approx(single["reward"], abs=1e-6), 11)
    assert reports[0]["tokens"] == single["tokens"]


@pytest.mark.engines
def test_lora_under_zero3_and_a_resume(tiny_model: str, tmp_path: Path) -> None:
    options = ["--model", tiny_model, "--chain", json.dumps(CHAIN), "--micro", "4", "--deepspeed", "zero3", "--lora"]
    whole = run_ranks("sft", 2, tmp_path / "whole", *options, "--steps", "3", deepspeed=True)
    run_ranks("sft", 2, tmp_path / "parts", *options, "--steps", "2", "--checkpoint-at", "2", deepspeed=True)
    resumed = run_ranks("sft", 2, tmp_path / "parts", *options, "--steps", "3", "--resume", deepspeed=True)
    assert chosen(tmp_path / "parts") == chosen(tmp_path / "whole")
    assert resumed[0]["losses"][-1] == whole[0]["losses"][-1]
