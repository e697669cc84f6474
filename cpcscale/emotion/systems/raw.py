"""raw: an untrained network, trained with the head on the labels alone (arXiv 2102.06357, Table 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpcscale.emotion.systems.random import untrained_features
from cpcscale.emotion.systems.system import Features, System

if TYPE_CHECKING:
    from cpcscale.emotion.inputs import PreparedCorpus
    from cpcscale.emotion.protocol.splits import Split
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


class Raw(System):
    """Waveforms: the network is part of what is trained."""

    name = "raw"
    takes_network = True
    draws_weights = True

    def trains_encoder(self, recipe: EmotionRecipe) -> bool:
        return True

    def encoder_rate(self, recipe: EmotionRecipe) -> float:
        return recipe.fit.learning_rate

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> None:
        return None

    def fold_features(self, recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
        return untrained_features(recipe, prepared, split)
