"""The predictors of pretraining: a linear map W_k for each step ahead, alone or after a transformer layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.model.attention import Transformer


@dataclass(kw_only=True)
class PredictorConfig:
    """How latents are predicted from contexts. ModelConfig replaces values 0 and auto by those of `model.size`."""

    # linear: W_k alone. shared: one transformer layer for all steps, then W_k. each: one for each step, then W_k.
    kind: Literal["auto", "linear", "shared", "each"] = "auto"
    # K: how many frames ahead to predict (in the paper 12, of 10 ms).
    steps: int = 12
    # Attention heads of the transformer layers.
    heads: int = 0
    # Positions in the transformer layers, as in model.context.positions.
    positions: Literal["rotary", "relative"] = "rotary"

    def __post_init__(self) -> None:
        config.at_least(1, **{"model.predictor.steps": self.steps})
        config.at_least(0, **{"model.predictor.heads": self.heads})


class Predictor(nn.Module):
    """c_BTD -> predictions_BTKC: entry k - 1 of axis K predicts the latent k frames ahead, from c up to t.

    `linear`: W_k c_t (van den Oord et al. 2018, eq. 3). `shared` and `each`: a causal transformer layer, one for all
    steps or one for each, then W_k. Riviere et al. 2020 (arXiv 2002.02848) use one for each and its output as the
    prediction, which needs D = C; W_k allows any D.
    """

    def __init__(self, config: PredictorConfig, width: int, channels: int) -> None:
        super().__init__()
        assert config.kind != "auto", "ModelConfig fills in what a PredictorConfig leaves to the size"
        self.maps = nn.Linear(width, config.steps * channels, bias=False)
        layers = {"linear": 0, "shared": 1, "each": config.steps}[config.kind]
        self.layers = nn.ModuleList([Transformer(width, 1, config.heads, config.positions) for _ in range(layers)])
        self._kind, self._shape = config.kind, (config.steps, channels)

    def forward(self, c_BTD: Tensor) -> Tensor:
        match self._kind:
            case "each":
                maps_KCD = self.maps.weight.unflatten(0, self._shape)
                made = [F.linear(layer(c_BTD), map_CD) for layer, map_CD in zip(self.layers, maps_KCD, strict=True)]
                return torch.stack(made, dim=2)
            case "shared":
                return self.maps(self.layers[0](c_BTD)).unflatten(-1, self._shape)
            case _:
                return self.maps(c_BTD).unflatten(-1, self._shape)
