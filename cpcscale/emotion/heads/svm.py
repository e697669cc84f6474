"""Support vector machines on one standardised vector an utterance, for the classic systems. Pure and deterministic.

U utterances, F features, P primitives. The time of a support vector machine grows with the square of its training rows:
use these systems for hundreds to a few thousand utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from cpcscale import config
from cpcscale.emotion.protocol.splits import speaker_folds
from cpcscale.emotion.scores.ccc_intervals import scores, unweighted_average_recall
from cpcscale.errors import UserError

# Imported where something is fitted: it takes seconds and 100 MB, which applying a recogniser does without.
if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline
    from sklearn.svm import SVC, SVR

KERNELS = ("rbf", "linear")
INNER_FOLDS = 4
# Standardised features are clipped to +-_REACH: one outlier (eGeMAPS has some at 20 deviations) would put its utterance
# far from all others, where a radial kernel predicts the mean.
_REACH = 3.0


@dataclass(kw_only=True)
class SVMConfig:
    """A support vector machine, for regression (SVR) or classification (SVC); the defaults are scikit-learn's."""

    # cost of an error: the larger, the closer the fit
    C: float = 1.0
    # regression: errors up to it cost nothing, on the label scale of [-1, 1]
    epsilon: float = 0.1
    # rbf, or linear, which ignores gamma
    kernel: str = "rbf"
    # rbf: the kernel is exp(-gamma |x - y|^2 / F), so that one value suits any number of features F
    gamma: float = 1.0

    def __post_init__(self) -> None:
        config.check_choice("svm.kernel", self.kernel, KERNELS)
        config.at_least(0, **{"svm.C": self.C, "svm.epsilon": self.epsilon, "svm.gamma": self.gamma})
        for name, value in {"svm.C": self.C, "svm.gamma": self.gamma}.items():
            if value == 0:
                raise UserError(f"{name}=0 fits nothing: give a value above 0, such as 1")


# 16 configs. On a tie the first wins, so smoother machines come first.
GRID = tuple(
    SVMConfig(C=cost, epsilon=epsilon, gamma=gamma)
    for cost, gamma, epsilon in product((0.3, 1.0, 3.0, 10.0), (0.3, 1.0), (0.1, 0.05))
)


@dataclass(frozen=True)
class SupportVectors:
    """A fitted support vector regression with what it standardises by, as float64 arrays: V vectors of F features.

    The prediction for x is sum_v dual_v k(v, s) + intercept of s, x standardised and clipped (Smola and Schoelkopf
    2004, Statistics and Computing 14, eq. 12), where k is the product of two vectors, or exp(-gamma |v - s|^2).
    """

    mean_F: np.ndarray
    deviation_F: np.ndarray
    vector_VF: np.ndarray
    dual_V: np.ndarray
    intercept: np.ndarray
    # Negative: the kernel is linear.
    gamma: np.ndarray

    @classmethod
    def of(cls, machine: Pipeline) -> SupportVectors:
        """Those of a fitted machine."""
        scaler, _, svr = (step for _, step in machine.steps)
        gamma = np.array(svr.gamma if svr.kernel == "rbf" else -1.0)
        duals, intercept = svr.dual_coef_[0], svr.intercept_[0]
        return cls(scaler.mean_, scaler.scale_, svr.support_vectors_, duals, np.array(intercept), gamma)

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """Predictions float64 [U]."""
        x_UF = np.clip((x_UF - self.mean_F) / self.deviation_F, -_REACH, _REACH).astype(np.float64)
        kernel_UV = x_UF @ self.vector_VF.T
        if self.gamma >= 0:
            squares_UV = (x_UF**2).sum(axis=1)[:, None] + (self.vector_VF**2).sum(axis=1) - 2 * kernel_UV
            kernel_UV = np.exp(-self.gamma * np.maximum(squares_UV, 0))
        return np.asarray(kernel_UV @ self.dual_V + self.intercept)


class Regressor:
    """A support vector regression for each primitive, on features standardised by the training rows."""

    def __init__(self, settings: SVMConfig) -> None:
        self._settings = settings
        self._machines: list[Pipeline] = []

    @property
    def support_vectors(self) -> tuple[SupportVectors, ...]:
        """What was fitted, for each primitive."""
        return tuple(SupportVectors.of(machine) for machine in self._machines)

    def fit(self, x_UF: np.ndarray, truth_UP: np.ndarray) -> Regressor:
        """Fits to labels [U, P] on [-1, 1] and returns itself. Raises ValueError for values that are not finite."""
        from sklearn.svm import SVR

        gamma = self._settings.gamma / x_UF.shape[1]
        options: dict[str, Any] = {"C": self._settings.C, "kernel": self._settings.kernel, "gamma": gamma}
        self._machines = [
            _standardised(SVR(epsilon=self._settings.epsilon, **options)).fit(x_UF, truth_U) for truth_U in truth_UP.T
        ]
        return self

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """Predictions float64 [U, P] on [-1, 1], not clipped."""
        assert self._machines, "predict before fit"
        return np.stack([machine.predict(x_UF) for machine in self._machines], axis=1)


class Classifier:
    """A support vector classifier in which all classes have the same weight, however many rows each has."""

    def __init__(self, settings: SVMConfig) -> None:
        self._settings = settings
        self._machine: Pipeline | None = None

    def fit(self, x_UF: np.ndarray, classes_U: Sequence[str]) -> Classifier:
        """Fits and returns itself. Raises UserError for a single class, ValueError for a feature that is not finite."""
        if len(set(classes_U)) < 2:
            raise UserError(
                f"the {len(classes_U)} training rows have {len(set(classes_U))} class, and a classifier needs 2: use a "
                "corpus with more, or fewer folds"
            )
        from sklearn.svm import SVC

        gamma = self._settings.gamma / x_UF.shape[1]
        machine = SVC(C=self._settings.C, kernel=self._settings.kernel, gamma=gamma, class_weight="balanced")
        self._machine = _standardised(machine).fit(x_UF, np.asarray(classes_U))
        return self

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """The class of each row, [U] of str."""
        assert self._machine is not None, "predict before fit"
        return self._machine.predict(x_UF)


def choose_regressor_config(
    x_UF: np.ndarray,
    truth_UP: np.ndarray,
    groups: Sequence[str],
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
) -> SVMConfig:
    """The config of `grid` with the highest mean CCC in cross-validation over whole groups, predictions pooled.

    Pass only the training rows of an outer fold, so that test speakers play no part in the choice. `groups` is the
    speaker of each row ("" leaves the row out). The inner folds are those of splits.speaker_folds for this `key`, at
    most one for each group. A grid of one is returned untried. Raises UserError for fewer than two groups.
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


def choose_classifier_config(
    x_UF: np.ndarray,
    classes_U: Sequence[str],
    groups: Sequence[str],
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
) -> SVMConfig:
    """As `choose_regressor_config`, but by unweighted average recall; `epsilon` is not searched."""

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
    """The predicted class of each of V test rows, by a classifier fitted to the training rows whose class is not "".

    Its config is that of `choose_classifier_config` on the training rows. Raises UserError for a single class.
    """
    rows = [row for row, name in enumerate(classes_U) if name]
    known, speakers = [classes_U[row] for row in rows], [groups[row] for row in rows]
    settings = choose_classifier_config(x_UF[rows], known, speakers, grid, folds, key)
    return [str(name) for name in Classifier(settings).fit(x_UF[rows], known).predict(x_VF)]


def _standardised(machine: SVR | SVC) -> Pipeline:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    return make_pipeline(
        StandardScaler(), FunctionTransformer(np.clip, kw_args={"a_min": -_REACH, "a_max": _REACH}), machine
    )


def _inner(groups: Sequence[str], folds: int, key: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) of each inner fold."""
    known = [group for group in groups if group]
    count = len(set(known))
    if count < 2:
        raise UserError(
            f"the {len(groups)} training rows have {count} known speaker, and choosing a config needs 2, one to fit "
            "and one to judge: use a corpus with more speakers, or svm_search=false"
        )
    names = np.asarray(groups)
    held = [np.isin(names, part) for part in speaker_folds(known, min(folds, count), key)]
    return [(np.flatnonzero((names != "") & ~inside), np.flatnonzero(inside)) for inside in held]
