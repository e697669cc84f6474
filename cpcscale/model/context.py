"""The context network: latents z to contexts c, each of the past and present alone (PAPER.md: one GRU of 256 units)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cpcscale import config


@dataclass(kw_only=True)
class ContextConfig:
    """The recurrent layer over frames."""

    width: int = 256

    def __post_init__(self) -> None:
        config.at_least(1, **{"model.context.width": self.width})


class Context(nn.Module):
    """z_BTC -> c_BTD by one unidirectional GRU."""

    def __init__(self, config: ContextConfig, channels: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, config.width, batch_first=True)

    def forward(self, z_BTC: Tensor) -> Tensor:
        return self.gru(z_BTC)[0]
