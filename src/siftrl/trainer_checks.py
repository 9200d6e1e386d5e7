"""What `trainer:` may not ask of TRL, beyond names and types. This module must stay free of torch.

TRL and transformers take most of this without a word, or refuse it once the model is loaded or a stage is trained.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any

from siftrl.recipe_text import RecipeError, kind_of, near

_Bounds = tuple[str, Callable[[float], bool]]
_FROM_0: _Bounds = ("0 or more", lambda value: value >= 0)
_ABOVE_0: _Bounds = ("above 0", lambda value: value > 0)
_FROM_1: _Bounds = ("1 or more", lambda value: value >= 1)
_BELOW_1: _Bounds = ("0 or more and below 1", lambda value: 0 <= value < 1)
_TO_1: _Bounds = ("from 0 to 1", lambda value: 0 <= value <= 1)
_BOUNDS: dict[str, _Bounds] = {
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": _FROM_0,
    "beta": _FROM_0,
    "dataloader_num_workers": _FROM_0,
    "dataset_num_proc": _FROM_1,
    "ddp_timeout": _FROM_1,
    "delta": _ABOVE_0,
    "discopop_tau": _ABOVE_0,
    "epsilon": _FROM_0,
    "epsilon_high": _FROM_0,
    "label_smoothing": _TO_1,
    "label_smoothing_factor": _TO_1,
    "ld_alpha": _TO_1,
    "learning_rate": _FROM_0,
    "max_grad_norm": _FROM_0,
    "max_length": _FROM_1,
    "max_steps": ("1 or more, or -1 for num_train_epochs", lambda value: value == -1 or value >= 1),
    "neftune_noise_alpha": _FROM_0,
    "num_iterations": _FROM_1,
    "num_train_epochs": _ABOVE_0,
    "off_policy_mask_threshold": _FROM_0,
    "precompute_ref_batch_size": _FROM_1,
    "ref_model_mixup_alpha": _TO_1,
    "ref_model_sync_steps": _FROM_1,
    "router_aux_loss_coef": _FROM_0,
    "sapo_temperature_neg": _ABOVE_0,
    "sapo_temperature_pos": _ABOVE_0,
    "top_entropy_quantile": _TO_1,
    "vllm_importance_sampling_cap": _ABOVE_0,
    "vllm_importance_sampling_clip_max": _ABOVE_0,
    "vllm_importance_sampling_clip_min": _FROM_0,
    "warmup_steps": _FROM_0,
    "weight_decay": _FROM_0,
}
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sft": {
        "loss_type": ("nll", "dft", "chunked_nll"),
        "packing_strategy": ("bfd", "bfd_split", "bfd-requeue", "wrapped"),
        "truncation_mode": ("keep_start", "keep_end"),
    },
    "dpo": {
        "loss_type": (
            *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
            *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        ),
        "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
        "truncation_mode": ("keep_start", "keep_end"),
    },
    "grpo": {
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "scale_rewards": ("group", "batch", "none", True, False),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    },
}
"""The words that TRL compares an option with, in the course of training, by kind of stage."""
_SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")
_EVALUATIONS: dict[str, tuple[Any, ...]] = {
    "eval_strategy": ("no",),
    "do_eval": (False,),
    "eval_on_start": (False,),
    "load_best_model_at_end": (False,),
}
"""Options of the trainer's own evaluation: option -> the values that leave it off."""
_NEED_EVALUATION = ("reduce_lr_on_plateau", "greedy")

REPORTS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""What `report_to` may name, as transformers does: name -> packages, one of which it needs."""
_OPTIMIZERS = (
    ("galore", "galore_torch"),
    ("apollo", "apollo_torch"),
    ("lomo", "lomo_optim"),
    ("grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree"),
    ("torch_[48]bit", "torchao"),
    ("anyprecision", "torchdistx"),
    ("stable_adamw", "optimi"),
    ("npu", "torch_npu"),
    ("xla", "torch_xla"),
    ("bnb|8bit|paged|ademamix|lion", "bitsandbytes"),
)
"""A pattern in an optimizer's name, and the package that it needs; the first that fits counts."""


def check_trainer_values(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse values of the right type that make no sense, or that only training would find wrong.

    Raises RecipeError with the option as its key.
    """
    for name, value in options.items():
        wanted, fits = _ABOVE_0 if (kind, name) == ("dpo", "beta") else _BOUNDS.get(name, ("", lambda value: True))
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not fits(value):
            raise RecipeError(f"must be {wanted}, not {kind_of(value)}", name)
        words = _SAMPLING if name == "train_sampling_strategy" else VALUES[kind].get(name, ())
        for word in value if isinstance(value, list) else [value]:
            if words and word is not None and word not in words:
                known = [str(each).lower() for each in words]
                hint = near(str(word), known) or f"; write one of {', '.join(known)}"
                raise RecipeError(f"must not be {word!r}{hint}", name)
        if value not in _EVALUATIONS.get(name, (value,)):
            raise RecipeError("held-out rows are measured by siftrl; remove it, and write `eval:` in the stage", name)
    if options.get("lr_scheduler_type") in _NEED_EVALUATION:
        problem = "follows the trainer's own evaluations, which are off; write another, for example cosine"
        raise RecipeError(problem, "lr_scheduler_type")
    for name in _reports(options):
        if name not in REPORTS:
            hint = near(name, REPORTS) or f"; write one of {', '.join(REPORTS)}, all or none"
            raise RecipeError(f"transformers reports to nothing of the name {name!r}{hint}", "report_to")


def check_trainer_packages(options: Mapping[str, Any]) -> None:
    """Refuse what needs a package, or a token, that this machine has not. Raises RecipeError, the option as its key."""
    for name in _reports(options):
        packages = REPORTS[name]
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise RecipeError(f"{name} is not installed; pip install {packages[0]}, or remove it", "report_to")
    optimizer = str(options.get("optim") or "")
    package = next((package for pattern, package in _OPTIMIZERS if re.search(pattern, optimizer)), None)
    if package and importlib.util.find_spec(package) is None:
        problem = f"{optimizer} needs the package {package}, which is not installed"
        raise RecipeError(f"{problem}; install it, or write another, for example adamw_torch", "optim")
    if options.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        problem = "needs the package liger_kernel, which is not installed; pip install liger-kernel, or remove it"
        raise RecipeError(problem, "use_liger_kernel")
    for name in ("push_to_hub", "log_completions_hub_repo"):
        if options.get(name) and not options.get("hub_token") and not _hub_token():
            problem = "there is no token for the hub; run `hf auth login` or set HF_TOKEN"
            raise RecipeError(f"{problem}, or remove it", name)


def _reports(options: Mapping[str, Any]) -> list[str]:
    """The trackers that `report_to` names, without the words for all and none of them."""
    named = options.get("report_to") or []
    return [name for name in ([named] if isinstance(named, str) else named) if name not in ("all", "none")]


def _hub_token() -> str | None:
    from huggingface_hub import get_token  # most of a second, and seldom asked for

    return get_token()
