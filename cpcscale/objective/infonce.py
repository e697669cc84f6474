"""InfoNCE over K steps (van den Oord et al. 2018, eq. 4), as sums and counts that add up over any split of a batch.

For frame t and step k, the score of a candidate latent z_s is f_k(t, s) = scale * <W_k c_t, z_s>. The loss of a
prediction is -log softmax of the positive z_{t+k} among itself and N negatives (objective/negatives.py). The loss of a
global batch is, for each k, the mean over valid predictions, then the mean over k. Sums and counts are returned
separately, so that a split over ranks or micro-batches does not change the loss.

The gradient is computed together with the loss and without autograd: only the scores of some rows and one step are in
memory at a time, and the caller decides when ranks exchange the gradients of each other's frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import config
from cpcscale.objective import hash_random
from cpcscale.objective.negative_scores import DrawnNegatives, PoolFrames, score_own_row, score_pool, score_shared
from cpcscale.objective.negatives import Scope
from cpcscale.objective.objective import Features, Outputs, Peers, Rows

# Relative to |W_k c| |z|: twice the largest change of a score by the order of summation that was measured.
_ROUNDING = 2 * torch.finfo(torch.float32).eps
# How many scores may be in memory at a time, by type of device.
_CHUNK = {"cpu": 2**21, "cuda": 2**26}


@dataclass(kw_only=True)
class InfoNCEConfig:
    """The contrastive objective; the defaults are the paper's."""

    # N, the negatives of each prediction.
    negatives: int = 50
    # Where negatives come from, in the global batch: the window itself, the windows of its group (speaker), or all.
    # mixed: half from the window itself, half from the others.
    scope: Literal["utterance", "group", "batch", "mixed"] = "utterance"
    # each: every prediction draws its own negatives. shared: one set for each window and step, which is much faster.
    draw: Literal["each", "shared"] = "each"
    # dot: the dot product. mean: divided by the number of channels. cosine: of vectors scaled to length 1.
    score: Literal["dot", "mean", "cosine"] = "dot"
    # Divides the scores; with learn_temperature, its value at the start.
    temperature: float = 1.0
    # Whether the temperature is learnt.
    learn_temperature: bool = False
    # Its weight in the loss; 0: the predictors are not trained, and the accuracies mean nothing.
    weight: float = field(default=1.0, metadata=config.ADDED)

    def __post_init__(self) -> None:
        config.at_least(1, **{"objective.negatives": self.negatives})
        config.at_least(1e-6, **{"objective.temperature": self.temperature})
        config.at_least(0, **{"objective.weight": self.weight})

    @property
    def chance(self) -> float:
        """The accuracy of guessing: 1 / (N + 1)."""
        return 1.0 / (self.negatives + 1)

    def scale(self, channels: int) -> float:
        """The factor of dot products of latents of this width; where the temperature is learnt, at the start."""
        return 1.0 / (self.temperature * (channels if self.score == "mean" else 1))


@dataclass(frozen=True)
class ScoredRows:
    """The input of `infonce` for some rows, in fp32.

    `z_BTC` latents; `predictions_BTKC` = W_k c_t; `scale` a tensor []. `frames_B` counts the frames of real audio in
    each row (0 for padding): only these are targets or negatives. `key_B` int64 keys the draws of negatives. With
    `content_BT`, a hash of the audio of each frame (`frame_content`), correct predictions and false negatives are
    counted.
    """

    z_BTC: Tensor
    predictions_BTKC: Tensor
    scale: Tensor
    frames_B: Tensor
    key_B: Tensor
    content_BT: Tensor | None = None


@dataclass(frozen=True)
class NegativePool:
    """The frames of R rows that negatives are drawn from; `scope` says which of them each scored row draws from."""

    z_RTC: Tensor
    scope: Scope
    content_RT: Tensor | None = None


@dataclass(frozen=True)
class LossSums:
    """Sums over the valid predictions of some rows, for each k: loss, correct predictions, shares of false negatives.

    A prediction is correct when the positive scores above every negative by more than rounding, so ties count as wrong
    and a network that maps all frames to one vector gets 0. A false negative holds the same audio as the positive;
    `false_K` sums, over predictions, their share among the negatives.
    """

    loss_K: Tensor
    correct_K: Tensor
    false_K: Tensor


@dataclass(frozen=True)
class LossGradients:
    """Gradients of sum_k weight_k loss_k with respect to the fields of ScoredRows and to the latents of a pool.

    The gradient of a scored row that is also in the pool is the sum of both.
    """

    z_BTC: Tensor
    predictions_BTKC: Tensor
    scale: Tensor
    pool_RTC: Tensor | None


def count_predictions(frames_B: Tensor, steps: int) -> Tensor:
    """int64 [K]: how many predictions of these rows are valid, that is, have real audio k frames ahead, for k = 1..K.

    >>> count_predictions(torch.tensor([5, 2]), steps=3)  # rows with 5 and 2 frames of real audio
    tensor([5, 3, 2])
    """
    step_K = torch.arange(1, steps + 1, device=frames_B.device)
    return (frames_B.unsqueeze(1) - step_K).clamp(min=0).sum(0)


def frame_content(wave_BS: Tensor, frames: int) -> Tensor:
    """int64 [B, frames]: a hash of each frame's hop of int16 samples; frames of the same audio have the same hash."""
    hop_BTH = wave_BS.unflatten(1, (frames, -1)).long()
    factor_H = hash_random.hashed(torch.tensor(0), torch.arange(hop_BTH.shape[2], device=wave_BS.device))
    return (hop_BTH * factor_H).sum(2)


def prepare_vectors(z_BTC: Tensor, predictions_BTKC: Tensor, config: InfoNCEConfig) -> tuple[Tensor, Tensor]:
    """Latents and predictions ready for dot products: in fp32, scaled to length 1 for `cosine`. Differentiable."""
    z_BTC, predictions_BTKC = z_BTC.float(), predictions_BTKC.float()
    if config.score == "cosine":
        return F.normalize(z_BTC, dim=-1), F.normalize(predictions_BTKC, dim=-1)
    return z_BTC, predictions_BTKC


@torch.no_grad()
def infonce(
    rows: ScoredRows, config: InfoNCEConfig, *, pool: NegativePool | None = None, weight_K: Tensor | None = None
) -> tuple[LossSums, LossGradients | None]:
    """The sums of these rows and, given `weight_K`, the gradients of sum_k weight_k loss_k; all in fp32.

    Without a pool, each row draws negatives from its own frames, which is the scope `utterance`.

    >>> z_BTC, frames_B = torch.ones(1, 10, 4), torch.tensor([10])  # equal latents: the loss is log(N + 1)
    >>> rows = ScoredRows(z_BTC, torch.ones(1, 10, 2, 4), torch.tensor(1.0), frames_B, key_B=torch.tensor([0]))
    >>> sums, _ = infonce(rows, InfoNCEConfig(negatives=3))
    >>> sums.loss_K / count_predictions(frames_B, steps=2)
    tensor([1.3863, 1.3863])
    """
    comparison = _Comparison(rows, config, pool, weight_K)
    batch, frames, steps = rows.predictions_BTKC.shape[:3]
    size = max(1, _CHUNK[rows.z_BTC.device.type] // comparison.numbers_a_row)
    for k in range(1, min(steps, frames - 1) + 1):
        for start in range(0, batch, size):
            comparison.add(k, slice(start, start + size))
    return comparison.sums, comparison.gradients


class _Comparison:
    """The sums and gradients of one call of `infonce` while they are added up."""

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
            # Only frames without a target are set to 0: the others are overwritten, and clearing them takes as long.
            for k in range(1, steps + 1):
                predictions_BTKC[:, max(0, frames - k) :, k - 1] = 0
            # Rows that draw from themselves are both targets and negatives: one tensor holds both gradients.
            pool_RTC = z_BTC if own else torch.zeros_like(pool.z_RTC)
            scale = torch.zeros_like(rows.scale)
            self.gradients = LossGradients(z_BTC, predictions_BTKC, scale, None if own else pool_RTC)
        self._scope, self._frames = pool.scope, PoolFrames(pool.z_RTC, pool.content_RT, pool_RTC)
        match config.draw:
            case "shared":
                self._score, self.numbers_a_row = score_shared, frames * config.negatives
            case "each" if own:
                self._score, self.numbers_a_row = score_own_row, frames * frames
            case "each":
                self._score, self.numbers_a_row = score_pool, frames * config.negatives * channels
        # Equal latents may get scores that differ by rounding; these must count as a tie.
        norm_RT = pool.z_RTC.norm(dim=2)
        if own:
            norm_RT *= torch.arange(frames, device=norm_RT.device) < rows.frames_B.unsqueeze(1)
        widest = norm_RT.amax(1) if own else norm_RT.amax()
        self._rounding_B1 = (_ROUNDING * rows.scale * widest).expand(batch).unsqueeze(1)

    def add(self, k: int, piece: slice) -> None:
        """Adds the predictions k frames ahead of the rows `piece`."""
        rows, scale = self._rows, self._rows.scale
        targets = rows.z_BTC.shape[1] - k
        p_BTC, z_BTC = rows.predictions_BTKC[piece, :targets, k - 1], rows.z_BTC[piece, k:]
        valid_BT = torch.arange(k, targets + k, device=z_BTC.device) < rows.frames_B[piece].unsqueeze(1)
        draw = DrawnNegatives(k, p_BTC, rows.key_B[piece], self._scope[piece], self._config.negatives)
        negatives = self._score(draw, self._frames[piece] if self._score is score_own_row else self._frames)
        positive_BT = (p_BTC * z_BTC).sum(2).mul_(scale)
        score_BTN = negatives.score_BTN.mul_(scale)
        hardest_BT = score_BTN.amax(2)
        if rows.content_BT is not None and negatives.content_BTN is not None:
            correct_BT = positive_BT - hardest_BT > self._rounding_B1[piece] * p_BTC.norm(dim=2)
            self.sums.correct_K[k - 1] += (correct_BT & valid_BT).sum()
            same_BTN = negatives.content_BTN == rows.content_BT[piece, k:].unsqueeze(2)
            self.sums.false_K[k - 1] += (same_BTN & valid_BT.unsqueeze(2)).sum() / self._config.negatives
        top_BT = torch.maximum(hardest_BT, positive_BT)
        share_BTN, share_BT = (score_BTN - top_BT.unsqueeze(2)).exp_(), (positive_BT - top_BT).exp_()
        total_BT = share_BTN.sum(2) + share_BT
        self.sums.loss_K[k - 1] += ((total_BT.log() + top_BT - positive_BT) * valid_BT).sum()
        if self.gradients is None or self._weight_K is None:
            return
        # The gradient of the scores: softmax, less 1 for the positive.
        weight_BT = valid_BT * self._weight_K[k - 1]
        d_BTN, d_BT = share_BTN.mul_((weight_BT / total_BT).unsqueeze(2)), (share_BT / total_BT - 1) * weight_BT
        if self._config.learn_temperature:
            self.gradients.scale.add_(((d_BTN * score_BTN).sum() + (d_BT * positive_BT).sum()) / scale)
        d_BT1 = d_BT.mul_(scale).unsqueeze(2)
        back_BTC = negatives.back(d_BTN.mul_(scale))
        torch.addcmul(back_BTC, d_BT1, z_BTC, out=self.gradients.predictions_BTKC[piece, :targets, k - 1])
        self.gradients.z_BTC[piece, k:].addcmul_(d_BT1, p_BTC)


class InfoNCE:
    """This loss as an objective; its classes are the K steps ahead, its sums those of LossSums."""

    name = "infonce"

    def __init__(self, config: InfoNCEConfig, steps: int) -> None:
        self.config, self.weight = config, config.weight
        # The loss of guessing.
        self.unit = math.log(config.negatives + 1)
        self.shape, self.compares_rows = (3, steps), config.scope != "utterance"

    def head(self, channels: int, width: int) -> nn.Module:
        return InfoNCEHead(self.config, channels)

    def count(self, rows: Rows, peers: Peers) -> Tensor:
        return count_predictions(rows.frames_B, self.shape[1])

    def __call__(
        self, outputs: Outputs, rows: Rows, peers: Peers, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Outputs | None]:
        z_BTC, predictions_BTKC, scale = outputs
        scored = ScoredRows(z_BTC, predictions_BTKC, scale, rows.frames_B, rows.key_B, rows.content_BT)
        pool, own = self._pool(z_BTC, rows, peers) if self.compares_rows else (None, slice(None))
        sums, gradients = infonce(scored, self.config, pool=pool, weight_K=weight_N)
        sums_MK = torch.stack([sums.loss_K.double(), sums.correct_K.double(), sums.false_K])
        if gradients is None:
            return sums_MK, None
        if gradients.pool_RTC is not None:
            gradients.z_BTC.add_(peers.sum(gradients.pool_RTC)[own])
        return sums_MK, (gradients.z_BTC, gradients.predictions_BTKC, gradients.scale)

    def figures(self, mean_MN: Tensor) -> dict[str, float]:
        means = dict(zip(("loss", "accuracy_mean", "false_negative_rate"), mean_MN.mean(1).tolist(), strict=True))
        for name, mean_K in zip(("loss", "accuracy"), mean_MN.tolist(), strict=False):
            means |= {f"{name}_k{k:02d}": mean for k, mean in enumerate(mean_K, 1)}
        return means

    def by_row(self) -> InfoNCE:
        # The same for all runs, whatever they train with, so that they can be compared.
        return InfoNCE(replace(self.config, scope="utterance", draw="each"), self.shape[1])

    def _pool(self, z_BTC: Tensor, rows: Rows, peers: Peers) -> tuple[NegativePool, slice]:
        """The latents of the global batch, and the slice of this rank's rows."""
        label_B = rows.group_B if self.config.scope == "group" else torch.zeros_like(rows.group_B)
        frames_R, own = peers.gather_rows(rows.frames_B)
        z_RTC, key_R, label_R = (peers.gather_rows(part)[0] for part in (z_BTC, rows.key_B, label_B))
        content_RT = None if rows.content_BT is None else peers.gather_rows(rows.content_BT)[0]
        mixed = self.config.scope == "mixed"
        scope = Scope.of_pool(frames_R, key_R, label_R, z_BTC.shape[1], own, mixed=mixed)
        return NegativePool(z_RTC, scope, content_RT), own


class InfoNCEHead(nn.Module):
    """Latents and predictions ready for dot products, and the scale of these: (z_BTC, predictions_BTKC, scale [])."""

    def __init__(self, config: InfoNCEConfig, channels: int) -> None:
        super().__init__()
        self._config = config
        # As a logarithm, so that a learnt scale stays above 0.
        log_scale = torch.tensor(math.log(config.scale(channels)))
        if config.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, features: Features, rows: Rows) -> Outputs:
        z_BTC, predictions_BTKC = prepare_vectors(features.z_BTC, features.predictions_BTKC, self._config)
        return z_BTC, predictions_BTKC, self.log_scale.exp()
