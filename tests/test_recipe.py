"""The recipe: what loads, what is refused and in which words, and the arithmetic of a step."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from siftrl import recipe_checks
from siftrl.recipe import (
    BatchSelectorConfig,
    DataConfig,
    DistributionConfig,
    GRPOStage,
    ModelConfig,
    Recipe,
    RecipeError,
    SelectionConfig,
    SFTStage,
    SignalsConfig,
    batch_arithmetic,
    deepspeed_config,
    dump,
    load_recipe,
    resolved,
)
from siftrl.recipe_text import parse_yaml
from siftrl.schema import recipe_schema
from siftrl.trainer_checks import REPORTS, VALUES, check_trainer_values
from siftrl.trl_options import OWNED, check_trainer_options, trl_options

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BASE = """\
model:
  scratch: {hidden_size: 96}
data:
  path: rows.jsonl
  eval: {size: 100}
rewards:
  - exact_match
stages:
  - kind: sft
    name: warmup
    rows_per_step: 128
    micro_batch_size: 64
    trainer: {max_steps: 1200, learning_rate: 1e-3, eval_strategy: no}
  - kind: grpo
    prompts_per_step: 16
    completions_per_prompt: 16
    micro_batch_size: 64
    prompt_selector: {name: prompt_curriculum}
    eval: {greedy: true}
    trainer: {max_steps: 20}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def refusal(path: Path, *overrides: str, **options: bool) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what loads


def test_defaults_and_plugins_are_filled_in(base: Path) -> None:
    recipe = load_recipe(base)
    warmup, grpo = recipe.stages
    assert isinstance(warmup, SFTStage) and isinstance(grpo, GRPOStage)
    assert (recipe.name, warmup.name, grpo.name) == ("base", "warmup", "grpo")
    assert warmup.trainer == {"max_steps": 1200, "learning_rate": 0.001, "eval_strategy": "no"}
    assert grpo.prompt_selector is not None
    assert grpo.prompt_selector.options["candidates"] == 4
    assert grpo.prompt_selector.options["value"]["body"] == "own"
    assert recipe.rewards[0].options["column"] == "answer"
    assert recipe.data_of(grpo) is recipe.data and recipe.rewards_of(grpo) is recipe.rewards
    assert recipe.model.scratch is not None and recipe.model.scratch.head_dim == 16
    assert recipe.run_folder == Path("runs/base")


def test_reasoning_gym_has_its_own_columns() -> None:
    data = DataConfig.model_validate({"reasoning_gym": {"tasks": [{"name": "chain_sum"}]}})
    assert (data.prompt, data.completion, data.source) == ("question", "answer", "task")
    assert DataConfig(path="rows.jsonl").source is None


def test_batch_selectors_come_as_a_name_a_section_or_a_chain(base: Path) -> None:
    def chain(override: str) -> list[BatchSelectorConfig]:
        return load_recipe(base, [f"stages.0.batch_selector={override}"]).stages[0].batch_selectors

    assert chain("null") == []
    (by_name,) = chain("high_loss")
    assert (by_name.name, by_name.keep, by_name.options) == ("high_loss", 0.5, {"normalise": True})
    (section,) = chain("{name: high_loss, keep: 64, normalise: false}")
    assert (section.keep, section.options) == (64, {"normalise": False})
    first, second = chain("[uniform_rows, {name: reducible_loss, keep: 1.0, reference: a/model}]")
    assert (first.name, second.options) == ("uniform_rows", {"reference": "a/model"})
    assert load_recipe(base).stages[1].batch_selectors == []


def test_a_grpo_stage_takes_what_an_sft_stage_takes_for_its_batch_selectors(base: Path) -> None:
    chain = "[{name: largest_advantage, keep: 128}, {name: gradient_coreset, keep: 0.5}]"
    settings = ["signals={micro_batch_size: 32, head: lm_head}", "selection={max_overhead: 0.25}"]
    written = [f"stages.1.{text}" for text in (f"batch_selector={chain}", *settings)]
    stage = load_recipe(base, written).stages[1]
    assert isinstance(stage, GRPOStage)
    assert [(one.name, one.keep) for one in stage.batch_selectors] == [
        ("largest_advantage", 128),
        ("gradient_coreset", 0.5),
    ]
    assert stage.signals == SignalsConfig(micro_batch_size=32, head="lm_head")
    assert stage.selection == SelectionConfig(max_overhead=0.25)
    for flag in ("true", "false"):
        load_recipe(base, [*written, f"stages.1.selection.skip_zero_advantage={flag}"])
    load_recipe(base, ["stages.0.batch_selector=high_loss", "stages.0.selection.max_overhead=0.99"])


def test_rows_without_advantage_may_be_left_out_without_a_batch_selector(base: Path) -> None:
    stage = load_recipe(base, ["stages.1.selection.skip_zero_advantage=true"]).stages[1]
    assert stage.selection.skip_zero_advantage is True and not stage.batch_selectors


@pytest.mark.parametrize(
    "selectors",
    [
        "high_loss",
        "{name: high_loss, keep: 1.0}",
        "[{name: high_loss, keep: 100}, {name: hard_batches, share: 0.5, keep: 1.0}, {name: uniform_rows, keep: 1}]",
    ],
)
def test_a_written_batch_selector_loads_to_the_same(selectors: str, base: Path, tmp_path: Path) -> None:
    """`keep: 1` is one row and `keep: 1.0` is all of them, so their types count as well."""
    settings = [f"batch_selector={selectors}", "signals.value=self_attn.v_proj", "selection.max_overhead=0.3"]
    recipe = load_recipe(base, [f"stages.{stage}.{setting}" for stage in (0, 1) for setting in settings])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump(recipe))
    again = load_recipe(copy)
    assert again == recipe and resolved(again) == resolved(recipe)
    for stage in (0, 1):
        before, after = ([type(one.keep) for one in r.stages[stage].batch_selectors] for r in (recipe, again))
        assert before == after
        assert again.stages[stage].signals == SignalsConfig(value="self_attn.v_proj")
        assert again.stages[stage].selection == SelectionConfig(max_overhead=0.3)


def test_overrides_reach_batch_selectors(base: Path) -> None:
    base.write_text(BASE.replace("rows_per_step: 128", "rows_per_step: 128\n    batch_selector: high_loss"))
    (one,) = load_recipe(base, ["stages.0.batch_selector.keep=0.25"]).stages[0].batch_selectors
    assert (one.name, one.keep) == ("high_loss", 0.25), "below the short form"
    chain = "[high_loss, {name: uniform_rows, keep: 8}]"
    base.write_text(BASE.replace("rows_per_step: 128", f"rows_per_step: 128\n    batch_selector: {chain}"))
    overrides = ["stages.0.batch_selector.0.keep=64", "stages.warmup.batch_selector.uniform_rows.keep=16"]
    first, second = load_recipe(base, overrides).stages[0].batch_selectors
    assert [(first.name, first.keep), (second.name, second.keep)] == [("high_loss", 64), ("uniform_rows", 16)]


def test_overrides_reach_lists_by_index_and_by_name(base: Path) -> None:
    recipe = load_recipe(
        base,
        [
            "seed=3",
            "stages.warmup.trainer.learning_rate=1e-4",
            "stages.1.rollout.temperature=0.5",
            "stages.grpo.prompt_selector.value.lr=2e-4",
            "rewards.0.weight=2",
            "stages.grpo.rewards=[{name: exact_match, options: {ignore_case: true}}]",
            "distribution.deepspeed=null",
        ],
    )
    warmup, grpo = recipe.stages
    assert isinstance(grpo, GRPOStage) and grpo.prompt_selector is not None
    assert (recipe.seed, warmup.trainer["learning_rate"], grpo.rollout.temperature) == (3, 1e-4, 0.5)
    assert grpo.prompt_selector.options["value"]["lr"] == 2e-4
    assert recipe.rewards[0].weight == 2.0
    assert recipe.rewards_of(grpo)[0].options["ignore_case"] is True
    assert recipe.rewards_of(warmup)[0].options["ignore_case"] is False


def test_yaml_reads_numbers_and_words_as_they_look() -> None:
    read = parse_yaml("[1e-4, 1.5E+3, -2e5, .5, 3, 0x10, 1_000, no, off, 2026-01-01, true, ~, 1.0e-05, .inf]")
    assert read == [1e-4, 1500.0, -2e5, 0.5, 3, 16, 1000, "no", "off", "2026-01-01", True, None, 1e-5, float("inf")]
    assert [type(value) for value in read[:5]] == [float, float, float, float, int]


@pytest.mark.parametrize("path", [*RECIPES, None], ids=lambda path: path.stem if path else "base")
def test_a_written_recipe_loads_to_the_same(path: Path | None, base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path or base, ["seed=5"], check_installed=False)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump(recipe))
    again = load_recipe(copy, check_installed=False)
    assert again == recipe
    assert resolved(again) == resolved(recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_its_launch_line_and_fits_its_ranks(path: Path) -> None:
    opening = re.match(r"(#.*\n)+", path.read_text())
    assert opening, "a recipe opens with a comment"
    assert re.search(r"(Needs|Meant for)", opening[0])
    ranks = re.search(r"--num_gpus (\d+)", opening[0])
    launcher = "scripts/train.py" if ranks else "siftrl train"
    overrides = re.findall(rf"{launcher} recipes/{re.escape(path.name)}(.*)", opening[0])
    assert overrides, "a recipe opens with its launch line"
    for line in overrides:
        load_recipe(path, shlex.split(line), num_ranks=int(ranks[1]) if ranks else 1, check_installed=False)


def test_the_paper_s_settings_are_in_the_4b_recipe() -> None:
    recipe = load_recipe(ROOT / "recipes/grpo-qwen3-4b-zero2-vllm.yaml", num_ranks=8, check_installed=False)
    stage = recipe.stages[0]
    assert isinstance(stage, GRPOStage)
    numbers = batch_arithmetic(stage, 8)
    assert (numbers.prompts_proposed, numbers.prompts_kept, numbers.completions_per_prompt) == (2048, 512, 16)
    assert numbers.gradient_accumulation_steps * 8 * stage.micro_batch_size == 512 * 16


def test_recipes_choose_data_three_times() -> None:
    """On one GPU, on eight with ZeRO-2 and ZeRO-3, with vLLM colocated, as a server, and on a CPU."""
    seen = set()
    for path in RECIPES:
        recipe = load_recipe(path, check_installed=False)
        stage = recipe.stages[-1]
        names = [selector.name for selector in stage.batch_selectors]
        if isinstance(stage, GRPOStage) and stage.prompt_selector and names[1:] == ["gradient_coreset"]:
            seen.add((recipe.distribution.deepspeed, stage.rollout.mode, names[0]))
    assert seen >= {
        (None, "colocate", "utility_diversity"),
        ("zero2", "server", "largest_advantage"),
        ("zero3", "colocate", "utility_diversity"),
    }


# ---------------------------------------------------------------------------------------- what is refused

REFUSED = {
    # wrong keys
    "stages.grpo.prompt_selector.candidats=3": "stages.1.prompt_selector.candidats: unknown key; did you mean 'candi",
    "stages.1.prompt_selector.value.lrr=1": "stages.1.prompt_selector.value.lrr: unknown key; did you mean 'lr'?",
    "stages.0.rows_pr_step=1": "stages.0.rows_pr_step: unknown key; did you mean 'rows_per_step'?",
    "stages.1.rollout.temprature=1": "stages.1.rollout.temprature: unknown key; did you mean 'temperature'?",
    "modle.path=x": "modle: unknown key; did you mean 'model'?",
    "rewards.0=exact": "rewards.0.name: no reward 'exact'; did you mean 'exact_match'?",
    "rewards.0={name: exact_match, options: {colum: x}}": "rewards.0.options.colum: unknown key; did you mean 'colu",
    "stages.1.prompt_selector=prompt_curiculum": "stages.1.prompt_selector.name: no selector 'prompt_curiculum'; did",
    "stages.x.y=3": "stages has no item 'x'; write one of 0, 1, grpo, warmup",
    "seed": "write key.path=value",
    "seed.x=3": None,
    "name.x=3": None,
    # wrong types and values
    "seed='1'": "seed: must be a whole number, not the text '1'; write 1 without quotes",
    "seed=1.0": "seed: must be a whole number, not the number 1.0",
    "seed=-1": "seed: must be greater than or equal to 0, not the number -1",
    "name=3": "name: must be text, not the number 3",
    "name=a/b": "name: 'a/b' must be letters, digits",
    "model.scratch=3": "model.scratch: must be a mapping, not the number 3",
    "data.path=[x]": "data.path: must be text, not a list",
    "data.chat=yes": "data.chat: must be true or false, not the text 'yes'",
    "stages=[]": "stages: is empty",
    "stages.1.kind=gpro": "stages.1.kind: must be sft or dpo or grpo, not 'gpro'; did you mean 'grpo'?",
    "stages.1={}": "stages.1.kind: is required",
    "stages.1.rollout.engine=vlm": "stages.1.rollout.engine: must be transformers or vllm, not the text 'vlm'; did you",
    "stages.1.rollout.temperature=.inf": "stages.1.rollout.temperature: must be a finite number",
    "stages.1.completions_per_prompt=1": "stages.1.completions_per_prompt: must be greater than or equal to 2",
    "stages.1.prompt_selector.candidates=0": "prompt_selector.candidates: must be greater than or equal to 1",
    "stages.1.prompt_selector.candidates='4'": "candidates: must be a whole number, not the text '4'; write 4 without",
    "stages.1.prompt_selector.rank_by=men": "rank_by: must be auto or mean or spread, not the text 'men'; did you",
    # TRL's options
    "stages.1.trainer.lerning_rate=1": "trainer.lerning_rate: unknown option of TRL's GRPOConfig; did you mean 'lear",
    "stages.0.trainer.beta=0.1": "stages.0.trainer.beta: unknown option of TRL's SFTConfig",
    "stages.1.trainer.top_k=1": "stages.1.trainer.top_k: is set by siftrl; write rollout.top_k instead",
    "stages.0.trainer.save_steps=1": "trainer.save_steps: is set by siftrl; write checkpoint.every instead",
    "stages.1.trainer.max_steps=1.5": "stages.1.trainer.max_steps: must be int, not the number 1.5",
    "stages.1.trainer.max_steps='3'": "stages.1.trainer.max_steps: must be int, not the text '3'",
    "stages.0.trainer.lr_scheduler_type=cosin": "lr_scheduler_type: must not be 'cosin'; did you mean 'cosine'?",
    # values without sense
    "seed=4294967296": "seed: must be less than 4294967296, not the number 4294967296",
    "stages.1.rollout.temperature=1e-4": "rollout.temperature: must be greater than or equal to 0.001, not the number",
    "stages.1.rollout={engine: vllm, temperature: 0.005}": "temperature: vllm takes 0.005 for 0.01, and the trainer do",
    "rewards.0={name: exact_match, weight: 1e39}": "rewards.0.weight: must be less than or equal to 1000000, n",
    "rewards.0={name: exact_match, weight: .nan}": "rewards.0.weight: must be a finite number",
    "rewards.0={name: exact_match, options: {extract: '('}}": "rewards.0.options: extract: '(' is no regular expressio",
    "rewards.0=response_format": "rewards.0.options: give one of `pattern` and `tags`, for example tags: [think, answe",
    "stages.1.prompt_selector={name: difficulty_pools, easy: 0.5}": "easy + normal + hard must be 1, not 1.4: write sh",
    "stages.1.prompt_selector={name: static_filter, low: 1}": "stages.1.prompt_selector: static_filter: low (1.0) must",
    "stages.1.prompt_selector.value.reward_range=[1, 0]": "prompt_selector.value: reward_range: [1.0, 0.0] holds no re",
    "stages.1.prompt_selector.value={body: policy, train: lora}": "prompt_selector.value: `body: policy` trains a head",
    "stages.1.prompt_selector.value.lr=3": "prompt_selector.value.lr: must be less than or equal to 1, not the number ",
    "stages.1.prompt_selector.value.head_lr=0": "prompt_selector.value.head_lr: must be greater than 0, not the number",
    "stages.0.batch_selector={name: high_loss, keep: .nan}": "batch_selector.keep: must be a share above 0 and up to 1",
    "stages.0.trainer.learning_rate=-1e-4": "stages.0.trainer.learning_rate: must be 0 or more, not the number -0.0001",
    "stages.0.trainer.adam_beta1=1": "stages.0.trainer.adam_beta1: must be 0 or more and below 1, not the number 1",
    "stages.1.trainer.weight_decay=-0.1": "stages.1.trainer.weight_decay: must be 0 or more, not the number -0.1",
    "stages.1.trainer.warmup_steps=-1": "stages.1.trainer.warmup_steps: must be 0 or more, not the number -1",
    "stages.1.trainer.epsilon=-0.2": "stages.1.trainer.epsilon: must be 0 or more, not the number -0.2",
    "stages.1.trainer.max_steps=0": "stages.1.trainer.max_steps: must be 1 or more, or -1 for num_train_epochs, not th",
    "stages.1.trainer.loss_type=grop": "stages.1.trainer.loss_type: must not be 'grop'; did you mean 'grpo'?",
    "stages.0={kind: dpo, trainer: {beta: 0}}": "stages.0.trainer.beta: must be above 0, not the number 0",
    "stages.0={kind: dpo, trainer: {loss_type: [ipo, x]}}": "stages.0.trainer.loss_type: must not be 'x'; write one of",
    "stages.0.trainer.eval_strategy=steps": "eval_strategy: held-out rows are measured by siftrl; remove it, and write",
    "stages.1.trainer.load_best_model_at_end=true": "load_best_model_at_end: held-out rows are measured by siftrl",
    "stages.1.trainer.lr_scheduler_type=reduce_lr_on_plateau": "lr_scheduler_type: follows the trainer's own evaluatio",
    "stages.1.trainer.report_to=[tensorboard, wand]": "report_to: transformers reports to nothing of the name 'wand'; ",
    "stages.1.rollout.max_completion_tokens=512": "max_completion_tokens: the model's context of 512 tokens has no roo",
    "stages.0.trainer.max_length=1024": "stages.0.trainer.max_length: the model's context of 512 tokens has no room fo",
    "data.limit=9": "stages.1.prompts_per_step: a step draws 64 prompts, the data has only 9 to train on; lower it, or",
    "stages.1.rollout={engine: vllm, max_model_len: 513}": "rollout.max_model_len: 513 is more than the model's contex",
    "model.scratch.alphabet=''": "model.scratch.alphabet: is empty; write the characters that the model shall know",
    "data={reasoning_gym: {tasks: [{name: gcd}], seed: 3}, eval: {size: 9, seed: 3}}": "data.eval.seed: 3 is also the",
    # combinations
    "model.path=x": "model: give exactly one of `path`",
    "model.scratch=null": "model: give exactly one of `path`",
    "model.scratch.num_heads=5": "model.scratch.num_heads: 5 does not divide hidden_size 96",
    "model={path: x, quantize: 4bit}": "model.quantize: quantised weights cannot be trained; add `lora: {}`",
    "data.path=null": "data: give exactly one of `path`",
    "data=null": "stages.0: has no data",
    "data.eval={}": "data.eval: give `size`",
    "data={path: rows.jsonl}": "stages.1.eval: there are no held-out rows",
    "stages.0={kind: sft, eval: {}, data: {path: rows.jsonl}}": "stages.0.eval: there are no held-out rows",
    "rewards=[]": "stages.1.rewards: a grpo stage needs rewards",
    "stages.1.rewards=[]": "stages.1.rewards: a grpo stage needs rewards",
    "rewards.0={name: exact_match, weight: 0}": "stages.0.rewards: every reward has weight 0",
    "stages.0.name=grpo": "stages.1.name: 'grpo' is the name of stages.0 too",
    "stages.1.eval={samples: 3}": "stages.1.eval.samples: 3 greedy completions are all the same",
    "stages.1.batch_selector=high_los": "stages.1.batch_selector.name: no selector 'high_los'; did you mean 'h",
    "stages.1.batch_selector=[high_loss, uniform]": "batch_selector.1.name: 'uniform' selects prompts before the rol",
    "stages.0.batch_selector=high_los": "stages.0.batch_selector.name: no selector 'high_los'; did you mean 'h",
    "stages.0.batch_selector=uniform": "stages.0.batch_selector.name: 'uniform' selects prompts before the rol",
    "stages.1.prompt_selector=high_loss": "prompt_selector.name: 'high_loss' selects inside a batch; write a selector "
    "of prompts, and this one under `batch_selector`",
    "stages.0.batch_selector={}": "stages.0.batch_selector.name: is required",
    "stages.0.batch_selector=3": "stages.0.batch_selector: must be a mapping, not the number 3",
    "stages.0.batch_selector=[]": "stages.0.batch_selector: is empty; write at least one item",
    "stages.0.batch_selector=[high_loss, 3]": "stages.0.batch_selector.1: must be a mapping, not the number 3",
    "stages.0.batch_selector={name: high_loss, normalize: true}": "batch_selector.normalize: unknown key; did you mean",
    "stages.0.batch_selector=[{name: high_loss, normalise: 1}]": "batch_selector.0.normalise: must be true or",
    "stages.0.batch_selector=reducible_loss": "stages.0.batch_selector.reference: is required",
    "stages.0.batch_selector={name: high_loss, keep: true}": "batch_selector.keep: must be a share above 0 and",
    "stages.0.batch_selector={name: high_loss, keep: 0}": "batch_selector.keep: must be a share above 0 and up",
    "stages.0.batch_selector={name: high_loss, keep: 1.5}": "from 1 on, not the number 1.5",
    "stages.0.batch_selector=[{name: high_loss, keep: '8'}]": "batch_selector.0.keep: must be a share above 0",
    "stages.0.batch_selector={name: high_loss, keep: 129}": "batch_selector.keep: 129 rows are more than the 128 to ch",
    "stages.0.batch_selector=[high_loss, {name: high_loss, keep: 65}]": "batch_selector.1.keep: 65 rows are mo",
    "stages.0.batch_selector={name: high_loss, keep: 96}": "stages.0.batch_selector.keep: micro_batch_size 64 does not",
    "stages.1.batch_selector={name: high_loss, keep: 96}": "stages.1.batch_selector.keep: micro_batch_size 64 does not",
    "stages.1.batch_selector={name: high_loss, keep: 257}": "keep: 257 rows are more than the 256 to choose from",
    "stages.0.signals.block=layers": "stages.0.signals.block: has no effect without a batch selector; remove i",
    "stages.0.signals.micro_batch_size=0": "stages.0.signals.micro_batch_size: must be greater than or equal to 1",
    "stages.1.signals.head=lm_head": "stages.1.signals.head: has no effect without a batch selector; remove it, or wr",
    "stages.0.selection.max_overhead=0.2": "stages.0.selection.max_overhead: has no effect without a batch selector",
    "stages.1.selection.max_overhead=0.2": "stages.1.selection.max_overhead: has no effect without a batch selector",
    "stages.1.selection.max_overhead=1": "selection.max_overhead: must be less than 1, not the number 1",
    "stages.1.selection.max_overhed=0.2": "selection.max_overhed: unknown key; did you mean 'max_overhead'?",
    "stages.1.selection.skip_zero_advantage=1": "skip_zero_advantage: must be true or false, not the number 1",
    "stages.1.selection.skip_zero_advantage=false": "skip_zero_advantage: has no effect without a batch selector",
    "stages.0.selection.skip_zero_advantage=true": "skip_zero_advantage: has no effect in an sft stage, whose rows",
    "stages.1.micro_batch_size=48": "stages.1.micro_batch_size: 48 does not divide the 256 completions a rank",
    "stages.0.micro_batch_size=48": "stages.0.micro_batch_size: 48 does not divide the 128 rows a rank",
    "stages.1.optimizer_steps_per_rollout=3": "stages.1.optimizer_steps_per_rollout: 3 does not divide the 4 micro-b",
    "stages.1.rollout.sleep=true": "stages.1.rollout.sleep: is an option of vllm",
    "stages.1.rollout.mode=server": "stages.1.rollout.mode: is an option of vllm",
    "stages.1.rollout={engine: vllm, mode: server, engine_args: {a: 1}}": "engine_args: has no effect with mode server",
    "stages.1.rollout={engine: vllm, server_url: x}": "server_url: has no effect with mode colocate",
    "stages.1.rollout={engine: vllm, engine_args: {seed: 1}}": "rollout.engine_args.seed: is set by siftrl; write the",
    "stages.1.rollout={engine: vllm, tensor_parallel_size: 2}": "tensor_parallel_size: 2 does not divide the 1 proc",
    "stages.1.rollout={engine: vllm, max_model_len: 200}": "max_model_len: 200 has no room for 1 prompt and 256 comp",
    "distribution.deepspeed=zero4": "distribution.deepspeed: no settings and no file 'zero4'; did you mean 'zero",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items(), ids=REFUSED)
def test_refused(override: str, message: str | None, base: Path) -> None:
    text = refusal(base, override, check_installed=False)
    assert (message or override.partition(".")[0]) in text


def test_an_error_names_the_file_and_line_or_the_override(base: Path) -> None:
    base.write_text(BASE.replace("rows_per_step: 128", "rows_per_step: x"))
    assert refusal(base).startswith(f"{base}:11: stages.0.rows_per_step: must be a whole number")
    assert refusal(base, "stages.0.rows_per_step=y").startswith(f"{base} with stages.0.rows_per_step=y: stages.0.rows")


def test_repeated_keys_and_broken_yaml_are_refused(base: Path) -> None:
    base.write_text(BASE + "model: {path: x}\n")
    assert refusal(base) == f"{base}:21: model: is there twice (first on line 1); remove one"
    base.write_text(BASE + "seed: [1\n")
    assert refusal(base).startswith(f"{base}:22: not YAML")
    base.write_text("")
    assert "is empty" in refusal(base)
    base.write_text("- 1")
    assert "must be a mapping" in refusal(base)
    base.write_text("1: 2")
    assert "the key 1 is not text" in refusal(base)
    assert "no such file" in refusal(base.with_name("none.yaml"))


def test_quantised_weights_and_colocated_vllm_do_not_meet(base: Path) -> None:
    overrides = ("model={path: x, quantize: 4bit, lora: {}}", "stages.1.rollout.engine=vllm")
    assert "stages.1.rollout.engine: colocated vllm does not load" in refusal(base, *overrides, check_installed=False)
    load_recipe(base, [*overrides, "stages.1.rollout.mode=server"], check_installed=False)


WITH_A_SELECTOR = {
    "train_sampling_strategy=group_by_length": "train_sampling_strategy: does not work with a batch selector: the rows",
    "parallelism_config={cp_size: 2}": "parallelism_config: does not work with a batch selector: whole rows are scored",
    "auto_find_batch_size=true": "auto_find_batch_size: is set by siftrl; write micro_batch_size instead",
}


@pytest.mark.parametrize(("option", "message"), WITH_A_SELECTOR.items(), ids=WITH_A_SELECTOR)
def test_trainer_options_that_a_batch_selector_rules_out(option: str, message: str, base: Path) -> None:
    text = refusal(base, "stages.0.batch_selector=high_loss", f"stages.0.trainer.{option}")
    assert f"stages.0.trainer.{message}" in text


def test_trainer_options_that_a_batch_selector_allows(base: Path) -> None:
    options = "{packing: true, dataloader_drop_last: true, eval_strategy: no, train_sampling_strategy: random}"
    load_recipe(base, ["stages.0.batch_selector=high_loss", f"stages.0.trainer={options}"])
    load_recipe(base, ["stages.0.trainer.train_sampling_strategy=group_by_length"])
    text = refusal(base, "stages.1.batch_selector=high_loss", "stages.1.trainer.parallelism_config={tp_size: 2}")
    assert "stages.1.trainer.parallelism_config: does not work with a batch selector: whole rows are scored" in text


def test_what_reads_rewards_is_for_grpo_stages(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class says so in its source; nothing is imported to find out."""
    source = """
import raises_when_imported
from typing import ClassVar
from siftrl.types import BatchSelector

class Lucky(BatchSelector):
    reads_rewards: ClassVar[bool] = True
    def select(self, signals, keep, generator): ...

class Luckier(Lucky): ...

class Unlucky(Lucky):
    reads_rewards = False
"""
    (base.parent / "my_lucky.py").write_text(source)
    monkeypatch.syspath_prepend(base.parent)
    message = (
        "reads rewards, which an sft stage has none of; write it in a grpo stage, and here, for example, high_loss"
    )
    for name in ("my_lucky:Lucky", "my_lucky:Luckier", "largest_advantage"):
        one, chain = (f"stages.0.batch_selector={text}" for text in (name, f"[high_loss, {{name: '{name}'}}]"))
        assert f"stages.0.batch_selector.name: {name!r} {message}" in refusal(base, one)
        assert f"stages.0.batch_selector.1.name: {name!r} {message}" in refusal(base, chain)
        load_recipe(base, [f"stages.1.batch_selector={name}"])
    load_recipe(base, ["stages.0.batch_selector=my_lucky:Unlucky", "stages.1.batch_selector=my_lucky:Unlucky"])


@pytest.mark.parametrize("field", ["keep", "name"])
def test_a_batch_selector_may_not_have_the_recipe_s_own_keys(
    field: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"""
from dataclasses import dataclass

@dataclass
class Mine:
    {field}: int = 3
    def select(self, signals, keep, generator): ...
"""
    (base.parent / f"my_{field}.py").write_text(source)
    monkeypatch.syspath_prepend(base.parent)
    text = refusal(base, f"stages.0.batch_selector=my_{field}:Mine")
    assert f"stages.0.batch_selector.name: 'my_{field}:Mine' has a field '{field}', which is a key of every" in text


MISSING = {
    "stages.1.rollout.engine=vllm": ("vllm", "stages.1.rollout.engine: needs the package vllm"),
    "distribution.deepspeed=zero2": ("deepspeed", "distribution.deepspeed: needs the package deepspeed"),
    "rewards=[math_verify]": ("math_verify", "rewards.0.name: needs the package math_verify"),
    "rewards=[reasoning_gym]": ("reasoning_gym", "rewards.0.name: needs the package reasoning_gym"),
    "model={path: x, quantize: 4bit, lora: {}}": ("bitsandbytes", "model.quantize: needs the package bitsandbytes"),
    "data={reasoning_gym: {tasks: [{name: gcd}]}, eval: {size: 9}}": ("reasoning_gym", "data.reasoning_gym: needs"),
}


@pytest.mark.parametrize(("override", "expected"), MISSING.items(), ids=[name for name, _ in MISSING.values()])
def test_missing_packages_are_named(
    override: str, expected: tuple[str, str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, message = expected
    found = recipe_checks.importlib.util.find_spec
    monkeypatch.setattr(
        recipe_checks.importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    text = refusal(base, override)
    assert message in text and "pip install" in text
    load_recipe(base, [override], check_installed=False)


NOT_INSTALLED = {
    "report_to=wandb": ("wandb", "report_to: wandb is not installed; pip install wandb, or remove it"),
    "report_to=[none, mlflow]": ("mlflow", "report_to: mlflow is not installed"),
    "optim=paged_adamw_8bit": ("bitsandbytes", "optim: paged_adamw_8bit needs the package bitsandbytes, which is not"),
    "optim=galore_adamw_8bit": (
        "galore_torch",
        "optim: galore_adamw_8bit needs the package galore_torch, which is not",
    ),
    "use_liger_kernel=true": (
        "liger_kernel",
        "use_liger_kernel: needs the package liger_kernel, which is not installed",
    ),
}


@pytest.mark.parametrize("option", NOT_INSTALLED)
def test_what_a_trainer_option_needs_is_installed(option: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, message = NOT_INSTALLED[option]
    assert recipe_checks.importlib.util.find_spec(package) is None, "the test needs a package that is not there"
    assert f"stages.1.trainer.{message}" in refusal(base, f"stages.1.trainer.{option}")
    load_recipe(base, [f"stages.1.trainer.{option}"], check_installed=False)
    load_recipe(base, ["stages.1.trainer={report_to: all, optim: adamw_torch}"])


@pytest.mark.parametrize("option", ["push_to_hub=true", "log_completions_hub_repo=me/rows"])
def test_pushing_to_the_hub_takes_a_token(option: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(base.parent / "token"))
    overrides = [f"stages.0.trainer.{option}"] if "push" in option else [f"stages.1.trainer.{option}"]
    assert "there is no token for the hub; run `hf auth login` or set HF_TOKEN" in refusal(base, *overrides)
    load_recipe(base, overrides, check_installed=False)
    (base.parent / "token").write_text("hf_x")
    load_recipe(base, overrides)
    (base.parent / "token").unlink()
    load_recipe(base, [*overrides, overrides[0].partition("trainer.")[0] + "trainer.hub_token=hf_x"])
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    load_recipe(base, overrides)


def test_reasoning_gym_families_and_settings_are_checked(base: Path) -> None:
    pytest.importorskip("reasoning_gym")

    def data(task: str) -> str:
        return f"data={{reasoning_gym: {{tasks: [{task}], size: 500}}, eval: {{size: 9}}}}"

    load_recipe(base, [data("{name: chain_sum, config: {min_terms: 2}}")])
    assert "tasks.0.name: reasoning-gym has no family 'chain_sums'; did you mean 'chain_sum'?" in refusal(
        base, data("{name: chain_sums}")
    )
    assert "tasks.0.config.min_term: chain_sum has no setting of that name; did you mean 'min_terms'?" in refusal(
        base, data("{name: chain_sum, config: {min_term: 2}}")
    )
    too_many = refusal(base, data("{name: chain_sum}"), "stages.1.prompt_selector.candidates=40")
    assert "stages.1.prompts_per_step: a step draws 640 prompts, the data has only 500" in too_many


def test_gym_families_are_those_that_the_library_registers() -> None:
    gym = pytest.importorskip("reasoning_gym")
    assert set(recipe_checks.gym_families()) == set(gym.factory.DATASETS) - {"composite"}
    for name in ("chain_sum", "gcd", "graph_color"):
        config = gym.factory.DATASETS[name][1]
        assert set(recipe_checks.gym_settings(name)) == {field.name for field in dataclasses.fields(config)}


def test_models_built_in_python_are_checked_too() -> None:
    with pytest.raises(ValueError, match="exactly one of `path`"):
        ModelConfig()
    with pytest.raises(ValueError, match="unknown key; did you mean 'candidates'"):
        GRPOStage.model_validate({"kind": "grpo", "prompt_selector": {"name": "prompt_curriculum", "candidats": 3}})


def test_the_launcher_s_world_size_counts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "128 rows do not divide over 3 ranks; write 126 or 129" in refusal(base)


# ------------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed(settings: object, cpu: bool = False) -> dict | None:
    recipe = Recipe.model_construct(distribution=DistributionConfig.model_validate({"deepspeed": settings}))
    return deepspeed_config(recipe, cpu=cpu)


def test_deepspeed_settings_come_by_name_file_or_mapping(tmp_path: Path) -> None:
    assert deepspeed(None) is None
    for stage in (1, 2, 3):
        config = deepspeed(f"zero{stage}")
        assert config is not None and config["zero_optimization"]["stage"] == stage
        assert {config[name] for name in ("train_batch_size", "gradient_accumulation_steps")} == {"auto"}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert deepspeed(str(file)) == {"zero_optimization": {"stage": 2}}
    assert deepspeed({"zero_optimization": {"stage": 1}}) == {"zero_optimization": {"stage": 1}}
    file.write_text("{")
    with pytest.raises(RecipeError, match="not JSON"):
        deepspeed(str(file))


def test_deepspeed_on_cpus_uses_torch_s_adam() -> None:
    inline = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert deepspeed(inline, cpu=True) == {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    assert inline == {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "the recipe is left as it was"
    config = deepspeed("zero3", cpu=True)
    assert config is not None and "optimizer" not in config, "the trainer's `optim` counts"


# ------------------------------------------------------------------------------------------------ TRL's options


def test_the_list_of_trl_options_is_the_installed_trl_s() -> None:
    generator = runpy.run_path(str(ROOT / "scripts/generate_trl_options.py"))
    rendered = generator["render"]()
    assert rendered == (ROOT / "src/siftrl/trl_options.json").read_text(), "run scripts/generate_trl_options.py"


def test_every_default_of_trl_passes_its_own_check() -> None:
    for kind in ("sft", "dpo", "grpo"):
        options = trl_options(kind)
        assert set(OWNED[kind]) <= set(options)
        defaults = {name: o["default"] for name, o in options.items() if "default" in o and name not in OWNED[kind]}
        check_trainer_options(kind, defaults)
        check_trainer_values(kind, defaults)


def test_the_words_of_trl_s_options_are_those_that_trl_compares_with() -> None:
    """A word that TRL learns or forgets shows here: it stands in the source of its trainers, quoted."""
    import trl

    for kind, options in VALUES.items():
        folder = Path(trl.__file__).parent
        files = [folder / "trainer" / f"{kind}_{part}.py" for part in ("trainer", "config")] + [
            folder / "data_utils.py"
        ]
        source = "\n".join(file.read_text() for file in files)
        for name, words in options.items():
            assert all(f'"{word}"' in source or isinstance(word, bool) for word in words), (kind, name)
            compared = re.findall(rf"{name.removesuffix('s')} (?:==|!=) \"([\w-]+)\"", source)
            assert set(compared) <= set(words), (kind, name)


def test_the_trackers_are_those_of_transformers() -> None:
    from transformers.integrations import integration_utils

    assert set(REPORTS) == set(integration_utils.INTEGRATION_TO_CALLBACK)


def test_the_schema_accepts_every_recipe_and_refuses_wrong_keys() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_schema())
    validator.check_schema(validator.schema)
    for path in RECIPES:
        recipe = load_recipe(path, check_installed=False)
        assert not list(validator.iter_errors(json.loads(json.dumps(resolved(recipe))))), path
    data = parse_yaml(BASE)
    assert validator.is_valid(data)
    for selectors in (
        None,
        "high_loss",
        "mine:Selector",
        {"name": "reducible_loss", "reference": "a/model", "keep": 1.0},
        [{"name": "high_loss", "keep": 32}, {"name": "mine:Selector", "anything": 3}],
    ):
        right = yaml.safe_load(yaml.safe_dump(data))
        for stage in right["stages"]:
            stage |= {"batch_selector": selectors, "signals": {"micro_batch_size": 4, "block": None}}
            stage |= {"selection": {"max_overhead": 0.2, "skip_zero_advantage": None}}
        assert validator.is_valid(right), selectors
    for stage, key, value in (
        (0, "batch_selector", "uniform"),
        (0, "batch_selector", []),
        (0, "batch_selector", {"name": "reducible_loss"}),
        (0, "batch_selector", {"name": "high_loss", "normalize": True}),
        (0, "batch_selector", [{"name": "high_loss", "keep": 0}]),
        (0, "batch_selector", {"name": "high_loss", "keep": 1.5}),
        (0, "signals", {"blok": "x"}),
        (0, "selection", {"max_overhead": 1.5}),
        (1, "prompt_selector", "high_loss"),
        (1, "batch_selector", "uniform"),
        (1, "selection", {"skip_zero_advantages": True}),
        (1, "prompt_selector", {"name": "prompt_curriculum", "candidats": 3}),
        (1, "prompt_selector", "none_such"),
        (1, "trainer", {"lerning_rate": 1}),
        (1, "rewards", [{"name": "exact_match", "options": {"colum": 1}}]),
        (0, "rows_per_step", "3"),
    ):
        wrong = yaml.safe_load(yaml.safe_dump(data))
        wrong["stages"][stage][key] = value
        assert not validator.is_valid(wrong), (key, value)
