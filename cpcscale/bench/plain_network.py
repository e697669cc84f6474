"""The paper's network and its loss, written plainly: the reference for speed and gradients.

Uses nn.Conv1d, nn.GRU and autograd throughout. Negatives are gathered for each prediction (`gathered`), or scored by
one matrix product if a window shares them (`matrix_product`). They are drawn by objective/negatives.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale.model.cpc import CPC
from cpcscale.objective import negatives
from cpcscale.objective.infonce import InfoNCEConfig, NegativePool, ScoredRows
from cpcscale.objective.negatives import Scope


class PlainCPC(nn.Module):
    """The network of a paper-like `CPC` (no norm, one GRU, linear predictors), with copies of its weights."""

    def __init__(self, model: CPC) -> None:
        super().__init__()
        encoder = model.config.encoder
        self.pads = [kernel - stride for kernel, stride in zip(encoder.kernels, encoder.strides, strict=True)]
        widths = [1] + [encoder.channels] * len(encoder.kernels)
        self.layers = nn.ModuleList(
            nn.Conv1d(before, after, kernel, stride)
            for before, after, kernel, stride in zip(widths, widths[1:], encoder.kernels, encoder.strides, strict=False)
        )
        self.gru = nn.GRU(encoder.channels, model.config.context.width, batch_first=True)
        self.maps = nn.Linear(model.config.context.width, model.config.predictor.steps * encoder.channels, bias=False)
        self.steps, self.offset, self.gain = model.config.predictor.steps, float(model.offset), float(model.gain)
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def forward(self, wave_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(z_BTC, predictions_BTKC) of float waveforms in [-1, 1)."""
        x_BCS = ((wave_BS - self.offset) * self.gain).unsqueeze(1)
        for pad, layer in zip(self.pads, self.layers, strict=True):
            x_BCS = F.relu(layer(F.pad(x_BCS, (pad, 0))))
        z_BTC = x_BCS.transpose(1, 2)
        return z_BTC, self.maps(self.gru(z_BTC)[0]).unflatten(2, (self.steps, -1))


def loss_K(rows: ScoredRows, config: InfoNCEConfig, pool: NegativePool | None = None) -> Tensor:
    """[K]: the loss summed over the valid predictions of each step k, with its graph; as objective.infonce.infonce."""
    frames, steps = rows.predictions_BTKC.shape[1:3]
    pool = pool or NegativePool(rows.z_BTC, Scope.of_rows(rows.frames_B, frames))
    losses = []
    for k in range(1, steps + 1):
        p_BTC, target_BTC = rows.predictions_BTKC[:, : frames - k, k - 1], rows.z_BTC[:, k:]
        positive_BT1 = (p_BTC * target_BTC).sum(2, keepdim=True)
        score = matrix_product if config.draw == "shared" else gathered
        scores_BTN = torch.cat([positive_BT1, score(p_BTC, k, rows.key_B, pool, config.negatives)], dim=2) * rows.scale
        valid_BT = torch.arange(k, frames, device=p_BTC.device) < rows.frames_B.unsqueeze(1)
        losses.append(-(scores_BTN.log_softmax(2)[:, :, 0] * valid_BT).sum())
    return torch.stack(losses)


def gathered(p_BTC: Tensor, k: int, key_B: Tensor, pool: NegativePool, count: int) -> Tensor:
    """[B, T, N]: the scores of negatives that are drawn for each prediction."""
    numbers_BTN = negatives.draw_each(key_B, pool.scope, k, p_BTC.shape[1], count)
    z_BTNC = pool.z_RTC.flatten(0, 1)[pool.scope.flat(numbers_BTN)]
    return (z_BTNC * p_BTC.unsqueeze(2)).sum(3)


def matrix_product(p_BTC: Tensor, k: int, key_B: Tensor, pool: NegativePool, count: int) -> Tensor:
    """[B, T, N]: the scores of negatives that a window shares; a spare replaces a negative that is the positive."""
    z_FC = pool.z_RTC.flatten(0, 1)
    numbers_BN, spares_BN = negatives.draw_shared(key_B, pool.scope, k, count)
    scores_BTN, spare_BTN = (
        p_BTC @ z_FC[pool.scope.flat(numbers)].transpose(1, 2) for numbers in (numbers_BN, spares_BN)
    )
    target_BT = pool.scope.own_B.unsqueeze(1) + torch.arange(k, k + p_BTC.shape[1], device=p_BTC.device)
    return torch.where(numbers_BN.unsqueeze(1) == target_BT.unsqueeze(2), spare_BTN, scores_BTN)
