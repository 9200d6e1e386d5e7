"""GRPO that chooses its prompts before the rollouts and its completions after them: a thin subclass of TRL's trainer.

One generation step, top to bottom (`_generate_and_score_completions`, then `siftrl.trainers.completions`):
    draw candidates -> value model scores them -> selector keeps P -> engine rolls each out G times -> rewards ->
    selector and value model see them -> groups the selector refuses are replaced by another round -> TRL's batch ->
    its completions are scored -> batch selectors keep k, with weights -> dealt to ranks and micro-batches.
Without a selector every hook below hands over to TRL unchanged, and the losses are TRL's bit for bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer

from siftrl import calibration, distributed, lengths, plugins, policy, state, value
from siftrl.batch_selection import Chain
from siftrl.generation_rules import check_generation, logprobs_mode
from siftrl.origin import loading_options, reference_loader
from siftrl.parts import BY_STRUCTURE, PartNames
from siftrl.reward_guard import RewardError, check_finite, load_reward_states, reward_states
from siftrl.rollout import ColocatedVLLM, RolloutOptions, replaced
from siftrl.run import Recorder
from siftrl.selection_checks import check_accepted, check_selection
from siftrl.trainers import rows as row_ops
from siftrl.trainers.base import SiftMixin
from siftrl.trainers.epoch_order import EpochRepeatSampler, EpochTeller
from siftrl.trainers.rollouts import RolloutsMixin
from siftrl.trainers.selected_completions import ROW, SelectedCompletionsMixin
from siftrl.types import BatchSelector, Candidates, PromptSelector, Selection


class GRPOTrainer(RolloutsMixin, SelectedCompletionsMixin, SiftMixin, TRLGRPOTrainer):
    """TRL's `GRPOTrainer` with `prompt_selector=` and `batch_selector=`; every other argument is TRL's.

    With a batch selector `args` describes the rollouts: per_device_train_batch_size x steps_per_generation x ranks
    completions are generated, rewarded, and compared in their groups. The kept ones are trained on in micro-batches of
    at most per_device_train_batch_size rows and in as many optimizer steps as before: memory is what it was, and a
    dropped completion costs nothing after its scoring. A step is as long as that of all completions would be (see
    `siftrl.trainers.completions.step_scale`).

    Args:
        prompt_selector: chooses the prompts of each step (see `siftrl.types.PromptSelector`); None: TRL's order.
        batch_selector: chooses the completions that are trained on (see `siftrl.types.BatchSelector`), or a chain of
            (selector, keep) pairs, each choosing from what the one before kept; None: all.
        keep: a share of the completions (float), or their number over all ranks (int); for a chain, stated there. Where
            all are kept they are trained on as TRL does, bit for bit.
        source_column: the data's column that names each row's source, for selectors that keep a mixture balanced.
        scoring_batch_size: rows of one forward pass of scoring; None: per_device_train_batch_size.
        parts: where the model's last block, V projection and head are, if its structure does not tell.
        max_overhead: share of a step's seconds that scoring and choosing may take (see `siftrl.budget`).
        skip_zero_advantage: do not run completions that have no advantage, though they count in the loss's denominator:
            they have no gradient. None: where a batch selector had to take some since too few have one; True: always;
            False: never. The step is TRL's up to rounding, but for bnpo: TRL divides each micro-batch by its own
            tokens, here the whole step's count. They are always run where a KL penalty, an entropy bonus or a router's
            loss counts on them.
        halt_on_no_signal: stop after so many optimizer steps in a row without a prompt whose completions' rewards
            differ. None: only warn.
        rollout: seeds, the weight-sync probe and further vLLM arguments.
        recorder: where the audit log and the samples go; None: `args.output_dir`, once a selector is on.

    Raises:
        ValueError: for a selector with bad settings, a data set that the selector cannot index, and what cannot work
            together with a batch selector.
    """

    train_dataset: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        prompt_selector: PromptSelector | None = None,
        batch_selector: BatchSelector | Chain | None = None,
        keep: float | int = 0.5,
        source_column: str | None = None,
        scoring_batch_size: int | None = None,
        parts: PartNames = BY_STRUCTURE,
        max_overhead: float | None = None,
        skip_zero_advantage: bool | None = None,
        halt_on_no_signal: int | None = None,
        rollout: RolloutOptions | None = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> None:
        self.rollout = rollout or RolloutOptions()
        self.prompt_selector = prompt_selector
        wanted = args or GRPOConfig()
        args = self._plan_rows(wanted, batch_selector, keep, skip_zero_advantage)
        selects = prompt_selector is not None or bool(self.chain)
        self.seeded = self.rollout.seeded if self.rollout.seeded is not None else selects
        check_generation(vars(wanted), seeded=self.seeded)
        for name in ("tools", "environment_factory", "rollout_func"):
            if selects and kwargs.get(name):
                raise ValueError(
                    f"{name} does not work with prompt_selector or batch_selector: completions of several turns are "
                    "neither seeded nor compared yet; remove the selectors, or it"
                )
        self.rollouts = 0  # completions generated for training, over all ranks
        self.generated_tokens = 0  # their tokens
        self._turn = 0  # calls of the engine so far: part of each completion's seed
        self._group_rewards: Tensor | None = None
        self._row_numbers: list[int] | None = None  # of this rank's completions under way, in the selection
        self.lengths = lengths.ExpectedLength()
        self._train_sampler: EpochRepeatSampler | None = None
        load = reference_loader(grpo_trainer.create_model_from_path, model)
        with (
            replaced(grpo_trainer, "VLLMGeneration", self._build_vllm),
            replaced(grpo_trainer, "create_model_from_path", load),
        ):
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self._init_sift(recorder, halt_on_no_signal)
        if batch_selector is not None and not self.chain:
            self.warn("batch_selector keeps all completions, so none is chosen: lower `keep`, or leave it out")
        self.value_model: value.ValueModel | None = None
        if prompt_selector is not None:
            self._set_up_selection(prompt_selector)
        if self.chain or skip_zero_advantage:
            rows = scoring_batch_size or wanted.per_device_train_batch_size
            self._set_up_rows(source_column, rows, parts, max_overhead)
        self.add_callback(EpochTeller(self))

    def _build_vllm(self, **kwargs: Any) -> ColocatedVLLM:
        precision = kwargs["accelerator"].mixed_precision  # vLLM's own choice for float32 weights is float16
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
        kwargs["max_num_seqs"] = self._rows_per_rank * kwargs["tensor_parallel_size"]  # rolled out, not trained on
        asked = kwargs["generation_kwargs"] or {}
        stops = dict.fromkeys([*self.eos_token_ids, *asked.get("stop_token_ids", [])])  # those of both engines
        kwargs["generation_kwargs"] = asked | {"stop_token_ids": list(stops)}
        source = loading_options(kwargs["model"], kwargs["model"].name_or_path, self.args.model_init_kwargs)
        theirs = {
            "dtype": dtype,
            "logprobs_mode": logprobs_mode(vars(self.args)),
            "trust_remote_code": source["trust_remote_code"],
        }
        if "revision" in source:  # of the configuration and the tokenizer, too
            theirs |= {"revision": source["revision"], "tokenizer_revision": source["revision"]}
        return ColocatedVLLM(engine_args=theirs | self.rollout.engine_args, **kwargs)

    def _set_up_selection(self, selector: PromptSelector) -> None:
        if dataclasses.is_dataclass(selector):
            plugins.check(selector)
        if not hasattr(self.train_dataset, "__len__") or self.train_dataset is None:
            raise ValueError("prompt_selector needs a data set that can be indexed: load it without streaming")
        if self.recorder is None:
            self.recorder = Recorder(Path(self.args.output_dir), "grpo")
        self.prompt_stream = state.PromptStream(len(self.train_dataset), self.args.seed)
        self.selection_generator = torch.Generator().manual_seed(self.args.seed + 1)
        if "value" in selector.needs:
            config = getattr(selector, "value", None) or value.ValueConfig()
            device, kwargs = self.accelerator.device, self.args.model_init_kwargs
            self.value_model = value.build(config, self.model, self._tokenizer, device, kwargs)
        self.prompt_stream.draw(selector.num_candidates(self._prompts_per_step))  # too few rows: say so now
        self.prompt_stream = state.PromptStream(len(self.train_dataset), self.args.seed)

    @property
    def _prompts_per_step(self) -> int:
        return self.args.generation_batch_size // self.num_generations

    # -- choosing prompts --------------------------------------------------------------------------------------

    def choose_prompts(self, keep: int) -> tuple[Candidates, Selection]:
        """Draw candidates and let the selector keep `keep` of them, with the value model as it stands now."""
        assert self.prompt_selector is not None
        ids = self.prompt_stream.draw(self.prompt_selector.num_candidates(keep))
        drawn = [self.train_dataset[index] for index in ids.tolist()]
        prediction = None
        if self.value_model is not None:
            prediction = self.value_model.predict(self._value_tokens(drawn), self._policy_hidden())
        candidates = Candidates(ids, drawn, prediction)
        selection = self.prompt_selector.propose(candidates, keep, self.selection_generator)
        check_selection(selection, keep, len(candidates), self.prompt_selector, "prompt", weighted=False)
        distributed.check_same(selection.indices, f"the prompts of step {self.state.global_step + 1}")
        return candidates, selection

    def _value_tokens(self, data_rows: list[dict[str, Any]]) -> list[list[int]]:
        """Prompts as the value model reads them: with the policy's tokenizer, or its own."""
        assert self.value_model is not None
        with replaced(self, "processing_class", self.value_model.tokenizer):
            return self._tokenize_prompts([row["prompt"] for row in data_rows])[0]

    def _policy_hidden(self) -> value.HiddenStates | None:
        if self.value_model is None or self.value_model.body is not None:
            return None
        policy = value.decoder(self.model)

        def hidden(ids: Tensor, mask: Tensor) -> Tensor:
            checkpointing = self.args.gradient_checkpointing_kwargs
            with disable_gradient_checkpointing(self.model, checkpointing), self.accelerator.autocast():
                return policy(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

        return hidden

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        if self.prompt_selector is not None:
            batch = self._selected_batch()
        elif self.row_selection is not None and len(inputs) % self.num_generations == 0:
            batch = self._longest_first(inputs)
        else:
            batch = self._roll_out(inputs)
        if self.row_selection is not None:
            self._kept = self._keep_completions(batch)
            for micro_batch in self._kept:
                self._add_log_probs(micro_batch)
        elif "importance_sampling_ratio" in batch:
            self._log_masked(batch["importance_sampling_ratio"], policy.loss_mask(batch))
        return batch

    def _roll_out(self, data_rows: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of this rank's rows; for batch selection with each one's reward and place in the data set."""
        if self.row_selection is None:
            return super()._generate_and_score_completions(data_rows)
        ids, plain = self.take_ids(data_rows)
        with self._without_old_passes():
            batch = super()._generate_and_score_completions(plain)
        assert self._group_rewards is not None
        rewards = self._group_rewards.flatten()[self.accelerator.process_index * len(ids) :][: len(ids)]
        return batch | {"ids": ids, "rewards": rewards.to(ids.device)}

    def _longest_first(self, data_rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The rollouts of this rank's prompts as TRL chose them, those whose completions will be the longest first."""
        group, first = self.num_generations, self.accelerator.process_index * len(data_rows)
        prompts = data_rows[::group]
        ids = torch.tensor([row[ROW] for row in prompts])
        tokens = torch.tensor([len(mine) for mine in self._tokenize_prompts([row["prompt"] for row in prompts])[0]])
        order = self.lengths.predict(ids, tokens, None).argsort(descending=True, stable=True)
        places = [place * group + copy for place in order.tolist() for copy in range(group)]
        self._row_numbers = [first + place for place in places]  # see `_round`
        batch = self._roll_out([data_rows[place] for place in places])
        self._row_numbers = None
        seen = distributed.gather_objects((ids[order], tokens[order], self._lengths(batch).view(-1, group).mean(1)))
        all_ids, all_tokens, all_means = (torch.cat(parts) for parts in zip(*seen, strict=True))
        self.lengths.observe(all_ids, all_tokens, None, all_means)
        return batch

    def _selected_batch(self) -> dict[str, Any]:
        """The rollouts of prompts that the selector chose, in as many rounds as it asks for."""
        assert self.prompt_selector is not None
        # TRL's loader only keeps time here: its rows were chosen one step ago, without the newest value model
        wanted = keep = self._prompts_per_step
        chosen: list[dict[str, Tensor]] = []
        spare: list[dict[str, Tensor]] = []
        for round_ in range(self.prompt_selector.max_rounds):
            batch, accepted = self._round(keep, round_)
            if round_ == 0 and (self.prompt_selector.max_rounds == 1 or accepted.all()):
                return batch
            chosen_now, refused = self._by_group(batch, accepted)
            chosen, spare = chosen + chosen_now, spare + refused
            missing = wanted - len(chosen) // self.num_generations
            if missing <= 0:
                break
            rate = max(accepted.float().mean().item(), 0.25)
            keep = self._even(min(wanted, round(missing / rate)))
        rows = (chosen + spare)[: wanted * self.num_generations]  # short of groups: the refused ones fill up
        self._log_metric_value("prompts/filled", max(missing, 0) / wanted)
        return self._deal(rows)

    def _round(self, keep: int, round_: int) -> tuple[dict[str, Any], Tensor]:
        """One selection with its rollouts: TRL's batch, and which of the `keep` groups the selector accepts."""
        assert self.prompt_selector is not None and self.recorder is not None
        with self.clock("propose"):
            candidates, selection = self.choose_prompts(keep)
            order = self._deal_prompts(candidates, selection)
        group, share = self.num_generations, keep * self.num_generations // self.accelerator.num_processes
        # completions keep the number that they have in the selection, whatever rank makes them: it is in their seed
        numbers = [place * group + copy for place in order.tolist() for copy in range(group)]
        self._row_numbers = numbers[self.accelerator.process_index * share :][:share]
        chosen = [candidates.rows[index] for index in selection.indices.tolist()]
        numbered = [dict(chosen[number // group]) for number in self._row_numbers]
        if self.row_selection is not None:
            ids = candidates.ids[selection.indices].tolist()
            numbered = [row | {ROW: ids[n // group]} for row, n in zip(numbered, self._row_numbers, strict=True)]
        batch = self._roll_out(numbered)
        self._row_numbers = None
        assert self._group_rewards is not None
        rewards = torch.empty_like(self._group_rewards)
        rewards[order] = self._group_rewards  # in the selection's order again
        self._see_lengths(candidates, selection, order, batch)
        with self.clock("value_update"):
            self.prompt_selector.observe(candidates, selection, rewards)
            if self.value_model is not None:
                learned = self.value_model.update(self._value_tokens(chosen), rewards, self._policy_hidden())
                for name, figure in learned.items():
                    self._log_metric_value(f"value/{name}", figure)
        figures = self.prompt_selector.metrics()
        for name, figure in figures.items():
            self._log_metric_value(f"prompts/{name}", figure)
        if "fallback" in figures:
            explained = figures.get("spread_explained_variance", figures.get("explained_variance"))
            self.health.curriculum(figures["fallback"] > 0, explained)
        if distributed.is_main():
            means = [None if torch.isnan(group).all() else group.nanmean().item() for group in rewards]
            self.recorder.selection(self.state.global_step + 1, round_, candidates, selection, means)
        accepted = self.prompt_selector.accept(rewards)
        check_accepted(accepted, len(rewards), self.prompt_selector)
        distributed.check_same(accepted.long(), f"the groups that are accepted in step {self.state.global_step + 1}")
        return batch, accepted[order]

    def _deal_prompts(self, candidates: Candidates, selection: Selection) -> Tensor:
        """int64 [P]: the chosen prompts' places in the selection, rank by rank, so that ranks finish together; on each
        rank those whose completions will be the longest come first, so that none is left over at the end."""
        world = self.accelerator.num_processes
        if len(selection.indices) % world:  # a group is shared by two ranks
            return torch.arange(len(selection.indices))
        expected = self.lengths.predict(*self._length_features(candidates, selection))
        return torch.tensor([place for mine in lengths.deal_prompts(expected, world) for place in mine])

    def _see_lengths(self, candidates: Candidates, selection: Selection, order: Tensor, batch: dict[str, Any]) -> None:
        mine = self._lengths(batch)
        everyone = torch.cat(distributed.gather_objects(mine)).view(-1, self.num_generations).mean(1)
        means = torch.empty_like(everyone)
        means[order] = everyone
        self.lengths.observe(*self._length_features(candidates, selection), means)

    def _lengths(self, batch: dict[str, Any]) -> Tensor:
        """float64 [B], on the CPU: tokens of this rank's completions."""
        # `mask_truncated_completions` leaves no token of those that came to the limit
        counts = batch["completion_mask"].sum(1).double().cpu()
        return torch.where(counts == 0, float(self.max_completion_length), counts)

    def _length_features(self, candidates: Candidates, selection: Selection) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = [candidates.rows[index] for index in selection.indices.tolist()]
        tokens = torch.tensor([len(ids) for ids in self._tokenize_prompts([row["prompt"] for row in rows])[0]])
        predicted = None if candidates.value is None else candidates.value.mean[selection.indices].cpu()
        return candidates.ids[selection.indices], tokens, predicted

    # -- rounds: groups that a selector refuses are replaced ----------------------------------------------------

    def _even(self, prompts: int) -> int:
        """The next number of prompts whose completions divide evenly among the ranks."""
        world = self.accelerator.num_processes
        while prompts * self.num_generations % world:
            prompts += 1
        return prompts

    def _by_group(
        self, batch: dict[str, Any], accepted: Tensor
    ) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """All ranks' rows, those of accepted groups and the others, each in order."""
        everyone = [row for part in distributed.gather_objects(row_ops.split(batch)) for row in part]
        kept = accepted.repeat_interleave(self.num_generations).tolist()
        return (
            [row for row, keep in zip(everyone, kept, strict=True) if keep],
            [row for row, keep in zip(everyone, kept, strict=True) if not keep],
        )

    def _deal(self, everyone: list[dict[str, Tensor]]) -> dict[str, Any]:
        """This rank's share of the rows, as a batch."""
        share = len(everyone) // self.accelerator.num_processes
        mine = everyone[self.accelerator.process_index * share :][:share]
        batch = row_ops.join(mine, self._tokenizer.pad_token_id, self.accelerator.device)
        batch["num_items_in_batch"] = torch.tensor(row_ops.loss_tokens(everyone), device=self.accelerator.device)
        return batch

    # -- rewards and losses -------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: Any
    ) -> Tensor:
        with self.clock("reward"):
            try:
                per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            except SystemExit as error:  # a reward of Python's would end the run as if it were done
                raise RewardError(f"a reward raised SystemExit: {error}") from error
        weights = self.reward_weights.to(per_function.device)
        check_finite(per_function, weights, self.reward_func_names)
        weighted = per_function * weights
        total = weighted.nansum(1)
        total[torch.isnan(per_function).all(1)] = float("nan")
        if torch.isnan(total).all():
            raise RuntimeError(
                f"step {self.state.global_step + 1}: no completion got a reward (every reward is missing), so there is "
                "nothing to learn from; look at the reward functions"
            )
        if self.model.training:
            self._group_rewards = total.view(-1, self.num_generations).cpu()
            effective = calibration.group_statistics(self._group_rewards).effective()
            self._log_metric_value("effective_ratio", effective.float().mean().item())
            if self.multi_objective_aggregation != "sum_then_normalize":  # each reward has advantages of its own
                groups = weighted.T.reshape(-1, self.num_generations).cpu()
                effective = calibration.group_statistics(groups).effective()
            cut = self._metrics["train"]["completions/clipped_ratio"][-1]
            known = total[~torch.isnan(total)]
            self.health.rollout(bool(effective.any()), cut, known.min().item(), known.max().item())
            if self.recorder is not None and distributed.is_main():
                rewards = total.tolist()  # rank 0's rows come first
                samples = [
                    {"prompt": prompt, "completion": completion, "reward": reward}
                    for prompt, completion, reward in zip(prompts, completions, rewards, strict=False)
                ]
                every = max(1, len(samples) // self.recorder.num_samples) if self.recorder.num_samples else 1
                self.recorder.samples(self.state.global_step + 1, samples[::every])
        return per_function

    def _log_metric_value(self, name: str, figure: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(figure)

    # -- data order and checkpoints -----------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        plain = super()._get_train_sampler(dataset)
        self._train_sampler = EpochRepeatSampler(
            plain.data_source, plain.mini_repeat_count, plain.batch_size, plain.repeat_count, plain.shuffle, plain.seed
        )
        return self._train_sampler

    def sift_state(self) -> dict[str, Any]:
        saved = super().sift_state() | {
            "micro_step": self._step,
            "turn": self._turn,
            "rollouts": self.rollouts,
            "generated_tokens": self.generated_tokens,
            "lengths": self.lengths.state_dict(),
        }
        if self.prompt_selector is not None:
            saved |= {
                "stream": self.prompt_stream.state_dict(),
                "generator": self.selection_generator.get_state(),
                "selector": self.prompt_selector.state_dict(),
                "value_model": self.value_model.state() if self.value_model is not None else None,
            }
        return saved

    def sift_summary(self) -> dict[str, Any]:
        return super().sift_summary() | {"rollouts": self.rollouts, "tokens": self.generated_tokens}

    def load_sift_state(self, saved: dict[str, Any]) -> None:
        super().load_sift_state(saved)
        self._step, self._turn = saved["micro_step"], saved["turn"]
        self.rollouts, self.generated_tokens = saved["rollouts"], saved["generated_tokens"]
        if (self.prompt_selector is not None) != ("stream" in saved):
            raise ValueError(
                "the checkpoint was written "
                + ("with" if "stream" in saved else "without")
                + " a prompt selector: resume with the recipe that it was made with"
            )
        self.lengths.load_state_dict(saved["lengths"])
        if self.prompt_selector is None:
            return
        self.prompt_stream.load_state_dict(saved["stream"])
        self.selection_generator.set_state(saved["generator"])
        self.prompt_selector.load_state_dict(saved["selector"])
        if self.value_model is not None:
            self.value_model.load_state(saved["value_model"])

    def rank_state(self) -> dict[str, Any]:
        """Rollouts that later optimizer steps will still use (`steps_per_generation`, `num_iterations` above 1), and
        the states of this rank's rewards."""
        under_way = self._step % self._passes_in_rollout != 0
        saved = {"rollouts_under_way": self._buffered_inputs} if under_way else {}
        states = reward_states(self.reward_funcs)
        return saved | {"rewards": states} if states else saved

    def load_rank_state(self, saved: dict[str, Any]) -> None:
        if "rollouts_under_way" in saved:
            self._buffered_inputs = send_to_device(saved["rollouts_under_way"], self.accelerator.device)
        load_reward_states(self.reward_funcs, saved.get("rewards", {}))
