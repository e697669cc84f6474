"""The recogniser of arXiv 2102.06357: self-attention over frames, mean and deviation over time, two dense layers.

The paper mentions no positional encoding, residual path or normalisation layer, so there is none. We read its "512
hidden" as the total over the heads. U utterances, B rows of a batch, T frames, C input features, H hidden units, P
primitives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.emotion.encoders.layer import LayerFeatures, WaveNorm
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError
from cpcscale.model.layers import Layer, LayeredNetwork
from cpcscale.objective.hash_random import hashed, uniform

# Added to variances before the root, whose gradient at 0 is infinite; features are standardised, so it is small.
_EPSILON = 1e-6


@dataclass(kw_only=True)
class AttentionHeadConfig:
    """The head on top of the features; the defaults are the paper's."""

    # heads of the self-attention
    heads: int = 8
    # units of the self-attention, over all heads
    hidden: int = 512
    # units of each of the two dense layers
    dense: int = 128
    # share of units left out in training
    dropout: float = 0.2
    # this many consecutive frames are averaged before the attention; 1 is the paper's
    pool_frames: int = 1

    def __post_init__(self) -> None:
        config.at_least(
            1, **{f"recogniser.{name}": getattr(self, name) for name in ("heads", "hidden", "dense", "pool_frames")}
        )
        if self.hidden % self.heads:
            raise UserError(f"recogniser.hidden={self.hidden} is not a multiple of recogniser.heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"recogniser.dropout={self.dropout} is not in [0, 1)")


class AttentionHead(nn.Module):
    """Predicts activation, valence and dominance, on [-1, 1], from the frames of an utterance.

    A padded batch gives the same as its rows one by one: padding reaches neither attention nor pooling. The mean and
    deviation of the features are buffers, set by `standardise`, so they are saved with the weights.
    """

    mean_C: Tensor
    deviation_C: Tensor

    def __init__(self, settings: AttentionHeadConfig, width: int, layers: Sequence[int] = ()) -> None:
        """`layers`: to mix encoder layers, the width of each; they lie side by side in the `width` input features."""
        super().__init__()
        self.config = settings
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("deviation_C", torch.ones(width))
        self.layer_mix = LayerMix(layers) if layers else None
        self.query_key_value = nn.Linear(max(layers, default=width), 3 * settings.hidden)
        self.mix = nn.Linear(settings.hidden, settings.hidden)
        self.dense = nn.Sequential(
            nn.Linear(2 * settings.hidden, settings.dense),
            nn.ReLU(),
            KeyedDropout(settings.dropout, 0),
            nn.Linear(settings.dense, settings.dense),
            nn.ReLU(),
            KeyedDropout(settings.dropout, 1),
            nn.Linear(settings.dense, len(PRIMITIVES)),
        )

    def standardise(self, mean_C: Tensor, deviation_C: Tensor) -> None:
        """Sets the mean and deviation by which features are standardised; a constant feature is only shifted."""
        self.mean_C.copy_(mean_C)
        self.deviation_C.copy_(torch.where(deviation_C > _EPSILON, deviation_C, torch.ones_like(deviation_C)))

    def forward(self, x_BTC: Tensor, frames_B: Tensor, key_B: Tensor | None = None) -> Tensor:
        """[B, P] for features with `frames_B` valid frames a row, at least one each.

        `key_B`, int64, keys the dropout of each row. Raises ValueError without it in training with dropout.
        """
        x_BTC, frames_B = average_frames((x_BTC - self.mean_C) / self.deviation_C, frames_B, self.config.pool_frames)
        if self.layer_mix is not None:
            x_BTC = self.layer_mix(x_BTC)
        valid_BT = _valid(frames_B, x_BTC.shape[1])
        mean_BH, deviation_BH = pool(self.mix(self._attend(x_BTC, valid_BT)), valid_BT)
        x_BF = torch.cat([mean_BH, deviation_BH], dim=1)
        for layer in self.dense:
            x_BF = layer(x_BF, key_B) if isinstance(layer, KeyedDropout) else layer(x_BF)
        return x_BF

    def _attend(self, x_BTC: Tensor, valid_BT: Tensor) -> Tensor:
        batch, frames, _ = x_BTC.shape
        split = self.query_key_value(x_BTC).view(batch, frames, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=valid_BT[:, None, None, :])
        return attended.transpose(1, 2).reshape(batch, frames, self.config.hidden)


class KeyedDropout(nn.Module):
    """Dropout whose mask depends on each row's key alone, not on the batch, its order or the device.

    So a second forward pass of a row, or one on another rank, drops the same units.
    """

    def __init__(self, p: float, number: int) -> None:
        """`number` gives each dropout of a network its own masks."""
        super().__init__()
        self.p, self.number = p, number

    def forward(self, x_BF: Tensor, key_B: Tensor | None) -> Tensor:
        """Sets each unit to 0 with probability p, else scales it by 1 / (1 - p); the identity in evaluation.

        Raises ValueError in training without keys (int64, one a row).
        """
        if not self.training or self.p == 0:
            return x_BF
        if key_B is None:
            raise ValueError("dropout is keyed: pass key_B, an int64 key for each row, or call eval()")
        place_F = torch.arange(x_BF.shape[1], device=x_BF.device)
        bits_BF = hashed(hashed(key_B, torch.tensor(self.number))[:, None], place_F)
        return torch.where(uniform(bits_BF) >= self.p, x_BF / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}, number={self.number}"


class LayerMix(nn.Module):
    """A learnt weighted sum of layers: scale * sum of share_l * layer_l; the shares are a softmax of learnt weights.

    As SUPERB weighs the hidden states of a network (Yang et al. 2021, arXiv 2105.01051). Layers of one width are summed
    as they are. Layers of several widths, such as z and c, are first mapped to the widest by learnt matrices whose rows
    have unit length: then a layer's share alone says how much it counts, and the loudness of a frame is kept.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.weight_L = nn.Parameter(torch.zeros(len(self.widths)))
        self.scale = nn.Parameter(torch.ones(()))
        mapped = self.widths if len(set(self.widths)) > 1 else []
        self.maps = nn.ParameterList(nn.Parameter(torch.randn(max(self.widths), width)) for width in mapped)

    @property
    def share_L(self) -> Tensor:
        """The weight of each layer [L]; they sum to 1."""
        return self.weight_L.softmax(dim=0)

    def forward(self, x_BTC: Tensor) -> Tensor:
        layers = list(x_BTC.split(self.widths, dim=2))
        if len(self.maps):
            layers = [F.linear(each, F.normalize(rows, dim=1)) for each, rows in zip(layers, self.maps, strict=True)]
        return self.scale * (torch.stack(layers, dim=3) @ self.share_L)


class EncoderWithHead(nn.Module):
    """An encoder and an attention head on one of its layers, trained together on waveforms."""

    def __init__(
        self, encoder: LayeredNetwork, recogniser: AttentionHead, layer: Layer = "c", wave_norm: WaveNorm = "corpus"
    ) -> None:
        super().__init__()
        self.encoder, self.recogniser = encoder, recogniser
        self.layer_features = LayerFeatures(encoder, layer, wave_norm)
        encoder.freeze_unused(layer)

    def forward(self, wave_BS: Tensor, samples_B: Tensor, key_B: Tensor | None = None) -> Tensor:
        """[B, P] for waveforms in [-1, 1) with `samples_B` valid samples a row.

        Each row has at least `encoder.least_samples`. `key_B` keys the recogniser's dropout.
        """
        return self.recogniser(self.layer_features(wave_BS, samples_B), self.encoder.frames(samples_B), key_B)


def learnt_mix(network: nn.Module) -> list[float]:
    """The layer shares of a recogniser, with or without its encoder; empty if it mixes no layers."""
    recogniser = network.recogniser if isinstance(network, EncoderWithHead) else network
    mix = recogniser.layer_mix if isinstance(recogniser, AttentionHead) else None
    return [] if mix is None else [round(share, 6) for share in mix.share_L.tolist()]


def average_frames(x_BTC: Tensor, frames_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(means of `count` consecutive valid frames, their number in each row: ceil(frames / count)).

    The last mean of a row is over its remaining valid frames, so padding has no weight.
    """
    if count == 1:
        return x_BTC, frames_B
    batch, frames, width = x_BTC.shape
    groups = -(-frames // count)
    valid_BT = _valid(frames_B, frames)
    padded = F.pad(x_BTC.masked_fill(~valid_BT[..., None], 0.0), (0, 0, 0, groups * count - frames))
    sums = padded.view(batch, groups, count, width).sum(dim=2)
    starts = torch.arange(groups, device=x_BTC.device) * count
    counts = (frames_B[:, None] - starts).clamp(1, count)
    return sums / counts[..., None], -(-frames_B // count)


def pool(x_BTC: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) over the valid frames, each [B, C]; the gradient is finite also for constant x."""
    weight_BT1 = valid_BT[..., None].to(x_BTC.dtype)
    count_B1 = weight_BT1.sum(dim=1)
    mean_BC = (x_BTC * weight_BT1).sum(dim=1) / count_B1
    variance_BC = ((x_BTC - mean_BC[:, None]).square() * weight_BT1).sum(dim=1) / count_B1
    return mean_BC, (variance_BC + _EPSILON).sqrt()


def _valid(frames_B: Tensor, frames: int) -> Tensor:
    return torch.arange(frames, device=frames_B.device)[None] < frames_B[:, None]
