"""Rows as token ids, exactly as TRL's trainers encode them: checked, and measured against what a stage takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from siftrl.row_limits import RowLimits
from siftrl.row_shapes import Prompt, encode_prompts, shorten, text_of

if TYPE_CHECKING:
    from siftrl.recipe import DataConfig

# what a chat template raises over messages that it does not expect
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True, slots=True)
class Measured:
    """num_prompt: tokens of the prompt. num_all: with the longest of the row's completions. is_cut: whether the stage
    cuts off some of them. drop_reason: why the row cannot be used, "" when it can."""

    num_prompt: int
    num_all: int
    is_cut: bool
    drop_reason: str


def measure(
    rows: dict[str, list[Any]],
    where: list[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits,
    data: DataConfig,
) -> list[Measured]:
    """The tokens of each of n rows.

    rows: `prompt`, and the completions of the stage's kind, n of each, in one form. where: the rows, for messages.
    Raises ValueError, with the row, where the tokenizer loses text without a word, the chat template refuses the
    messages, the model cannot read the row, or a prompt is too long and `data.long_prompts` is "error".
    """
    prompts: list[Prompt] = rows["prompt"]
    if not prompts:
        return []
    hint = "; remove data.system_prompt" if data.system_prompt is not None else ""
    prompt_ids = _encode(prompts, True, tokenizer, where, hint)
    _check_encoded(prompts, prompt_ids, [0] * len(prompts), tokenizer, limits, where, "prompt")
    completed: list[list[list[int]]] = []
    for name in rows:
        if name != "prompt":
            wholes = [_with_completion(*pair, tokenizer) for pair in zip(prompts, rows[name], strict=True)]
            ids = _encode(wholes, False, tokenizer, where, hint)
            _check_encoded(rows[name], ids, list(map(len, prompt_ids)), tokenizer, limits, where, name)
            completed.append(ids)
    return [
        _measured(prompt, wholes, row, limits, data)
        for prompt, row, *wholes in zip(prompt_ids, where, *completed, strict=True)
    ]


def _measured(
    prompt: list[int], wholes: Sequence[list[int]], where: str, limits: RowLimits, data: DataConfig
) -> Measured:
    num_all = max(map(len, wholes), default=len(prompt))
    if data.max_prompt_tokens is not None and len(prompt) > data.max_prompt_tokens:
        if data.long_prompts == "error":
            raise ValueError(
                f"data.max_prompt_tokens: {where.removeprefix('data: ')} has a prompt of {len(prompt)} tokens, more "
                f"than {data.max_prompt_tokens}; raise the limit, or write `long_prompts: drop`"
            )
        return Measured(len(prompt), num_all, False, "long prompt")
    is_cut = limits.max_length is not None and num_all > limits.max_length
    if is_cut and limits.drops_full_prompts and _shared(prompt, wholes) >= cast(int, limits.max_length):
        return Measured(len(prompt), num_all, False, "prompt fills max_length")
    limits.check_length(len(prompt), num_all, where)
    return Measured(len(prompt), num_all, is_cut, "")


def _shared(prompt: list[int], wholes: Sequence[list[int]]) -> int:
    """Tokens that the prompt has in common with itself and each completion: there TRL lets the completion begin."""
    for i, tokens in enumerate(zip(prompt, *wholes, strict=False)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, (prompt, *wholes)))


def _with_completion(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    if isinstance(prompt, list):
        return prompt + completion
    end = cast(str, tokenizer.eos_token)
    return prompt + completion + ("" if completion.endswith(end) else end)


def _encode(
    rows: list[Any], opens: bool, tokenizer: PreTrainedTokenizerBase, where: list[str], hint: str
) -> list[list[int]]:
    """Token ids of each row; ValueError for the first one that the chat template refuses."""
    try:
        return encode_prompts(rows, tokenizer, opens=opens)
    except _TEMPLATE_ERRORS:
        for row, place in zip(rows, where, strict=True):
            try:
                encode_prompts([row], tokenizer, opens=opens)
            except _TEMPLATE_ERRORS as error:
                refused = f"{place}: the model's chat template refuses its messages: {str(error).splitlines()[0]}"
                has_system = isinstance(row, list) and row[0]["role"] == "system"
                raise ValueError(refused + (hint if has_system else "")) from error
        raise


def _check_encoded(
    texts: list[Any],
    ids: list[list[int]],
    lengths_before: list[int],
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits,
    where: list[str],
    name: str,
) -> None:
    """ValueError where the tokenizer loses text without a word: to unknown tokens, or to nothing at all.

    ids: of the texts, behind `lengths_before` tokens of others.
    """
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        unknown = None  # byte-level tokenizers know every text and name some special token as unknown
    for text, row, before, place in zip(texts, ids, lengths_before, where, strict=True):
        if len(row) <= before and (lost := text_of(text)).strip():
            raise ValueError(f"{place}: {name}: the model's tokenizer encodes {shorten(lost)!r} to nothing")
        if unknown is not None and unknown in row:
            written = text_of(text)
            lost_characters = sorted(
                c for c in set(written) if unknown in tokenizer.encode(c, add_special_tokens=False)
            )
            raise ValueError(
                f"{place}: {name}: the model's tokenizer does not know "
                f"{' '.join(map(repr, lost_characters)) or 'some of its words'} in {shorten(written)!r}; clean the "
                "data, or add to model.scratch.alphabet"
            )
        limits.check_ids(row, f"{place}: {name}")
