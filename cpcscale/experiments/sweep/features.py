"""The features of a sweep: computed once for each value of what decides them, and shared by all trials."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpcscale import config as configs
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.networks import OpenedEncoder, encoder_digest, open_encoder
from cpcscale.emotion.heads.attention import AttentionHeadConfig
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.inputs import PreparedCorpus, prepare
from cpcscale.emotion.recipe import FRAMES, EmotionRecipe, PretrainedConfig
from cpcscale.experiments.sweep.space import SearchDimension, with_values
from cpcscale.progress import note


@dataclass(frozen=True)
class FeatureVariant:
    """One way of hearing the corpus: a recipe that has it, the encoder that it opened, and its digest."""

    recipe: EmotionRecipe
    opened: OpenedEncoder
    digest: str


def feature_key(recipe: EmotionRecipe) -> str:
    """The same for two recipes whose features, and the network that makes them, are the same."""
    encoder = dataclasses.replace(recipe.encoder, learning_rate=PretrainedConfig().learning_rate)
    return configs.digest(
        dataclasses.replace(
            recipe,
            encoder=PretrainedConfig() if recipe.system in FRAMES else encoder,
            recogniser=AttentionHeadConfig(),
            fit=FitConfig(device=recipe.fit.device),
        )
    )


def feature_variants(config: EmotionRecipe, dimensions: Sequence[SearchDimension]) -> dict[str, FeatureVariant]:
    """Every way of hearing that the space can draw, by feature_key.

    Raises UserError for a combination of them that no recogniser can be trained with, such as a missing checkpoint.
    """
    choices = [[(each.key, value) for value in each.arguments] for each in dimensions if each.is_heard]
    ways: dict[str, FeatureVariant] = {}
    for values in itertools.product(*choices):
        recipe = with_values(config, dict(values))
        if (key := feature_key(recipe)) not in ways:
            opened = open_encoder(recipe)
            ways[key] = FeatureVariant(recipe, opened, encoder_digest(opened[0]))
    return ways


def encoders_digest(ways: Mapping[str, FeatureVariant]) -> str:
    """The digest of the encoder of all ways, in their order; over several of them, that of their digests."""
    digests = list(dict.fromkeys(way.digest for way in ways.values()))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def prepare_variants(ways: Mapping[str, FeatureVariant], corpus: Corpus) -> dict[str, PreparedCorpus]:
    """What recognisers hear, by feature_key. Raises UserError for audio that cannot be used."""
    prepared: dict[str, PreparedCorpus] = {}
    for number, (key, way) in enumerate(ways.items(), 1):
        if len(ways) > 1:
            note(f"sweep: features {number} of {len(ways)}: {_described(way.recipe)}")
        prepared[key] = prepare(way.recipe, corpus, way.opened)
    return prepared


def _described(recipe: EmotionRecipe) -> str:
    parts = [recipe.system, recipe.encoder.checkpoint, "" if recipe.encoder.frozen else "trained on"]
    return ", ".join(part for part in parts if part)
