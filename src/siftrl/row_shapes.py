"""One row of a data set: its prompt and completions, text or chat messages, made, checked and encoded.

This module must stay free of torch: the first rows of a file are shaped before torch is imported.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from siftrl.data_files import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from siftrl.recipe import DataConfig

Messages = list[dict[str, Any]]
Prompt = str | Messages
Kind = Literal["sft", "dpo", "grpo"]
COMPLETIONS: dict[Kind, tuple[str, ...]] = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "grpo": ()}
"""What rows have besides their prompt, by kind of stage."""


def shape_row(row: Mapping[str, Any], data: DataConfig, kind: Kind, where: str) -> tuple[dict[str, Any], str]:
    """The row's `prompt`, for SFT its `completion`, for DPO `chosen` and `rejected`; and why it cannot be used, "" when
    it can.

    where: the row, for messages. Raises ValueError for a row that makes no sense.
    """
    completions = {name: row.get(getattr(data, name) or name) for name in COMPLETIONS[kind]}
    prompt: Prompt | None
    if kind == "dpo" and any(map(is_conversation, completions.values())):
        prompt, completions = _before_last(completions, where)
    else:
        prompt = _prompt(row, data, where)
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        if kind != "sft" or completions["completion"] is not None:
            problem = "the prompt ends with an assistant's message; it must end with the user's"
            raise ValueError(f"{where}: {problem}")
        prompt, completions = prompt[:-1], {"completion": prompt[-1:]}  # a whole conversation: its last turn
    if not text_of(prompt).strip():
        is_null = prompt is None and data.prompt_template is not None
        return {}, "null in prompt_template" if is_null else "empty prompt"
    if isinstance(prompt, str) and (data.chat or data.system_prompt is not None):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and data.system_prompt is not None:
        if prompt and prompt[0]["role"] == "system":
            raise ValueError(f"{where}: it has a system message already; remove data.system_prompt")
        prompt = [{"role": "system", "content": data.system_prompt}, *prompt]
    shaped: dict[str, Any] = {"prompt": prompt}
    for name, completion in completions.items():
        shaped[name] = _completion(completion, isinstance(prompt, list), where, name)
    texts = [text_of(shaped[name]) for name in completions]
    if not all(texts):
        return shaped, "empty completion"
    return shaped, "equal completions" if kind == "dpo" and texts[0] == texts[1] else ""


def columns_needed(first: Mapping[str, Any], data: DataConfig, kind: Kind) -> dict[str, str]:
    """The columns that rows of this form must have: the key of `data` that names it -> the column. first: a row."""
    needed = {} if data.prompt_template is not None else {"prompt": data.prompt or "prompt"}
    if not (kind == "sft" and isinstance(first.get(data.prompt or "prompt"), list)):
        needed |= {name: getattr(data, name) or name for name in COMPLETIONS[kind]}
    if kind == "dpo" and is_conversation(first.get(needed["chosen"])):
        needed.pop("prompt", None)
    return needed


def is_conversation(completion: Any) -> bool:
    """Whether a column of pairs holds the prompt, too: messages that begin with another's than the assistant's."""
    return isinstance(completion, list) and completion[:1] != [] and completion[0].get("role") != "assistant"


def _before_last(pair: Mapping[str, Any], where: str) -> tuple[Messages, dict[str, Any]]:
    """Two whole conversations: what they have in common, and the last message of each."""
    whole = {name: _messages(messages or [], f"{where}: {name}") for name, messages in pair.items()}
    prompt = whole["chosen"][:-1]
    if whole["rejected"][:-1] != prompt:
        raise ValueError(f"{where}: chosen and rejected must be one conversation up to their last message")
    for name, messages in whole.items():
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: {name}: the last message must be the assistant's")
    return prompt, {name: messages[-1:] for name, messages in whole.items()}


class _CellFormatter(string.Formatter):
    """Reads inside of cells: "{metadata[size]}"."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise _NoValueError
        return whole(value), first


class _NoValueError(Exception):
    pass


@functools.cache
def template_fields(template: str) -> tuple[str, ...]:
    """What stands in the template's braces, such as "question" or "metadata[size]". ValueError for a broken one."""
    fields: list[str] = []
    for _, name, spec, _ in string.Formatter().parse(template):
        if name is not None:
            fields += [name, *template_fields(spec or "")]
    return tuple(fields)


def template_columns(template: str) -> list[str]:
    """The columns that a template names. Raises ValueError for a broken one."""
    try:
        names = [re.split(r"[.\[]", name)[0] for name in template_fields(template)]
    except ValueError as error:
        raise ValueError(f"data.prompt_template: {template!r}: {error}; write braces as {{{{ }}}}") from error
    return [name for name in dict.fromkeys(names) if name and not name.isdigit()]


def fill(template: str, row: Mapping[str, Any], key: str = "data.prompt_template") -> str | None:
    """`template.format(**row)`; None where a cell that it names is null.

    Raises ValueError where it names a column that is not there.
    """
    try:
        fields = template_fields(template)
        if any("[" in name or "." in name for name in fields):
            return _CellFormatter().vformat(template, (), row)
        if any(row[name] is None for name in fields):
            return None
        return template.format_map(row)
    except _NoValueError:
        return None
    except KeyError as error:
        raise ValueError(f"{key}: there is no column {error}; the columns are {', '.join(row)}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{key}: {template!r} does not fit the row: {error}; write braces as {{{{ }}}}") from error


def text_of(prompt: Prompt | None) -> str:
    """What was written: the text itself, or the contents of all messages, one a line."""
    if isinstance(prompt, list):
        return "\n".join(message["content"] for message in prompt)
    return prompt or ""


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, opens: bool = True
) -> list[list[int]]:
    """Token ids of each prompt, exactly as TRL's trainers encode them.

    opens: chat prompts end with the assistant's opening; False: what is given is a whole conversation.
    """
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    encoded = tokenizer.apply_chat_template(
        conversation=list(prompts), add_generation_prompt=opens, tokenize=True, return_dict=True
    )
    return encoded["input_ids"]


def shorten(text: str, length: int = 200) -> str:
    """At most `length` characters: the beginning and the end."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _prompt(row: Mapping[str, Any], data: DataConfig, where: str) -> Prompt | None:
    if data.prompt_template is not None:
        return fill(data.prompt_template, row)
    prompt = row.get(data.prompt or "prompt")
    if isinstance(prompt, list):
        return _messages(prompt, f"{where}: prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt: must be text or a list of messages, not {prompt!r}")
    return prompt


def _completion(completion: Any, is_chat: bool, where: str, name: str) -> Prompt | None:
    """The completion in the prompt's form; numbers become text. name: its column."""
    if isinstance(completion, list):
        if not is_chat:
            raise ValueError(f"{where}: the {name} is a list of messages and the prompt is text; write chat: true")
        return _messages(completion, f"{where}: {name}")
    if isinstance(completion, dict):
        raise ValueError(
            f"{where}: {name}: must be text, a number or a list of messages, not {shorten(str(completion))}"
        )
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
