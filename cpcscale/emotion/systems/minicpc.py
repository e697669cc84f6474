"""minicpc: a network pretrained on the labelled corpus's own audio (Li et al. 2021, section 4.2).

For each fold on its training speakers, or once on all, which marks the result TRANSDUCTIVE.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from cpcscale.emotion.encoders.huggingface import PREFIX
from cpcscale.emotion.encoders.networks import encoder_features, pretrain_on_corpus, pretrain_on_rows
from cpcscale.emotion.systems.system import Features, System
from cpcscale.errors import UserError

if TYPE_CHECKING:
    from cpcscale.emotion.audio.windows import Waves
    from cpcscale.emotion.inputs import PreparedCorpus
    from cpcscale.emotion.protocol.splits import Split
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


class MiniCPC(System):
    """Frames of a network that was pretrained on the corpus alone."""

    name = "minicpc"
    takes_network = True
    pretrains = True
    draws_weights = True
    not_swept = "each trial would pretrain a network for each fold"

    def check(self, recipe: EmotionRecipe) -> None:
        if recipe.corpus.shards:
            raise UserError(
                "system=minicpc packs the training speakers of each fold from their audio files: give corpus.path with "
                "the audio, and leave corpus.shards out"
            )
        if recipe.encoder.checkpoint.startswith(PREFIX):
            raise UserError(
                f"system=minicpc pretrains a CPC network, and encoder.checkpoint={recipe.encoder.checkpoint} is not "
                'one: use encoder.checkpoint="" or the folder of a `cpcscale pretrain` run, or system=precpc'
            )

    def trains_encoder(self, recipe: EmotionRecipe) -> bool:
        return not recipe.encoder.frozen

    def marks(self, recipe: EmotionRecipe) -> list[str]:
        return ["TRANSDUCTIVE"] * (recipe.pretraining_on == "corpus") + super().marks(recipe)

    def pretrain(self, recipe: EmotionRecipe, waves: Waves, encoder: LayeredNetwork | None) -> LayeredNetwork | None:
        return pretrain_on_corpus(recipe, waves, encoder) if recipe.pretraining_on == "corpus" else encoder

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> Features | None:
        if encoder is None or recipe.pretraining_on == "fold" or self.trains_encoder(recipe):
            return None
        return encoder_features(recipe, encoder)

    def fold_features(self, recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
        known = prepared.encoder
        if recipe.pretraining_on == "corpus":
            assert known is not None
            return encoder_features(recipe, copy.deepcopy(known))
        rows = sorted({*split.train_rows, *split.dev_rows} - set(split.test_rows))
        return encoder_features(recipe, pretrain_on_rows(recipe, prepared.corpus, known, rows))
