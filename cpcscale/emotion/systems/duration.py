"""duration: the seconds of the utterance alone, the control that shows what its length gives away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpcscale import audio
from cpcscale.emotion.systems.functionals import SEARCHED_ALREADY
from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem

if TYPE_CHECKING:
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


class Duration(HandmadeSystem):
    """A vector an utterance, of one number. It has the duration whatever the recipe says of others."""

    name = "duration"
    regressors = ("svr", "ridge")
    not_swept = SEARCHED_ALREADY

    def features(self, kind: str = "") -> HandmadeFeatures:
        return HandmadeFeatures(self.name, "seconds 1", _seconds, whole=True, by_slices=True)

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> HandmadeFeatures:
        return self.features()


def _seconds(wave_S: audio.Sliced) -> np.ndarray:
    return np.array([len(wave_S) / audio.RATE_HZ], np.float32)
