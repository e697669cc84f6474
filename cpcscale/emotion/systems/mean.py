"""mean: predicts the mean of the training labels, whatever it is given. The control that has to score 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpcscale.emotion.systems.system import System

if TYPE_CHECKING:
    from cpcscale.emotion.recipe import EmotionRecipe


class Mean(System):
    """A constant; takes no audio."""

    name = "mean"
    regressors = ("mean",)
    not_swept = "it has no settings"

    def marks(self, recipe: EmotionRecipe) -> list[str]:
        return []
