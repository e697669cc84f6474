"""Support vector machines on one standardised vector an utterance, for the classic systems. Pure and deterministic.

U utterances, F features, P primitives. The time of a support vector machine grows with the square of its training rows:
use these systems for hundreds to a few thousand utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np

from cpcscale import config
from cpcscale.emotion.heads.blocks import COMPONENTS, UNSCALED, Block, BlockScale, standardised
from cpcscale.emotion.heads.vectors import INNER_FOLDS, inner_folds, scales_of, standardised_by, with_scaler
from cpcscale.emotion.scores.ccc_intervals import unweighted_average_recall
from cpcscale.errors import UserError

# Imported where something is fitted: it takes seconds and 100 MB, which applying a recogniser does without.
if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline
    from sklearn.svm import SVC, SVR

KERNELS = ("rbf", "linear")


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
    # readout=components and slopes+components: how many principal components of the statistics of frames are taken
    components: int = field(default=COMPONENTS[-1], metadata=config.ADDED)

    def __post_init__(self) -> None:
        config.at_least(1, **{"svm.components": self.components})
        config.check_choice("svm.kernel", self.kernel, KERNELS)
        config.at_least(0, **{"svm.C": self.C, "svm.epsilon": self.epsilon, "svm.gamma": self.gamma})
        for name, value in {"svm.C": self.C, "svm.gamma": self.gamma}.items():
            if value == 0:
                raise UserError(f"{name}=0 fits nothing: give a value above 0, such as 1")

    def regressor(self, features: int) -> SVR:
        """An unfitted regression on vectors of so many features."""
        from sklearn.svm import SVR

        return SVR(epsilon=self.epsilon, C=self.C, kernel=self.kernel, gamma=self.gamma / features)

    def classifier(self, features: int) -> SVC:
        """An unfitted classifier in which all classes weigh the same."""
        from sklearn.svm import SVC

        return SVC(C=self.C, kernel=self.kernel, gamma=self.gamma / features, class_weight="balanced")

    def fitted(self, machine: Pipeline) -> SupportVectors:
        """What a fitted regression is."""
        return SupportVectors.of(machine)


# 16 configs. On a tie the first wins, so smoother machines come first.
_COSTS_AND_GAMMAS = tuple(product((0.3, 1.0, 3.0, 10.0), (0.3, 1.0)))
GRID = tuple(
    SVMConfig(C=cost, epsilon=epsilon, gamma=gamma)
    for (cost, gamma), epsilon in product(_COSTS_AND_GAMMAS, (0.1, 0.05))
)
# 16 configs too, where a block is reduced to principal components.
COMPONENTS_GRID = tuple(
    SVMConfig(C=cost, gamma=gamma, components=components)
    for (cost, gamma), components in product(_COSTS_AND_GAMMAS, COMPONENTS)
)


@dataclass(frozen=True)
class _Vectors:
    """What a fitted machine standardises by, and its V support vectors of F features, as float64 arrays."""

    mean_F: np.ndarray
    deviation_F: np.ndarray
    vector_VF: np.ndarray
    # Negative: the kernel is linear.
    gamma: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it is made again from."""
        return dict(vars(self))

    def kernel(self, x_UF: np.ndarray) -> np.ndarray:
        """[U, V]: the kernel of each x, standardised and clipped, with each support vector."""
        x_UF = standardised(x_UF, self.mean_F, self.deviation_F)
        kernel_UV = x_UF @ self.vector_VF.T
        if self.gamma >= 0:
            squares_UV = (x_UF**2).sum(axis=1)[:, None] + (self.vector_VF**2).sum(axis=1) - 2 * kernel_UV
            kernel_UV = np.exp(-self.gamma * np.maximum(squares_UV, 0))
        return np.asarray(kernel_UV)


@dataclass(frozen=True)
class SupportVectors(_Vectors):
    """A fitted support vector regression.

    The prediction for x is sum_v dual_v k(v, x) + intercept (Smola and Schoelkopf 2004, Statistics and Computing 14,
    eq. 12), where k is the product of two vectors, or exp(-gamma |v - x|^2).
    """

    dual_V: np.ndarray
    intercept: np.ndarray

    @classmethod
    def of(cls, machine: Pipeline) -> SupportVectors:
        """Those of a fitted machine."""
        svr = machine[-1]
        return cls(**_vectors_of(machine), dual_V=svr.dual_coef_[0], intercept=np.array(svr.intercept_[0]))

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """Predictions float64 [U]."""
        return np.asarray(self.kernel(x_UF) @ self.dual_V + self.intercept)


@dataclass(frozen=True)
class SupportClasses(_Vectors):
    """A fitted support vector classifier of N classes: each pair of classes votes, and most votes win.

    `class_V` is the class of each support vector, `dual_NV` its coefficient against each other class: against class n
    in row n, where n is below its own, else in row n - 1 (Chang and Lin 2011, LIBSVM, section 7). `intercept_Q` has
    one of each pair, (0, 1), (0, 2) ...
    """

    class_V: np.ndarray
    dual_NV: np.ndarray
    intercept_Q: np.ndarray

    @classmethod
    def of(cls, machine: Pipeline) -> SupportClasses:
        """Those of a fitted machine."""
        svc = machine[-1]
        # scikit-learn turns the sign where there are two classes.
        sign = -1 if len(svc.classes_) == 2 else 1
        class_V = np.repeat(np.arange(len(svc.classes_)), svc.n_support_)
        return cls(
            **_vectors_of(machine), class_V=class_V, dual_NV=sign * svc.dual_coef_, intercept_Q=sign * svc.intercept_
        )

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """The number of the class of each row, int64 [U]; of equally many votes the first class."""
        kernel_UV = self.kernel(x_UF)
        count = len(self.dual_NV) + 1
        votes_UN = np.zeros((len(x_UF), count), int)
        for pair, (first, second) in enumerate(combinations(range(count), 2)):
            dual_V = np.where(self.class_V == first, self.dual_NV[second - 1], 0)
            dual_V = np.where(self.class_V == second, self.dual_NV[first], dual_V)
            wins_U = kernel_UV @ dual_V + self.intercept_Q[pair] > 0
            votes_UN[np.arange(len(x_UF)), np.where(wins_U, first, second)] += 1
        return votes_UN.argmax(axis=1)


def _vectors_of(machine: Pipeline) -> dict[str, np.ndarray]:
    vectors = machine[-1]
    vector_VF, gamma = vectors.support_vectors_, np.array(vectors.gamma if vectors.kernel == "rbf" else -1.0)
    return {**standardised_by(machine, vector_VF.shape[1]), "vector_VF": vector_VF, "gamma": gamma}


class Classifier:
    """A support vector classifier in which all classes have the same weight, however many rows each has."""

    def __init__(self, settings: SVMConfig, scale: BlockScale = UNSCALED) -> None:
        self._settings, self.scale = settings, scale
        self._machine: Pipeline | None = None

    def fit(self, x_UF: np.ndarray, classes_U: Sequence[str]) -> Classifier:
        """Fits and returns itself. Raises UserError for a single class, ValueError for a feature that is not finite."""
        if len(set(classes_U)) < 2:
            raise UserError(
                f"the {len(classes_U)} training rows have {len(set(classes_U))} class, and a classifier needs 2: use a "
                "corpus with more, or fewer folds"
            )
        machine = self._settings.classifier(self.scale.features(x_UF))
        self._machine = with_scaler(machine, self.scale).fit(self.scale(x_UF), np.asarray(classes_U))
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that it knows, sorted."""
        assert self._machine is not None, "classes before fit"
        return tuple(map(str, self._machine.classes_))

    @property
    def support_vectors(self) -> SupportClasses:
        """What was fitted."""
        assert self._machine is not None, "support_vectors before fit"
        return SupportClasses.of(self._machine)

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """The class of each row, [U] of str."""
        assert self._machine is not None, "predict before fit"
        return self._machine.predict(self.scale(x_UF))


def choose_classifier_config(
    x_UF: np.ndarray,
    classes_U: Sequence[str],
    groups: Sequence[str],
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
    blocks: Sequence[Block] = (),
) -> SVMConfig:
    """As `choose_regressor_config`, but by unweighted average recall; `epsilon` is not searched."""

    def score(settings: SVMConfig) -> float:
        guess_U = np.full(len(classes_U), "", dtype=object)
        for (train, test), scale in zip(parts, scales(settings.components), strict=True):
            known = Classifier(settings, scale).fit(x_UF[train], [classes_U[row] for row in train])
            guess_U[test] = known.predict(x_UF[test])
        judged = [row for row, guess in enumerate(guess_U) if guess]
        return unweighted_average_recall([classes_U[row] for row in judged], [guess_U[row] for row in judged])

    if len(grid) == 1:
        return grid[0]
    parts = inner_folds(groups, folds, key)
    scales = scales_of(x_UF, parts, blocks)
    distinct = {(one.C, one.kernel, one.gamma, one.components): one for one in reversed(grid)}
    return max(reversed(distinct.values()), key=score)


def chosen_classifier(
    x_UF: np.ndarray,
    classes_U: Sequence[str],
    groups: Sequence[str],
    grid: Sequence[SVMConfig] = GRID,
    folds: int = INNER_FOLDS,
    key: str = "0",
    blocks: Sequence[Block] = (),
) -> Classifier:
    """A classifier fitted to the rows whose class is not "".

    Its config is that of `choose_classifier_config` on them. Raises UserError for a single class.
    """
    rows = [row for row, name in enumerate(classes_U) if name]
    known, speakers = [classes_U[row] for row in rows], [groups[row] for row in rows]
    settings = choose_classifier_config(x_UF[rows], known, speakers, grid, folds, key, blocks)
    scale = BlockScale.of(x_UF[rows], blocks, settings.components)
    return Classifier(settings, scale).fit(x_UF[rows], known)
