"""The value model: predicts, from a prompt alone, the mean reward of its completions and how far they spread.

PCL (Gao et al., arXiv 2510.01135) trains V by V <- argmin sum_x (V(x) - mean_j r(x, y_j))^2 on each step's group means,
one regression step a policy step and without a rollout of its own. Two additions: a second output for the variance of
the reward within a group, which ranks prompts where rewards are not binary; and a bounded output,
V = low + (high - low) · sigmoid(z), over the range of the single rewards seen so far.

The variance is the unbiased one (divided by n - 1), which `siftrl.calibration` judges V by. Of n rewards in [low, high]
it is at most (high - low)^2 / 4 · n / (n - 1) (Popoviciu), so never above (high - low)^2 / 2, whatever n: the bound of
the second output.

So the loss is the cross-entropy of sigmoid(z) and the group mean's place in that range. Its minimum is the same, but
its gradient in z, sigmoid(z) - target, does not vanish where the sigmoid is flat: by squares, a V whose first steps had
hardly any reward would go on predicting none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from siftrl import distributed
from siftrl.calibration import group_statistics
from siftrl.fields import Count, ModelPath, NonNegative, Positive, Rate
from siftrl.origin import loading_options, whole, whole_model
from siftrl.parts import check_adapters
from siftrl.types import Prediction

HiddenStates = Callable[[Tensor, Tensor], Tensor]
"""(input_ids [B, T], attention_mask [B, T], right-padded) -> last hidden states [B, T, d]."""


@dataclass
class ValueConfig:
    """Recipe keys of the value model (`prompt_selector.value`)."""

    body: Literal["own", "policy"] = "own"  # own: a model of its own; policy: a head on the policy's hidden state
    model: ModelPath | None = None  # own: folder or hub name (default: the policy's starting point)
    train: Literal["full", "lora", "head"] = "full"  # what of an own body is trained; a policy body never is
    lr: Rate = 3e-4  # of the body, or of its LoRA matrices
    head_lr: Rate = 3e-3  # of the linear head, which starts from zero
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    updates: Count = 1  # regression steps on each step's group means
    lora_rank: Count = 16
    micro_batch_size: Count = 64  # prompts in one forward pass
    dtype: Literal["float32", "bfloat16"] = "float32"  # an own body computes in it; trained weights stay float32
    reward_range: tuple[float, float] | None = None  # default: [0, 1], widened to the rewards seen

    def __post_init__(self) -> None:
        if self.body == "policy" and (self.train == "lora" or self.model is not None):
            raise ValueError(
                "`body: policy` trains a head on the policy's own hidden state; `train: lora` and `model` need "
                "`body: own`"
            )
        if self.reward_range is not None and not self.reward_range[0] < self.reward_range[1]:
            raise ValueError(
                f"reward_range: {list(self.reward_range)} holds no reward; write the lowest "
                "reward first and then the highest, such as [0, 1]"
            )


class ValueModel(nn.Module):
    """V(x), with its optimizer. Every rank holds a copy; gradients are summed over ranks, so the copies stay equal.

    It lives outside the policy's DeepSpeed engine: it works the same under every ZeRO stage, at the price of a full
    copy of its body and optimizer on every rank (`train: head` or `lora` keeps the optimizer small).
    """

    def __init__(
        self,
        config: ValueConfig,
        tokenizer: PreTrainedTokenizerBase,
        hidden_size: int,
        body: PreTrainedModel | None,
        device: torch.device | str = "cpu",
    ) -> None:
        """body: the own body, or None where hidden states of width `hidden_size` come from the policy."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.low, self.high = config.reward_range or (0.0, 1.0)
        self.head = nn.Linear(hidden_size, 2)  # mean, spread
        nn.init.zeros_(self.head.weight)  # V starts as a constant: no prompt is preferred before something is learned
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[1] = -math.log(3)  # a quarter of the largest spread: half of the largest of many rewards
        self.body = body
        if body is not None:
            body.requires_grad_(config.train == "full")
            if config.train == "lora":
                self.body = _with_lora(body, config.lora_rank)
        self.to(device)
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr": config.head_lr}]
        if body_parameters := [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("head")]:
            groups.append({"params": body_parameters, "lr": config.lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)

    # -- tokens in, numbers out --------------------------------------------------------------------------------

    def forward(self, prompt_ids: list[list[int]], policy_hidden: HiddenStates | None = None) -> Tensor:
        """The head's raw outputs at each prompt's last token: float [n, 2]."""
        pad = self.tokenizer.pad_token_id or 0
        device = self.head.weight.device
        width = max(map(len, prompt_ids))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in prompt_ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in prompt_ids], device=device)
        if self.body is None:
            assert policy_hidden is not None, "a value head on the policy needs the policy's hidden states"
            with torch.no_grad():
                hidden = policy_hidden(ids, mask)
        else:
            in_bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train != "head"), in_bfloat16:
                hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1]
        return self.head(last.to(self.head.weight.dtype))

    def _scale(self, raw: Tensor) -> Prediction:
        """Raw outputs [n, 2] -> mean within [low, high], spread within [0, (high - low)^2 / 2]."""
        width = self.high - self.low
        shares = raw.float().sigmoid()
        return Prediction(self.low + width * shares[:, 0], width**2 / 2 * shares[:, 1])

    @torch.no_grad()
    def predict(self, prompt_ids: list[list[int]], policy_hidden: HiddenStates | None = None) -> Prediction:
        """V of n prompts, float [n] each, on the CPU. Every rank passes the same prompts and scores its share."""
        world, rank = distributed.world_size(), distributed.rank()
        # longest first, so that a micro-batch pads little; every rank runs the same number of forward passes, which a
        # sharded policy body needs
        order = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), i))
        mine = [prompt_ids[i] for i in order[rank::world]]
        rows = -(-len(prompt_ids) // world)
        padded = mine + [mine[-1] if mine else prompt_ids[0]] * (rows - len(mine))
        size = self.config.micro_batch_size
        raw = torch.cat([self(padded[at : at + size], policy_hidden) for at in range(0, rows, size)])[: len(mine)]
        ordered = distributed.gather_strided(raw.float().cpu())
        prediction = self._scale(torch.empty_like(ordered).index_copy_(0, torch.tensor(order), ordered))
        if not torch.isfinite(prediction.mean).all():
            raise FloatingPointError(
                "the value model predicts NaN or infinity: lower prompt_selector.value.lr, or resume from the last "
                "checkpoint"
            )
        return prediction

    # -- learning ----------------------------------------------------------------------------------------------

    def update(
        self, prompt_ids: list[list[int]], rewards: Tensor, policy_hidden: HiddenStates | None = None
    ) -> dict[str, float]:
        """Regress on P prompts' groups. rewards: float [P, G], NaN where missing; the same on every rank.

        Loss: mean over prompts of H(mean, V) + H(variance, S), each as a share of the range that it can have, with
        H(q, p) = -q log p - (1 - q) log(1 - p). Groups without any reward are left out; one with a single reward has no
        variance, and no second term.
        """
        usable = (~torch.isnan(rewards)).any(1)
        if not usable.any():
            return {}
        prompt_ids = [ids for ids, use in zip(prompt_ids, usable.tolist(), strict=True) if use]
        groups = group_statistics(rewards[usable])
        if self.config.reward_range is None:  # predictions are bounded, so the bounds must hold what is predicted
            seen = rewards[rewards.isfinite()]
            self.low, self.high = min([self.low, *seen.tolist()]), max([self.high, *seen.tolist()])
        world, rank, size = distributed.world_size(), distributed.rank(), self.config.micro_batch_size
        width = self.high - self.low
        shares = torch.stack([(groups.mean - self.low) / width, groups.variance / (width**2 / 2)], dim=1)  # `_scale`
        device = self.head.weight.device
        targets = shares.float().clamp(0, 1).to(device)
        counted = torch.stack([groups.count > 0, groups.count > 1], dim=1).float().to(device)
        targets[counted == 0] = 0.0  # a NaN times 0 would be one
        losses: list[Tensor] = []
        for _ in range(self.config.updates):
            self.optimizer.zero_grad(set_to_none=False)
            total = torch.zeros(1, device=self.head.weight.device)
            # every rank runs the same number of passes; a rank that has run out repeats a row at weight 0
            for at in range(rank, rank + world * -(-len(prompt_ids) // world), world * size):
                rows = list(range(at, min(at + world * size, len(prompt_ids)), world))
                weight = 1.0 if rows else 0.0
                rows = rows or [0]
                raw = self([prompt_ids[i] for i in rows], policy_hidden).float()
                errors = nn.functional.binary_cross_entropy_with_logits(
                    raw, targets[rows], counted[rows], reduction="sum"
                )
                loss = weight * errors / len(prompt_ids)
                loss.backward()
                total += loss.detach()
            distributed.sum_([total, *(p.grad for p in self._trained() if p.grad is not None)])
            norm = torch.nn.utils.clip_grad_norm_(self._trained(), self.config.max_grad_norm)
            if torch.isfinite(norm):  # a NaN here would end the curriculum for good
                self.optimizer.step()
            losses.append(total)
        return {"loss": losses[-1].item(), "grad_norm": norm.item()}

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Trained weights, optimizer, reward range; what is not trained is loaded again from its path."""
        weights = {name: p.detach().cpu() for name, p in self.named_parameters() if p.requires_grad}
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "range": [self.low, self.high]}

    def load_state(self, state: dict[str, Any]) -> None:
        mine = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if mine.keys() != state["weights"].keys():
            raise ValueError(
                "the checkpoint's value model has other trained weights than this one: keep prompt_selector.value as "
                "it was when the run began"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.low, self.high = state["range"]


def build(
    config: ValueConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    init_kwargs: Mapping[str, Any] | None = None,
) -> ValueModel:
    """The value model for a policy. Its body starts from `config.model`, or from where the policy started.

    init_kwargs: what the policy was loaded with, see `siftrl.origin.loading_options`.
    """
    hidden_size = policy.config.get_text_config().hidden_size
    if config.body == "policy":
        check_adapters(policy, "`body: policy` of a value model reads the policy's hidden states")
        return ValueModel(config, tokenizer, hidden_size, None, device)
    # bfloat16 would round away an update of less than 1/256 of a weight
    dtype = torch.float32 if config.train == "full" else getattr(torch, config.dtype)
    path = config.model or policy.config._name_or_path
    if path:
        options = loading_options(policy, path, init_kwargs)
        if config.dtype == "float32" and "flash" in options.get("attn_implementation", ""):
            del options["attn_implementation"]  # flash attention has no float32
        with whole_model():
            body = AutoModel.from_pretrained(path, dtype=dtype, **options)
        if config.model:
            options.pop("attn_implementation", None)
            tokenizer = AutoTokenizer.from_pretrained(config.model, **options)
    elif any(hasattr(p, "ds_id") for p in policy.parameters()):
        raise ValueError(
            "the value model cannot be copied from a policy that ZeRO-3 has sharded and that has no folder or hub "
            "name: set prompt_selector.value.model"
        )
    else:
        body = copy.deepcopy(decoder(policy)).to(dtype)
    body.config.use_cache = False
    return ValueModel(config, tokenizer, body.config.get_text_config().hidden_size, body, device)


def decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of blocks below the head, through PEFT's wrapper where there is one."""
    return whole(model).base_model


def _with_lora(body: PreTrainedModel, lora_rank: int) -> PreTrainedModel:
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type=TaskType.FEATURE_EXTRACTION
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the ranks' own random states differ, and their copies must not
        return get_peft_model(body, settings)  # type: ignore[return-value]
