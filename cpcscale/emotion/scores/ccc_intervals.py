"""CCC of each primitive and their mean, the measures a CCC is made of, and intervals over speakers.

Predictions are guess_UP [U, P], or guess_SUP [S, U, P] of S seeds of one system. Every figure and every replicate is
the mean over seeds of the CCC over all rows pooled. Seeds are never counted as samples; `seed_deviation` is their
spread. `speakers` is the group of each row under the protocol, so unknown speakers of one recording count as one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cpcscale.emotion.scores.ccc import PRIMITIVES, ccc

Figures = dict[str, float]
Intervals = dict[str, list[float]]

# The columns of every table: each primitive, then the mean over primitives.
FIGURES = (*PRIMITIVES, "mean")
# Under this many speakers a deviation over speakers is too uncertain, so there is no interval.
LEAST_SPEAKERS = 6
LEVEL = 0.95
REPLICATES = 2000
# Fisher's z is infinite at a CCC of 1 or -1.
_CLIP = 1 - 1e-12
# A column whose variance is under this share of its second moment is constant; the rest is rounding.
_CONSTANT = 1e-13


def scores(truth_UP: np.ndarray, guess: np.ndarray) -> Figures:
    """The CCC of each primitive over all rows pooled, and `mean`, the mean of the three."""
    return _named(_pooled(truth_UP, with_seeds(truth_UP, guess)).mean(axis=0))


def seed_deviation(truth_UP: np.ndarray, guess: np.ndarray) -> Figures | None:
    """The standard deviation over seeds (S - 1 degrees of freedom) of each of `scores`, or None for one seed."""
    guess_SUP = with_seeds(truth_UP, guess)
    return None if len(guess_SUP) < 2 else _named(_pooled(truth_UP, guess_SUP).std(axis=0, ddof=1))


def by_group(truth_UP: np.ndarray, guess: np.ndarray, groups: Sequence[Hashable]) -> dict[Hashable, Figures]:
    """`scores` of each group (a fold, a gender, a style) alone, sorted by group; rows of group "" are left out."""
    guess_SUP = with_seeds(truth_UP, guess)
    labels = np.asarray(groups)
    return {
        label: scores(truth_UP[labels == label], guess_SUP[:, labels == label])
        for label in np.unique(labels).tolist()
        if label != ""
    }


def mean_of_folds(folds: Sequence[Figures]) -> Figures:
    """The mean over folds of each of `scores`; this is not the score over all folds pooled."""
    return {name: float(np.mean([fold[name] for fold in folds])) for name in FIGURES}


def agreement(truth_UP: np.ndarray, guess: np.ndarray) -> dict[str, Figures]:
    """The measures behind a CCC, over all rows pooled: {measure: {primitive: value, ..., "mean": their mean}}.

    pearson          Pearson's r
    bias_correction  C_b = 2 / (v + 1 / v + u^2) for a scale ratio v and the bias u over the geometric mean of the two
                     deviations; CCC = r C_b (Lin 1989, Biometrics 45)
    scale_ratio      v, the deviation of the guess over that of the truth
    bias             mean guess - mean truth, in units of the labels
    rmse             in units of the labels
    slope            of the truth regressed on the guess: 1 is calibrated, under 1 the guess varies too much

    Measures that a constant column leaves undefined are 0.
    """
    guess_SUP = with_seeds(truth_UP, guess)
    truth = np.asarray(truth_UP, np.float64)
    deviation_t, deviation_g = truth.std(axis=0), guess_SUP.std(axis=1)
    flat_t, flat_g = np.ptp(truth, axis=0) == 0, np.ptp(guess_SUP, axis=1) == 0
    bias = guess_SUP.mean(axis=1) - truth.mean(axis=0)
    covariance = ((truth - truth.mean(axis=0)) * (guess_SUP - guess_SUP.mean(axis=1, keepdims=True))).mean(axis=1)
    product = np.where(flat_t | flat_g, 1.0, deviation_t * deviation_g)
    spread = deviation_t**2 + deviation_g**2 + bias**2
    measures = {
        "pearson": np.where(flat_t | flat_g, 0.0, covariance / product),
        "bias_correction": np.where(flat_t | flat_g, 0.0, 2 * product / np.where(spread > 0, spread, 1.0)),
        "scale_ratio": np.where(flat_t | flat_g, 0.0, deviation_g / np.where(flat_t, 1.0, deviation_t)),
        "bias": bias,
        "rmse": np.sqrt(((guess_SUP - truth) ** 2).mean(axis=1)),
        "slope": np.where(flat_t | flat_g, 0.0, covariance / np.where(flat_g, 1.0, deviation_g**2)),
    }
    return {name: _named(_with_mean(value_SP).mean(axis=0)) for name, value_SP in measures.items()}


def interval(truth_UP: np.ndarray, guess: np.ndarray, speakers: Sequence[str]) -> Intervals | None:
    """95 % intervals [low, high] over speakers for each of `scores`, or None under LEAST_SPEAKERS speakers.

    Delete-one-speaker jackknife of Fisher's z of the pooled CCC, around its estimate, by Student's t with n - 1 degrees
    of freedom for n speakers (Efron & Tibshirani 1993, ch. 11). A constant prediction has the interval [0, 0].
    """
    sums_GSP6 = speaker_sums(truth_UP, guess, speakers)
    count = len(sums_GSP6)
    if count < LEAST_SPEAKERS:
        return None
    z_whole = _fisher(_pooled(truth_UP, with_seeds(truth_UP, guess)).mean(axis=0))
    reach = jackknife_reach([_fisher(figures_of(sums_GSP6.sum(axis=0) - sums_GSP6))])
    return _bounds(np.tanh(z_whole - reach), np.tanh(z_whole + reach))


def bootstrap_interval(
    truth_UP: np.ndarray, guess: np.ndarray, speakers: Sequence[str], *, seed: int, replicates: int = REPLICATES
) -> Intervals | None:
    """95 % percentile intervals over whole speakers drawn with replacement, or None under LEAST_SPEAKERS.

    The draws depend on `seed` and the sorted names of the speakers, not on the order of the rows. With few speakers the
    interval is too short (at 10 it holds the true value about nine times in ten): `interval` is the primary one.
    """
    sums_GSP6 = speaker_sums(truth_UP, guess, speakers)
    count = len(sums_GSP6)
    if count < LEAST_SPEAKERS:
        return None
    drawn_RG = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
    low, high = np.quantile(figures_of(weighted_sums(drawn_RG, sums_GSP6)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return _bounds(low, high)


def ccc_change(
    truth_UP: np.ndarray, before: np.ndarray, after: np.ndarray, speakers: Sequence[str]
) -> tuple[Figures, Intervals | None]:
    """(CCC of `after` minus CCC of `before`, its 95 % interval over speakers), for predictions of the same rows.

    The interval is a delete-one-speaker jackknife of the difference, by Student's t with n - 1 degrees of freedom; None
    under LEAST_SPEAKERS speakers.
    """
    sums = [speaker_sums(truth_UP, guess, speakers) for guess in (before, after)]
    difference = np.subtract(*(figures_of(part.sum(axis=0, keepdims=True))[0] for part in reversed(sums)))
    if len(sums[0]) < LEAST_SPEAKERS:
        return _named(difference), None
    without = [figures_of(part.sum(axis=0) - part) for part in sums]
    reach = jackknife_reach([without[1] - without[0]])
    return _named(difference), _bounds(difference - reach, difference + reach)


@dataclass(frozen=True)
class ScoreGap:
    """The pooled CCC of group `first` minus that of `second`, with its 95 % interval; `speakers` in each group."""

    first: str
    second: str
    difference: Figures
    interval: Intervals | None
    speakers: tuple[int, int]


def ccc_gap(
    truth_UP: np.ndarray,
    guess: np.ndarray,
    speakers: Sequence[str],
    groups: Sequence[str],
    *,
    first: str,
    second: str,
) -> ScoreGap:
    """The CCC of the rows of group `first` minus that of `second`, for groups by gender or by style.

    The interval is a delete-one-speaker jackknife of the difference, by Student's t with n - 1 degrees of freedom; a
    speaker with rows in both groups is left out of both at once. It is None under LEAST_SPEAKERS speakers in all, or
    under two in either group. Raises ValueError for a group without rows.
    """
    guess_SUP, labels, names = with_seeds(truth_UP, guess), np.asarray(groups), np.asarray(speakers)
    chosen = [labels == first, labels == second]
    for label, rows in zip((first, second), chosen, strict=True):
        if not rows.any():
            raise ValueError(f"no row is of group {label!r}: the groups are {sorted(set(groups))}")
    whole = [_pooled(truth_UP[rows], guess_SUP[:, rows]).mean(axis=0) for rows in chosen]
    counts = [len(np.unique(names[rows])) for rows in chosen]
    either = chosen[0] | chosen[1]
    difference, found = whole[0] - whole[1], None
    if len(np.unique(names[either])) >= LEAST_SPEAKERS and min(counts) > 1:
        sums = [
            speaker_sums(truth_UP[either], guess_SUP[:, either], names[either], rows[either].astype(np.float64))
            for rows in chosen
        ]
        without = [figures_of(part.sum(axis=0) - part) for part in sums]
        reach = jackknife_reach([without[0] - without[1]])
        found = _bounds(difference - reach, difference + reach)
    return ScoreGap(first, second, _named(difference), found, (counts[0], counts[1]))


def unweighted_average_recall(truth: Sequence[Hashable], guess: Sequence[Hashable]) -> float:
    """Unweighted average recall (UAR, balanced accuracy): the mean over the classes of `truth` of their recall.

    Raises ValueError for different lengths, or no row.
    """
    if len(truth) != len(guess) or not len(truth):
        raise ValueError(f"recall takes two lists of one length with at least one row, not {len(truth)}, {len(guess)}")
    rows: dict[Hashable, list[bool]] = {}
    for true, guessed in zip(truth, guess, strict=True):
        rows.setdefault(true, []).append(true == guessed)
    return float(np.mean([np.mean(right) for right in rows.values()]))


def with_seeds(truth_UP: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Predictions [S, U, P] or [U, P] as float64 [S, U, P]. Raises ValueError if U, P are 0 or not the truth's."""
    guess_SUP = np.asarray(guess, np.float64)
    guess_SUP = guess_SUP[None] if guess_SUP.ndim == 2 else guess_SUP
    if guess_SUP.ndim != 3 or guess_SUP.shape[1:] != np.shape(truth_UP) or 0 in guess_SUP.shape:
        raise ValueError(
            f"predictions of shape {np.shape(guess)} do not fit labels of shape {np.shape(truth_UP)}: give both as "
            "[U, P] with at least one row, or predictions of several seeds as [S, U, P]"
        )
    return guess_SUP


def speaker_sums(
    truth_UP: np.ndarray, guess: np.ndarray, speakers: Sequence[str] | np.ndarray, weight_U: np.ndarray | None = None
) -> np.ndarray:
    """Sums over the rows of each of G speakers, sorted, [G, S, P, 6]: n, x, y, xx, yy, xy for x truth and y guess.

    The mean of the truth is subtracted from both, for accuracy. Summed over speakers they give a CCC, see `ccc_of`.
    """
    truth_UP = np.asarray(truth_UP, np.float64)
    x, y = np.broadcast_arrays(truth_UP, with_seeds(truth_UP, guess)) - truth_UP.mean(axis=0)
    n = np.broadcast_to((np.ones(len(truth_UP)) if weight_U is None else weight_U)[:, None], x.shape)
    products_USP6 = np.moveaxis(np.stack([n, n * x, n * y, n * x * x, n * y * y, n * x * y], axis=-1), 1, 0)
    _, speaker_U = np.unique(np.asarray(speakers), return_inverse=True)
    order = np.argsort(speaker_U, kind="stable")
    return np.add.reduceat(products_USP6[order], np.unique(speaker_U[order], return_index=True)[1], axis=0)


def weighted_sums(weight_RG: np.ndarray, sums_GSP6: np.ndarray) -> np.ndarray:
    """[R, S, P, 6]: for each of R replicates the sums of the speakers, weighted."""
    return (weight_RG @ sums_GSP6.reshape(len(sums_GSP6), -1)).reshape(-1, *sums_GSP6.shape[1:])


def ccc_of(sums: np.ndarray) -> np.ndarray:
    """The CCC [...] of sums [..., 6]; 0 for a constant column, as `ccc` has it."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    moments = n * (xx + yy)
    constant = np.minimum(n * xx - x * x, n * yy - y * y) <= _CONSTANT * moments
    return np.where(constant, 0.0, 2 * (n * xy - x * y) / np.where(constant, 1.0, moments - 2 * x * y))


def figures_of(sums_RSP6: np.ndarray) -> np.ndarray:
    """[R, P + 1]: the CCC of each primitive and their mean, each the mean over seeds, for sums [R, S, P, 6]."""
    return _with_mean(ccc_of(sums_RSP6).mean(axis=1))


def _pooled(truth_UP: np.ndarray, guess_SUP: np.ndarray) -> np.ndarray:
    return _with_mean(np.stack([ccc(truth_UP, guess_UP) for guess_UP in guess_SUP]))


def _with_mean(value_RP: np.ndarray) -> np.ndarray:
    return np.concatenate([value_RP, value_RP.mean(axis=1, keepdims=True)], axis=1)


def jackknife_reach(without: Sequence[np.ndarray]) -> np.ndarray:
    """How far the interval of LEVEL reaches to either side, [F]: of figures, or of their mean over several corpora.

    `without` has for each corpus the figures without each of its speakers, [G, F].
    """
    # Takes a fifth of a second, which what gives no interval need not wait for.
    from scipy.special import stdtrit

    variance_F, freedom = np.zeros(without[0].shape[1]), 0
    for without_GF in without:
        count = len(without_GF)
        squares_F = ((without_GF - without_GF.mean(axis=0)) ** 2).sum(axis=0)
        variance_F += (count - 1) / count * squares_F / len(without) ** 2
        freedom += count - 1
    return np.asarray(stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt(variance_F))


def _fisher(value: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(value, -_CLIP, _CLIP))


def _named(value_F: np.ndarray) -> Figures:
    return dict(zip(FIGURES, value_F.tolist(), strict=True))


def _bounds(low_F: np.ndarray, high_F: np.ndarray) -> Intervals:
    return {name: [float(low), float(high)] for name, low, high in zip(FIGURES, low_F, high_F, strict=True)}
