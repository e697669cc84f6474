"""InfoNCE over K steps (van den Oord et al. 2018, eq. 4), as sums and counts that add up over any split of a batch.

For frame t and step k the score of a candidate latent s is f_k(t, s) = <W_k c_t, z_s>, or the cosine over a
temperature. The loss of a prediction is -log softmax of the positive z_{t+k} among itself and N negatives. The loss of
a global batch is, for each k, the sum over valid predictions over their count, then the mean over k; so no split over
ranks or micro-batches can change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpcscale import config
from cpcscale.objective import negatives

# Of |W_k c| |z|: twice the most that the order of summation was seen to change a score.
_ROUNDING = 2 * torch.finfo(torch.float32).eps


@dataclass(kw_only=True)
class InfoNCEConfig:
    """The contrastive objective; the defaults are the paper's."""

    # N: negatives for every prediction, from its own utterance.
    negatives: int = 50
    score: Literal["dot", "cosine"] = "dot"
    # Divides the scores.
    temperature: float = 1.0

    def __post_init__(self) -> None:
        config.at_least(1, **{"objective.negatives": self.negatives})
        config.at_least(1e-6, **{"objective.temperature": self.temperature})

    @property
    def chance(self) -> float:
        """The accuracy of guessing: 1 / (N + 1)."""
        return 1.0 / (self.negatives + 1)


@dataclass(frozen=True)
class Sums:
    """Over the valid predictions of some rows, for each k: summed loss (with graph) and correct predictions."""

    loss_K: Tensor
    correct_K: Tensor


def counts(frames_B: Tensor, steps: int) -> Tensor:
    """int64 [K]: the valid predictions of rows with these frames: those whose target k frames ahead is real audio."""
    ahead_K = torch.arange(1, steps + 1, device=frames_B.device)
    return (frames_B.unsqueeze(1) - ahead_K).clamp(min=0).sum(0)


def infonce(z_BTC: Tensor, predictions_BTKC: Tensor, frames_B: Tensor, key_B: Tensor, config: InfoNCEConfig) -> Sums:
    """Summed InfoNCE loss and correct predictions of these rows, for each k, in fp32.

    `frames_B` counts each row's frames of real audio, 0 for padding: only they are targets or negatives. A prediction
    is correct when the positive scores above every negative by more than fp32 rounds, so ties count as wrong and a
    network that maps all frames alike gets 0.
    """
    z_BTC, predictions_BTKC = z_BTC.float(), predictions_BTKC.float()
    if config.score == "cosine":
        z_BTC, predictions_BTKC = F.normalize(z_BTC, dim=-1), F.normalize(predictions_BTKC, dim=-1)
    frames = z_BTC.shape[1]
    # Equal latents in two columns of a matrix product may score a rounding apart: a tie all the same.
    widest_B11 = z_BTC.norm(dim=-1).amax(1).view(-1, 1, 1)
    rounding_BTK = _ROUNDING / config.temperature * predictions_BTKC.norm(dim=-1) * widest_B11
    losses, correct = [], []
    for k in range(1, predictions_BTKC.shape[2] + 1):
        targets = frames - k
        scores_BTT = predictions_BTKC[:, :targets, k - 1] @ z_BTC.transpose(1, 2) / config.temperature
        positive_BT = scores_BTT.diagonal(offset=k, dim1=1, dim2=2)
        drawn_BTN = negatives.draw(key_B, frames_B, k, targets, config.negatives)
        negative_BTN = scores_BTT.gather(2, drawn_BTN)
        logits_BTN = torch.cat([positive_BT.unsqueeze(2), negative_BTN], dim=2)
        valid_BT = (torch.arange(targets, device=z_BTC.device) + k) < frames_B.unsqueeze(1)
        loss_BT = logits_BTN.logsumexp(2) - positive_BT
        losses.append((loss_BT * valid_BT).sum())
        ahead_BT = positive_BT - negative_BTN.amax(2) > rounding_BTK[:, :targets, k - 1]
        correct.append((ahead_BT & valid_BT).sum())
    return Sums(torch.stack(losses), torch.stack(correct))
