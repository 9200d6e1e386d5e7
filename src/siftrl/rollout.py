"""What siftrl needs of a rollout engine, on transformers and on vLLM.

Seeded rollouts: with `seeds`, each completion depends on the weights, its prompt and its own seed alone. The batch it
shares, the number of ranks and the completions before it do not matter, so a run resumes exactly and a run on 2 ranks
sees the rollouts of a run on 1 (up to the rounding of the engine's kernels).
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration, extract_logprobs

from siftrl.end_tokens import end_tokens, without_generation_config
from siftrl.precision import gpu_has_bfloat16

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """What siftrl adds to TRL's own generation settings.

    seeded: seed every completion (see above); None: whenever a selector is on.
    max_logprob_drift: after a weight sync to vLLM, the largest mean difference between the engine's and the trainer's
        log-probabilities of the probe's tokens; beyond it the run stops. "auto": 0.005 where both compute in float32,
        which shows a single stale matrix, else 0.1. None: no probe.
    engine_args: further arguments of `vllm.LLM`, colocated mode only.
    """

    seeded: bool | None = None
    max_logprob_drift: float | Literal["auto"] | None = "auto"
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completions:
    """Token ids of each completion (with its EOS, if it came to one), and their log-probabilities where known.

    prompt_tokens_cached: prompt tokens over all prompts that were not computed, since an earlier prompt (of this call,
        or of one since the last weight sync) began with the same blocks of tokens; None where the engine does not say.
    slots: how many completions the engine decodes side by side at most; None where it is not known.
    """

    ids: list[list[int]]
    logprobs: list[list[float | None]] | None = None
    prompt_tokens_cached: int | None = None
    slots: int | None = None


class Engine(Protocol):
    """Draws one completion for each prompt. A prompt that is wanted G times is given G times.

    eos_ids: tokens that end a completion.
    """

    eos_ids: list[int]

    def generate(
        self, prompt_ids: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> Completions: ...


def row_seeds(*key: int, rows: Iterable[int]) -> list[int]:
    """One 62-bit seed for each global row, from the run's seed, the rollout's number and the like."""
    return [int.from_bytes(hashlib.blake2b(repr((*key, row)).encode(), digest_size=8).digest()) >> 2 for row in rows]


# ------------------------------------------------------------------------------------------------- transformers


def uniform_from(seeds: Tensor, position: int) -> Tensor:
    """One number in [0, 1) for each seed at this token position: float64 [B] from int64 [B].

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on seed + position · golden ratio.
    """
    x = seeds + torch.tensor(position + 1, dtype=torch.int64) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() / 2.0**53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class _SeededSampler(LogitsProcessor):
    """Samples by inverting the distribution function at one number a row and position, and forces that token."""

    def __init__(self, sampling: Sampling, seeds: Tensor) -> None:
        self.seeds = seeds
        self.position = 0
        self.warpers = LogitsProcessorList()
        if sampling.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: int64 [B, T]; scores: float [B, V] -> [B, V], all but the drawn token at -inf."""
        warped = self.warpers(input_ids, scores)  # type: ignore[arg-type]
        probabilities = warped.float().softmax(-1)
        cumulative = probabilities.double().cumsum(-1)
        # the last entry may round to less than 1: scale the draw instead of reaching past the end
        draw = uniform_from(self.seeds, self.position).unsqueeze(1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.size(1) - 1)
        self.position += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


class TransformersEngine:
    """Rollouts through `model.generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """eos_ids: tokens that end a completion; None: the tokenizer's, and those that the model declares.
        settings: further entries of transformers' `GenerationConfig`."""
        self.settings = settings or {}
        self.model, self.tokenizer = model, tokenizer
        self.eos_ids = eos_ids or end_tokens(model.generation_config, tokenizer)

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], sampling: Sampling, seeds: list[int] | None = None) -> Completions:
        device = next(self.model.parameters()).device
        width = max(map(len, prompt_ids))
        pad = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompt_ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
        options: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
        processors = LogitsProcessorList()
        if sampling.temperature == 0:
            options["do_sample"] = False
        elif seeds is not None:
            options["do_sample"] = False
            processors.append(_SeededSampler(sampling, torch.tensor(seeds, device=device)))
        else:
            options |= asdict(sampling) | {"do_sample": True}
            del options["max_tokens"]
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            pad_token_id=pad,
            eos_token_id=self.eos_ids,
            disable_compile=True,
            **(self.settings | options),
        )
        was_training = self.model.training
        self.model.eval()
        try:
            with without_generation_config(self.model):
                rows = self.model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
                )
        finally:
            self.model.train(was_training)
        return Completions(
            [_until_eos(row, set(self.eos_ids)) for row in rows[:, width:].tolist()], slots=len(prompt_ids)
        )


def _until_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in eos_ids:
            return ids[: position + 1]
    return ids


# --------------------------------------------------------------------------------------------------------- vLLM


def vllm_generate(
    llm: LLM, prompt_ids: list[list[int]], sampling: Sampling, seeds: list[int] | None, **options: Any
) -> Completions:
    """One completion a prompt from an in-process vLLM; `options` go to its SamplingParams.

    Prompts start in the order given. Copies of a prompt compute the blocks of tokens that lie before its last token
    once, in whatever order they come: vLLM registers a block as soon as it is scheduled, so copies share it even
    within one of its steps.
    """
    from vllm import SamplingParams

    common = asdict(sampling) | {"logprobs": 0} | options
    each_seed: list[Any] = seeds or [None] * len(prompt_ids)
    params = [SamplingParams(**common, seed=seed) for seed in each_seed]
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in prompt_ids]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    logprobs, _ = extract_logprobs(outputs)
    return Completions(
        ids=[list(output.outputs[0].token_ids) for output in outputs],
        logprobs=None if logprobs is None else [[token[0] for token in row] for row in logprobs],
        prompt_tokens_cached=sum(output.num_cached_tokens or 0 for output in outputs),
        slots=llm.llm_engine.vllm_config.scheduler_config.max_num_seqs,
    )


class VLLMEngine:
    """Rollouts through a vLLM of its own, for evaluation. Trainers use `ColocatedVLLM`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        declared = llm.llm_engine.vllm_config.model_config.try_get_generation_config().get("eos_token_id")
        self.eos_ids = end_tokens(GenerationConfig(eos_token_id=declared), llm.get_tokenizer())  # type: ignore[arg-type]

    @classmethod
    def from_path(cls, path: str, **engine_args: Any) -> VLLMEngine:
        from vllm import LLM

        prepare_cpu_vllm()
        half = torch.cuda.is_available() and not gpu_has_bfloat16()  # vLLM refuses bfloat16 there
        fitting = {"dtype": "float16"} if half else cpu_engine_args()
        return cls(LLM(model=path, **(fitting | engine_args)))

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling, seeds: list[int] | None = None) -> Completions:
        return vllm_generate(self.llm, prompt_ids, sampling, seeds)


def prepare_cpu_vllm() -> None:
    """Settings that vLLM reads from the environment when it runs on CPUs; what is set already stays."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks on one machine must share its cores
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def cpu_engine_args() -> dict[str, Any]:
    """vLLM arguments that CPUs need: graphs are captured on GPUs only, float32 is what the trainer computes in, and a
    seeded request whose prompt is split over steps fails (vLLM 0.31 turns back a generator's offset, which CPU
    generators do not have), so prompts are never split. Completions of one prompt share the cache of its full blocks
    only, and vLLM's 128 tokens a block on CPUs leave most prompts without any: 32 is the smallest its kernels take."""
    if torch.cuda.is_available():
        return {}
    return {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}


class ColocatedVLLM(VLLMGeneration):
    """TRL's colocated vLLM with further engine arguments, seeds, and a weight sync that works on CPUs."""

    def __init__(self, *args: Any, engine_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.engine_args = cpu_engine_args() | (engine_args or {})
        if not torch.cuda.is_available():  # prompts that are not split must fit into one step; TRL allows 4096 tokens
            longest = kwargs["max_model_length"] or kwargs["model"].config.get_text_config().max_position_embeddings
            self.engine_args.setdefault("max_num_batched_tokens", max(4096, longest))
        self._cache_awake = False  # in sleep mode
        prepare_cpu_vllm()
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        build: Any = vllm_generation.LLM
        # TRL calls LLM(...) with a fixed list of arguments
        with replaced(vllm_generation, "LLM", lambda **fixed: build(**(fixed | self.engine_args))):
            super()._init_vllm()

    def sync_weights(self) -> None:
        if self.mode == "server" or torch.cuda.is_available():
            super().sync_weights()
            return
        # vLLM repacks weights for its CPU kernels, so its per-tensor loaders are gone; reload_weights repacks anew
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=self._iter_named_params())
        # a head tied to the embedding gets no weights of its own, so its repacked copy would stay as it was
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
        self.llm.reset_prefix_cache()

    @property
    def in_float32(self) -> bool:
        return self.mode == "colocate" and self.llm.llm_engine.vllm_config.model_config.dtype == torch.float32

    @contextmanager
    def awake(self, *, sleep_after: bool = True) -> Iterator[None]:
        """The engine with its weights and cache in memory; afterwards, in sleep mode, it gives both up.

        Asleep it has no weights at all, so each sleep costs a sync: stay awake over all calls that belong together.
        """
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:  # type: ignore[has-type]
                self.sync_weights()
            if not self._cache_awake:
                self.llm.wake_up(tags=["kv_cache"])
                self._cache_awake = True
        yield
        if self.enable_sleep_mode and sleep_after:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping, self._cache_awake = True, False

    def request_options(self) -> dict[str, Any]:
        """What TRL's `generate` asks of each request besides the sampling settings."""
        from vllm.sampling_params import StructuredOutputsParams

        options = dict(self.generation_kwargs)
        pattern = options.get("structured_outputs")
        if self.structured_outputs_regex is not None:
            options["structured_outputs"] = StructuredOutputsParams(regex=self.structured_outputs_regex)
        elif isinstance(pattern, dict):
            options["structured_outputs"] = StructuredOutputsParams(**pattern)
        return options


def free_memory() -> None:
    """Free a trainer that is no longer used, with its engine and its model.

    They hold each other in cycles, and vLLM exempts everything that is there when it starts from the collection of
    cycles (`gc.freeze`): a second stage's engine would find the first one's weights and cache still in memory.
    """
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TrainerVLLM:
    """The trainer's own vLLM as an `Engine`, for evaluation and rollouts of text prompts."""

    def __init__(self, generation: VLLMGeneration, eos_ids: list[int], *, plain: bool = False) -> None:
        """plain: draw from the model's whole distribution, whatever patterns and penalties the rollouts obey."""
        self.generation, self.eos_ids, self.plain = generation, eos_ids, plain

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling, seeds: list[int] | None = None) -> Completions:
        if isinstance(self.generation, ColocatedVLLM) and self.generation.mode == "colocate":
            options = {"stop_token_ids": self.eos_ids} if self.plain else self.generation.request_options()
            return vllm_generate(self.generation.llm, prompt_ids, sampling, seeds, **options)
        changed = asdict(sampling) | {"max_completion_length": sampling.max_tokens}
        del changed["max_tokens"]
        if self.plain:
            changed |= {"generation_kwargs": {"stop_token_ids": self.eos_ids}, "structured_outputs_regex": None}
        before = {name: getattr(self.generation, name) for name in changed}
        try:  # a server takes its sampling settings from the client's attributes
            vars(self.generation).update(changed)
            _, ids, logprobs, _ = self.generation.generate(prompt_ids, None, num_generations=1)
        finally:
            vars(self.generation).update(before)
        return Completions(ids, None if logprobs is None else [[token[0] for token in row] for row in logprobs])


@contextmanager
def replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Let `module.name` be `stand_in` for a while: the way past a fixed constructor call inside TRL."""
    original = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, original)
