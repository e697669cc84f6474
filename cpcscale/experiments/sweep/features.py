"""The features of a sweep, computed once for each set of values that changes them, and shared by all trials."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpcscale import config as configs
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.networks import OpenedEncoder, encoder_digest
from cpcscale.emotion.heads.attention import AttentionHeadConfig
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.inputs import PreparedCorpus, prepare
from cpcscale.emotion.recipe import EmotionRecipe, PretrainedConfig
from cpcscale.experiments.encoders import open_encoder
from cpcscale.experiments.sweep.space import SearchDimension, with_values
from cpcscale.progress import note


@dataclass(frozen=True)
class FeatureVariant:
    """One variant of the features: a recipe that has it, its opened encoder, and the digest of that encoder."""

    recipe: EmotionRecipe
    opened: OpenedEncoder
    digest: str


def feature_key(recipe: EmotionRecipe) -> str:
    """A digest that two recipes share if their features, and the network that computes them, are the same."""
    encoder = dataclasses.replace(recipe.encoder, learning_rate=PretrainedConfig().learning_rate)
    return configs.digest(
        dataclasses.replace(
            recipe,
            encoder=encoder if recipe.definition.takes_network else PretrainedConfig(),
            recogniser=AttentionHeadConfig(),
            fit=FitConfig(device=recipe.fit.device),
        )
    )


def feature_variants(config: EmotionRecipe, dimensions: Sequence[SearchDimension]) -> dict[str, FeatureVariant]:
    """Every variant of the features that the space can draw, by feature_key.

    Raises UserError for a combination that cannot be trained, such as one with a missing checkpoint.
    """
    choices = [[(each.key, value) for value in each.arguments] for each in dimensions if each.changes_features]
    variants: dict[str, FeatureVariant] = {}
    for values in itertools.product(*choices):
        recipe = with_values(config, dict(values))
        if (key := feature_key(recipe)) not in variants:
            opened = open_encoder(recipe)
            variants[key] = FeatureVariant(recipe, opened, encoder_digest(opened[0]))
    return variants


def encoders_digest(variants: Mapping[str, FeatureVariant]) -> str:
    """The digest of the variants' encoder; if they have several, the SHA-256 of their digests in order."""
    digests = list(dict.fromkeys(variant.digest for variant in variants.values()))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def prepare_variants(variants: Mapping[str, FeatureVariant], corpus: Corpus) -> dict[str, PreparedCorpus]:
    """The inputs of recognisers, by feature_key. Raises UserError for audio that cannot be used."""
    prepared: dict[str, PreparedCorpus] = {}
    for number, (key, variant) in enumerate(variants.items(), 1):
        if len(variants) > 1:
            note(f"sweep: features {number} of {len(variants)}: {_described(variant.recipe)}")
        prepared[key] = prepare(variant.recipe, corpus, variant.opened)
    return prepared


def _described(recipe: EmotionRecipe) -> str:
    parts = [recipe.system, recipe.encoder.checkpoint, "" if recipe.encoder.frozen else "trained on"]
    return ", ".join(part for part in parts if part)
