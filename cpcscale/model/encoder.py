"""The convolutional encoder: waveform to one latent z a hop (Li et al. 2021: 4 layers, 128 channels, 10 ms a frame)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.errors import UserError


@dataclass(kw_only=True)
class EncoderConfig:
    """The convolution stack; kernels and strides pair up layer by layer."""

    channels: int = 128
    kernels: list[int] = field(default_factory=lambda: [10, 8, 8, 4])
    strides: list[int] = field(default_factory=lambda: [5, 4, 4, 2])

    def __post_init__(self) -> None:
        config.at_least(1, **{"model.encoder.channels": self.channels})
        if len(self.kernels) != len(self.strides) or not self.kernels:
            raise UserError(
                f"model.encoder.kernels={self.kernels} and strides {self.strides} differ in length: one each a layer"
            )
        if any(kernel < stride or stride < 1 for kernel, stride in zip(self.kernels, self.strides, strict=True)):
            raise UserError(
                f"model.encoder.kernels={self.kernels} with strides {self.strides} would skip samples: make no "
                "kernel shorter than its stride"
            )

    @property
    def hop_samples(self) -> int:
        """Samples a frame: the product of the strides (160 in the paper, 10 ms)."""
        return math.prod(self.strides)


class Encoder(nn.Module):
    """wave_BS -> z_BTC with T = S // hop, causal: frame t sees samples before (t + 1) * hop alone.

    Each layer is padded on the left by kernel - stride, so whole hops in give whole frames out and what follows an
    utterance never reaches its frames. The paper states no normalisation; there is none. Weights start from Kaiming's
    initialisation for ReLU with zero biases: without it and without the corpus gain, all frames start alike and CPC
    does not take off.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = [1] + [config.channels] * len(config.kernels)
        layers = [
            nn.Conv1d(before, after, kernel, stride)
            for before, after, kernel, stride in zip(widths, widths[1:], config.kernels, config.strides, strict=False)
        ]
        self.layers = nn.ModuleList(layers)
        self._pads = [kernel - stride for kernel, stride in zip(config.kernels, config.strides, strict=True)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, wave_BS: Tensor) -> Tensor:
        x_BCS = wave_BS.unsqueeze(1)
        for layer, pad in zip(self.layers, self._pads, strict=True):
            x_BCS = F.relu(layer(F.pad(x_BCS, (pad, 0))))
        return x_BCS.transpose(1, 2).contiguous()
