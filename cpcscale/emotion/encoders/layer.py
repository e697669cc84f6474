"""The layer of an encoder that a recogniser takes as input, and the level of the encoder's input; CPC or Hugging Face.

B rows, S samples, T frames, C features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from cpcscale.emotion.encoders.huggingface import HFEncoder
from cpcscale.model.cpc import CPC, Layer

EncoderLayer = Literal["c", "z", "both", "mix"]
WaveNorm = Literal["corpus", "window", "none"]
Encoder: TypeAlias = "CPC | HFEncoder"

# Raise it when the same weights give other values of a layer, or the input level is set differently.
VERSION = 1
# Added to a window's variance, as in the transformers library; silence stays silence.
_VARIANCE_FLOOR = 1e-7


@dataclass(frozen=True)
class LayerFeatures:
    """One layer of an encoder, over waveforms in [-1, 1) at 16 kHz.

    `layer`: c, z, both side by side, or mix: the layers side by side, of which the recogniser learns a weighted sum (z
    and c of a CPC network, all hidden states of another). `wave_norm`: corpus uses the level of the pretraining (CPC:
    one offset and gain for all; others: as their feature extractor says), window scales each window to zero mean and
    unit variance, none leaves the waveform as it is.
    """

    encoder: Encoder
    layer: EncoderLayer = "c"
    wave_norm: WaveNorm = "corpus"

    def __call__(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        """Features [B, T, C] of rows with `samples_B` valid samples, at least `least_samples` each.

        The first `frames(samples_B)` of each row are valid, and the same as for that row alone, without padding.
        """
        wave_BS = self._at_level(wave_BS, samples_B)
        if isinstance(self.encoder, CPC):
            return self.encoder.layer(wave_BS, self._cpc_layer)
        return self.encoder.layer(wave_BS, samples_B, self.layer)

    def frames(self, samples_B: Tensor) -> Tensor:
        """The number of valid frames, [B], of rows with so many samples."""
        if isinstance(self.encoder, CPC):
            return samples_B // self.encoder.hop_samples
        return self.encoder.frames(samples_B)

    @property
    def least_samples(self) -> int:
        """The fewest samples that give a frame."""
        return self.encoder.hop_samples if isinstance(self.encoder, CPC) else self.encoder.least_samples

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the layers that lie side by side in C."""
        z, c = self.encoder.channels, self.encoder.context_width
        match self.layer:
            case "c":
                return (c,)
            case "z":
                return (z,)
            case "mix" if isinstance(self.encoder, HFEncoder):
                return (c,) * self.encoder.hidden_states
            case _:
                return (z, c)

    @property
    def identity(self) -> str:
        """A text that changes when the same encoder may give other features; part of their cache key."""
        layer = self._cpc_layer if isinstance(self.encoder, CPC) else self.layer
        return f"{VERSION} {layer} {self.wave_norm}"

    def freeze_unused(self) -> None:
        """Switches off gradients of the parts that the layer does not depend on: DDP would wait for them."""
        if not isinstance(self.encoder, CPC):
            self.encoder.freeze_unused(self.layer)
            return
        self.encoder.predictor.requires_grad_(False)
        if self.layer == "z":
            self.encoder.context.requires_grad_(False)

    @property
    def _cpc_layer(self) -> Layer:
        return "both" if self.layer == "mix" else self.layer

    def _at_level(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        own = isinstance(self.encoder, HFEncoder) and self.encoder.normalises
        if self.wave_norm == "window" or (self.wave_norm == "corpus" and own):
            wave_BS = _normalise_windows(wave_BS, samples_B)
        if self.wave_norm != "corpus" and isinstance(self.encoder, CPC):
            # Undoes in advance the offset and gain that the network applies.
            return wave_BS / self.encoder.gain + self.encoder.offset
        return wave_BS


def _normalise_windows(wave_BS: Tensor, samples_B: Tensor) -> Tensor:
    """Each row scaled to zero mean and unit variance over its valid samples; 0 in the padding."""
    valid_BS = torch.arange(wave_BS.shape[1], device=wave_BS.device)[None] < samples_B[:, None]
    count_B1 = samples_B[:, None].to(wave_BS.dtype)
    centred_BS = (wave_BS - (wave_BS * valid_BS).sum(dim=1, keepdim=True) / count_B1) * valid_BS
    return centred_BS / (centred_BS.square().sum(dim=1, keepdim=True) / count_B1 + _VARIANCE_FLOOR).sqrt()
