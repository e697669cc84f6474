"""random: an untrained network, the control that shows what pretraining adds; it keeps its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpcscale.emotion.audio.prefetch import flatten_windows
from cpcscale.emotion.encoders.networks import encoder_features, input_level, measure_level, untrained_encoder
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
        return encoder_features(recipe, untrained_encoder(recipe, encoder, input_level(encoder)))

    def fold_features(self, recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
        return untrained_features(recipe, prepared, split)


def untrained_features(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
    """Those of an untrained network, at the level of the known one, else of the fold's training speakers."""
    known = prepared.encoder
    assert prepared.waves is not None
    level = (
        measure_level(flatten_windows(prepared.waves.take(split.train_rows))) if known is None else input_level(known)
    )
    return encoder_features(recipe, untrained_encoder(recipe, known, level))
