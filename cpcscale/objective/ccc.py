"""The concordance correlation coefficient (Lin 1989, Biometrics 45) as a loss. Pure.

    CCC(x, y) = 2 cov(x, y) / (var x + var y + (mean x - mean y)^2)        with biased (1/n) moments, as Lin has them

A constant x, a constant y and a single sample, where the formula is undefined or decided by rounding, have CCC 0. NaN
gives NaN. Columns are independent. Shapes: U utterances or B rows of a batch, P primitives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this, both columns are the same constant up to rounding: squares of labels, which are near 1, are far larger.
_TINY = 1e-24


def batch_ccc(predicted_BP: Tensor, truth_BP: Tensor) -> Tensor:
    """The CCC of each column over the whole batch, [P], float64 and differentiable.

    Gradients are finite everywhere. For constant predictions and labels that vary, the gradient is that of the formula
    and leads away from the constant. It is 0 for constant labels and for a single sample.
    """
    return _Moments.of(predicted_BP, truth_BP).ccc_P


def ccc_loss(predicted_BP: Tensor, truth_BP: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """1 - a CCC_activation - b CCC_valence - g CCC_dominance of the whole batch, a float64 scalar (arXiv 2102.06357).

    All rows of a batch must be in one call: its CCC is not the mean of the CCCs of its parts.
    """
    each_P = batch_ccc(predicted_BP, truth_BP)
    return 1 - (each_P * torch.tensor(weights, dtype=each_P.dtype, device=each_P.device)).sum()


@torch.no_grad()
def ccc_loss_gradient(predicted_BP: Tensor, truth_BP: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """float64 [B, P]: the gradient of `ccc_loss` with respect to each prediction, in closed form.

        d CCC / d g_i = 2 (t_i - mean t - CCC (g_i - mean t)) / (B (var g + var t + (mean g - mean t)^2))

    With it, the rows of a batch can be back-propagated in parts, also on several ranks.
    """
    moments = _Moments.of(predicted_BP, truth_BP)
    weight_P = torch.tensor(weights, dtype=torch.float64, device=predicted_BP.device)
    scale_P = torch.where(moments.constant_P, 0.0, 2 * weight_P / (len(predicted_BP) * moments.spread_P))
    return scale_P * (moments.ccc_P * (moments.predicted_BP + moments.bias_P) - moments.truth_BP)


@dataclass(frozen=True)
class _Moments:
    """Predictions and labels less their means, [B, P]; `bias_P`, the difference of the means; all in float64.

    `spread_P` is the denominator of the CCC, but 1 where `constant_P`: both columns are the same constant.
    """

    predicted_BP: Tensor
    truth_BP: Tensor
    bias_P: Tensor
    spread_P: Tensor
    constant_P: Tensor

    @classmethod
    def of(cls, predicted_BP: Tensor, truth_BP: Tensor) -> _Moments:
        _same_shape(tuple(predicted_BP.shape), tuple(truth_BP.shape))
        (predicted, shift_g, first_g), (truth, shift_t, first_t) = _centred(predicted_BP), _centred(truth_BP)
        bias = (first_g - first_t) + (shift_g - shift_t)
        spread = predicted.square().mean(dim=0) + truth.square().mean(dim=0) + bias.square()
        constant = spread <= _TINY
        return cls(predicted, truth, bias, torch.where(constant, 1.0, spread), constant)

    @property
    def ccc_P(self) -> Tensor:
        each_P = 2 * (self.predicted_BP * self.truth_BP).mean(dim=0) / self.spread_P
        return torch.where(self.constant_P, 0.0, each_P)


def _centred(x_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x less its mean, the mean less the first row, the first row).

    The first row is subtracted first, so that a constant column is exactly 0.
    """
    x = x_BP.double()
    first = x[0].detach()
    from_first = x - first
    shift = from_first.mean(dim=0)
    return from_first - shift, shift, first


def _same_shape(truth: tuple[int, ...], predicted: tuple[int, ...]) -> None:
    if truth != predicted or not truth or truth[0] == 0:
        raise ValueError(f"CCC needs two arrays of the same shape with at least one row, not {truth} and {predicted}")
