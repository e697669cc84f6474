"""The concordance correlation coefficient (Lin 1989, Biometrics 45), as a metric and as a loss. Pure.

    CCC(x, y) = 2 cov(x, y) / (var x + var y + (mean x - mean y)^2)        with biased (1/n) moments, as Lin has them

Three cases that the formula leaves open, or to rounding, are defined: a constant x, a constant y and a single sample
have CCC 0. A value that is not a number gives one that is not either. Columns are independent; U utterances or B rows
of a batch, P primitives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The order of the columns wherever labels or predictions stand in one array.
PRIMITIVES = ("activation", "valence", "dominance")

# Below this the two columns are one constant, up to rounding: labels are of order 1, so their squares are far above it.
_TINY = 1e-24


def ccc(truth_UP: np.ndarray, guess_UP: np.ndarray) -> np.ndarray:
    """The CCC of each column in float64: [P] for [U, P], a 0-d array for [U]. Symmetric in its arguments."""
    truth, guess = np.asarray(truth_UP, np.float64), np.asarray(guess_UP, np.float64)
    _same_shape(truth.shape, guess.shape)
    mean_t, mean_g = truth.mean(axis=0), guess.mean(axis=0)
    covariance = ((truth - mean_t) * (guess - mean_g)).mean(axis=0)
    spread = truth.var(axis=0) + guess.var(axis=0) + (mean_t - mean_g) ** 2
    # A constant column is told by its range: its computed variance is rounding noise, not always 0.
    constant = (np.ptp(truth, axis=0) == 0) | (np.ptp(guess, axis=0) == 0)
    return np.where(constant, 0.0, 2 * covariance / np.where(constant, 1.0, spread))


def batch_ccc(guess_BP: Tensor, truth_BP: Tensor) -> Tensor:
    """The CCC of each column over the whole batch, [P], float64 and differentiable.

    Gradients are finite everywhere. At a constant guess under labels that vary the gradient is that of the formula and
    points out of the constant; where both columns are one constant the CCC is 0 with gradient 0.
    """
    _same_shape(tuple(guess_BP.shape), tuple(truth_BP.shape))
    guess, truth = guess_BP.double(), truth_BP.double()
    mean_g, mean_t = guess.mean(dim=0), truth.mean(dim=0)
    centred_g, centred_t = guess - mean_g, truth - mean_t
    spread = centred_g.square().mean(dim=0) + centred_t.square().mean(dim=0) + (mean_g - mean_t).square()
    constant = spread <= _TINY
    concordance = 2 * (centred_g * centred_t).mean(dim=0) / torch.where(constant, torch.ones_like(spread), spread)
    return torch.where(constant, torch.zeros_like(concordance), concordance)


def ccc_loss(guess_BP: Tensor, truth_BP: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """1 - a CCC_activation - b CCC_valence - g CCC_dominance of the whole batch, a float64 scalar (arXiv 2102.06357).

    The CCC of a batch is not the mean of the CCCs of its parts: every row of the batch must be in one call.
    """
    each_P = batch_ccc(guess_BP, truth_BP)
    return 1 - (each_P * torch.tensor(weights, dtype=each_P.dtype, device=each_P.device)).sum()


def _same_shape(truth: tuple[int, ...], guess: tuple[int, ...]) -> None:
    if truth != guess or not truth or truth[0] == 0:
        raise ValueError(f"CCC wants two arrays of the same shape with at least one row, not {truth} and {guess}")
