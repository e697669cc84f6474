"""The context network: latents z to contexts c; c_t depends on z_0..z_t (Li et al. 2021: one GRU of 256 units)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model import attention
from cpcscale.model.cpu_gru import gru

_MOST_RECURRENT_LAYERS = 4


@dataclass(kw_only=True)
class ContextConfig:
    """The network over frames. ModelConfig replaces values 0 and auto by those of `model.size`."""

    # gru and lstm: recurrent networks. transformer: causal attention.
    kind: Literal["auto", "gru", "lstm", "transformer"] = "auto"
    # Number of layers: 1 to 4 for gru and lstm, any for a transformer.
    layers: int = 0
    # D, the width of c: units of a gru or lstm, the model width of a transformer.
    width: int = 0
    # Attention heads of a transformer.
    heads: int = 0
    # Positions of a transformer: rotary rotates queries and keys; relative lowers scores by distance (ALiBi), which is
    # made for audio longer than the windows of training.
    positions: Literal["rotary", "relative"] = "rotary"

    def __post_init__(self) -> None:
        config.at_least(0, **{f"model.context.{name}": getattr(self, name) for name in ("layers", "width", "heads")})
        if self.kind in ("gru", "lstm") and self.layers > _MOST_RECURRENT_LAYERS:
            raise UserError(
                f"model.context.layers={self.layers} of kind {self.kind} would be slow to train and hard to fit: use "
                f"1 to {_MOST_RECURRENT_LAYERS}, or kind=transformer"
            )
        if self.kind == "transformer" and self.heads:
            attention.check_heads("model.context", self.heads, self.width, self.positions)


class Context(nn.Module):
    """z_BTC -> c_BTD, causal: c at t depends on z up to t.

    `gru` and `lstm` are those of torch (the paper: one GRU layer; Riviere et al. 2020: one LSTM layer). `transformer`
    is a linear map from C to D, then attention.Transformer.
    """

    def __init__(self, config: ContextConfig, channels: int) -> None:
        super().__init__()
        assert config.kind != "auto", "ModelConfig fills in what a ContextConfig leaves to the size"
        self._kind = config.kind
        match config.kind:
            case "gru":
                self.gru = nn.GRU(channels, config.width, config.layers, batch_first=True)
            case "lstm":
                self.lstm = nn.LSTM(channels, config.width, config.layers, batch_first=True)
            case "transformer":
                self.project = nn.Linear(channels, config.width)
                self.transformer = attention.Transformer(config.width, config.layers, config.heads, config.positions)

    def forward(self, z_BTC: Tensor) -> Tensor:
        match self._kind:
            case "gru":
                return gru(z_BTC, self.gru)
            case "lstm":
                return self.lstm(z_BTC)[0]
            case _:
                return self.transformer(self.project(z_BTC))
