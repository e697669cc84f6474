"""The layer of an encoder that a recogniser takes as input, and the level of the encoder's input.

B rows, S samples, T frames, C features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cpcscale.model.layers import Layer, LayeredNetwork

WaveNorm = Literal["corpus", "window", "none"]

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

    encoder: LayeredNetwork
    layer: Layer = "c"
    wave_norm: WaveNorm = "corpus"

    def __call__(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        """Features [B, T, C] of rows with `samples_B` valid samples, at least `encoder.least_samples` each.

        The first `encoder.frames(samples_B)` of each row are valid, and the same as for that row alone.
        """
        return self.encoder.layer(self._at_level(wave_BS, samples_B), self.layer, samples_B)

    def _at_level(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        if self.wave_norm == "window" or (self.wave_norm == "corpus" and self.encoder.normalises):
            wave_BS = _normalise_windows(wave_BS, samples_B)
        if self.wave_norm != "corpus":
            # Undoes in advance the offset and gain that the network applies.
            return wave_BS / self.encoder.gain + self.encoder.offset
        return wave_BS


def _normalise_windows(wave_BS: Tensor, samples_B: Tensor) -> Tensor:
    """Each row scaled to zero mean and unit variance over its valid samples; 0 in the padding."""
    valid_BS = torch.arange(wave_BS.shape[1], device=wave_BS.device)[None] < samples_B[:, None]
    count_B1 = samples_B[:, None].to(wave_BS.dtype)
    centred_BS = (wave_BS - (wave_BS * valid_BS).sum(dim=1, keepdim=True) / count_B1) * valid_BS
    return centred_BS / (centred_BS.square().sum(dim=1, keepdim=True) / count_B1 + _VARIANCE_FLOOR).sqrt()
