"""The predictors of pretraining: one linear map W_k for each step ahead (van den Oord et al. 2018, eq. 3), by itself or
behind a transformer layer (Riviere et al. 2020)."""

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
    """How far ahead the context predicts, and by what. What is left at 0 or auto is filled in by ModelConfig with what
    `model.size` has."""

    # linear: W_k alone. shared: one transformer layer for all steps, then W_k. each: a layer for each step, then W_k.
    kind: Literal["auto", "linear", "shared", "each"] = "auto"
    # K: the steps ahead, in frames (12 frames of 10 ms in the paper).
    steps: int = 12
    # Of the transformer layers.
    heads: int = 0
    # How they know distances, as in model.context.positions.
    positions: Literal["rotary", "relative"] = "rotary"

    def __post_init__(self) -> None:
        config.at_least(1, **{"model.predictor.steps": self.steps})
        config.at_least(0, **{"model.predictor.heads": self.heads})


class Predictor(nn.Module):
    """c_BTD -> predictions_BTKC: row k - 1 predicts the latent k frames ahead, from c up to t.

    `linear`: W_k c_t (van den Oord et al. 2018, eq. 3). `shared` and `each`: W_k of what one causal transformer layer
    for all steps, or one for each, makes of c. Riviere et al. 2020 (arXiv 2002.02848) have one for each and take its
    output for the prediction, which needs D = C; W_k makes it fit any D.
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
