"""The concordance correlation coefficient (Lin 1989, Biometrics 45) as a loss. Pure.

    CCC(x, y) = 2 cov(x, y) / (var x + var y + (mean x - mean y)^2)        with biased (1/n) moments, as Lin has them

Three cases that the formula leaves open, or to rounding, are defined: a constant x, a constant y and a single sample
have CCC 0. A value that is not a number gives one that is not either. Columns are independent; U utterances or B rows
of a batch, P primitives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this the two columns are one constant, up to rounding: labels are of order 1, so their squares are far above it.
_TINY = 1e-24


def batch_ccc(guess_BP: Tensor, truth_BP: Tensor) -> Tensor:
    """The CCC of each column over the whole batch, [P], float64 and differentiable.

    Gradients are finite everywhere. At a constant guess under labels that vary the gradient is that of the formula and
    points out of the constant; under constant labels, for a single sample, and where both columns are one constant it
    is 0.
    """
    return _Moments.of(guess_BP, truth_BP).ccc_P


def ccc_loss(guess_BP: Tensor, truth_BP: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """1 - a CCC_activation - b CCC_valence - g CCC_dominance of the whole batch, a float64 scalar (arXiv 2102.06357).

    The CCC of a batch is not the mean of the CCCs of its parts: every row of the batch must be in one call.
    """
    each_P = batch_ccc(guess_BP, truth_BP)
    return 1 - (each_P * torch.tensor(weights, dtype=each_P.dtype, device=each_P.device)).sum()


@torch.no_grad()
def ccc_loss_gradient(guess_BP: Tensor, truth_BP: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """float64 [B, P]: the gradient of `ccc_loss` by each guess, in closed form.

        d CCC / d g_i = 2 (t_i - mean t - CCC (g_i - mean t)) / (B (var g + var t + (mean g - mean t)^2))

    With it a batch need not be one graph: its rows go back through the network in parts, wherever they are.
    """
    moments = _Moments.of(guess_BP, truth_BP)
    weight_P = torch.tensor(weights, dtype=torch.float64, device=guess_BP.device)
    scale_P = torch.where(moments.constant_P, 0.0, 2 * weight_P / (len(guess_BP) * moments.spread_P))
    return scale_P * (moments.ccc_P * (moments.guess_BP + moments.bias_P) - moments.truth_BP)


@dataclass(frozen=True)
class _Moments:
    """Both columns less their means, [B, P]; the means' difference and the CCC's denominator, [P]. float64.

    `constant_P`: both columns are one and the same constant; there `spread_P` is 1.
    """

    guess_BP: Tensor
    truth_BP: Tensor
    bias_P: Tensor
    spread_P: Tensor
    constant_P: Tensor

    @classmethod
    def of(cls, guess_BP: Tensor, truth_BP: Tensor) -> _Moments:
        _same_shape(tuple(guess_BP.shape), tuple(truth_BP.shape))
        (guess, shift_g, first_g), (truth, shift_t, first_t) = _centred(guess_BP), _centred(truth_BP)
        bias = (first_g - first_t) + (shift_g - shift_t)
        spread = guess.square().mean(dim=0) + truth.square().mean(dim=0) + bias.square()
        constant = spread <= _TINY
        return cls(guess, truth, bias, torch.where(constant, 1.0, spread), constant)

    @property
    def ccc_P(self) -> Tensor:
        each_P = 2 * (self.guess_BP * self.truth_BP).mean(dim=0) / self.spread_P
        return torch.where(self.constant_P, 0.0, each_P)


def _centred(x_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x less its mean, mean less the first row, the first row).

    Counted from the first row a constant column is 0, and so is all that follows, without rounding.
    """
    x = x_BP.double()
    first = x[0].detach()
    from_first = x - first
    shift = from_first.mean(dim=0)
    return from_first - shift, shift, first


def _same_shape(truth: tuple[int, ...], guess: tuple[int, ...]) -> None:
    if truth != guess or not truth or truth[0] == 0:
        raise ValueError(f"CCC wants two arrays of the same shape with at least one row, not {truth} and {guess}")
