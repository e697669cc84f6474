"""Ridge regression on one standardised vector an utterance: a head that keeps no row of its training.

U utterances, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from cpcscale.emotion.heads.blocks import COMPONENTS, standardised
from cpcscale.emotion.heads.vectors import standardised_by

# Imported where something is fitted, as in svm.py.
if TYPE_CHECKING:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class RidgeConfig:
    """A ridge regression: `alpha` is the weight of the squared weights, for each feature of the vector.

    `components` as in SVMConfig.
    """

    alpha: float = 1.0
    components: int = COMPONENTS[-1]

    def regressor(self, features: int) -> Ridge:
        """An unfitted one for vectors of so many features."""
        from sklearn.linear_model import Ridge

        return Ridge(alpha=self.alpha * features)

    def fitted(self, machine: Pipeline) -> LinearWeights:
        """What a fitted one is."""
        return LinearWeights.of(machine)


# On a tie the first wins, so smoother ones come first.
_ALPHAS = (10.0, 3.0, 1.0, 0.3, 0.1)
GRID = tuple(map(RidgeConfig, _ALPHAS))
# Where a block is reduced to principal components.
COMPONENTS_GRID = tuple(RidgeConfig(*each) for each in product(_ALPHAS, COMPONENTS))


@dataclass(frozen=True)
class LinearWeights:
    """A fitted ridge regression with what it standardises by, as float64 arrays."""

    mean_F: np.ndarray
    deviation_F: np.ndarray
    weight_F: np.ndarray
    intercept: np.ndarray

    @classmethod
    def of(cls, machine: Pipeline) -> LinearWeights:
        """That of a fitted machine."""
        ridge = machine[-1]
        standardises_by = standardised_by(machine, len(ridge.coef_))
        return cls(**standardises_by, weight_F=ridge.coef_, intercept=np.array(ridge.intercept_))

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it is made again from."""
        return dict(vars(self))

    def predict(self, x_UF: np.ndarray) -> np.ndarray:
        """Predictions float64 [U]."""
        return np.asarray(standardised(x_UF, self.mean_F, self.deviation_F) @ self.weight_F + self.intercept)
