"""Classic systems: one vector an utterance, standardised, and support vector machines on it. Pure, and deterministic.

U utterances, F features, P primitives, T frames, C channels. A support vector machine's time grows with the square of
its training rows: hundreds to a few thousand utterances are what these systems are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, SVR

from cpcscale import config
from cpcscale.emotion.protocol.splits import speaker_folds
from cpcscale.emotion.scores.ccc_intervals import scores, unweighted_average_recall
from cpcscale.errors import UserError

KERNELS = ("rbf", "linear")
INNER_FOLDS = 4
# Standardised features beyond it are drawn back to it: one wild ratio (eGeMAPS has some at 20 deviations) would else
# put its utterance far from all others, where a radial kernel answers with the mean.
_REACH = 3.0


@dataclass(kw_only=True)
class SVMConfig:
    """A support vector machine, for regression (SVR) or classification (SVC); the defaults are scikit-learn's."""

    C: float = 1.0  # cost of an error: the larger, the closer the fit
    epsilon: float = 0.1  # regression: errors up to it cost nothing, on the label scale of [-1, 1]
    kernel: str = "rbf"  # rbf, or linear, which has no gamma
    gamma: float = 1.0  # rbf: exp(-gamma |x - y|^2 / F), so that one value suits any number of features

    def __post_init__(self) -> None:
        config.check_choice("svm.kernel", self.kernel, KERNELS)
        config.at_least(0, **{"svm.C": self.C, "svm.epsilon": self.epsilon, "svm.gamma": self.gamma})
        for name, value in {"svm.C": self.C, "svm.gamma": self.gamma}.items():
            if value == 0:
                raise UserError(f"{name}=0 fits nothing: give a value above 0, such as 1")


# 16 trials. Of equals the first wins, so the smoother machine comes first.
GRID = tuple(
    SVMConfig(C=cost, epsilon=epsilon, gamma=gamma)
    for cost, gamma, epsilon in product((0.3, 1.0, 3.0, 10.0), (0.3, 1.0), (0.1, 0.05))
)


class Regressor:
    """One support vector regression a primitive, on features standardised by the rows it is fitted on."""

    def __init__(self, settings: SVMConfig) -> None:
        self._settings = settings
        self._machines: list[Pipeline] = []

    def fit(self, x_UF: np.ndarray, truth_UP: np.ndarray) -> Regressor:
        """Itself, fitted to labels on [-1, 1]. Raises ValueError where a feature or label is not finite."""
        gamma = self._settings.gamma / x_UF.shape[1]
        options: dict[str, Any] = {"C": self._settings.C, "kernel": self._settings.kernel, "gamma": gamma}
        self._machines = [
            _standardised(SVR(epsilon=self._settings.epsilon, **options)).fit(x_UF, truth_U) for truth_U in truth_UP.T
        ]
        return self

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """float64 [U, P] on the labels' scale; not clipped to it."""
        assert self._machines, "predict before fit"
        return np.stack([machine.predict(x_UF) for machine in self._machines], axis=1)


class Classifier:
    """A support vector classification whose classes weigh the same, however many rows each has."""

    def __init__(self, settings: SVMConfig) -> None:
        self._settings = settings
        self._machine: Pipeline | None = None

    def fit(self, x_UF: np.ndarray, classes_U: Sequence[str]) -> Classifier:
        """Itself, fitted. Raises UserError where all rows are of one class, ValueError for a feature not finite."""
        if len(set(classes_U)) < 2:
            raise UserError(
                f"{len(classes_U)} training rows have {len(set(classes_U))} class between them, and a classifier takes "
                "two: use a corpus with more, or fewer folds"
            )
        gamma = self._settings.gamma / x_UF.shape[1]
        machine = SVC(C=self._settings.C, kernel=self._settings.kernel, gamma=gamma, class_weight="balanced")
        self._machine = _standardised(machine).fit(x_UF, np.asarray(classes_U))
        return self

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """The class of each row, [U] of str."""
        assert self._machine is not None, "predict before fit"
        return self._machine.predict(x_UF)


def choose(
    x_UF: np.ndarray,
    truth_UP: np.ndarray,
    groups: Sequence[str],
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
) -> SVMConfig:
    """The config of `grid` with the greatest mean CCC, out of fold and pooled, on `folds` that share no group.

    Pass the training rows of an outer fold, with the speaker of each ("" for rows to leave out): the test speakers are
    then no part of the choice. The folds are those of splits.speaker_folds for this `key`, or one a group where there
    are fewer. A grid of one is not tried, just returned. Raises UserError for rows of fewer than two groups.
    """

    def score(settings: SVMConfig) -> float:
        guess_UP = np.full(truth_UP.shape, np.nan)
        for train, test in parts:
            guess_UP[test] = Regressor(settings).fit(x_UF[train], truth_UP[train]).predict(x_UF[test])
        judged_U = ~np.isnan(guess_UP[:, 0])
        return scores(truth_UP[judged_U], guess_UP[judged_U])["mean"]

    if len(grid) == 1:
        return grid[0]
    parts = _inner(groups, folds, key)
    return max(grid, key=score)


def choose_classifier(
    x_UF: np.ndarray,
    classes_U: Sequence[str],
    groups: Sequence[str],
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
) -> SVMConfig:
    """As `choose`, by the unweighted average recall. Configs that differ in `epsilon` alone are tried once."""

    def score(settings: SVMConfig) -> float:
        guess_U = np.full(len(classes_U), "", dtype=object)
        for train, test in parts:
            known = Classifier(settings).fit(x_UF[train], [classes_U[row] for row in train])
            guess_U[test] = known.predict(x_UF[test])
        judged = [row for row, guess in enumerate(guess_U) if guess]
        return unweighted_average_recall([classes_U[row] for row in judged], [guess_U[row] for row in judged])

    if len(grid) == 1:
        return grid[0]
    parts = _inner(groups, folds, key)
    distinct = {(one.C, one.kernel, one.gamma): one for one in reversed(grid)}
    return max(reversed(distinct.values()), key=score)


def classify(
    x_UF: np.ndarray,
    classes_U: Sequence[str],
    groups: Sequence[str],
    x_VF: np.ndarray,
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
) -> list[str]:
    """The class guessed for each of V test rows, by a classifier fitted to those of U training rows that have one.

    Its config is that of `choose_classifier` on the training rows. Raises UserError where they are of one class.
    """
    rows = [row for row, name in enumerate(classes_U) if name]
    known, voices = [classes_U[row] for row in rows], [groups[row] for row in rows]
    settings = choose_classifier(x_UF[rows], known, voices, grid, folds, key)
    return [str(name) for name in Classifier(settings).fit(x_UF[rows], known).predict(x_VF)]


def _standardised(machine: SVR | SVC) -> Pipeline:
    return make_pipeline(
        StandardScaler(), FunctionTransformer(np.clip, kw_args={"a_min": -_REACH, "a_max": _REACH}), machine
    )


def _inner(groups: Sequence[str], folds: int, key: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) of each inner fold."""
    known = [group for group in groups if group]
    count = len(set(known))
    if count < 2:
        raise UserError(
            f"{len(groups)} training rows have {count} known speaker between them: choosing a config takes two, one to "
            "fit and one to judge; use a corpus with more speakers, or give a grid of one config"
        )
    names = np.asarray(groups)
    held = [np.isin(names, voices) for voices in speaker_folds(known, min(folds, count), key)]
    return [(np.flatnonzero((names != "") & ~inside), np.flatnonzero(inside)) for inside in held]
