"""InfoNCE over K steps (van den Oord et al. 2018, eq. 4), as sums and counts that add up over any split of a batch.

For frame t and step k the score of a candidate latent s is f_k(t, s) = scale * <W_k c_t, z_s>. The loss of a prediction
is -log softmax of the positive z_{t+k} among itself and N negatives (objective/negatives.py). The loss of a global
batch is, for each k, the sum over valid predictions over their count, then the mean over k; so no split over ranks or
micro-batches can change it.

The gradient is computed with the loss, by hand: the scores of a few rows and one step stand in memory at a time, never
those of all, and the caller decides when the gradients of other ranks' frames are exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpcscale import config
from cpcscale.objective import hash_random
from cpcscale.objective.negative_scores import DrawnNegatives, PoolFrames, score_own_row, score_pool, score_shared
from cpcscale.objective.negatives import Scope

# Of |W_k c| |z|: twice the most that the order of summation was seen to change a score.
_ROUNDING = 2 * torch.finfo(torch.float32).eps
# The numbers that the scores of some rows may take at a time.
_CHUNK = {"cpu": 2**21, "cuda": 2**26}


@dataclass(kw_only=True)
class InfoNCEConfig:
    """The contrastive objective; the defaults are the paper's."""

    # N: negatives for every prediction.
    negatives: int = 50
    # Where they come from: the utterance's window, the windows of its group (speaker), or all, of the global batch.
    scope: Literal["utterance", "group", "batch"] = "utterance"
    # each: own negatives for every prediction; shared: one set for a window and step, a matrix product and much faster.
    draw: Literal["each", "shared"] = "each"
    # dot: the dot product; mean: that over the channels; cosine: of vectors of length 1.
    score: Literal["dot", "mean", "cosine"] = "dot"
    # Divides the scores; what it starts from where it is learnt.
    temperature: float = 1.0
    # Whether the temperature is a parameter of the network.
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        config.at_least(1, **{"objective.negatives": self.negatives})
        config.at_least(1e-6, **{"objective.temperature": self.temperature})

    @property
    def chance(self) -> float:
        """The accuracy of guessing: 1 / (N + 1)."""
        return 1.0 / (self.negatives + 1)

    def scale(self, channels: int) -> float:
        """What the dot products of latents of this width are multiplied by; where it is learnt, at the start."""
        return 1.0 / (self.temperature * (channels if self.score == "mean" else 1))


@dataclass(frozen=True)
class ScoredRows:
    """What the scores of some rows are made of, in fp32.

    `z_BTC` latents, `predictions_BTKC` = W_k c_t, `scale` a tensor []. `frames_B` counts each row's frames of real
    audio, 0 for padding: only they are targets or negatives. `key_B` int64 keys the draws. `content_BT` says what each
    frame holds (see `frame_content`): with it, correct predictions and false negatives are counted.
    """

    z_BTC: Tensor
    predictions_BTKC: Tensor
    scale: Tensor
    frames_B: Tensor
    key_B: Tensor
    content_BT: Tensor | None = None


@dataclass(frozen=True)
class NegativePool:
    """The frames of R rows that negatives come from, and how the rows at hand draw from them."""

    z_RTC: Tensor
    scope: Scope
    content_RT: Tensor | None = None


@dataclass(frozen=True)
class LossSums:
    """Over the valid predictions of some rows, for each k: summed loss, correct predictions and false negatives.

    A prediction is correct when the positive scores above every negative by more than fp32 rounds, so ties count as
    wrong and a network that maps all frames alike gets 0. `false_K` adds up, over predictions, the share of negatives
    that hold the very audio of the positive.
    """

    loss_K: Tensor
    correct_K: Tensor
    false_K: Tensor


@dataclass(frozen=True)
class LossGradients:
    """Of sum_k weight_k loss_k: with respect to the parts of Latents, and to the latents of the pool, if there is one.

    Where rows at hand stand in the pool too, their latents' gradient is the sum of both.
    """

    z_BTC: Tensor
    predictions_BTKC: Tensor
    scale: Tensor
    pool_RTC: Tensor | None


def count_predictions(frames_B: Tensor, steps: int) -> Tensor:
    """int64 [K]: the valid predictions of rows with these frames: those whose target k frames ahead is real audio."""
    ahead_K = torch.arange(1, steps + 1, device=frames_B.device)
    return (frames_B.unsqueeze(1) - ahead_K).clamp(min=0).sum(0)


def sum_parts(parts: Iterable[LossSums]) -> LossSums:
    """The sums of all parts; there is at least one."""
    whole, *others = parts
    for part in others:
        whole = LossSums(whole.loss_K + part.loss_K, whole.correct_K + part.correct_K, whole.false_K + part.false_K)
    return whole


def frame_content(wave_BS: Tensor, frames: int) -> Tensor:
    """int64 [B, frames]: the same for frames whose hop of int16 samples is the same, and by rare chance for others."""
    hop_BTH = wave_BS.unflatten(1, (frames, -1)).long()
    factor_H = hash_random.hashed(torch.tensor(0), torch.arange(hop_BTH.shape[2], device=wave_BS.device))
    return (hop_BTH * factor_H).sum(2)


def prepare_vectors(z_BTC: Tensor, predictions_BTKC: Tensor, config: InfoNCEConfig) -> tuple[Tensor, Tensor]:
    """Latents and predictions as their dot product scores them: in fp32, of length 1 for `cosine`. Keeps the graph."""
    z_BTC, predictions_BTKC = z_BTC.float(), predictions_BTKC.float()
    if config.score == "cosine":
        return F.normalize(z_BTC, dim=-1), F.normalize(predictions_BTKC, dim=-1)
    return z_BTC, predictions_BTKC


@torch.no_grad()
def infonce(
    rows: ScoredRows, config: InfoNCEConfig, *, pool: NegativePool | None = None, weight_K: Tensor | None = None
) -> tuple[LossSums, LossGradients | None]:
    """The sums of these rows and, given `weight_K`, the gradient of sum_k weight_k loss_k; all in fp32.

    Without a pool each row draws from its own frames, which is the scope `utterance`.
    """
    comparison = _Comparison(rows, config, pool, weight_K)
    batch, frames, steps = rows.predictions_BTKC.shape[:3]
    size = max(1, _CHUNK[rows.z_BTC.device.type] // comparison.numbers_a_row)
    for k in range(1, min(steps, frames - 1) + 1):
        for start in range(0, batch, size):
            comparison.add(k, slice(start, start + size))
    return comparison.sums, comparison.gradients


class _Comparison:
    """The accumulators of one call of `infonce`."""

    def __init__(
        self, rows: ScoredRows, config: InfoNCEConfig, pool: NegativePool | None, weight_K: Tensor | None
    ) -> None:
        batch, frames, steps, channels = rows.predictions_BTKC.shape
        self._rows, self._config, self._weight_K, own = rows, config, weight_K, pool is None
        pool = pool or NegativePool(rows.z_BTC, Scope.of_rows(rows.frames_B, frames), rows.content_BT)
        zero_K = torch.zeros(steps, device=rows.z_BTC.device)
        self.sums, self.gradients = LossSums(zero_K, zero_K.long(), zero_K.double()), None
        pool_RTC = None
        if weight_K is not None:
            z_BTC, predictions_BTKC = torch.zeros_like(rows.z_BTC), torch.empty_like(rows.predictions_BTKC)
            # The rest is written, not added to: to clear it first costs as much as to write it.
            for k in range(1, steps + 1):
                predictions_BTKC[:, max(0, frames - k) :, k - 1] = 0
            # Rows that draw from themselves are one tensor as targets and as negatives: so is their gradient.
            pool_RTC = z_BTC if own else torch.zeros_like(pool.z_RTC)
            scale = torch.zeros_like(rows.scale)
            self.gradients = LossGradients(z_BTC, predictions_BTKC, scale, None if own else pool_RTC)
        self._scope, self._frames = pool.scope, PoolFrames(pool.z_RTC, pool.content_RT, pool_RTC)
        match config.draw:
            case "shared":
                self._rivals, self.numbers_a_row = score_shared, frames * config.negatives
            case "each" if own:
                self._rivals, self.numbers_a_row = score_own_row, frames * frames
            case "each":
                self._rivals, self.numbers_a_row = score_pool, frames * config.negatives * channels
        # Equal latents in two places of a matrix product may score a rounding apart: a tie all the same.
        norm_RT = pool.z_RTC.norm(dim=2)
        if own:
            norm_RT *= torch.arange(frames, device=norm_RT.device) < rows.frames_B.unsqueeze(1)
        widest = norm_RT.amax(1) if own else norm_RT.amax()
        self._rounding_B1 = (_ROUNDING * rows.scale * widest).expand(batch).unsqueeze(1)

    def add(self, k: int, piece: slice) -> None:
        """Compares the predictions k frames ahead of these rows."""
        rows, scale = self._rows, self._rows.scale
        targets = rows.z_BTC.shape[1] - k
        p_BTC, z_BTC = rows.predictions_BTKC[piece, :targets, k - 1], rows.z_BTC[piece, k:]
        valid_BT = torch.arange(k, targets + k, device=z_BTC.device) < rows.frames_B[piece].unsqueeze(1)
        draw = DrawnNegatives(k, p_BTC, rows.key_B[piece], self._scope[piece], self._config.negatives)
        rivals = self._rivals(draw, self._frames[piece] if self._rivals is score_own_row else self._frames)
        positive_BT = (p_BTC * z_BTC).sum(2).mul_(scale)
        score_BTN = rivals.score_BTN.mul_(scale)
        hardest_BT = score_BTN.amax(2)
        if rows.content_BT is not None and rivals.content_BTN is not None:
            ahead_BT = positive_BT - hardest_BT > self._rounding_B1[piece] * p_BTC.norm(dim=2)
            self.sums.correct_K[k - 1] += (ahead_BT & valid_BT).sum()
            same_BTN = rivals.content_BTN == rows.content_BT[piece, k:].unsqueeze(2)
            self.sums.false_K[k - 1] += (same_BTN & valid_BT.unsqueeze(2)).sum() / self._config.negatives
        top_BT = torch.maximum(hardest_BT, positive_BT)
        share_BTN, share_BT = (score_BTN - top_BT.unsqueeze(2)).exp_(), (positive_BT - top_BT).exp_()
        total_BT = share_BTN.sum(2) + share_BT
        self.sums.loss_K[k - 1] += ((total_BT.log() + top_BT - positive_BT) * valid_BT).sum()
        if self.gradients is None or self._weight_K is None:
            return
        # Softmax less one for the positive.
        weight_BT = valid_BT * self._weight_K[k - 1]
        d_BTN, d_BT = share_BTN.mul_((weight_BT / total_BT).unsqueeze(2)), (share_BT / total_BT - 1) * weight_BT
        if self._config.learn_temperature:
            self.gradients.scale.add_(((d_BTN * score_BTN).sum() + (d_BT * positive_BT).sum()) / scale)
        d_BT1 = d_BT.mul_(scale).unsqueeze(2)
        back_BTC = rivals.back(d_BTN.mul_(scale))
        torch.addcmul(back_BTC, d_BT1, z_BTC, out=self.gradients.predictions_BTKC[piece, :targets, k - 1])
        self.gradients.z_BTC[piece, k:].addcmul_(d_BT1, p_BTC)
