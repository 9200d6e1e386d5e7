from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftrl.rollout import ColocatedVLLM, Sampling, TransformersEngine, _SeededSampler, row_seeds, uniform_from


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> TransformersEngine:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return TransformersEngine(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer)


def tokens(engine: TransformersEngine, *texts: str) -> list[list[int]]:
    return engine.tokenizer(list(texts))["input_ids"]


def test_uniform_numbers_are_uniform_and_independent_of_position_and_row() -> None:
    seeds = torch.tensor(row_seeds(1, rows=range(20_000)))
    draws = torch.stack([uniform_from(seeds, position) for position in range(3)])
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.allclose(draws.mean(1), torch.full((3,), 0.5, dtype=torch.float64), atol=0.01)
    assert torch.allclose(draws.var(1), torch.full((3,), 1 / 12, dtype=torch.float64), atol=0.005)
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.03


def test_seeds_are_distinct_and_depend_on_every_part_of_the_key() -> None:
    seeds = row_seeds(5, 1, rows=range(1000))
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**62 for seed in seeds)
    assert row_seeds(5, 2, rows=range(1000))[0] != seeds[0] != row_seeds(6, 1, rows=range(1000))[0]
    assert row_seeds(5, 1, rows=range(500, 600)) == seeds[500:600]


def test_seeded_sampling_draws_from_the_softmax() -> None:
    """Logits log(1, 2, 3, 4): tokens with shares 0.1, 0.2, 0.3, 0.4."""
    rows = 20_000
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(rows, 4)
    drawn = _SeededSampler(Sampling(1), torch.tensor(row_seeds(0, rows=range(rows))))(torch.zeros(rows, 1), scores)
    shares = drawn.argmax(1).bincount(minlength=4) / rows
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012)


def test_seeded_sampling_obeys_temperature_and_top_k() -> None:
    rows = 4000
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(rows, 4)
    sampling = Sampling(1, temperature=0.5, top_k=2)  # squares: 9 and 16 remain
    drawn = _SeededSampler(sampling, torch.tensor(row_seeds(0, rows=range(rows))))(torch.zeros(rows, 1), scores)
    shares = drawn.argmax(1).bincount(minlength=4) / rows
    assert torch.allclose(shares, torch.tensor([0.0, 0.0, 9 / 25, 16 / 25]), atol=0.03)


def test_a_seeded_completion_does_not_depend_on_its_batch(engine: TransformersEngine) -> None:
    prompts, sampling = tokens(engine, "1+1=", "12+345=", "7+0=", "1+1="), Sampling(8)
    seeds = row_seeds(0, 0, rows=range(4))
    together = engine.generate(prompts, sampling, seeds).ids
    alone = [engine.generate([p], sampling, [s]).ids[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together[0] != together[3]  # the same prompt, another seed
    assert engine.generate(prompts, sampling, row_seeds(0, 1, rows=range(4))).ids != together


def test_greedy_needs_no_seed_and_repeats(engine: TransformersEngine) -> None:
    prompts = tokens(engine, "1+1=", "2+2=")
    first = engine.generate(prompts, Sampling(5, temperature=0.0)).ids
    assert first == engine.generate(prompts, Sampling(5, temperature=0.0)).ids
    logits = engine.model(torch.tensor([prompts[0]])).logits[0, -1]
    assert first[0][0] == int(logits.argmax())


def test_completions_end_at_eos(engine: TransformersEngine) -> None:
    eos = int(engine.tokenizer.eos_token_id)
    completions = engine.generate(tokens(engine, *["3+4="] * 200), Sampling(40), row_seeds(0, rows=range(200))).ids
    ended = [ids for ids in completions if eos in ids]
    assert ended and all(ids.index(eos) == len(ids) - 1 for ids in ended)
    assert all(len(ids) <= 40 for ids in completions)


def test_transformers_decodes_all_rows_side_by_side_and_shares_no_prompt(engine: TransformersEngine) -> None:
    completions = engine.generate(tokens(engine, "1+1=", "1+1=", "7+0="), Sampling(2, temperature=0.0))
    assert (completions.slots, completions.prompt_tokens_cached) == (3, None)


def test_a_sleeping_engine_gets_its_weights_once_for_all_calls_that_belong_together() -> None:
    """Sleep mode needs a GPU; this is the order of its calls. The trainer's sync, its probe, then the rollouts."""
    calls: list[str] = []

    class Engine:
        def wake_up(self, tags: list[str]) -> None:
            calls.append(f"wake {tags[0]}")

        def sleep(self, level: int) -> None:
            calls.append("sleep")

    class Sleeper(ColocatedVLLM):
        def __init__(self) -> None:
            self.llm, self.enable_sleep_mode = Engine(), True
            self._llm_weights_sleeping, self._cache_awake = True, False

        def sync_weights(self) -> None:
            calls.append("sync")
            self._llm_weights_sleeping = False

    sleeper = Sleeper()
    sleeper.sync_weights()
    with sleeper.awake(sleep_after=False):
        calls.append("probe")
    with sleeper.awake():
        calls.append("rollouts")
    with sleeper.awake():
        calls.append("evaluation")
    assert calls[:5] == ["sync", "wake kv_cache", "probe", "rollouts", "sleep"]
    assert calls[5:] == ["sync", "wake kv_cache", "evaluation", "sleep"]


@pytest.mark.engines
def test_vllm_draws_what_transformers_would(tiny_model: str, tmp_path: Path) -> None:
    """A real vLLM on the same weights: greedy tokens agree, and its log-probabilities are the model's. Of the
    checkpoint's generation settings both take the end tokens alone."""
    from siftrl.rollout import VLLMEngine

    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    settings = {"eos_token_id": [1, 40], "repetition_penalty": 5.0, "top_k": 1, "no_repeat_ngram_size": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    tiny_model = str(tmp_path)
    engine = TransformersEngine(
        AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    )
    # a step takes 64 tokens: the long prompts below come in turns, and none may be split
    vllm: Any = VLLMEngine.from_path(tiny_model, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=64)
    long = tokens(engine, *["1+1=" * 9] * 20)
    assert vllm.eos_ids == engine.eos_ids == [1, 40]
    turns = [vllm.generate(long, Sampling(6), row_seeds(1, rows=range(20))) for _ in range(2)]
    assert turns[0].ids == turns[1].ids and len(set(map(tuple, turns[0].ids))) > 10
    # 36 tokens: one block of 32, which the first copy computes, the others find, and the second call finds throughout
    assert [turn.prompt_tokens_cached for turn in turns] == [19 * 32, 20 * 32]
    assert turns[0].slots == 64
    prompts = tokens(engine, "1+1=", "12+3=", "7+0=")
    greedy = Sampling(6, temperature=0.0)
    assert vllm.generate(prompts, greedy).ids == engine.generate(prompts, greedy).ids
    seeds = row_seeds(3, rows=range(3))
    drawn = vllm.generate(prompts, Sampling(6), seeds)
    assert drawn.ids == vllm.generate(prompts, Sampling(6), seeds).ids
    assert drawn.ids != vllm.generate(prompts, Sampling(6), row_seeds(4, rows=range(3))).ids
    many = vllm.generate(prompts * 60, Sampling(6), row_seeds(5, rows=range(180))).ids
    assert any(ids[-1] == 40 for ids in many) and not any(40 in ids[:-1] for ids in many)
    for prompt, ids, logprobs in zip(prompts, drawn.ids, drawn.logprobs, strict=True):
        expected = engine.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            assert math.isclose(expected[len(prompt) - 1 + place, token].item(), logprob, abs_tol=1e-4)
