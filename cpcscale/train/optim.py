"""The optimiser, its parameter groups, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from cpcscale import config
from cpcscale.errors import UserError


@dataclass(kw_only=True)
class OptimConfig:
    """How weights follow gradients; the defaults are the paper's: plain Adam at a constant rate."""

    # adam: weight decay is an L2 term in the gradient (the paper). adamw: it shrinks the weights apart from the
    # gradient (Loshchilov and Hutter 2019).
    kind: Literal["adam", "adamw"] = "adam"
    # The peak rate, at the end of the warm-up.
    learning_rate: float = 2e-4
    # How strongly weights are drawn to 0.
    weight_decay: float = 1e-5
    # What Adam's running means of the gradient and of its square keep at each update.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # Added to the root of the mean square, so that a gradient of nearly 0 makes no large update.
    eps: float = 1e-8
    # Updates of linear warm-up before the schedule.
    warmup_steps: int = 0
    # From the end of the warm-up to the last step: the peak rate, half a cosine down, or a line down.
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    # Where cosine and linear end, as a share of the peak rate.
    final_share: float = 0.0
    # Global gradient norm above which gradients are scaled down; 0: never.
    clip_norm: float = 0.0
    # Factor of the rate for the encoder's parameters; 0 freezes them.
    encoder_rate: float = 1.0
    # Whether biases, the weights of norms and a learnt temperature decay like all others.
    decay_norms_and_biases: bool = True
    # What the running mean of the weights keeps at each update (see Ema); 0: there is none.
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        config.at_least(0, **{"optim.weight_decay": self.weight_decay, "optim.warmup_steps": self.warmup_steps})
        config.at_least(0, **{"optim.clip_norm": self.clip_norm, "optim.learning_rate": self.learning_rate})
        config.at_least(0, **{"optim.encoder_rate": self.encoder_rate, "optim.final_share": self.final_share})
        # fp32 holds nothing less, and the step of a gradient of 0 would be 0 / 0.
        config.at_least(torch.finfo(torch.float32).tiny, **{"optim.eps": self.eps})
        if self.final_share > 1:
            raise UserError(f"optim.final_share={self.final_share} would end above the peak rate: give 1 or less")
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={self.betas} are not two: one for the mean, one for the mean square")
        for name, kept in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema_decay", self.ema_decay)):
            if not 0 <= kept < 1:
                raise UserError(f"optim.{name} has {kept}, which makes no running mean: give 0 or more, below 1")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over all parameters of `model` in the groups of `parameter_groups`, by torch's fused kernel.

    The model is on its device already. Every group carries `rate_factor`: its rate at a step is `learning_rate` of
    that step times this factor. Without a setting that parts them there is one group, in the model's order.
    """
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    betas = (config.betas[0], config.betas[1])
    return kinds[config.kind](
        parameter_groups(model, config), lr=config.learning_rate, betas=betas, eps=config.eps, fused=True
    )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Every parameter once, those alike in rate and weight decay together, as an optimiser takes them.

    The encoder is the part of that name, at whatever depth; norms and biases are what has fewer than two dimensions.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = config.encoder_rate if "encoder" in name.split(".") else 1.0
        decays = config.decay_norms_and_biases or parameter.ndim > 1
        found.setdefault((factor, config.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": config.learning_rate * factor, "rate_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in found.items()
    ]


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The rate of the update at `step` (from 0) of a run of `total` updates.

    It rises by equal parts over the first `warmup_steps` updates, the last of them at the peak. From there it stays or
    falls, towards `final_share` of the peak, which it would reach at `total`; in a run shorter than its warm-up, never.
    """
    if step < config.warmup_steps:
        return config.learning_rate * ((step + 1) / config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    match config.schedule:
        case "constant":
            fallen = 0.0
        case "cosine":
            fallen = (1 - math.cos(math.pi * done)) / 2
        case "linear":
            fallen = done
    return config.learning_rate * (1 - (1 - config.final_share) * fallen)
