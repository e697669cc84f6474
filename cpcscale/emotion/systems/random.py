"""random: an untrained network, the control that shows what pretraining adds; it keeps its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpcscale.emotion.audio.prefetch import flatten_windows
from cpcscale.emotion.encoders.networks import encoder_features, untrained_on
from cpcscale.emotion.systems.system import Features, System

if TYPE_CHECKING:
    from cpcscale.emotion.inputs import PreparedCorpus
    from cpcscale.emotion.protocol.splits import Split
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


class Random(System):
    """Frames of a network with random weights, at the input level of the pretrained one if there is one."""

    name = "random"
    takes_network = True
    draws_weights = True

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> Features | None:
        if encoder is None:
            return None
        return encoder_features(recipe, encoder.untrained(recipe.seed))

    def fold_features(self, recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
        return untrained_features(recipe, prepared, split)


def untrained_features(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
    """Those of an untrained network, at the level of the known one, else of the fold's training speakers."""
    known, waves = prepared.encoder, prepared.waves
    assert waves is not None
    if known is not None:
        return encoder_features(recipe, known.untrained(recipe.seed))
    return encoder_features(recipe, untrained_on(recipe, lambda: flatten_windows(waves.take(split.train_rows))))
