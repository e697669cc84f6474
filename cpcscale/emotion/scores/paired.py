"""Whether one system is better than another on the same utterances: exact swaps of their predictions by speaker.

Under the null hypothesis the two systems are alike, so a speaker's predictions may change hands. Each assignment of the
speakers' two sets of predictions to the two systems gives a difference of the pooled CCCs; p is the share of
assignments whose difference is at least as large, in either direction, as the one seen (a permutation test for paired
data, Good 2005, ch. 3). Speakers change hands whole: utterances of one speaker are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.ccc_intervals import FIGURES, Figures, figures_of, speaker_sums, weighted_sums, with_seeds

# Up to this many speakers all 2^n assignments are gone through.
EXACT_SPEAKERS = 16
# Random assignments for more speakers; the least p is then one in so many, and one.
DRAWS = 20_000
# Assignments at a time: bounds the memory for sums of many seeds.
_BLOCK = 4096
# A difference that is only rounded otherwise is the same difference.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class PairedTest:
    """How two systems compare: the figures of the first less those of the second, and a two-sided p for each.

    `exact` says that all 2^speakers assignments were gone through; `least_p` is the smallest p that could come out.
    """

    difference: Figures
    p: Figures
    speakers: int
    assignments: int
    exact: bool
    least_p: float


def paired_test(
    truth_UP: np.ndarray, first: np.ndarray, second: np.ndarray, speakers: Sequence[str], *, seed: int = 0
) -> PairedTest:
    """The paired test of two systems' predictions [U, P] or [S, U, P] of the same rows, swapped by `speakers`.

    Several seeds are averaged inside each assignment: all seeds of a speaker change hands together. Beyond
    EXACT_SPEAKERS speakers there are DRAWS random assignments keyed by `seed`, and p counts the one seen among them
    (Phipson & Smyth 2010). One of the systems may have one seed and the other several. Raises ValueError for
    predictions that do not fit the truth or are not finite, or different numbers of seeds beyond that.
    """
    first_SUP, second_SUP = _same_seeds(with_seeds(truth_UP, first), with_seeds(truth_UP, second))
    sums_first, sums_second = (speaker_sums(truth_UP, guess_SUP, speakers) for guess_SUP in (first_SUP, second_SUP))
    whole_first, whole_second = sums_first.sum(axis=0), sums_second.sum(axis=0)
    count = len(sums_first)
    exact = count <= EXACT_SPEAKERS
    (seen_F,) = figures_of(whole_first[None]) - figures_of(whole_second[None])
    # No comparison with a NaN holds, which would read as p = 0.
    if not np.isfinite(seen_F).all():
        raise ValueError("a label or a prediction is not finite: the two systems cannot be compared")
    reached_F, total = np.zeros(len(FIGURES), np.int64), 0
    rng = np.random.default_rng(seed)
    # An assignment and its mirror image differ in the sign alone, so the first speaker stays where it is.
    todo = 2 ** (count - 1) if exact else DRAWS
    for start in range(0, todo, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, todo))
        if exact:
            swapped_RG = (2 * block[:, None] >> np.arange(count) & 1).astype(np.float64)
        else:
            swapped_RG = rng.integers(0, 2, (len(block), count)).astype(np.float64)
        moved = weighted_sums(swapped_RG, sums_second - sums_first)
        difference_RF = figures_of(whole_first + moved) - figures_of(whole_second - moved)
        reached_F += (np.abs(difference_RF) >= np.abs(seen_F) - _ROUNDING).sum(axis=0)
        total += len(block)
    p_F = reached_F / total if exact else (reached_F + 1) / (total + 1)
    return PairedTest(
        difference=dict(zip(FIGURES, seen_F.tolist(), strict=True)),
        p=dict(zip(FIGURES, p_F.tolist(), strict=True)),
        speakers=count,
        assignments=2**count if exact else DRAWS,
        exact=exact,
        least_p=2.0 ** (1 - count) if exact else 1 / (DRAWS + 1),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family, corrected for its size and in the same order (Holm 1979, Scand. J. Statist. 6).

    Rejecting those at or under a level keeps the chance of any false rejection at or under that level, however the
    tests depend on each other. Raises ValueError for a value outside [0, 1].
    """
    values = np.asarray(p_values, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values lie in [0, 1], not {list(p_values)}")
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return corrected.tolist()


def corrected(tests: Mapping[str, PairedTest]) -> dict[str, Figures]:
    """The p of each test after Holm's correction, by the name that `tests` has for it.

    The primitives of all tests are one family. The mean, which sums them up, is corrected over the tests alone.
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
