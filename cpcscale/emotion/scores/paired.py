"""Paired permutation test by speaker: is one system better than another on the same utterances?

Under the null hypothesis the two systems are alike, so their predictions for a speaker can be swapped. Each choice of
the speakers to swap gives a difference of the pooled CCCs; p is the share of choices whose difference is at least as
large, in either direction, as the observed one (a permutation test for paired data, Good 2005, ch. 3). All predictions
for a speaker are swapped together, because utterances of one speaker are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.ccc_intervals import (
    FIGURES,
    LEAST_SPEAKERS,
    Figures,
    Intervals,
    figures_of,
    jackknife_reach,
    speaker_sums,
    weighted_sums,
    with_seeds,
)

# Up to this many speakers, all 2^n assignments are computed.
EXACT_SPEAKERS = 16
# Random assignments for more speakers; the least p is then 1 / (DRAWS + 1).
DRAWS = 20_000
# Assignments at a time: bounds the memory for sums of many seeds.
_BLOCK = 4096
# Differences that differ by rounding count as equal.
_ROUNDING = 1e-10


# What is tested: the columns of every table, and the mean of activation and dominance, by which encoders are chosen
# where valence is only happiness found.
TESTED = (*FIGURES, "activation_dominance")


@dataclass(frozen=True)
class PairedTest:
    """The figures of the first system minus those of the second, their 95 % intervals, and a two-sided p for each.

    `exact`: all 2^speakers assignments were computed. `least_p`: the smallest p possible with so many.
    """

    difference: Figures
    interval: Intervals | None
    p: Figures
    speakers: int
    assignments: int
    exact: bool
    least_p: float


@dataclass(frozen=True)
class Pair:
    """Two systems' predictions, [U, P] or [S, U, P], of the same rows of one corpus, and the speaker of each row."""

    truth_UP: np.ndarray
    first: np.ndarray
    second: np.ndarray
    speakers: Sequence[str]


def paired_test(
    truth_UP: np.ndarray, first: np.ndarray, second: np.ndarray, speakers: Sequence[str], *, seed: int = 0
) -> PairedTest:
    """`paired_test_over` of one corpus.

    >>> truth_UP = np.linspace([-1, -1, -1], [1, 1, 1], 12)
    >>> test = paired_test(truth_UP, truth_UP, truth_UP / 2, ["ann", "bob", "cem", "dan"] * 3)
    >>> round(test.difference["mean"], 3), test.p["mean"], test.least_p
    (0.2, 0.125, 0.125)
    """
    return paired_test_over([Pair(truth_UP, first, second, speakers)], seed=seed)


def paired_test_over(pairs: Sequence[Pair], *, seed: int = 0) -> PairedTest:
    """Tests two systems over several corpora: each figure is the mean over corpora of the CCC pooled in each.

    Predictions are swapped for whole speakers, each within its corpus, and all seeds of a speaker together. Beyond
    EXACT_SPEAKERS speakers, DRAWS random assignments keyed by `seed` are used, and p counts the observed one too
    (Phipson & Smyth 2010). The systems have as many seeds, or one of them a single seed. The interval is a
    delete-one-speaker jackknife of the difference, stratified by corpus, by Student's t with one degree of freedom less
    than speakers for each corpus; None if a corpus has less than LEAST_SPEAKERS. Test and interval hold the fits fixed.
    Raises ValueError for other numbers of seeds, and for predictions that do not fit the truth or are not finite.
    """
    parts = [_sums(pair) for pair in pairs]
    (seen_F,) = _difference([(first.sum(axis=0)[None], second.sum(axis=0)[None]) for first, second in parts])
    # Comparisons with NaN are false, which would give p = 0.
    if not np.isfinite(seen_F).all():
        raise ValueError("a label or a prediction is not finite: the two systems cannot be compared")
    ends = np.cumsum([len(first) for first, _ in parts])
    count = int(ends[-1])
    exact = count <= EXACT_SPEAKERS
    reached_F, total = np.zeros(len(TESTED), np.int64), 0
    rng = np.random.default_rng(seed)
    # Swapping all speakers changes only the sign of the difference, so the first speaker is never swapped.
    todo = 2 ** (count - 1) if exact else DRAWS
    for start in range(0, todo, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, todo))
        if exact:
            swapped_RG = (2 * block[:, None] >> np.arange(count) & 1).astype(np.float64)
        else:
            swapped_RG = rng.integers(0, 2, (len(block), count)).astype(np.float64)
        swapped = []
        for (first, second), of_corpus_RG in zip(parts, np.split(swapped_RG, ends[:-1], axis=1), strict=True):
            moved = weighted_sums(of_corpus_RG, second - first)
            swapped.append((first.sum(axis=0) + moved, second.sum(axis=0) - moved))
        reached_F += (np.abs(_difference(swapped)) >= np.abs(seen_F) - _ROUNDING).sum(axis=0)
        total += len(block)
    p_F = reached_F / total if exact else (reached_F + 1) / (total + 1)
    return PairedTest(
        difference=_named(seen_F),
        interval=_interval(parts, seen_F),
        p=_named(p_F),
        speakers=count,
        assignments=2**count if exact else DRAWS,
        exact=exact,
        least_p=2.0 ** (1 - count) if exact else 1 / (DRAWS + 1),
    )


# Of one corpus, the sums of each speaker (`speaker_sums`) of the first and of the second system.
_Sums = tuple[np.ndarray, np.ndarray]


def _sums(pair: Pair) -> _Sums:
    truth_UP = pair.truth_UP
    first_SUP, second_SUP = _same_seeds(with_seeds(truth_UP, pair.first), with_seeds(truth_UP, pair.second))
    return speaker_sums(truth_UP, first_SUP, pair.speakers), speaker_sums(truth_UP, second_SUP, pair.speakers)


def _tested(sums_RSP6: np.ndarray) -> np.ndarray:
    """[R, TESTED] of sums [R, S, P, 6]."""
    figure_RF = figures_of(sums_RSP6)
    both = [PRIMITIVES.index("activation"), PRIMITIVES.index("dominance")]
    return np.concatenate([figure_RF, figure_RF[:, both].mean(axis=1, keepdims=True)], axis=1)


def _difference(replicates: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """[R, TESTED]: the mean over corpora of the first system's figures minus the second's, of replicates of each."""
    return np.mean([_tested(first) - _tested(second) for first, second in replicates], axis=0)


def _interval(parts: Sequence[_Sums], seen_F: np.ndarray) -> Intervals | None:
    if min(len(first) for first, _ in parts) < LEAST_SPEAKERS:
        return None
    reach_F = jackknife_reach(
        [_tested(first.sum(axis=0) - first) - _tested(second.sum(axis=0) - second) for first, second in parts]
    )
    bounds_F2 = np.stack([seen_F - reach_F, seen_F + reach_F], axis=1)
    return dict(zip(TESTED, bounds_F2.tolist(), strict=True))


def _named(value_F: np.ndarray) -> Figures:
    return dict(zip(TESTED, value_F.tolist(), strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of tests, corrected for its size, in the same order (Holm 1979, Scand. J. Statist. 6).

    Rejecting corrected values up to a level keeps the probability of any false rejection within that level, however the
    tests depend on each other. Raises ValueError for a value outside [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values lie in [0, 1], not {list(p_values)}")
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return corrected.tolist()


def corrected(tests: Mapping[str, PairedTest]) -> dict[str, Figures]:
    """{name of the test: its p-values after Holm's correction}.

    The primitives of all tests are one family; the means of all tests are another.
    """
    of_primitives = iter(holm([test.p[name] for test in tests.values() for name in PRIMITIVES]))
    of_mean = iter(holm([test.p["mean"] for test in tests.values()]))
    return {each: {name: next(of_primitives) for name in PRIMITIVES} | {"mean": next(of_mean)} for each in tests}


def _same_seeds(first_SUP: np.ndarray, second_SUP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    seeds = {len(first_SUP), len(second_SUP)}
    if len(seeds - {1}) > 1:
        raise ValueError(
            f"{len(first_SUP)} seeds of one system and {len(second_SUP)} of the other: give both as many, or one"
        )
    shape = (max(seeds), *first_SUP.shape[1:])
    return np.broadcast_to(first_SUP, shape), np.broadcast_to(second_SUP, shape)
