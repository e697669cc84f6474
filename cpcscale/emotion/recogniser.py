"""The recogniser of arXiv 2102.06357: self-attention over frames, mean and deviation over time, a small dense head.

The paper states no positional encoding, residual path or normalisation layer: there is none. "512 hidden" is read as
the total over the heads. U utterances, B rows of a batch, T frames, C input features, H hidden units, P primitives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.objective.ccc import PRIMITIVES

# Added to variances before the root, whose gradient at 0 is infinite; features are standardised, so it is small.
_EPSILON = 1e-6


@dataclass(kw_only=True)
class RecogniserConfig:
    """The head on top of the features; the defaults are the paper's."""

    heads: int = 8
    hidden: int = 512  # over all heads
    dense: int = 128  # units of each of the two dense layers
    dropout: float = 0.2
    pool_frames: int = 1  # this many consecutive frames are averaged before the attention; 1 is the paper's

    def __post_init__(self) -> None:
        config.at_least(
            1, **{f"recogniser.{name}": getattr(self, name) for name in ("heads", "hidden", "dense", "pool_frames")}
        )
        if self.hidden % self.heads:
            raise UserError(f"recogniser.hidden={self.hidden} does not divide by recogniser.heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"recogniser.dropout={self.dropout} is not in [0, 1)")


class Recogniser(nn.Module):
    """Features of utterances to activation, valence and dominance on the unit scale of labels, [-1, 1].

    A padded batch gives what its rows give one by one: frames from `frames_B` on reach neither attention nor pooling.
    The features' mean and deviation are buffers, set by `standardise`, so that a saved recogniser carries them.
    """

    mean_C: Tensor
    deviation_C: Tensor

    def __init__(self, settings: RecogniserConfig, width: int) -> None:
        super().__init__()
        self.config = settings
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("deviation_C", torch.ones(width))
        self.query_key_value = nn.Linear(width, 3 * settings.hidden)
        self.mix = nn.Linear(settings.hidden, settings.hidden)
        self.dense = nn.Sequential(
            nn.Linear(2 * settings.hidden, settings.dense),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.dense, settings.dense),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.dense, len(PRIMITIVES)),
        )

    def standardise(self, mean_C: Tensor, deviation_C: Tensor) -> None:
        """From now on features are shifted and scaled by these; a feature that never varies is only shifted."""
        self.mean_C.copy_(mean_C)
        self.deviation_C.copy_(torch.where(deviation_C > _EPSILON, deviation_C, torch.ones_like(deviation_C)))

    def forward(self, x_BTC: Tensor, frames_B: Tensor) -> Tensor:
        """[B, P] for features with `frames_B` valid frames a row, at least one each."""
        x_BTC, frames_B = average_frames((x_BTC - self.mean_C) / self.deviation_C, frames_B, self.config.pool_frames)
        valid_BT = _valid(frames_B, x_BTC.shape[1])
        mean_BH, deviation_BH = pool(self.mix(self._attend(x_BTC, valid_BT)), valid_BT)
        return self.dense(torch.cat([mean_BH, deviation_BH], dim=1))

    def _attend(self, x_BTC: Tensor, valid_BT: Tensor) -> Tensor:
        batch, frames, _ = x_BTC.shape
        split = self.query_key_value(x_BTC).view(batch, frames, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=valid_BT[:, None, None, :])
        return attended.transpose(1, 2).reshape(batch, frames, self.config.hidden)


class EndToEnd(nn.Module):
    """A CPC network whose context c the recogniser hears, trained together; it takes waveforms."""

    def __init__(self, encoder: CPC, recogniser: Recogniser) -> None:
        super().__init__()
        self.encoder = encoder
        self.recogniser = recogniser

    def forward(self, wave_BS: Tensor, samples_B: Tensor) -> Tensor:
        """[B, P] for waveforms in [-1, 1) with `samples_B` valid samples a row, at least one hop each."""
        _, c_BTC = self.encoder.features(wave_BS)
        return self.recogniser(c_BTC, samples_B // self.encoder.hop_samples)


def average_frames(x_BTC: Tensor, frames_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means of `count` consecutive valid frames and how many there are a row: ceil(frames / count).

    The last mean of a row is over the valid frames that are left, so padding never weighs in.
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
    """(mean, standard deviation) over the valid frames, each [B, C]; the gradient is finite where x is constant."""
    weight_BT1 = valid_BT[..., None].to(x_BTC.dtype)
    count_B1 = weight_BT1.sum(dim=1)
    mean_BC = (x_BTC * weight_BT1).sum(dim=1) / count_B1
    variance_BC = ((x_BTC - mean_BC[:, None]).square() * weight_BT1).sum(dim=1) / count_B1
    return mean_BC, (variance_BC + _EPSILON).sqrt()


def _valid(frames_B: Tensor, frames: int) -> Tensor:
    return torch.arange(frames, device=frames_B.device)[None] < frames_B[:, None]
