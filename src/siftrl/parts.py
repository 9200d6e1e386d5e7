"""The parts of a causal language model that scoring rows needs: decoder, last block, V projection, head.

CoLM (Nguyen et al., arXiv 2407.19580) takes as a row's feature the gradient of the last block's V projection, or of its
LoRA matrices. UDS (Zou et al., arXiv 2510.16882) needs the logits, which the head makes of the last hidden state. Parts
are found by the model's structure, also below PEFT's wrapper, and one forward pass over a few tokens checks them.

Shapes: B rows, T tokens, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from siftrl.recipe_text import near


@dataclass(frozen=True)
class PartNames:
    """Recipe keys (`signals`) that name parts; null: found by structure. Names are those of the model below PEFT.

    block: dotted name of the last block, for example "model.layers.27".
    value: dotted name, inside the block, of the matrix whose gradient is a row's feature: "self_attn.v_proj".
    head: dotted name of the module that makes logits of the last hidden state: "lm_head".
    """

    block: str | None = None
    value: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class ValueSite:
    """One matrix whose gradient is a row's feature: sum_t delta_t x_t^T, [columns, inputs].

    module: called once in a forward pass, with x [B, T, inputs] as its first positional argument; it returns
        [B, T, outputs], whose gradient is delta. Latent attention puts a dimension of 1 before T, so take both
        through flatten(1, -2). A linear layer of any kind (quantised ones and Conv1D too), or a LoRA's A or B.
    columns: int64, on the CPU, ascending: the outputs that are V's, where a matrix holds more; None: all.
    """

    module: nn.Module
    columns: Tensor | None


@dataclass(frozen=True)
class Parts:
    """What `find_parts` found.

    decoder: the stack of blocks; its output's `last_hidden_state` [B, T, d] comes after the last norm.
    layers_name: the attribute of `decoder` that holds the ModuleList of blocks ("layers", "h", ...).
    block: the last of them.
    sites: one for a full weight; A and B for a LoRA on V; none where no V was asked for.
    head: the module that makes logits [B, T, V].
    linear_head: logits = logit_scale * (last_hidden_state W^T + b), with `head` a linear layer of weight W [V, d]
        and bias b [V] or None. False where logits are capped, where the head carries an adapter (its matrix is
        not its `weight` alone), or where this does not hold for the tokens tried: then take the model's logits.
    logit_scale: a constant of the model, 1 for most; 1 too where `linear_head` is False.
    """

    decoder: nn.Module
    layers_name: str
    block: nn.Module
    sites: tuple[ValueSite, ...]
    head: nn.Module
    linear_head: bool
    logit_scale: float


BY_STRUCTURE = PartNames()


def check_adapters(model: nn.Module, what: str) -> None:
    """Refuse PEFT's prompt learning, which puts tokens or a cache of its own before each row: positions are not the
    rows' then, and modules below the wrapper do not see them. what: the option that reads the model below it."""
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"{what}, which does not work with {type(adapter).__name__}: prompt learning puts tokens of its own "
                "before each row; train LoRA adapters instead"
            )


def find_parts(model: nn.Module, names: PartNames = BY_STRUCTURE, *, need_value: bool = True) -> Parts:
    """The parts of a transformers causal language model, or of PEFT's wrapper around one.

    Runs the model once, without gradient and in evaluation mode, on a few tokens; its training flags stay as they were.
    Modules are only called, never read, so it works on weights that ZeRO-3 has sharded: there call it on every rank,
    after DeepSpeed has taken the model over.

    names: parts that the structure does not tell.
    need_value: False leaves `sites` empty, and never fails for want of a V projection.

    Raises ValueError, with the recipe key to write, for a part that is not found or does not behave like one.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = base.config.get_text_config()
    decoder, layers_name = _find_stack(base, names.block)
    block = getattr(decoder, layers_name)[-1]
    head = _find_head(base, names.head)
    value_name = _find_value(block, config, names.value) if need_value else None
    sites = () if value_name is None else _sites(block, value_name, config)

    probe = _run(base, [decoder, head, *(site.module for site in sites)])
    for site in sites:
        _check_site(site, f"{_name_of(base, block)}.{value_name}", probe)
    scale = _logit_scale(config, decoder, head, probe)
    return Parts(decoder, layers_name, block, sites, head, scale is not None, 1.0 if scale is None else scale)


# -- decoder, block, head --------------------------------------------------------------------------------------------


def _find_stack(base: Any, name: str | None) -> tuple[nn.Module, str]:
    """(decoder, the attribute that holds its blocks)."""
    if name is not None:
        return _named_stack(base, name)
    num_blocks = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    # get_decoder first: a model that also sees images has a stack of blocks for them, too
    for module in (base.get_decoder(), *base.modules()):
        if isinstance(module, PreTrainedModel):
            for attribute, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == num_blocks:
                    return module, attribute
    raise ValueError(
        f"signals.block: no list of {num_blocks} blocks was found in {type(base).__name__}; write the last block's "
        "name as `model.named_modules()` gives it, for example model.layers.27"
    )


def _named_stack(base: Any, name: str) -> tuple[nn.Module, str]:
    block = _submodule(base, name, "signals.block", "the model")
    path, _, _ = name.rpartition(".")
    decoder_name, _, layers_name = path.rpartition(".")
    layers = base.get_submodule(path)
    if not isinstance(layers, nn.ModuleList) or not isinstance(base.get_submodule(decoder_name), PreTrainedModel):
        raise ValueError(
            f"signals.block: {name!r} is a {type(block).__name__} inside a {type(layers).__name__}; write the name of "
            "a block, which is an item of a ModuleList that a transformers model holds"
        )
    if layers[-1] is not block:
        raise ValueError(f"signals.block: {name!r} is not the last block; write {path}.{len(layers) - 1}")
    return base.get_submodule(decoder_name), layers_name


def _find_head(base: Any, name: str | None) -> nn.Module:
    if name is not None:
        return _submodule(base, name, "signals.head", "the model")
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"signals.head: {type(base).__name__} does not say which module makes its logits; write its name, for "
            "example lm_head"
        )
    return head


def _submodule(parent: nn.Module, name: str, key: str, where: str) -> nn.Module:
    modules = dict(parent.named_modules())
    if name not in modules or not name:
        raise ValueError(f"{key}: {where} has no module {name!r}{near(name, modules)}")
    return modules[name]


def _name_of(base: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in base.named_modules() if module is wanted)


# -- the V projection ------------------------------------------------------------------------------------------------

VALUE_NAMES = ("v_proj", "value_proj", "value", "Wv", "wv", "v")
"""A matrix that holds V and nothing else is called so, the most usual name first."""


@dataclass(frozen=True)
class FusedLayout:
    """Where V lies among the outputs of a matrix that also holds K or Q: `groups` runs of before + value + after."""

    groups: int
    before: int
    value: int
    after: int = 0

    def columns(self) -> Tensor:
        """int64 [groups * value], ascending."""
        run = self.before + self.value + self.after
        outputs = torch.arange(self.groups * run).view(self.groups, run)
        return outputs[:, self.before : self.before + self.value].flatten()


def _thirds(config: Any) -> FusedLayout:
    """All of Q, all of K, all of V, with as many heads each."""
    return FusedLayout(1, 2 * config.hidden_size, config.hidden_size)


def _grouped_thirds(config: Any) -> FusedLayout:
    """All of Q, all of K, all of V; K and V may have fewer heads than Q."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return FusedLayout(1, (config.num_attention_heads + kv_heads) * width, kv_heads * width)


def _q_k_v_of_each_head(config: Any) -> FusedLayout:
    width = config.hidden_size // config.num_attention_heads
    return FusedLayout(config.num_attention_heads, 2 * width, width)


def _gpt_bigcode(config: Any) -> FusedLayout:
    """One head of K and V for all heads of Q, or as many of each."""
    width = config.hidden_size // config.num_attention_heads
    if config.multi_query:
        return FusedLayout(1, (config.num_attention_heads + 1) * width, width)
    return _q_k_v_of_each_head(config)


def _falcon(config: Any) -> FusedLayout:
    """40B and later: each head of K and V follows the heads of Q that it serves. 7B: one K and one V at the end."""
    width = config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        served = config.num_attention_heads // config.num_kv_heads
        return FusedLayout(config.num_kv_heads, (served + 1) * width, width)
    return _gpt_bigcode(config)


def _codegen(config: Any) -> FusedLayout:
    """Four runs of Q, V, K (in this order): one for each core that the model was trained on."""
    share = config.hidden_size // 4
    return FusedLayout(4, share, share, share)


def _latent(config: Any) -> FusedLayout:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): for each head K without position, then V."""
    return FusedLayout(config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim)


FUSED_LAYOUTS: dict[tuple[str, str], Callable[[Any], FusedLayout]] = {
    ("phi3", "qkv_proj"): _grouped_thirds,
    ("gpt2", "c_attn"): _thirds,
    ("mpt", "Wqkv"): _thirds,
    ("gpt_neox", "query_key_value"): _q_k_v_of_each_head,
    ("bloom", "query_key_value"): _q_k_v_of_each_head,
    ("persimmon", "query_key_value"): _q_k_v_of_each_head,
    ("gpt_bigcode", "c_attn"): _gpt_bigcode,
    ("falcon", "query_key_value"): _falcon,
    ("codegen", "qkv_proj"): _codegen,
}
"""(model type, matrix): its layout. The name alone does not tell: c_attn differs between GPT-2 and GPT-BigCode."""
LATENT_NAME = "kv_b_proj"
"""The matrix of latent attention that makes K and V of the latent; every model type lays it out alike."""
FUSED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "kv_proj", LATENT_NAME)


def _layout(config: Any, value_name: str) -> FusedLayout | None:
    """The layout of a matrix that holds more than V; None for any other matrix and for an unknown model type."""
    leaf = value_name.rpartition(".")[2]
    if leaf == LATENT_NAME:
        return _latent(config)
    layout = FUSED_LAYOUTS.get((config.model_type, leaf))
    return layout(config) if layout else None


def _find_value(block: nn.Module, config: Any, name: str | None) -> str:
    """The V projection's name inside the block."""
    if name is not None:
        _submodule(block, name, "signals.value", "the last block")
        return name
    for leaf in VALUE_NAMES:
        if found := _ending_in(block, leaf):
            return _only(found)
    fused = [found for leaf in FUSED_NAMES for found in _ending_in(block, leaf)]
    if known := [found for found in fused if _layout(config, found)]:
        return _only(known)
    if fused:
        raise ValueError(
            f"signals.value: {fused[0]} holds V beside K or Q, in an order that is not known for model type "
            f"{config.model_type!r}; write `value: {fused[0]}` to take the whole matrix, or the name of another"
        )
    matrices = (found for found, module in block.named_modules() if hasattr(module, "out_features"))
    raise ValueError(
        f"signals.value: no V projection was found in the last block, a {type(block).__name__}; write the name of one "
        f"of its matrices: {', '.join(islice(matrices, 12))}"
    )


def _ending_in(block: nn.Module, leaf: str) -> list[str]:
    """Modules of the block whose name ends in `leaf`; attention to another sequence does not count."""
    found = [name for name, _ in block.named_modules() if name.rpartition(".")[2] == leaf]
    return [name for name in found if "cross" not in name and "encoder" not in name]


def _only(found: Sequence[str]) -> str:
    if len(found) > 1:
        raise ValueError(f"signals.value: the last block has several: {', '.join(found)}; write the one to take")
    return found[0]


def _sites(block: nn.Module, value_name: str, config: Any) -> tuple[ValueSite, ...]:
    module = block.get_submodule(value_name)
    layout = _layout(config, value_name)
    columns = layout.columns() if layout else None
    if isinstance(module, LoraLayer):
        # DoRA and other variants call A and B on matrices that are no rows; they fall through to the base weight
        adapters = [a for a in module.active_adapters if a in module.lora_A and a not in module.lora_variant]
        if adapters:
            pairs = ((ValueSite(module.lora_A[a], None), ValueSite(module.lora_B[a], columns)) for a in adapters)
            return tuple(site for pair in pairs for site in pair)
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return (ValueSite(module, columns),)


# -- the probe -------------------------------------------------------------------------------------------------------

PROBE_SHAPE = (2, 8)
"""Rows and tokens of the forward pass that checks the parts."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config entries for logits = cap * tanh(logits / cap), which small logits hide from the probe."""
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Config entries that multiply or divide the logits; families differ in which, so the probe decides."""


@dataclass(frozen=True)
class _Probe:
    """One forward pass: the model's logits [B, T, V], and each watched module's calls as (arguments, output)."""

    logits: Tensor | None
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], Any]]]


@torch.no_grad()
def _run(base: Any, watched: Sequence[nn.Module]) -> _Probe:
    # All figures come from one pass: under autocast, modules called on their own would compute in another precision.
    rows, tokens = PROBE_SHAPE
    vocab_size = base.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + rows * tokens, device=base.device).view(rows, tokens) % vocab_size
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], Any]]] = {module: [] for module in watched}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module].append((args, output))

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(base))
        for module in watched:
            stack.enter_context(module.register_forward_hook(record))
        output = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True)
    return _Probe(getattr(output, "logits", None), calls)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards as it was. Flags are set one by one: train() and eval() would undo a caller's
    mixture, and some modules override them."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _check_site(site: ValueSite, name: str, probe: _Probe) -> None:
    calls = probe.calls[site.module]
    if len(calls) != 1:
        raise ValueError(
            f"signals.value: {name} is called {len(calls)} times in a forward pass, not once (a block that shares "
            "another one's K and V does not use its own); write the name of another matrix of the last block"
        )
    args, output = calls[0]
    if not (args and _tokenwise(args[0]) and _tokenwise(output)):
        raise ValueError(
            f"signals.value: {name} does not map [rows, tokens, inputs] to [rows, tokens, outputs]; write the name of "
            "another matrix of the last block"
        )


def _tokenwise(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 2 and x.flatten(1, -2).shape[:2] == PROBE_SHAPE


def _logit_scale(config: Any, decoder: nn.Module, head: nn.Module, probe: _Probe) -> float | None:
    """The constant s of logits = s * head(last_hidden_state); None where there is none."""
    hidden = [getattr(output, "last_hidden_state", None) for _, output in probe.calls[decoder]]
    if len(hidden) != 1 or hidden[0] is None:
        raise ValueError(
            f"signals.block: {type(decoder).__name__}, which holds the blocks, gives no last_hidden_state in a forward "
            "pass; write the last block of another stack"
        )
    if any(getattr(config, cap, None) for cap in SOFT_CAPS) or not isinstance(head, nn.Linear):
        return None
    if probe.logits is None or len(probe.calls[head]) != 1:
        return None
    (inputs, *_), outputs = probe.calls[head][0]
    if not _equal(inputs, hidden[0], outputs.dtype):
        return None
    given = [value for name in SCALES if isinstance(value := getattr(config, name, None), (int, float)) and value]
    candidates = (*given, *(1 / value for value in given), 1.0)
    return next((float(s) for s in candidates if _equal(probe.logits, s * outputs, outputs.dtype)), None)


def _equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for a few roundings in `dtype`, relative to the largest entry."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max())
