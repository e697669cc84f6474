"""The convolutional encoder: waveform to one latent z for each hop (Li et al. 2021: 4 layers, 128 channels, 10 ms).

Its layers are over the waveform itself, or over the log energies of mel bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model import log_mel
from cpcscale.model.cpu_first_layers import fits, stem
from cpcscale.model.log_mel import LogMel
from cpcscale.model.strided_conv import causal_conv

# Over log mel, a longer hop than this many frames of 10 ms can only be meant for samples.
_MOST_FRAMES = 16


@dataclass(kw_only=True)
class EncoderConfig:
    """The stack of convolutions. ModelConfig replaces values 0, [] and auto by those of `model.size`."""

    # conv: the layers are over the waveform. logmel: over the log energies of mel bands, 100 frames a second; a size
    # then stands for one layer with kernel 3, which costs a fraction.
    kind: Literal["conv", "logmel"] = field(default="conv", metadata=config.ADDED)
    # Mel bands, for kind: logmel.
    bands: int = field(default=40, metadata=config.ADDED)
    # C, the width of every layer and of z.
    channels: int = 0
    # Kernel sizes, one for each layer, in samples (frames of what is before it); none is smaller than its stride.
    kernels: list[int] = field(default_factory=list)
    # Strides, one for each layer, in samples (frames of what is before it); their product is the hop.
    strides: list[int] = field(default_factory=list)
    # Normalisation between each convolution and its ReLU, over the channels of each frame, never over time.
    norm: Literal["auto", "none", "channel", "group"] = "auto"
    # Groups of channels, for norm: group.
    groups: int = 8
    # Added to the variance that a norm divides by. Waves are scaled to a variance of 1, so 1 keeps quiet frames quiet;
    # with 1e-5 (Riviere et al. 2020) loudness is lost, and silence becomes as loud as speech.
    norm_epsilon: float = 1.0

    def __post_init__(self) -> None:
        config.at_least(0, **{"model.encoder.channels": self.channels})
        config.at_least(1e-9, **{"model.encoder.norm_epsilon": self.norm_epsilon})
        config.at_least(1, **{"model.encoder.groups": self.groups, "model.encoder.bands": self.bands})
        if self.bands > log_mel.MOST_BANDS:
            raise UserError(
                f"model.encoder.bands={self.bands} are more than the frequencies of 25 ms can fill: use at most "
                f"{log_mel.MOST_BANDS}"
            )
        if self.norm == "group" and self.channels % self.groups:
            raise UserError(
                f"model.encoder.groups={self.groups} does not split channels={self.channels} into equal groups: use "
                f"groups={math.gcd(self.groups, self.channels)}, or norm=channel"
            )
        if not self.kernels or not self.strides:
            return
        if len(self.kernels) != len(self.strides):
            raise UserError(
                f"model.encoder.kernels={self.kernels} and strides {self.strides} differ in length: one each a layer"
            )
        if any(kernel < stride or stride < 1 for kernel, stride in zip(self.kernels, self.strides, strict=True)):
            raise UserError(
                f"model.encoder.kernels={self.kernels} with strides {self.strides} would skip samples: make no "
                "kernel shorter than its stride"
            )

        if self.on_log_mel and math.prod(self.strides) > _MOST_FRAMES:
            raise UserError(
                f"model.encoder.strides={self.strides} are those of samples, and kind=logmel has frames of 10 ms, so a "
                f"frame of z would take {math.prod(self.strides) / 100:g} s: use model.encoder.kernels=[3] "
                "model.encoder.strides=[1]"
            )

    @property
    def on_log_mel(self) -> bool:
        """Whether the layers are over log mel energies, not over the waveform."""
        return self.kind == "logmel"

    @property
    def inputs(self) -> int:
        """The width of what the first layer is over."""
        return self.bands if self.on_log_mel else 1

    @property
    def hop_samples(self) -> int:
        """Samples between two frames: the product of the strides (160 in the paper, 10 ms), after log mel in frames."""
        return math.prod(self.strides) * (log_mel.HOP if self.on_log_mel else 1)

    @property
    def receptive_samples(self) -> int:
        """The receptive field: samples that a frame of z depends on, its own hop included."""
        spacings = [math.prod(self.strides[:layer]) for layer in range(len(self.strides))]
        before = sum((kernel - 1) * spacing for kernel, spacing in zip(self.kernels, spacings, strict=True))
        return log_mel.WINDOW + log_mel.HOP * before if self.on_log_mel else 1 + before

    @property
    def fuses_first_layers(self) -> bool:
        """Whether model/cpu_first_layers.py can compute the first two layers together."""
        fit = len(self.kernels) > 1 and self.kernels[1] % self.strides[1] == 0
        return fit and self.norm == "none" and not self.on_log_mel


class ConvEncoder(nn.Module):
    """wave_BS -> z_BTC with T = S // hop, causal: frame t depends only on samples before (t + 1) * hop.

    With `kind=logmel`, the layers are over log_mel.LogMel, which is causal too; else over the waveform. Each layer is
    padded on the left by kernel - stride, so padding after an utterance never changes its frames. Norms
    are computed for each frame by itself: `channel` over all channels (Riviere et al. 2020, arXiv 2002.02848:
    statistics over time leak the future), `group` over groups of them (Wu and He 2018, arXiv 1803.08494, without
    pooling over positions). Both have a gain and a shift for each channel, and an epsilon that keeps loudness: with
    1e-5, networks of several layers stay at chance for hundreds of updates. The paper states no normalisation.

    Weights have Kaiming's initialisation for ReLU, biases start at 0. Without it and without the gain of the corpus,
    all frames start out alike and CPC learns nothing.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        assert config.channels and config.kernels, "ModelConfig fills in what an EncoderConfig leaves to the size"
        self.front = LogMel(config.bands) if config.on_log_mel else None
        widths = [config.inputs] + [config.channels] * len(config.kernels)
        layers = [
            nn.Conv1d(before, after, kernel, stride)
            for before, after, kernel, stride in zip(widths, widths[1:], config.kernels, config.strides, strict=False)
        ]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList([_norm(config) for _ in layers])
        self._fuses_first_layers = config.fuses_first_layers
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, wave_BS: Tensor) -> Tensor:
        layers, norms = cast(list[nn.Conv1d], list(self.layers)), list(self.norms)
        if self._fuses_first_layers and fits(wave_BS):
            x_BSC, done = stem(wave_BS, layers[0], layers[1]), 2
        else:
            x_BSC, done = self.front(wave_BS) if self.front else wave_BS.unsqueeze(2), 0
        for layer, norm in zip(layers[done:], norms[done:], strict=True):
            x_BSC = F.relu(norm(causal_conv(x_BSC, layer)), inplace=True)
        return x_BSC.contiguous()


class _FrameGroupNorm(nn.GroupNorm):
    """x_BSC -> x_BSC: each group of channels of each frame is brought to zero mean and unit variance."""

    def forward(self, input: Tensor) -> Tensor:
        # Each frame becomes a row, so that frames do not share statistics.
        return super().forward(input.flatten(0, 1)).view_as(input)


def _norm(config: EncoderConfig) -> nn.Module:
    match config.norm:
        case "channel":
            return nn.LayerNorm(config.channels, eps=config.norm_epsilon)
        case "group":
            return _FrameGroupNorm(config.groups, config.channels, eps=config.norm_epsilon)
        case _:
            return nn.Identity()
