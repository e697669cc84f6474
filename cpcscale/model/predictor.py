"""The predictors of pretraining: one linear map W_k for each step ahead (van den Oord et al. 2018, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cpcscale import config


@dataclass(kw_only=True)
class PredictorConfig:
    """How far ahead the context predicts."""

    # K: the steps ahead, in frames (12 frames of 10 ms in the paper).
    steps: int = 12

    def __post_init__(self) -> None:
        config.at_least(1, **{"model.predictor.steps": self.steps})


class Predictor(nn.Module):
    """c_BTD -> predictions_BTKC: row k - 1 predicts the latent k frames ahead."""

    def __init__(self, config: PredictorConfig, width: int, channels: int) -> None:
        super().__init__()
        self.maps = nn.Linear(width, config.steps * channels, bias=False)
        self._shape = (config.steps, channels)

    def forward(self, c_BTD: Tensor) -> Tensor:
        return self.maps(c_BTD).unflatten(-1, self._shape)
