from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYOUTS
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from siftrl.parts import FusedLayout, PartNames, Parts, ValueSite, find_parts

EVERY = FAMILIES | LAYOUTS
IDS = torch.arange(20, 44).view(2, 12)

VALUES = {
    "self_attn.qkv_proj": ["phi3"],
    "attention.query_key_value": ["gpt_neox"],
    "self_attention.query_key_value": ["falcon", "falcon_7b", "falcon_rw", "bloom"],
    "self_attn.query_key_value": ["persimmon"],
    "attn.c_attn": ["gpt2", "gpt_bigcode", "gpt_bigcode_heads"],
    "attn.Wqkv": ["mpt"],
    "attn.qkv_proj": ["codegen"],
    "self_attn.kv_b_proj": ["deepseek_v3"],
}
VALUE_OF = {family: name for name, families in VALUES.items() for family in families}


def value_name(family: str) -> str:
    return VALUE_OF.get(family, "self_attn.v_proj")


def matrix(module: Any) -> Tensor:
    """The gradient of the module's matrix, [outputs, inputs]."""
    return module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad


def chosen(site: ValueSite, outputs: int) -> Tensor:
    return torch.arange(outputs) if site.columns is None else site.columns


def mean_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """float [B]: each row's mean loss of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def row_gradients(model: nn.Module, sites: tuple[ValueSite, ...], ids: Tensor) -> list[Tensor]:
    """For each site sum_t delta_t x_t^T of every row, float [B, columns, inputs], from one backward pass."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen[module] = (args[0], output)

    handles = [site.module.register_forward_hook(hook) for site in sites]
    mean_losses(model(input_ids=ids, use_cache=False).logits, ids).sum().backward()
    for handle in handles:
        handle.remove()
    found = []
    for site in sites:
        x, output = seen[site.module]
        assert output.grad is not None
        delta = output.grad[..., chosen(site, output.shape[-1])]
        found.append(torch.einsum("bto,bti->boi", delta.flatten(1, -2), x.detach().flatten(1, -2)))
    return found


def assert_gradients_are_autograds(model: nn.Module, sites: tuple[ValueSite, ...], ids: Tensor = IDS) -> None:
    assembled = row_gradients(model, sites, ids)
    for row in range(len(ids)):
        model.zero_grad()
        mean_losses(model(input_ids=ids[row : row + 1], use_cache=False).logits, ids[row : row + 1]).sum().backward()
        for site, gradients in zip(sites, assembled, strict=True):
            expected = matrix(site.module)
            expected = expected[chosen(site, len(expected))]
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(gradients[row], expected, rtol=1e-4, atol=1e-6)


# ---- every family


@pytest.mark.parametrize("family", EVERY)
def test_the_last_blocks_v_is_found(family: str) -> None:
    model = EVERY[family]()
    parts = find_parts(model)
    blocks = getattr(parts.decoder, parts.layers_name)
    assert isinstance(blocks, nn.ModuleList) and len(blocks) == 2 and parts.block is blocks[1]
    (site,) = parts.sites
    assert site.module is parts.block.get_submodule(value_name(family))
    assert parts.head is model.get_output_embeddings()
    assert (site.columns is not None) == (family in VALUE_OF)


@pytest.mark.parametrize("family", EVERY)
def test_logits_are_the_head_of_the_last_hidden_state(family: str) -> None:
    model = EVERY[family]()
    parts = find_parts(model)
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
        hidden = parts.decoder(input_ids=IDS, use_cache=False).last_hidden_state
        made = parts.head(hidden) * parts.logit_scale
    linear = bool((logits - made).abs().max() < 1e-5)
    assert parts.linear_head == linear == (family != "gemma2")
    assert parts.logit_scale == {"granite": 1 / 8, "cohere": 1 / 4}.get(family, 1.0)


@pytest.mark.parametrize("family", EVERY)
def test_row_gradients_are_autograds(family: str) -> None:
    model = EVERY[family]()
    assert_gradients_are_autograds(model, find_parts(model).sites)


def last_attention(model: PreTrainedModel, module: nn.Module, columns: Tensor, noise: float) -> Tensor:
    """The last block's attention weights, with noise added to these outputs of the module."""

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        kept = torch.zeros(output.shape[-1])
        kept[columns] = noise
        return output + drawn * kept

    handle = module.register_forward_hook(disturb)
    with torch.no_grad():
        weights = model(input_ids=IDS, use_cache=False, output_attentions=True).attentions[-1]
    handle.remove()
    return weights


@pytest.mark.parametrize("family", EVERY)
def test_v_does_not_move_attention_and_k_does(family: str) -> None:
    model = EVERY[family]()
    parts = find_parts(model)
    (site,) = parts.sites
    every = torch.arange(site.module.nf if isinstance(site.module, Conv1D) else site.module.out_features)
    if site.columns is None:
        other, rest = parts.block.get_submodule(value_name(family).replace("v_proj", "k_proj")), every
    else:
        other, rest = site.module, every[~torch.isin(every, site.columns)]
    plain = last_attention(model, site.module, every, 0.0)
    assert torch.equal(last_attention(model, site.module, chosen(site, len(every)), 1.0), plain)
    assert (last_attention(model, other, rest, 1.0) - plain).abs().max() > 0.01


@pytest.mark.parametrize("family", EVERY)
def test_all_of_v_is_taken_and_nothing_else(family: str) -> None:
    """A lone token attends to itself with weight 1 whatever Q and K are: logits move with V's outputs alone."""
    model = EVERY[family]()
    (site,) = find_parts(model).sites
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    handle = site.module.register_forward_hook(keep)
    model(input_ids=IDS.view(-1, 1), use_cache=False).logits.square().sum().backward()
    handle.remove()
    assert outputs[0].grad is not None
    moves = outputs[0].grad.abs().flatten(0, -2).amax(0) > 1e-6
    assert torch.equal(moves.nonzero()[:, 0], chosen(site, len(moves)))


def test_columns_by_hand() -> None:
    assert FusedLayout(groups=2, before=3, value=2, after=1).columns().tolist() == [3, 4, 9, 10]
    # 4 heads of 8: q k v of the first head end at 24
    (site,) = find_parts(FAMILIES["gpt_neox"]()).sites
    assert site.columns is not None and site.columns.dtype == torch.int64
    assert site.columns.tolist() == [*range(16, 24), *range(40, 48), *range(64, 72), *range(88, 96)]
    # 4 heads of Q, 2 of K, 2 of V
    (site,) = find_parts(FAMILIES["phi3"]()).sites
    assert site.columns is not None and site.columns.tolist() == list(range(48, 64))
    # two heads of Q, one of K, one of V, twice
    (site,) = find_parts(FAMILIES["falcon"]()).sites
    assert site.columns is not None and site.columns.tolist() == [*range(24, 32), *range(56, 64)]


# ---- LoRA


def with_lora(family: str, **options: Any) -> Any:
    """The model under PEFT, with B off zero, so that A has a gradient."""
    torch.manual_seed(3)
    model = get_peft_model(EVERY[family](), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def value_layer(parts: Parts, name: str = "self_attn.v_proj") -> Any:
    return parts.block.get_submodule(name)


@pytest.mark.parametrize("targets", [["v_proj"], "all-linear"])
def test_lora_on_v_has_two_sites(targets: Any) -> None:
    model = with_lora("llama", target_modules=targets)
    parts = find_parts(model)
    layer = value_layer(parts)
    assert [site.module for site in parts.sites] == [layer.lora_A["default"], layer.lora_B["default"]]
    assert [site.columns for site in parts.sites] == [None, None]
    assert parts.decoder is model.base_model.model.model and parts.block is parts.decoder.layers[1]
    assert parts.linear_head and parts.head is model.base_model.model.lm_head
    assert_gradients_are_autograds(model, parts.sites)


def test_lora_elsewhere_leaves_the_weight_of_v() -> None:
    model = with_lora("llama", target_modules=["q_proj"])
    (site,) = find_parts(model).sites
    assert type(site.module) is nn.Linear and site.module.weight.shape == (16, 32)
    site.module.weight.requires_grad_(True)
    assert_gradients_are_autograds(model, (site,))


def test_lora_on_a_fused_matrix_takes_the_columns_of_b() -> None:
    model = with_lora("phi3", target_modules=["qkv_proj"])
    parts = find_parts(model)
    a, b = parts.sites
    layer = value_layer(parts, "self_attn.qkv_proj")
    assert a.module is layer.lora_A["default"] and a.columns is None
    assert b.module is layer.lora_B["default"]
    assert b.columns is not None and b.columns.tolist() == list(range(48, 64))
    assert_gradients_are_autograds(model, parts.sites)


def test_lora_takes_the_active_adapter() -> None:
    model = with_lora("llama", target_modules=["v_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    layer = value_layer(find_parts(model))
    assert find_parts(model).sites[0].module is layer.lora_A["default"]
    model.set_adapter("second")
    assert [site.module for site in find_parts(model).sites] == [layer.lora_A["second"], layer.lora_B["second"]]


def test_dora_takes_the_weight_below() -> None:
    parts = find_parts(with_lora("llama", target_modules=["v_proj"], use_dora=True))
    assert [site.module for site in parts.sites] == [value_layer(parts).base_layer]


def test_a_head_with_an_adapter_is_not_one_matrix() -> None:
    parts = find_parts(with_lora("llama", target_modules=["v_proj", "lm_head"]))
    assert isinstance(parts.head, LoraLayer) and not parts.linear_head


# ---- logits


def test_a_cap_is_seen_where_logits_are_small() -> None:
    model = FAMILIES["gemma2"]()
    model.get_output_embeddings().weight.data.mul_(1e-4)
    assert not find_parts(model).linear_head


def changed_logits(change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A model whose logits are a function of the head's output that no configuration tells of."""
    model = FAMILIES["llama"]()
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


def test_unknown_logits_are_not_linear() -> None:
    assert not find_parts(changed_logits(torch.tanh)).linear_head
    assert not find_parts(changed_logits(lambda logits: 1.001 * logits)).linear_head
    model = FAMILIES["llama"]()  # something between the decoder and the head
    model.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert not find_parts(model).linear_head


@pytest.mark.parametrize("family, scale", [("granite", 1 / 8), ("cohere", 1 / 4), ("llama", 1)])
def test_the_scale_is_found_in_half_precision(family: str, scale: float) -> None:
    parts = find_parts(FAMILIES[family]().bfloat16())
    assert parts.linear_head and parts.logit_scale == scale
    with torch.autocast("cpu", torch.bfloat16):
        parts = find_parts(FAMILIES[family]())
    assert parts.linear_head and parts.logit_scale == scale


def test_a_forward_that_trl_has_patched() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = FAMILIES["granite"]()
    add_fused_lm_head(model)
    parts = find_parts(model)
    assert parts.linear_head and parts.logit_scale == 1 / 8


# ---- the model is left as it was


def test_nothing_is_changed() -> None:
    model = FAMILIES["gpt2"]().train()  # dropout 0.1
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    assert set(flags) == {True, False}
    state = torch.get_rng_state()
    find_parts(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---- names


def test_parts_can_be_named() -> None:
    model = FAMILIES["llama"]()
    names = PartNames(block="model.layers.1", value="self_attn.o_proj", head="lm_head")
    parts = find_parts(model, names)
    assert parts.decoder is model.model and parts.layers_name == "layers" and parts.block is model.model.layers[1]
    (site,) = parts.sites
    assert site.module is parts.block.self_attn.o_proj and site.columns is None
    assert_gradients_are_autograds(model, parts.sites)
    assert find_parts(with_lora("llama", target_modules=["v_proj"]), names).linear_head  # PEFT's prefix is not written


def test_a_named_matrix_keeps_to_vs_columns() -> None:
    (site,) = find_parts(FAMILIES["gpt2"](), PartNames(value="attn.c_attn")).sites
    assert site.columns is not None and site.columns.tolist() == list(range(64, 96))


def test_no_value_is_asked_for() -> None:
    parts = find_parts(FAMILIES["llama"](), need_value=False)
    assert parts.sites == () and parts.linear_head


@pytest.mark.parametrize(
    "names, message",
    [
        (PartNames(block="model.layer.1"), r"signals.block: the model has no module 'model.layer.1'; did you mean"),
        (PartNames(block="model.layers.0"), r"'model.layers.0' is not the last block; write model.layers.1"),
        (PartNames(block="model.layers.1.mlp"), r"signals.block: .* is a LlamaMLP inside a LlamaDecoderLayer; write"),
        (PartNames(value="self_attn.v_prj"), r"signals.value: .*'self_attn.v_prj'; did you mean 'self_attn.v_proj'"),
        (PartNames(value="self_attn"), r"signals.value: model.layers.1.self_attn does not map \[rows, tokens, inputs"),
        (PartNames(head="lm_heat"), r"signals.head: the model has no module 'lm_heat'; did you mean 'lm_head'"),
    ],
)
def test_wrong_names(names: PartNames, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_parts(FAMILIES["llama"](), names)


def test_a_stack_that_is_not_found() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    model = BertLMHeadModel(BertConfig(vocab_size=64, num_hidden_layers=2, is_decoder=True, **sizes))
    with pytest.raises(ValueError, match=r"signals.block: no list of 2 blocks was found in BertLMHeadModel; write"):
        find_parts(model)
    with pytest.raises(ValueError, match=r"signals.block: .* which is an item of a ModuleList that a transformers"):
        find_parts(model, PartNames(block="bert.encoder.layer.1"))


def test_a_stack_that_gives_no_hidden_states() -> None:
    model = FAMILIES["llama"]()
    model.model.register_forward_hook(lambda _, __, output: output.to_tuple())
    model.forward = lambda **inputs: model.model(**inputs)
    with pytest.raises(ValueError, match=r"signals.block: LlamaModel, .* gives no last_hidden_state"):
        find_parts(model)


def test_a_block_without_attention() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=r"signals.value: no V .* a MambaBlock; write .*mixer.in_proj.*mixer.out_proj"):
        find_parts(model)
    assert find_parts(model, need_value=False).linear_head
    (site,) = find_parts(model, PartNames(value="mixer.in_proj")).sites
    assert_gradients_are_autograds(model, (site,))


def test_an_unknown_layout() -> None:
    model = FAMILIES["phi3"]()
    model.config.model_type = "phi9"
    with pytest.raises(ValueError, match=r"signals.value: self_attn.qkv_proj .* 'phi9'; write `value: self_attn.qkv"):
        find_parts(model)
    (site,) = find_parts(model, PartNames(value="self_attn.qkv_proj")).sites
    assert site.columns is None
    assert_gradients_are_autograds(model, (site,))


def test_several_and_unused_matrices() -> None:
    model = FAMILIES["llama"]()
    block = model.model.layers[1]
    block.extra_attn = nn.Module()
    block.extra_attn.v_proj = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"several: self_attn.v_proj, extra_attn.v_proj; write the one to take"):
        find_parts(model)
    with pytest.raises(ValueError, match=r"model.layers.1.extra_attn.v_proj is called 0 times .* shares another"):
        find_parts(model, PartNames(value="extra_attn.v_proj"))
    block.encoder_attn = block._modules.pop("extra_attn")
    assert find_parts(model).sites[0].module is block.self_attn.v_proj


def test_a_model_that_names_no_head() -> None:
    model = FAMILIES["llama"]()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"signals.head: LlamaForCausalLM does not say which module makes its logits"):
        find_parts(model)
    assert find_parts(model, PartNames(head="lm_head")).linear_head
