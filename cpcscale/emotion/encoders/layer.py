"""What a recogniser hears of an encoder: which layer, and waveforms at which level; CPC networks and others alike.

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

# Raise it when the same weights give other values of a layer, or a level is reached in another way.
VERSION = 1
# Added to a window's variance, as the transformers library has it; silence stays silence.
_VARIANCE_FLOOR = 1e-7


@dataclass(frozen=True)
class LayerFeatures:
    """One layer of an encoder, over waveforms in [-1, 1) at 16 kHz.

    `mix` is of the layers side by side, which the recogniser learns to mix: z and c of a CPC network, all hidden states
    of another. `wave_norm`: corpus is the level that the encoder was pretrained at (CPC: one offset and gain for all;
    others: as their feature extractor says), window brings each window by itself to zero mean and unit variance, none
    leaves the waveform as it is.
    """

    encoder: Encoder
    layer: EncoderLayer = "c"
    wave_norm: WaveNorm = "corpus"

    def __call__(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        """x_BTC of rows with `samples_B` valid samples, at least `least_samples` each, of which `frames` are valid.

        These are what each row gives alone, whatever pads it.
        """
        wave_BS = self._levelled(wave_BS, samples_B)
        if isinstance(self.encoder, CPC):
            return self.encoder.layer(wave_BS, self._cpc_layer)
        return self.encoder.layer(wave_BS, samples_B, self.layer)

    def frames(self, samples_B: Tensor) -> Tensor:
        """Valid frames of rows of so many samples."""
        if isinstance(self.encoder, CPC):
            return samples_B // self.encoder.hop_samples
        return self.encoder.frames(samples_B)

    @property
    def least_samples(self) -> int:
        """Samples below which there is no frame."""
        return self.encoder.hop_samples if isinstance(self.encoder, CPC) else self.encoder.least_samples

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the layers that stand side by side in C."""
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
    def features(self) -> str:
        """What decides, beside the encoder, what is heard: features of one name are the same."""
        layer = self._cpc_layer if isinstance(self.encoder, CPC) else self.layer
        return f"{VERSION} {layer} {self.wave_norm}"

    def leave_unheard(self) -> None:
        """What the layer is no function of gets no gradient: DDP would wait for one."""
        if not isinstance(self.encoder, CPC):
            self.encoder.leave_unheard(self.layer)
            return
        self.encoder.predictor.requires_grad_(False)
        if self.layer == "z":
            self.encoder.context.requires_grad_(False)

    @property
    def _cpc_layer(self) -> Layer:
        return "both" if self.layer == "mix" else self.layer

    def _levelled(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        own = isinstance(self.encoder, HFEncoder) and self.encoder.normalises
        if self.wave_norm == "window" or (self.wave_norm == "corpus" and own):
            wave_BS = _by_window(wave_BS, samples_B)
        if self.wave_norm != "corpus" and isinstance(self.encoder, CPC):
            # The network's own level is taken back before it comes.
            return wave_BS / self.encoder.gain + self.encoder.offset
        return wave_BS


def _by_window(wave_BS: Tensor, samples_B: Tensor) -> Tensor:
    """Each row to zero mean and unit variance over its valid samples; 0 behind them."""
    valid_BS = torch.arange(wave_BS.shape[1], device=wave_BS.device)[None] < samples_B[:, None]
    count_B1 = samples_B[:, None].to(wave_BS.dtype)
    centred_BS = (wave_BS - (wave_BS * valid_BS).sum(dim=1, keepdim=True) / count_B1) * valid_BS
    return centred_BS / (centred_BS.square().sum(dim=1, keepdim=True) / count_B1 + _VARIANCE_FLOOR).sqrt()
