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
    """The optimiser and its schedule; the defaults are the paper's: plain Adam at a constant rate."""

    # adam: weight decay is an L2 term in the gradient (the paper). adamw: weight decay is decoupled from the gradient
    # (Loshchilov and Hutter 2019).
    kind: Literal["adam", "adamw"] = "adam"
    # Peak learning rate, reached at the end of the warm-up.
    learning_rate: float = 2e-4
    # Weight decay, as `kind` applies it.
    weight_decay: float = 1e-5
    # Decay rates of Adam's running means of the gradient and of its square.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # Adam's epsilon: added to the root of the mean square, so that gradients near 0 make no large update.
    eps: float = 1e-8
    # Updates of linear warm-up before the schedule.
    warmup_steps: int = 0
    # The rate from the end of the warm-up to the last step: constant, half a cosine down, or linear down.
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    # The rate at the end of cosine and linear, as a share of the peak rate.
    final_share: float = 0.0
    # Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping.
    clip_norm: float = 0.0
    # Factor of the learning rate for the encoder's parameters; 0 freezes them.
    encoder_rate: float = 1.0
    # Whether weight decay also applies to biases, the weights of norms and a learnt temperature.
    decay_norms_and_biases: bool = True
    # Decay of the running mean of the weights (EMA), which validations and evaluations then use; 0: no mean.
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        config.at_least(0, **{"optim.weight_decay": self.weight_decay, "optim.warmup_steps": self.warmup_steps})
        config.at_least(0, **{"optim.clip_norm": self.clip_norm, "optim.learning_rate": self.learning_rate})
        config.at_least(0, **{"optim.encoder_rate": self.encoder_rate, "optim.final_share": self.final_share})
        # Anything smaller is 0 in fp32, and the update for a gradient of 0 would be 0 / 0.
        config.at_least(torch.finfo(torch.float32).tiny, **{"optim.eps": self.eps})
        if self.final_share > 1:
            raise UserError(f"optim.final_share={self.final_share} would end above the peak rate: give 1 or less")
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={self.betas} must be two numbers: for the mean and for the mean square")
        for name, kept in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema_decay", self.ema_decay)):
            if not 0 <= kept < 1:
                raise UserError(f"optim.{name} has {kept}, which is not a decay rate: give 0 or more, below 1")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over all parameters of `model` in the groups of `parameter_groups`, by torch's fused kernel.

    The model must already be on its device. Every group has a `rate_factor`: its rate at a step is `learning_rate` at
    that step times this factor. If no setting separates parameters, there is one group, in the model's order.
    """
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    betas = (config.betas[0], config.betas[1])
    return kinds[config.kind](
        parameter_groups(model, config), lr=config.learning_rate, betas=betas, eps=config.eps, fused=True
    )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser: parameters with the same rate and weight decay share a group.

    Parameters below a module named `encoder`, at any depth, get `encoder_rate`. Norms and biases are the parameters
    with fewer than two dimensions.
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

    It rises linearly over the first `warmup_steps` updates, the last of which has the peak rate. Then it stays there,
    or falls towards `final_share` of the peak, which it would reach at `total`.
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
