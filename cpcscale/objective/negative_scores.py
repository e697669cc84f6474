"""Scores of drawn negatives and their gradients, in three ways: a shared set, from the own row, from the whole pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cpcscale.objective import negatives
from cpcscale.objective.negatives import Scope


@dataclass(frozen=True)
class PoolFrames:
    """The frames of R rows: latents and, where needed, their content (`infonce.frame_content`) and gradient."""

    z_RTC: Tensor
    content_RT: Tensor | None = None
    gradient_RTC: Tensor | None = None

    def __getitem__(self, rows: slice) -> PoolFrames:
        """These rows, as views."""
        content_RT = None if self.content_RT is None else self.content_RT[rows]
        gradient_RTC = None if self.gradient_RTC is None else self.gradient_RTC[rows]
        return PoolFrames(self.z_RTC[rows], content_RT, gradient_RTC)


@dataclass(frozen=True)
class DrawnNegatives:
    """The predictions of some rows for frames k..T-1 at step k, and how they draw `count` negatives."""

    k: int
    predictions_BTC: Tensor
    key_B: Tensor
    scope: Scope
    count: int


class NegativeScores(NamedTuple):
    """`score_BTN`, the dot products of predictions and their negatives; `content_BTN`, the content of these, if known.

    `back(d_BTN)` takes the gradient of the scores, adds to the gradient of the frames, and returns the gradient of the
    predictions. It may overwrite its argument.
    """

    score_BTN: Tensor
    content_BTN: Tensor | None
    back: Callable[[Tensor], Tensor]


def score_shared(draw: DrawnNegatives, frames: PoolFrames) -> NegativeScores:
    """One set of negatives for each row and step, scored in one matrix product."""
    p_BTC, z_FC = draw.predictions_BTC, frames.z_RTC.flatten(0, 1)
    number_BN, spare_BN = negatives.draw_shared(draw.key_B, draw.scope, draw.k, draw.count)
    place_BN, spare_place_BN = draw.scope.flat(number_BN), draw.scope.flat(spare_BN)
    z_BNC, spare_BNC = z_FC[place_BN], z_FC[spare_place_BN]
    # Where a negative is the positive of frame t, its spare takes its place.
    t_BN = number_BN - draw.scope.own_B.unsqueeze(1) - draw.k
    hit_BN = (t_BN >= 0) & (t_BN < p_BTC.shape[1])
    at_B1N = t_BN.clamp(0, p_BTC.shape[1] - 1).unsqueeze(1)
    rows_BNC = at_B1N.transpose(1, 2).expand_as(z_BNC)
    p_BNC = p_BTC.gather(1, rows_BNC)

    def replaced(values_BTN: Tensor, spare_value_BN: Tensor) -> Tensor:
        value_BN = torch.where(hit_BN, spare_value_BN, values_BTN.gather(1, at_B1N).squeeze(1))
        return values_BTN.scatter_(1, at_B1N, value_BN.unsqueeze(1))

    def back(d_BTN: Tensor) -> Tensor:
        d_BN = d_BTN.gather(1, at_B1N).squeeze(1) * hit_BN
        d_BTN = replaced(d_BTN, torch.zeros_like(d_BN))
        _add(frames, place_BN, d_BTN.transpose(1, 2) @ p_BTC)
        _add(frames, spare_place_BN, d_BN.unsqueeze(2) * p_BNC)
        return (d_BTN @ z_BNC).scatter_add_(1, rows_BNC, d_BN.unsqueeze(2) * spare_BNC)

    content_BTN = None
    if frames.content_RT is not None:
        held_F = frames.content_RT.flatten()
        content_BTN = replaced(held_F[place_BN].unsqueeze(1).repeat(1, p_BTC.shape[1], 1), held_F[spare_place_BN])
    return NegativeScores(replaced(p_BTC @ z_BNC.transpose(1, 2), (p_BNC * spare_BNC).sum(2)), content_BTN, back)


def score_own_row(draw: DrawnNegatives, frames: PoolFrames) -> NegativeScores:
    """Own negatives for each prediction, from its own row; `frames` are those of the rows that draw.

    One matrix product scores all pairs, of which those drawn are picked. Unless N is much smaller than T, this is
    faster than to gather N vectors for each prediction.
    """
    p_BTC, z_BTC = draw.predictions_BTC, frames.z_RTC
    number_BTN = negatives.draw_each(draw.key_B, draw.scope, draw.k, p_BTC.shape[1], draw.count)
    score_BTT = p_BTC @ z_BTC.transpose(1, 2)

    def back(d_BTN: Tensor) -> Tensor:
        assert frames.gradient_RTC is not None
        d_BTT = score_BTT.zero_().scatter_add_(2, number_BTN, d_BTN)
        frames.gradient_RTC.baddbmm_(d_BTT.transpose(1, 2), p_BTC)
        return d_BTT @ z_BTC

    content_BTN = None
    if frames.content_RT is not None:
        content_BTN = frames.content_RT.unsqueeze(1).expand(-1, p_BTC.shape[1], -1).gather(2, number_BTN)
    return NegativeScores(score_BTT.gather(2, number_BTN), content_BTN, back)


def score_pool(draw: DrawnNegatives, frames: PoolFrames) -> NegativeScores:
    """Own negatives for each prediction, from anywhere in the pool: gathers N vectors for each."""
    p_BTC, z_FC = draw.predictions_BTC, frames.z_RTC.flatten(0, 1)
    place_BTN = draw.scope.flat(negatives.draw_each(draw.key_B, draw.scope, draw.k, p_BTC.shape[1], draw.count))
    z_BTNC = z_FC[place_BTN]

    def back(d_BTN: Tensor) -> Tensor:
        _add(frames, place_BTN, d_BTN.unsqueeze(3) * p_BTC.unsqueeze(2))
        return (d_BTN.unsqueeze(2) @ z_BTNC).squeeze(2)

    content_BTN = None if frames.content_RT is None else frames.content_RT.flatten()[place_BTN]
    return NegativeScores((z_BTNC @ p_BTC.unsqueeze(3)).squeeze(3), content_BTN, back)


def _add(frames: PoolFrames, places: Tensor, gradient: Tensor) -> None:
    """Adds these gradients to those of the frames at `places`, which may repeat."""
    assert frames.gradient_RTC is not None
    frames.gradient_RTC.view(-1, frames.gradient_RTC.shape[2]).index_add_(0, places.flatten(), gradient.flatten(0, -2))
