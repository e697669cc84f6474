"""Acoustic targets, which a network learns beside contrast: the level, pitch and spectrum of its audio.

After PASE (Pascual et al. 2019, arXiv 1904.03416), whose workers are small heads on one encoder. `frames` predicts the
measures of a frame and of a later one from its context; `window` predicts statistics of a whole window from mean and
deviation of its contexts. Targets (handmade/targets.py) are standardised by constants that checkpoints hold, clipped,
and compared by the Huber loss; a value that does not exist is NaN and does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.handmade.statistics import START_UP
from cpcscale.handmade.targets import FRAME_NAMES, WINDOW_NAMES
from cpcscale.objective.objective import AutogradObjective, Features, Outputs, Peers, Pool, Rows

# Frames ahead whose measures a context predicts.
AHEAD = (0, 12)
# A quarter of the loss of frames each.
FAMILIES = {"energy": slice(0, 1), "f0": slice(1, 2), "voicing": slice(2, 3), "mfcc": slice(3, len(FRAME_NAMES))}
# Standardised targets are clipped at so many deviations.
CLIP = 4.0


@dataclass(kw_only=True)
class AcousticConfig:
    """Prediction of acoustic measures of the audio from contexts."""

    # The weight of energy, pitch, voicing and MFCCs of each frame in the loss; .5 is a good start.
    frames: float = 0.0
    # The weight of statistics of the window in the loss; .5 is a good start.
    window: float = 0.0

    def __post_init__(self) -> None:
        config.at_least(0, **{"objective.acoustic.frames": self.frames, "objective.acoustic.window": self.window})


class Standardised(nn.Module):
    """The targets in the field `source` of Rows, in deviations from their mean and clipped at CLIP.

    The constants are buffers, so checkpoints hold them. Columns `raw` stay as they are.
    """

    mean_F: Tensor
    deviation_F: Tensor

    def __init__(self, source: Literal["frame_BTF", "window_BF"], width: int, raw: slice = slice(0)) -> None:
        super().__init__()
        self.source, self._raw = source, raw
        self.register_buffer("mean_F", torch.zeros(width))
        self.register_buffer("deviation_F", torch.ones(width))

    def set(self, mean_F: Tensor, deviation_F: Tensor) -> None:
        """Sets the constants; a target that is always the same gets the deviation 1."""
        self.mean_F.copy_(mean_F)
        # The deviation of equal values may be their rounding.
        self.deviation_F.copy_(torch.where(deviation_F > 1e-5 * mean_F.abs(), deviation_F, 1.0))
        self.mean_F[self._raw], self.deviation_F[self._raw] = 0.0, 1.0

    def forward(self, rows: Rows) -> Tensor:
        target = getattr(rows, self.source)
        return ((target - self.mean_F) / self.deviation_F).clamp(-CLIP, CLIP)


class Frames(AutogradObjective):
    """Measures of frames; its classes are FAMILIES for each of AHEAD."""

    name = "frames"

    def __init__(self, config: AcousticConfig) -> None:
        self.weight, self.shape = config.frames, (1, len(AHEAD) * len(FAMILIES))

    def head(self, channels: int, width: int) -> nn.Module:
        return FramesHead(width)

    def count(self, rows: Rows, peers: Peers) -> Tensor:
        assert rows.frame_BTF is not None
        known_BTF = rows.frame_BTF.isfinite()
        return torch.stack([known_BTF[:, ahead:, family].sum() for ahead in AHEAD for family in FAMILIES.values()])

    def loss(self, outputs: Outputs, rows: Rows, pool: Pool | None = None) -> Tensor:
        predicted_BTAF, target_BTF = outputs
        sums = []
        for number, ahead in enumerate(AHEAD):
            later_BTF = target_BTF[:, ahead:]
            for name, family in FAMILIES.items():
                score, target = predicted_BTAF[:, : later_BTF.shape[1], number, family], later_BTF[:, :, family]
                sums.append(_cross_entropy(score, target) if name == "voicing" else _huber(score, target))
        return torch.stack(sums).unsqueeze(0)

    def figures(self, mean_MN: Tensor) -> dict[str, float]:
        by_family = mean_MN[0].view(len(AHEAD), len(FAMILIES)).mean(0)
        losses = {f"frames_{name}_loss": loss for name, loss in zip(FAMILIES, by_family.tolist(), strict=True)}
        return {"frames_loss": float(mean_MN.mean()), **losses}


class FramesHead(nn.Module):
    """(predictions_BTAF for the frames AHEAD, target_BTF standardised), from contexts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, len(AHEAD) * len(FRAME_NAMES))
        self.targets = Standardised("frame_BTF", len(FRAME_NAMES), FAMILIES["voicing"])

    def forward(self, features: Features, rows: Rows) -> Outputs:
        predicted_BTAF = self.map(features.c_BTD.float()).unflatten(2, (len(AHEAD), len(FRAME_NAMES)))
        return predicted_BTAF, self.targets(rows)


class Window(AutogradObjective):
    """Statistics of a window, in one class."""

    name = "window"
    shape = (1, 1)

    def __init__(self, config: AcousticConfig) -> None:
        self.weight = config.window

    def head(self, channels: int, width: int) -> nn.Module:
        return WindowHead(width)

    def count(self, rows: Rows, peers: Peers) -> Tensor:
        assert rows.window_BF is not None
        return rows.window_BF.isfinite().sum().view(1)

    def loss(self, outputs: Outputs, rows: Rows, pool: Pool | None = None) -> Tensor:
        return _huber(*outputs).view(1, 1)

    def figures(self, mean_MN: Tensor) -> dict[str, float]:
        return {"window_loss": float(mean_MN)}


class WindowHead(nn.Module):
    """(predictions_BF, target_BF standardised), from mean and deviation of the contexts of real frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map, self.targets = nn.Linear(2 * width, len(WINDOW_NAMES)), Standardised("window_BF", len(WINDOW_NAMES))

    def forward(self, features: Features, rows: Rows) -> Outputs:
        c_BTD = features.c_BTD.float()
        t_T = torch.arange(c_BTD.shape[1], device=c_BTD.device)
        real_BT1 = ((t_T >= START_UP) & (t_T < rows.frames_B.unsqueeze(1))).unsqueeze(2)
        count_B1 = real_BT1.sum(1).clamp(min=1)
        mean_BD = (c_BTD * real_BT1).sum(1) / count_B1
        square_BD = ((c_BTD - mean_BD.unsqueeze(1)).square() * real_BT1).sum(1) / count_B1
        # The gradient of a root is infinite at 0.
        deviation_BD = (square_BD + 1e-6).sqrt()
        return self.map(torch.cat([mean_BD, deviation_BD], dim=1)), self.targets(rows)


def _huber(predicted: Tensor, target: Tensor) -> Tensor:
    """The sum over values of which there is a target."""
    known = target.isfinite()
    target = torch.where(known, target.detach(), 0.0)
    return (F.huber_loss(predicted, target, reduction="none") * known).sum()


def _cross_entropy(score: Tensor, target: Tensor) -> Tensor:
    """As `_huber`, of targets 0 and 1; in bits, so that guessing costs 1."""
    known = target.isfinite()
    target = torch.where(known, target.detach(), 0.0)
    return (F.binary_cross_entropy_with_logits(score, target, reduction="none") * known).sum() / math.log(2)
