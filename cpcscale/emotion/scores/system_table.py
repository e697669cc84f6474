"""The results table of several systems: the scores of each, and paired tests between them. Pure.

Every figure of a system, and every replicate of an interval or a test, is the mean over its seeds. Seeds are never
counted as samples, see scores/ccc_intervals.py. U utterances, S seeds, P primitives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale.emotion.scores.by_group import by_trait
from cpcscale.emotion.scores.ccc_intervals import (
    Figures,
    Intervals,
    agreement,
    bootstrap_interval,
    by_group,
    interval,
    mean_of_folds,
    scores,
    seed_deviation,
    with_seeds,
)
from cpcscale.emotion.scores.paired import PairedTest, corrected, paired_test

# The classic system that a learnt one should beat.
BASELINE = "functionals"
# The four systems of the paper, in its order.
PAPER_SYSTEMS = ("mfcc", "raw", "minicpc", "precpc")


@dataclass(frozen=True)
class SystemPredictions:
    """The predictions of one system, guess_SUP [S, U, P], with one seed of `seeds` each.

    `recalls` has the unweighted average recall of each seed that also classified.
    """

    seeds: tuple[int, ...]
    guess_SUP: np.ndarray
    recalls: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.guess_SUP):
            raise ValueError(f"{len(self.guess_SUP)} sets of predictions do not fit the seeds {list(self.seeds)}")


@dataclass(frozen=True)
class SystemRow:
    """One system: its CCCs over all folds pooled, their intervals, and other figures of the same predictions.

    `interval` is the jackknife over speakers, the primary one; `bootstrap` is shown beside it. `seed_deviation` and
    `recall_deviation` are over seeds, None for a single seed. `recall` is None if no categories were predicted.
    `groups` are those of by_group.by_trait.
    """

    system: str
    seeds: list[int]
    ccc: Figures
    interval: Intervals | None
    bootstrap: Intervals | None
    seed_deviation: Figures | None
    ccc_mean_of_folds: Figures
    agreement: dict[str, Figures]
    recall: float | None
    recall_deviation: float | None
    groups: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """The paired test of `first` against `second`: difference of their figures, p, and p after Holm's correction."""

    first: str
    second: str
    difference: Figures
    interval: Intervals | None
    p: Figures
    p_holm: Figures
    speakers: int
    assignments: int
    exact: bool
    least_p: float


@dataclass(frozen=True)
class PublishedScores:
    """The CCCs that a paper reports on this corpus, by system, with its source and its protocol."""

    source: str
    protocol: str
    ccc: dict[str, Figures]


@dataclass(frozen=True)
class TableSubject:
    """The data behind a table. `part` is the owner's test part under `official`, else "".

    `left_out` counts utterances that some system could not use: the table is over those that all systems predicted.
    """

    corpus: str
    protocol: str
    marks: tuple[str, ...]
    utterances: int
    speakers: int
    part: str = ""
    left_out: int = 0


@dataclass(frozen=True)
class SystemTable:
    """The whole table. `tests` has, for each system compared against, the comparisons of all others with it.

    `correlation` is `label_correlation` of the labels.
    """

    subject: TableSubject
    rows: list[SystemRow]
    reference: str
    tests: dict[str, list[Comparison]]
    correlation: list[list[float | None]]
    published: PublishedScores | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as results.json has them."""
        return dataclasses.asdict(self)


def system_table(
    subject: TableSubject,
    truth_UP: np.ndarray,
    groups: Sequence[str],
    folds: Sequence[int],
    systems: Mapping[str, SystemPredictions],
    *,
    reference: str,
    published: PublishedScores | None = None,
    traits: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> SystemTable:
    """The table of these systems, by name, in their order.

    `groups` is the speaker of each row, `folds` the fold that tested it, `traits` other values by name, such as a
    gender for each row. All systems are tested against `reference`, and against BASELINE if it is among them; each of
    the two is a family for Holm's correction. `seed` keys the random draws. Raises ValueError if `reference` is not
    among the systems, or if systems with several seeds have different ones.
    """
    if reference not in systems:
        raise ValueError(f"reference={reference!r} is not among the systems {list(systems)}")
    several = {each.seeds for each in systems.values() if len(each.seeds) > 1}
    if len(several) > 1:
        raise ValueError(f"the systems differ in their seeds, {sorted(several)}: compare runs of the same ones")
    against = dict.fromkeys([reference, *([BASELINE] if BASELINE in systems else [])])
    return SystemTable(
        subject=subject,
        rows=[_row(name, each, truth_UP, groups, folds, traits or {}, seed) for name, each in systems.items()],
        reference=reference,
        tests={second: compare_systems(truth_UP, groups, systems, second, seed=seed) for second in against},
        correlation=label_correlation(truth_UP),
        published=published,
    )


def compare_systems(
    truth_UP: np.ndarray, groups: Sequence[str], systems: Mapping[str, SystemPredictions], second: str, *, seed: int = 0
) -> list[Comparison]:
    """The comparison of each other system with `second`, corrected as one family."""
    tests: dict[str, PairedTest] = {
        first: paired_test(truth_UP, each.guess_SUP, systems[second].guess_SUP, groups, seed=seed)
        for first, each in systems.items()
        if first != second
    }
    holm = corrected(tests)
    return [Comparison(first, second, p_holm=holm[first], **dataclasses.asdict(test)) for first, test in tests.items()]


def label_correlation(truth_UP: np.ndarray) -> list[list[float | None]]:
    """Pearson's r between the primitives of the labels, 3x3 in the order of PRIMITIVES; None if one is constant."""
    truth_UP = np.asarray(truth_UP, np.float64)
    varies_P = np.ptp(truth_UP, axis=0) > 0
    deviation_P = np.where(varies_P, truth_UP.std(axis=0), 1.0)
    standard_UP = (truth_UP - truth_UP.mean(axis=0)) / deviation_P
    matrix_PP = standard_UP.T @ standard_UP / len(truth_UP)
    places = range(len(varies_P))
    return [[float(matrix_PP[a, b]) if varies_P[a] and varies_P[b] else None for b in places] for a in places]


def published_scores(kind: str) -> PublishedScores | None:
    """The scores that Li et al. (ICASSP 2021, arXiv 2102.06357) report for a `CorpusConfig.kind`, or None.

    Only those of preCPC, one of their four systems, are known here, as quoted in another publication.
    """
    match kind:
        case "iemocap":
            protocol = "5 folds, by session or at random not stated; mean of five runs"
            ccc = {"activation": 0.752, "valence": 0.752, "dominance": 0.691, "mean": 0.731}
        case "msp-podcast":
            protocol = "release and test part not stated; mean of five runs"
            ccc = {"activation": 0.706, "valence": 0.377, "dominance": 0.639}
            ccc["mean"] = sum(ccc.values()) / 3
        case _:
            return None
    return PublishedScores("Li et al., ICASSP 2021 (arXiv 2102.06357), as quoted elsewhere", protocol, {"precpc": ccc})


def _row(
    system: str,
    guesses: SystemPredictions,
    truth_UP: np.ndarray,
    groups: Sequence[str],
    folds: Sequence[int],
    traits: Mapping[str, Sequence[str]],
    seed: int,
) -> SystemRow:
    guess_SUP = with_seeds(truth_UP, guesses.guess_SUP)
    recalls = guesses.recalls
    return SystemRow(
        system=system,
        seeds=list(guesses.seeds),
        ccc=scores(truth_UP, guess_SUP),
        interval=interval(truth_UP, guess_SUP, groups),
        bootstrap=bootstrap_interval(truth_UP, guess_SUP, groups, seed=seed),
        seed_deviation=seed_deviation(truth_UP, guess_SUP),
        ccc_mean_of_folds=mean_of_folds(list(by_group(truth_UP, guess_SUP, folds).values())),
        agreement=agreement(truth_UP, guess_SUP),
        recall=float(np.mean(recalls)) if recalls else None,
        recall_deviation=float(np.std(recalls, ddof=1)) if len(recalls) > 1 else None,
        groups=by_trait(truth_UP, guess_SUP, groups, traits),
    )
