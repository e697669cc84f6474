"""Intervals of predictions for speakers that nobody knows yet: hierarchical conformal prediction. Imports numpy alone.

Speakers are drawn like those of the corpus, and utterances like theirs; the interval of a new utterance of a new
speaker then contains its label with at least the stated probability, on average over such speakers, whatever the
recogniser is (Lee, Barber and Willett, arXiv 2306.06342, section 3). It promises nothing for one speaker, nor for other
microphones or languages. U utterances, K speakers, P primitives.
"""

from __future__ import annotations

import numpy as np

# (from this number of speakers on, the probability), the greatest first; below the last there is none.
_LEVELS = ((19, 0.9), (4, 0.8))


def interval_level(speakers: int) -> float:
    """The probability of intervals from the residuals of so many speakers; 0: too few for any."""
    return next((level for least, level in _LEVELS if speakers >= least), 0.0)


def half_widths(sizes_UP: np.ndarray, speaker_U: np.ndarray, level: float) -> np.ndarray:
    """The half-width of the interval of each column, float64 [P]: prediction +- half-width.

    `sizes_UP` are |label - prediction| of held-out utterances, `speaker_U` their speakers. The half-width is the
    `level` quantile of all sizes, in which each of the K speakers counts 1 / (K + 1) in all, and infinity the rest
    (eq. 8 of the paper). Infinite where `level` is over K / (K + 1).

    >>> half_widths(np.array([[1.0], [1.0], [3.0], [2.0], [5.0]]), np.array([0, 0, 1, 2, 3]), 0.8)
    array([5.])
    """
    _, place_U, count_K = np.unique(speaker_U, return_inverse=True, return_counts=True)
    weight_U = 1 / ((len(count_K) + 1) * count_K[place_U])
    order_UP = np.argsort(sizes_UP, axis=0, kind="stable")
    # A sum of many weights may end a little under the level that it reaches.
    reached_UP = np.cumsum(weight_U[order_UP], axis=0) >= level - 1e-9
    found_P = np.full(sizes_UP.shape[1], np.inf)
    for column in np.flatnonzero(reached_UP.any(axis=0)):
        found_P[column] = sizes_UP[order_UP[reached_UP[:, column].argmax(), column], column]
    return found_P
