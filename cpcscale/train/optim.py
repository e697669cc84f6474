"""The optimiser and its learning rate, a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cpcscale import config


@dataclass(kw_only=True)
class OptimConfig:
    """Adam; the defaults are the paper's, clipping aside."""

    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    # Steps of linear warm-up before the constant rate.
    warmup_steps: int = 0
    # Global gradient norm above which gradients are scaled down; 0: never.
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        config.at_least(0, **{"optim.weight_decay": self.weight_decay, "optim.warmup_steps": self.warmup_steps})
        config.at_least(0, **{"optim.clip_norm": self.clip_norm, "optim.learning_rate": self.learning_rate})


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Adam:
    """Adam over all parameters, in the model's order."""
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of `step` (from 0)."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
