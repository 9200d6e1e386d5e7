"""What a stage and its model take of a row: how many tokens, which ones, and how many rows a step needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from siftrl.trl_options import trl_options

if TYPE_CHECKING:
    from siftrl.recipe import AnyStage, ModelConfig


@dataclass(frozen=True, slots=True)
class RowLimits:
    """None is no limit.

    max_length: tokens of a row that TRL trains on; it cuts off the rest.
    drops_full_prompts: whether a prompt of max_length tokens or more leaves a row without loss.
    completion_tokens: the longest completion that is generated.
    context: tokens that the model reads at once, prompt and completion together; engine_context: that its engine does.
    num_embeddings: tokens that the model knows; a tokenizer may have more.
    rows: training rows that one step takes; rows_key: the recipe's key for it.
    """

    max_length: int | None = None
    drops_full_prompts: bool = False
    completion_tokens: int = 0
    context: int | None = None
    engine_context: int | None = None
    num_embeddings: int | None = None
    rows: int = 1
    rows_key: str = ""

    def check_rows(self, num_rows: int) -> None:
        """ValueError where the rows are too few for one step."""
        if num_rows < self.rows:
            raise ValueError(
                f"data: a step takes {self.rows} rows, but there are {num_rows} to train on; lower {self.rows_key}, or "
                "add rows"
            )

    def check_ids(self, ids: list[int], where: str) -> None:
        """ValueError where the model knows one of the tokens only by the tokenizer's word."""
        if self.num_embeddings is not None and ids and max(ids) >= self.num_embeddings:
            raise ValueError(
                f"{where}: holds token {max(ids)}, but the model embeds only {self.num_embeddings} tokens; take that "
                "token's text out of the data, or use the tokenizer that the model was trained with"
            )

    def check_length(self, num_prompt: int, num_all: int, where: str) -> None:
        """ValueError where the model cannot read a row at once. num_all: tokens with the longest completion given."""
        if self.completion_tokens:
            for limit, of, more in (
                (self.context, "the model reads", ""),
                (self.engine_context, "the engine reads", ", or raise rollout.max_model_len"),
            ):
                if limit is not None and num_prompt + self.completion_tokens > limit:
                    most = limit - self.completion_tokens
                    raise ValueError(
                        f"{where}: a prompt of {num_prompt} tokens and a completion of {self.completion_tokens} are "
                        f"more than the {limit} tokens that {of} at once; "
                        + (f"write data.max_prompt_tokens: {most}, or lower" if most > 0 else "lower")
                        + f" rollout.max_completion_tokens{more}"
                    )
            return
        longest = max(num_prompt, num_all)
        seen = longest if self.max_length is None else min(longest, self.max_length)
        if self.context is not None and seen > self.context:
            raise ValueError(
                f"{where}: has {longest} tokens, more than the {self.context} that the model reads at once; write "
                f"trainer.max_length: {self.context} to cut such rows, or data.max_prompt_tokens to drop long prompts"
            )


NO_LIMITS = RowLimits()


def model_limits(model: ModelConfig) -> RowLimits:
    """The limits of the model of `model.path`."""
    assert model.path is not None
    kwargs: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision is not None:
        kwargs["revision"] = model.revision
    config = AutoConfig.from_pretrained(model.path, **kwargs).get_text_config()
    return RowLimits(context=_context(config), num_embeddings=config.vocab_size)


def stage_limits(stage: AnyStage, model: ModelConfig) -> RowLimits:
    """The limits of a stage's rows; its model is that of `model.path`."""
    known = model_limits(model)
    if stage.kind == "grpo":
        return replace(
            known,
            completion_tokens=stage.rollout.max_completion_tokens,
            engine_context=stage.rollout.max_model_len if stage.rollout.engine == "vllm" else None,
            rows=stage.prompts_per_step,
            rows_key="prompts_per_step",
        )
    options = {name: option.get("default") for name, option in trl_options(stage.kind).items()} | stage.trainer
    packed = bool(options.get("packing")) and not stage.batch_selectors  # chosen rows are packed after they are cut
    cuts = not packed or options["packing_strategy"] == "bfd"  # the other strategies go on with the rest of a row
    keeps_start = options["truncation_mode"] == "keep_start"
    return replace(
        known,
        max_length=options["max_length"] if cuts else None,
        drops_full_prompts=keeps_start and options.get("completion_only_loss") is not False,
        rows=stage.rows_per_step if stage.batch_selectors else 1,
        rows_key="rows_per_step",
    )


def _context(config: Any) -> int | None:
    """Positions that a model has; with those that its RoPE is stretched to."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    stretched = (rope.get("original_max_position_embeddings") or positions) * (rope.get("factor") or 1.0)
    return max(positions, int(stretched))
