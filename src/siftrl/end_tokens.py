"""Which tokens end a completion, and nothing else of a checkpoint's generation settings.

A checkpoint's generation_config.json may ask for top_p, a repetition penalty and more. Rollouts and evaluation take the
recipe's sampling settings alone; what they take from the file is its end tokens, on every engine alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from siftrl.origin import whole


def end_tokens(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a completion: the tokenizer's eos token, then those that the model declares."""
    declared: int | list[int] | None = generation_config.eos_token_id
    also = [declared] if isinstance(declared, int) else list(declared or [])
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *also]))  # type: ignore[arg-type]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | str:
    """The id of the token that the chat template writes after an assistant's message; or why there is none."""
    said = "A siftrl answer."
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": said}]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError) as error:
        return f"the chat template does not render a plain conversation ({error})"
    _, found, after = rendered.rpartition(said)
    if not found or not after.strip():
        return "the chat template writes nothing after an assistant's message"
    first = tokenizer.encode(after, add_special_tokens=False)[0]
    if first not in tokenizer.added_tokens_decoder and first not in tokenizer.all_special_ids:
        return f"the chat template ends an assistant's message with plain text, {after.strip()[:20]!r}"
    return int(first)


def stop_at_turn_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Let a model that learns conversations stop where an assistant's turn ends; returns why it will not, or None.

    Many base models declare another end token than the one that their chat template ends turns with.
    """
    token = turn_end(tokenizer)
    if isinstance(token, str):
        return token
    settings = whole(model).generation_config
    settings.eos_token_id = list(dict.fromkeys([*end_tokens(settings, tokenizer), token]))
    return None


def settle_turn_end(trainer: Any, tokenizer: PreTrainedTokenizerBase, *, learns: bool) -> None:
    """For a stage of conversations. learns: whether the model is shown whole ones (SFT, DPO), and so the turn's end."""
    if learns:
        if why := stop_at_turn_end(trainer.model, tokenizer):
            trainer.warn(f"the model learns no token that ends its turns: {why}")
        return
    token = turn_end(tokenizer)
    if isinstance(token, int) and token not in trainer.eos_token_ids:
        trainer.warn(
            f"completions do not stop at {tokenizer.convert_ids_to_tokens(token)}, which ends an assistant's turn in "
            "the chat template: it is not in eos_token_id of the model's generation_config.json; add it there, or "
            "train the model by chat SFT first"
        )


@contextmanager
def without_generation_config(model: Any) -> Iterator[None]:
    """`model.generate` fills what its caller leaves open from the checkpoint's generation settings: here from none."""
    with ExitStack() as stack:
        for holder in {id(holder): holder for holder in (model, whole(model))}.values():
            if "generation_config" in vars(holder):
                before = holder.generation_config
                holder.generation_config = GenerationConfig()
                stack.callback(setattr, holder, "generation_config", before)
        yield
