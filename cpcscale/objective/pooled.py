"""A contrast of whole windows: the first half of a window must find the second half of the same utterance.

After COLA (Saeed et al. 2021, arXiv 2010.10915) and TRILL (Shor et al. 2020, arXiv 2002.12764): what is constant in an
utterance, such as the speaker and how she speaks, tells it from others, while negatives from the utterance itself give
no reward for it. With F real frames and h = F // 2, u = W mean(c[0:h]) is compared with v = mean(z[h + 12 : F]) by the
cosine over a temperature. The contexts of the second half are never used: their state carries the first half.

Negatives of a row are the v of all rows of the global batch that belong to another utterance. The loss of a row with R
negatives is divided by ln(R + 1), that of guessing. A row of less than a second, or without negatives, does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.objective.objective import AutogradObjective, Features, Outputs, Peers, Pool, Rows

# Frames between the two halves, so that they share no sound.
GAP = 12
LEAST_FRAMES = 100
TEMPERATURE = 0.1


@dataclass(kw_only=True)
class PooledConfig:
    """The contrast of whole windows."""

    # Its weight in the loss; .2 is a good start.
    weight: float = 0.0

    def __post_init__(self) -> None:
        config.at_least(0, **{"objective.pooled.weight": self.weight})


class Pooled(AutogradObjective):
    """The contrast as an objective of one class; its sums are losses and correct rows."""

    name = "pooled"
    shape = (2, 1)
    compares_rows = True

    def __init__(self, config: PooledConfig) -> None:
        self.weight = config.weight

    def head(self, channels: int, width: int) -> nn.Module:
        return PooledHead(channels, width)

    def count(self, rows: Rows, peers: Peers) -> Tensor:
        return _negatives(rows, rows.gathered(peers)[0]).any(1).sum().view(1)

    def loss(self, outputs: Outputs, rows: Rows, pool: Pool | None = None) -> Tensor:
        assert pool is not None
        (u_BC, v_BC), (_, v_RC) = outputs, pool.outputs
        negative_BR = _negatives(rows, pool.rows)
        positive_B1 = (u_BC * v_BC).sum(1, keepdim=True) / TEMPERATURE
        score_BR = (u_BC @ v_RC.T / TEMPERATURE).masked_fill(~negative_BR, -torch.inf)
        loss_B = torch.cat([positive_B1, score_BR], dim=1).logsumexp(1) - positive_B1.squeeze(1)
        valid_B = negative_BR.any(1)
        unit_B = (negative_BR.sum(1).clamp(min=1) + 1).log()
        correct_B = positive_B1.squeeze(1) > score_BR.amax(1)
        return torch.stack([(loss_B * valid_B / unit_B).sum(), (correct_B & valid_B).sum()]).unsqueeze(1)

    def figures(self, mean_MN: Tensor) -> dict[str, float]:
        return dict(zip(("pooled_loss", "pooled_accuracy"), mean_MN.flatten().tolist(), strict=True))


class PooledHead(nn.Module):
    """(u_BC, v_BC) of length 1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, channels, bias=False)

    def forward(self, features: Features, rows: Rows) -> Outputs:
        half_B = rows.frames_B // 2
        c_BD = _mean(features.c_BTD.float(), torch.zeros_like(half_B), half_B)
        z_BC = _mean(features.z_BTC.float(), half_B + GAP, rows.frames_B)
        return F.normalize(self.map(c_BD), dim=1), F.normalize(z_BC, dim=1)


def _negatives(rows: Rows, pool: Rows) -> Tensor:
    """bool [B, R]: which rows of the pool are negatives of each row; none of a row that does not count."""
    long_B1, long_R = (rows.frames_B >= LEAST_FRAMES).unsqueeze(1), pool.frames_B >= LEAST_FRAMES
    return long_B1 & long_R & (rows.utterance_B.unsqueeze(1) != pool.utterance_B)


def _mean(x_BTC: Tensor, first_B: Tensor, last_B: Tensor) -> Tensor:
    """The mean of frames first..last-1 of each row; 0 where there is none."""
    t_T = torch.arange(x_BTC.shape[1], device=x_BTC.device)
    within_BT = (t_T >= first_B.unsqueeze(1)) & (t_T < last_B.unsqueeze(1))
    return (x_BTC * within_BT.unsqueeze(2)).sum(1) / within_BT.sum(1, keepdim=True).clamp(min=1)
