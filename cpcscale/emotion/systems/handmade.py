"""Systems whose features are a formula, without a network: the classic ones and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpcscale.emotion.systems.system import Features, System

if TYPE_CHECKING:
    from cpcscale.emotion.encoders.arrays import Arrays
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


@dataclass(frozen=True)
class HandmadeFeatures:
    """Features (see system.py) that `measure` makes of a float waveform in [-1, 1).

    `kind` is which of a system's formulas it is, where the system has several; `licence` is that of the library behind
    it, where it limits what the features may be used for.
    """

    name: str
    digest: str
    measure: Callable[[np.ndarray], np.ndarray]
    whole: bool = False
    kind: str = ""
    least_samples: int = 1
    licence: str = ""

    def __call__(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.measure(wave.astype(np.float32) / 32768) for wave in waves]

    def description(self) -> dict[str, Any]:
        return {"kind": "handmade", "which": self.kind, "digest": self.digest}

    def arrays(self) -> Arrays:
        return {}


class HandmadeSystem(System):
    """A system whose features are the same in all folds."""

    def features(self, kind: str = "") -> HandmadeFeatures:
        """Its features; `kind` is which, where it has several. Raises UserError where a library is missing."""
        raise NotImplementedError

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> Features:
        return self.features(recipe.prosody)
