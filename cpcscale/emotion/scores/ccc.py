"""The concordance correlation coefficient (Lin 1989, Biometrics 45), as a metric. numpy alone; as a loss it is in
objective/ccc.py.

    CCC(x, y) = 2 cov(x, y) / (var x + var y + (mean x - mean y)^2)        with biased (1/n) moments, as in Lin

The CCC of a constant x, a constant y or a single sample is 0 here; the formula leaves these cases open.
"""

from __future__ import annotations

import numpy as np

# The order of the columns in every array of labels or predictions.
PRIMITIVES = ("activation", "valence", "dominance")


def ccc(truth_UP: np.ndarray, guess_UP: np.ndarray) -> np.ndarray:
    """The CCC of each column in float64: [P] for U utterances and P primitives, [U, P], or a 0-d array for [U].

    Symmetric in its arguments; NaN where a value is NaN. Raises ValueError for arrays of unlike shape or without rows.

    >>> ccc(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])).round(3)
    np.float64(0.571)
    """
    truth, guess = np.asarray(truth_UP, np.float64), np.asarray(guess_UP, np.float64)
    if truth.shape != guess.shape or not truth.size:
        raise ValueError(
            f"CCC takes two arrays of one shape with at least one row, not {truth.shape} and {guess.shape}"
        )
    mean_t, mean_g = truth.mean(axis=0), guess.mean(axis=0)
    covariance = ((truth - mean_t) * (guess - mean_g)).mean(axis=0)
    spread = truth.var(axis=0) + guess.var(axis=0) + (mean_t - mean_g) ** 2
    # A constant column is found by its range: its computed variance is rounding noise, not always 0.
    constant = (np.ptp(truth, axis=0) == 0) | (np.ptp(guess, axis=0) == 0)
    return np.where(constant, 0.0, 2 * covariance / np.where(constant, 1.0, spread))
