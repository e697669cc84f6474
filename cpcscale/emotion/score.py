"""Figures for a set of predictions: CCC for each primitive and its mean, with an interval over speakers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from cpcscale.objective.ccc import PRIMITIVES, ccc

# Under this many speakers a deviation over speakers says nothing, so there is no interval.
LEAST_SPEAKERS = 6
LEVEL = 0.95
# Fisher's z is infinite at a CCC of 1 or -1.
_CLIP = 1 - 1e-12


def scores(truth_UP: np.ndarray, guess_UP: np.ndarray) -> dict[str, float]:
    """The CCC of each primitive over all rows pooled, and `mean`, their mean."""
    return dict(zip((*PRIMITIVES, "mean"), _pooled(truth_UP, guess_UP).tolist(), strict=True))


def mean_of_folds(folds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over folds of each figure that `scores` gave: another quantity than the pooled one."""
    return {name: float(np.mean([fold[name] for fold in folds])) for name in (*PRIMITIVES, "mean")}


def interval(truth_UP: np.ndarray, guess_UP: np.ndarray, speakers: Sequence[str]) -> dict[str, list[float]] | None:
    """95 % intervals [low, high] over speakers of what `scores` gives, or None under LEAST_SPEAKERS.

    Delete-one-speaker jackknife of Fisher's z of the pooled CCC, around its estimate, by Student's t with n - 1 degrees
    of freedom for n speakers (Efron & Tibshirani 1993, ch. 11). A constant prediction has a CCC of 0 whoever is left
    out, and the interval [0, 0].
    """
    names = np.asarray(speakers)
    voices = np.unique(names)
    count = len(voices)
    if count < LEAST_SPEAKERS:
        return None
    z_whole = _fisher(_pooled(truth_UP, guess_UP))
    z_without = np.stack([_fisher(_pooled(truth_UP[names != voice], guess_UP[names != voice])) for voice in voices])
    error = np.sqrt((count - 1) / count * ((z_without - z_without.mean(axis=0)) ** 2).sum(axis=0))
    reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * error
    low, high = np.tanh(z_whole - reach), np.tanh(z_whole + reach)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate((*PRIMITIVES, "mean"))}


def _pooled(truth_UP: np.ndarray, guess_UP: np.ndarray) -> np.ndarray:
    each = ccc(truth_UP, guess_UP)
    return np.append(each, each.mean())


def _fisher(value: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(value, -_CLIP, _CLIP))
