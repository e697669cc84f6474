"""precpc: the network of `cpcscale pretrain`, or of the transformers library; frozen, or trained further."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from cpcscale.emotion.encoders.networks import encoder_features
from cpcscale.emotion.systems.system import Features, System

if TYPE_CHECKING:
    from cpcscale.emotion.inputs import PreparedCorpus
    from cpcscale.emotion.protocol.splits import Split
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


class Pretrained(System):
    """Frames of a network that was pretrained on unlabelled speech."""

    name = "precpc"
    takes_network = True
    needs_checkpoint = True
    takes_weights = True

    def trains_encoder(self, recipe: EmotionRecipe) -> bool:
        return not recipe.encoder.frozen

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> Features | None:
        return None if encoder is None or self.trains_encoder(recipe) else encoder_features(recipe, encoder)

    def fold_features(self, recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
        assert prepared.encoder is not None
        return encoder_features(recipe, copy.deepcopy(prepared.encoder))
