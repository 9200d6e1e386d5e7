from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftrl import value
from siftrl.selectors.prompt_curriculum import PromptCurriculum
from siftrl.types import Candidates
from siftrl.value import ValueConfig


@pytest.fixture(scope="module")
def policy(tiny_model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def build(policy: Any, tokenizer: Any, **settings: Any) -> value.ValueModel:
    torch.manual_seed(0)
    return value.build(ValueConfig(**settings), policy, tokenizer, "cpu")


def hidden_of(policy: Any) -> value.HiddenStates:
    return lambda ids, mask: value.decoder(policy)(input_ids=ids, attention_mask=mask).last_hidden_state


PROMPTS = ["1+1=", "12+34=", "7+0=", "100+9="]


def test_starts_as_a_constant_half(policy: Any, tokenizer: Any) -> None:
    prediction = build(policy, tokenizer).predict(tokenizer(PROMPTS)["input_ids"])
    assert torch.equal(prediction.mean, torch.full((4,), 0.5))
    assert torch.equal(prediction.spread, torch.full((4,), 0.125))


def test_prediction_does_not_depend_on_the_batch_or_its_order(policy: Any, tokenizer: Any) -> None:
    model = build(policy, tokenizer, micro_batch_size=3)
    torch.nn.init.normal_(model.head.weight)
    ids = tokenizer(PROMPTS)["input_ids"]
    together = model.predict(ids).mean
    alone = torch.cat([model.predict([row]).mean for row in ids])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(model.predict(ids[::-1]).mean.flip(0), together, atol=1e-5)
    assert len(set(together.tolist())) == 4


def test_loss_by_hand(policy: Any, tokenizer: Any) -> None:
    """Groups (1, 1), (0, 1), (0, nan): means 1, 1/2, 0; unbiased variances 0, 1/2 (the largest there is), none. V is
    set to 3/4 and S to 1/5 of its range. Loss: the mean of -log(3/4) - log(4/5), -(log(3/4) + log(1/4)) / 2 - log(1/5)
    and -log(1/4); the group without any reward is left out."""
    nan = float("nan")
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, nan], [nan, nan]])
    model = build(policy, tokenizer)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([math.log(3), -math.log(4)]))
    figures = model.update(tokenizer(PROMPTS)["input_ids"], rewards)
    first, second, third = (math.log(x) for x in (0.75 * 0.8, math.sqrt(0.75 * 0.25) * 0.2, 0.25))
    assert figures["loss"] == pytest.approx(-(first + second + third) / 3, rel=1e-5)


def test_a_value_model_that_has_seen_no_reward_for_long_learns_from_the_first(policy: Any, tokenizer: Any) -> None:
    model = build(policy, tokenizer, lr=1e-3, head_lr=1e-2)
    ids = tokenizer(PROMPTS)["input_ids"]
    for _ in range(60):
        model.update(ids, torch.zeros(4, 4))
    assert model.predict(ids).mean.max() < 0.02
    with torch.no_grad():
        model.head.bias[0] = -12.0  # as after thousands of such steps
    for _ in range(40):
        model.update(ids, torch.tensor([[0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]))
    predicted = model.predict(ids).mean
    assert predicted.argmax() == 1 and predicted[1] > 0.05


@pytest.mark.parametrize(("body", "train"), [("own", "full"), ("own", "lora"), ("own", "head"), ("policy", "head")])
def test_learns_which_prompts_are_easy(policy: Any, tokenizer: Any, body: Any, train: Any) -> None:
    model = build(policy, tokenizer, body=body, train=train, lr=3e-3, head_lr=1e-2, updates=60)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    own = {name: p.clone() for name, p in model.named_parameters()}
    ids = tokenizer(PROMPTS)["input_ids"]
    rewards = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    hidden = hidden_of(policy) if body == "policy" else None
    model.update(ids, rewards, hidden)
    learned = model.predict(ids, hidden)
    assert torch.allclose(learned.mean, rewards.mean(1), atol=0.12)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())  # the policy is never touched
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, own[name])}
    assert changed == ({"head"} if train == "head" else {"head", "body"})


def test_ranks_start_from_the_same_adapters_and_bfloat16_still_learns(policy: Any, tokenizer: Any) -> None:
    def first_adapter(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)  # each rank has a random state of its own
        model = value.build(ValueConfig(train="lora", dtype="bfloat16"), policy, tokenizer, "cpu")
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_adapter(1), first_adapter(2))
    model = build(policy, tokenizer, dtype="bfloat16", lr=1e-5)
    body = model.body
    assert body is not None and all(p.dtype == torch.float32 for p in body.parameters())
    before = [p.clone() for p in body.parameters()]
    torch.nn.init.normal_(model.head.weight)
    model.update(tokenizer(PROMPTS)["input_ids"], torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    moved = sum(int((p != q).sum()) for p, q in zip(before, body.parameters(), strict=True))
    used = sum(p.numel() for name, p in body.named_parameters() if "embed" not in name)
    assert moved > 0.9 * used  # in bfloat16 a step of 1e-5 would be rounded away from most weights


def test_range_widens_with_the_rewards_and_can_be_fixed(policy: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPTS[:2])["input_ids"]
    model = build(policy, tokenizer)
    model.update(ids, torch.tensor([[-2.0, -2.0], [4.0, 4.0]]))
    assert (model.low, model.high) == (-2.0, 4.0)
    fixed = build(policy, tokenizer, reward_range=(0.0, 10.0))
    fixed.update(ids, torch.tensor([[-2.0, -2.0], [4.0, 4.0]]))
    assert (fixed.low, fixed.high) == (0.0, 10.0)


def test_the_range_holds_single_rewards_not_only_group_means(policy: Any, tokenizer: Any) -> None:
    model = build(policy, tokenizer)
    model.update(tokenizer(PROMPTS[:1])["input_ids"], torch.tensor([[-2.0, 4.0, float("nan")]]))  # the mean is 1
    assert (model.low, model.high) == (-2.0, 4.0)
    with pytest.raises(ValueError, match=r"reward_range: \[1.0, 0.0\] holds no reward; write the lowest reward first"):
        ValueConfig(reward_range=(1.0, 0.0))


@pytest.mark.parametrize("group", [2, 3, 8])
def test_the_spread_learned_is_the_unbiased_variance_even_at_its_largest(
    policy: Any, tokenizer: Any, group: int
) -> None:
    """Half low, half high: a variance of width^2 / 4 x n / (n - 1), for even n."""
    model = build(policy, tokenizer, train="head", head_lr=0.1, updates=150)
    ids = tokenizer(PROMPTS[:2])["input_ids"]
    rewards = torch.stack([torch.arange(group) % 2 * 3.0, torch.full((group,), 1.5)])  # 0, 3, 0, 3, ... and no spread
    model.update(ids, rewards)
    learned = model.predict(ids).spread
    assert torch.allclose(learned, rewards.var(dim=1), atol=0.1)


class Readable:
    """1,000 prompts whose difficulty V can read off, but for some noise; rewards are correct + 0.2 x format."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        ease = torch.randn(1000, generator=self.generator)
        self.rates = torch.sigmoid(1.2 * ease)
        seen = ease + 0.2 * torch.randn(1000, generator=self.generator)
        self.features = torch.exp(-(((seen[:, None] - torch.linspace(-2.5, 2.5, 11)) / 0.5) ** 2))

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.features[ids]

    def rewards(self, ids: torch.Tensor, group: int) -> torch.Tensor:
        correct = torch.bernoulli(self.rates[ids][:, None].expand(-1, group), generator=self.generator)
        form = torch.bernoulli(torch.full((len(ids), group), 0.8), generator=self.generator)
        return correct + 0.2 * form


def test_a_curriculum_with_rewards_of_four_values_seldom_falls_back(tokenizer: Any) -> None:
    """V learns the variance by the estimator that it is judged by. With one divided by n, and judged by one divided by
    n - 1, the choice was uniform in more than half of these steps at 4 completions a prompt."""
    fell_back = []
    for seed in (0, 1):
        world = Readable(seed)
        model = value.ValueModel(ValueConfig(body="policy", head_lr=0.03), tokenizer, 11, None)
        selector = PromptCurriculum(candidates=4)
        for _ in range(120):
            ids = torch.randperm(1000, generator=world.generator)[: selector.num_candidates(16)]
            prediction = model.predict(ids[:, None].tolist(), world.hidden)
            drawn = Candidates(ids, [{}] * len(ids), prediction)
            selection = selector.propose(drawn, 16, world.generator)
            chosen = ids[selection.indices]
            rewards = world.rewards(chosen, 4)
            selector.observe(drawn, selection, rewards)
            model.update(chosen[:, None].tolist(), rewards, world.hidden)
            fell_back.append(selector.metrics()["fallback"])
    assert sum(fell_back) / len(fell_back) < 0.25


def test_state_goes_on_exactly(policy: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPTS)["input_ids"]
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    model = build(policy, tokenizer)
    model.update(ids, rewards)
    saved = copy.deepcopy(model.state())
    other = build(policy, tokenizer)
    other.load_state(saved)
    for _ in range(2):
        model.update(ids, rewards)
        other.update(ids, rewards)
    assert torch.equal(model.predict(ids).mean, other.predict(ids).mean)
    with pytest.raises(ValueError, match="other trained weights"):
        build(policy, tokenizer, train="head").load_state(saved)


def test_impossible_settings_and_nan_are_named(policy: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="`model` need `body: own`"):
        build(policy, tokenizer, body="policy", train="lora")
    model = build(policy, tokenizer)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"lower prompt_selector\.value\.lr"):
        model.predict(tokenizer(PROMPTS)["input_ids"])


def test_a_nan_gradient_is_not_taken(policy: Any, tokenizer: Any) -> None:
    model = build(policy, tokenizer, body="policy")
    before = model.head.bias.detach().clone()
    broken = torch.full((1, 4, model.head.in_features), float("nan"))
    model.update(tokenizer(PROMPTS[:1])["input_ids"], torch.tensor([[0.0, 1.0]]), lambda ids, mask: broken)
    assert torch.equal(model.head.bias, before)
