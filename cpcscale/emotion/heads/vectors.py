"""Heads on one standardised vector an utterance: what they share, and the choice of a config on inner folds.

U utterances, F features, P primitives. Pure and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from cpcscale.emotion.heads.blocks import REACH, UNSCALED, Block, BlockScale
from cpcscale.emotion.protocol.splits import speaker_folds
from cpcscale.emotion.scores.ccc_intervals import scores
from cpcscale.errors import UserError

# Imported where something is fitted: it takes seconds and 100 MB, which applying a recogniser does without.
if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from sklearn.pipeline import Pipeline

INNER_FOLDS = 4


class Fitted(Protocol):
    """A regression of one primitive that was fitted, as arrays."""

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """Predictions float64 [U]."""

    def arrays(self) -> Mapping[str, np.ndarray]:
        """All that it is made again from."""


class Settings(Protocol):
    """The settings of a kind of regression."""

    @property
    def components(self) -> int:
        """Of the blocks that are reduced to principal components: the number of these."""

    def regressor(self, features: int) -> BaseEstimator:
        """An unfitted one for vectors of so many features."""

    def fitted(self, machine: Pipeline) -> Fitted:
        """That of a fitted machine."""


Config = TypeVar("Config", bound=Settings)


class Regressor:
    """A regression for each primitive, on features standardised by the training rows, or scaled by blocks."""

    def __init__(self, settings: Settings, scale: BlockScale = UNSCALED) -> None:
        self._settings, self.scale = settings, scale
        self._machines: list[Pipeline] = []

    @property
    def fitted(self) -> tuple[Fitted, ...]:
        """What was fitted, for each primitive."""
        return tuple(self._settings.fitted(machine) for machine in self._machines)

    def fit(self, x_UF: np.ndarray, truth_UP: np.ndarray) -> Regressor:
        """Fits to labels [U, P] on [-1, 1] and returns itself. Raises ValueError for values that are not finite."""
        x_UF, features = self.scale(x_UF), self.scale.features(x_UF)
        self._machines = [
            with_scaler(self._settings.regressor(features), self.scale).fit(x_UF, truth_U) for truth_U in truth_UP.T
        ]
        return self

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """Predictions float64 [U, P] on [-1, 1], not clipped."""
        assert self._machines, "predict before fit"
        x_UF = self.scale(x_UF)
        return np.stack([machine.predict(x_UF) for machine in self._machines], axis=1)


def choose_regressor_config(
    x_UF: np.ndarray,
    truth_UP: np.ndarray,
    groups: Sequence[str],
    grid: Sequence[Config],
    folds: int = INNER_FOLDS,
    key: str = "0",
    blocks: Sequence[Block] = (),
) -> Config:
    """The config of `grid` with the highest mean CCC in cross-validation over whole groups, predictions pooled.

    Pass only the training rows of an outer fold, so that test speakers play no part in the choice. `groups` is the
    speaker of each row ("" leaves the row out). The inner folds are those of splits.speaker_folds for this `key`, at
    most one for each group. `blocks` are those of the vectors, scaled anew in each inner fold. A grid of one is
    returned untried. Raises UserError for fewer than two groups.
    """

    def score(settings: Config) -> float:
        guess_UP = np.full(truth_UP.shape, np.nan)
        for (train, test), scale in zip(parts, scales(settings.components), strict=True):
            guess_UP[test] = Regressor(settings, scale).fit(x_UF[train], truth_UP[train]).predict(x_UF[test])
        judged_U = ~np.isnan(guess_UP[:, 0])
        return scores(truth_UP[judged_U], guess_UP[judged_U])["mean"]

    if len(grid) == 1:
        return grid[0]
    parts = inner_folds(groups, folds, key)
    scales = scales_of(x_UF, parts, blocks)
    return max(grid, key=score)


def scales_of(
    x_UF: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]], blocks: Sequence[Block]
) -> Callable[[int], list[BlockScale]]:
    """Gives the scale of each inner fold, of its training rows, for a number of components; each is made once."""

    @cache
    def scales(components: int) -> list[BlockScale]:
        return [BlockScale.of(x_UF[train], blocks, components) for train, _ in parts]

    return scales


def with_scaler(machine: BaseEstimator, scale: BlockScale) -> Pipeline:
    """The machine behind a scaler that clips; behind one that does nothing where `scale` has scaled already."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    scaler = StandardScaler(with_mean=not scale.blocks, with_std=not scale.blocks)
    return make_pipeline(scaler, FunctionTransformer(np.clip, kw_args={"a_min": -REACH, "a_max": REACH}), machine)


def standardised_by(machine: Pipeline, features: int) -> dict[str, np.ndarray]:
    """What the scaler of a fitted machine standardises so many features by."""
    scaler = machine[0]
    if scaler.mean_ is None:
        return {"mean_F": np.zeros(features), "deviation_F": np.ones(features)}
    return {"mean_F": scaler.mean_, "deviation_F": scaler.scale_}


def inner_folds(groups: Sequence[str], folds: int, key: str) -> list[tuple[np.ndarray, np.ndarray]]:
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
