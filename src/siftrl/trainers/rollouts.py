"""How GRPO rolls out: the engine with the policy's weights, seeds, counts, the weight sync and its probe; evaluation.

Without seeds, `_generate_single_turn` hands over to TRL unchanged, but for the counts and the sync's check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation

from siftrl import distributed, lengths
from siftrl.end_tokens import without_generation_config
from siftrl.evaluate import evaluate_on_ranks
from siftrl.generation_rules import HONOURED_WITH_SEEDS, generation_kwargs
from siftrl.rollout import (
    Completions,
    Engine,
    RolloutOptions,
    Sampling,
    TrainerVLLM,
    TransformersEngine,
    row_seeds,
)
from siftrl.run import Clock


class RolloutsMixin:
    """Put before `SiftMixin` in the bases."""

    accelerator: Any
    args: Any
    clock: Clock
    generated_tokens: int
    model: Any
    rollout: RolloutOptions
    rollouts: int
    seeded: bool
    state: Any
    train_dataset: Any
    _row_numbers: list[int] | None
    _turn: int
    # TRL's
    eos_token_ids: Any
    max_completion_length: int
    min_p: float | None
    model_wrapped: Any
    repetition_penalty: float
    reward_funcs: Any
    reward_weights: Any
    temperature: float
    top_k: int
    top_p: float
    use_vllm: bool
    vllm_generation: Any
    vllm_mode: str
    vllm_tensor_parallel_size: int
    _dist: Any
    _get_per_token_logps_and_entropies: Any
    _last_loaded_step: int
    _log_metric_value: Any
    _tokenize_prompts: Any
    _tokenizer: Any

    @contextmanager
    def rollout_engine(self) -> Iterator[Engine]:
        """The engine with the policy's current weights; every rank enters and leaves together."""
        if self.use_vllm:
            self._sync_engine()
            with self.vllm_generation.awake() if self.vllm_mode == "colocate" else nullcontext():
                yield TrainerVLLM(self.vllm_generation, list(self.eos_token_ids))
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield TransformersEngine(model, self._tokenizer, list(self.eos_token_ids), self._generation_settings())

    def _generation_settings(self) -> dict[str, Any]:
        """Of TRL's options those that the transformers engine takes besides its sampling settings."""
        given = generation_kwargs(vars(self.args))
        if self.args.cache_implementation is not None:
            given.setdefault("cache_implementation", self.args.cache_implementation)
        return {name: value for name, value in given.items() if name in HONOURED_WITH_SEEDS}

    def _sampling(self) -> Sampling:
        return Sampling(
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p or 0.0,
            self.repetition_penalty,
        )

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        one_engine_a_rank = not self.use_vllm or (self.vllm_mode == "colocate" and self.vllm_tensor_parallel_size == 1)
        seeded = self.seeded and images is None and not multimodal_fields and one_engine_a_rank
        if self.use_vllm:
            self._sync_engine()
        with self.clock("generate"):
            if seeded:
                made = self._generate_seeded(prompt_ids)
            else:
                with without_generation_config(self.model):
                    made = Completions(
                        *super()._generate_single_turn(  # type: ignore[misc]
                            prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                        )
                    )
        self._turn += 1
        if self.model.training:
            self._count(prompt_ids, made)
        logprobs: Any = made.logprobs
        return made.ids, logprobs

    def _count(self, prompt_ids: list[list[int]], made: Completions) -> None:
        sizes = [len(ids) for ids in made.ids]
        slots = min(made.slots or len(sizes), len(sizes))
        figures = [len(sizes), sum(sizes), slots, sum(map(len, prompt_ids)), made.prompt_tokens_cached or 0]
        counts = torch.tensor(figures, dtype=torch.float64)
        distributed.sum_([counts])
        rows, tokens, all_slots, prompt_tokens, cached = counts.tolist()
        self.rollouts += int(rows)
        self.generated_tokens += int(tokens)
        # a step lasts until the slowest rank's last completion: the slots' token steps that no completion used
        slowest = distributed.max_number(lengths.makespan(sizes, slots))
        self._log_metric_value("rollout/idle_tail", lengths.idle_share(tokens, all_slots, slowest))
        if made.prompt_tokens_cached is not None:
            self._log_metric_value("rollout/prefix_hits", cached / max(prompt_tokens, 1))

    def _generate_seeded(self, prompt_ids: list[list[int]]) -> Completions:
        first = self.accelerator.process_index * len(prompt_ids)
        rows = self._row_numbers or range(first, first + len(prompt_ids))
        with self.rollout_engine() as engine:
            return engine.generate(prompt_ids, self._sampling(), row_seeds(self.args.seed, self._turn, rows=rows))

    def _sync_engine(self) -> None:
        """Bring the policy's weights to vLLM, once a step, and make sure that they arrived."""
        if self.state.global_step == self._last_loaded_step:
            return
        with self.clock("weight_sync"):
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
            limit = self.rollout.max_logprob_drift
            if limit is None:
                return
            if limit == "auto":
                both_float32 = self.vllm_generation.in_float32 and not (self.args.bf16 or self.args.fp16)
                limit = 0.005 if both_float32 else 0.1
            # TRL's own generate, which rollouts without seeds go through, wakes an engine that sleeps
            colocated = self.vllm_mode == "colocate"
            with self.vllm_generation.awake(sleep_after=not self.seeded) if colocated else nullcontext():
                drift = self.probe_engine()
            self._log_metric_value("engine/logprob_drift", drift)
            if not drift <= limit:  # NaN too
                raise RuntimeError(
                    f"after the weight sync at step {self.state.global_step} vLLM's log-probabilities differ from the "
                    f"trainer's by {drift:.3g} on average, more than rollout.max_logprob_drift allows ({limit}): the "
                    "engine's weights are stale or corrupted (or its precision is far from the trainer's: then raise "
                    "the limit)"
                )

    def probe_engine(self, num_tokens: int = 8) -> float:
        """Mean |log p of the engine - log p of the trainer| over `num_tokens` drawn tokens; the largest over ranks."""
        data = self.train_dataset
        first = next(iter(data)) if not hasattr(data, "__len__") else data[self.state.global_step % len(data)]
        prompt = self._tokenize_prompts([first["prompt"]])[0][0]
        # the engine's log-probabilities are of the distribution that it draws from: here the model's own
        sampling = Sampling(num_tokens, self.temperature or 1.0)
        engine = TrainerVLLM(self.vllm_generation, list(self.eos_token_ids), plain=True)
        answer = engine.generate([prompt], sampling, [self.state.global_step])
        tokens, theirs = answer.ids[0], answer.logprobs
        assert theirs is not None
        ids = torch.tensor([prompt + tokens], device=self.accelerator.device)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            ours, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), len(tokens))
        reported = torch.tensor([float("nan") if p is None else p for p in theirs[0]], device=ours.device)
        return distributed.max_number((ours[0].float() - reported).abs().mean().item())

    def evaluate_rewards(
        self, rows: Any, sampling: Sampling, *, samples: int = 1, batch_size: int = 256, seed: int = 0
    ) -> dict[str, Any]:
        """Reward of the current policy on `rows` (a data set like the training set), spread over the ranks.

        Returns {"reward": mean, "std_error", "pass_at_k", "mean_length", "truncated", "rows"}: the same on every rank.
        """
        one_engine_a_rank = not self.use_vllm or (self.vllm_mode == "colocate" and self.vllm_tensor_parallel_size == 1)
        with self.rollout_engine() as engine:
            return evaluate_on_ranks(
                engine,
                self._tokenizer,
                rows,
                self.reward_funcs,
                self.reward_weights.tolist(),
                sampling,
                spread=one_engine_a_rank,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
                tokenize=lambda prompts: self._tokenize_prompts(prompts)[0],
                progress=distributed.is_main() and not self.args.disable_tqdm,
                trainer_state=self.state,
            )
