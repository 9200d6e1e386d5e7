"""One row of a data set: its prompt and completion, text or chat messages, made, checked and encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from siftrl.recipe import DataConfig

Messages = list[dict[str, Any]]
Prompt = str | Messages


def shape_row(row: Mapping[str, Any], data: DataConfig, kind: Literal["sft", "grpo"], where: str) -> dict[str, Any]:
    """The row's `prompt`, for SFT its `completion`, and `drop_reason`: why it cannot be used, "" when it can.

    where: the row, for messages. Raises ValueError for a row that makes no sense.
    """
    prompt, completion = _prompt(row, data, where), None
    if kind == "sft":
        completion = row.get(data.completion or "completion")
        if completion is None and isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
            prompt, completion = prompt[:-1], prompt[-1:]  # a whole conversation: its last turn is the target
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the prompt ends with an assistant's message; it must end with the user's")
    is_empty = not text_of(prompt).strip()
    if isinstance(prompt, str) and (data.chat or data.system_prompt is not None):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and data.system_prompt is not None:
        if prompt and prompt[0]["role"] == "system":
            raise ValueError(f"{where}: it has a system message already; remove data.system_prompt")
        prompt = [{"role": "system", "content": data.system_prompt}, *prompt]
    shaped: dict[str, Any] = {"prompt": prompt, "drop_reason": "empty prompt" if is_empty else ""}
    if kind == "sft":
        shaped["completion"] = _completion(completion, isinstance(prompt, list), where)
        if not is_empty and not text_of(shaped["completion"]):
            shaped["drop_reason"] = "empty completion"
    return shaped


def fill(template: str, row: Mapping[str, Any], key: str = "data.prompt_template") -> str:
    """`template.format(**row)`; ValueError where it names a column that is not there."""
    try:
        return template.format_map(row)
    except KeyError as error:
        raise ValueError(f"{key}: there is no column {error}; the columns are {', '.join(row)}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{key}: {template!r} does not fit the row: {error}; write braces as {{{{ }}}}") from error


def text_of(prompt: Prompt | None) -> str:
    """What was written: the text itself, or the contents of all messages, one a line."""
    if isinstance(prompt, list):
        return "\n".join(message["content"] for message in prompt)
    return prompt or ""


def encode_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each prompt, exactly as TRL's GRPO trainer encodes them (chat: with the assistant's opening)."""
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    encoded = tokenizer.apply_chat_template(
        conversation=list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return encoded["input_ids"]


def check_encodable(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ValueError where the tokenizer loses text without a word: to unknown tokens, or to nothing at all."""
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        unknown = None  # byte-level tokenizers know every text and name some special token as unknown
    if text.strip() and not ids:
        raise ValueError(f"{where}: the model's tokenizer encodes {shorten(text)!r} to nothing")
    if unknown is not None and unknown in ids:
        lost = sorted(c for c in set(text) if unknown in tokenizer.encode(c, add_special_tokens=False))
        raise ValueError(
            f"{where}: the model's tokenizer does not know {' '.join(map(repr, lost)) or 'some of its words'} "
            f"in {shorten(text)!r}; clean the data, or add to model.scratch.alphabet"
        )


def shorten(text: str, length: int = 200) -> str:
    """At most `length` characters: the beginning and the end."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _prompt(row: Mapping[str, Any], data: DataConfig, where: str) -> Prompt | None:
    if data.prompt_template is not None:
        return fill(data.prompt_template, row)
    prompt = row[data.prompt or "prompt"]
    if isinstance(prompt, list):
        return _messages(prompt, f"{where}: prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt: must be text or a list of messages, not {prompt!r}")
    return prompt


def _completion(completion: Any, is_chat: bool, where: str) -> Prompt | None:
    """The completion in the prompt's form; numbers (JSON) become text."""
    if isinstance(completion, list):
        if not is_chat:
            raise ValueError(f"{where}: the completion is a list of messages and the prompt is text; write chat: true")
        return _messages(completion, f"{where}: completion")
    text = "" if completion is None else str(completion)
    return [{"role": "assistant", "content": text}] if is_chat else text


def _messages(messages: list[Any], where: str) -> Messages:
    """The messages, checked, with `role` and `content` alone: columns of records pad every other key with None."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: message {i} must be {{role: ..., content: ...}}, not {message!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: message {i}: content must be text, not {message.get('content')!r}")
        if more := [key for key, value in message.items() if key not in ("role", "content") and value is not None]:
            raise ValueError(f"{where}: message {i} has {', '.join(more)}; only role and content are trained on")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
