"""A probe of a network: how well its context vectors c predict emotion on a small labelled set.

Statistics of c of each utterance (statistics.summarise) go into a support vector regression with fixed settings, over
folds of whole speakers. Nothing is random, so the scores of two checkpoints differ by their weights alone. They are
those of a fine-tuning with system=precpc, head=svr and svm_search=false.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.encoders.networks import encoder_features
from cpcscale.emotion.finetune_result import combine_folds
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe, ProtocolConfig
from cpcscale.emotion.systems.system import Features
from cpcscale.handmade.statistics import STATISTICS
from cpcscale.model.cpc import CPC

# Utterances that are encoded at a time.
_TOGETHER = 64


def probe_recipe(corpus: CorpusConfig, split: str, audio_cache: AudioCacheConfig) -> EmotionRecipe:
    """The recipe of a probe on this corpus under this protocol."""
    return EmotionRecipe(
        system="precpc",
        head="svr",
        svm_search=False,
        corpus=corpus,
        protocol=ProtocolConfig(split=split),
        # On the CPU, beside a run that has the GPU.
        fit=FitConfig(device="cpu"),
        audio_cache=audio_cache,
    )


def open_waves(recipe: EmotionRecipe, corpus: Corpus) -> Waves:
    """The audio of a probe. Raises UserError for unusable audio, unless `corpus.on_bad` skips it."""
    settings = recipe.corpus
    return Waves.open(corpus, recipe.audio_cache, max_s=settings.max_s, on_bad=settings.on_bad)


def probe(recipe: EmotionRecipe, waves: Waves, network: CPC) -> dict[str, float]:
    """The CCC of each primitive and their `mean`, pooled over the folds' test speakers.

    The network's output is not cached, because the next checkpoint is another network.
    """
    features = encoder_features(recipe, network)
    vectors_UF = np.stack(list(_vectors(waves, features)))
    folds = fold_splits(recipe, waves.corpus)
    prepared = PreparedCorpus(waves.corpus, folds, waves, vectors_UF=vectors_UF, features=features)
    results = [run_fold(recipe, prepared, fold) for fold in range(len(prepared.folds.splits))]
    return combine_folds(recipe, prepared, results).ccc


def _vectors(waves: Waves, features: Features) -> Iterator[np.ndarray]:
    """For each utterance [F]: statistics of c, averaged over its windows."""
    waves = waves.at_least(features.least_samples)
    for start in range(0, len(waves), _TOGETHER):
        rows = range(start, min(start + _TOGETHER, len(waves)))
        parts = [waves[row] for row in rows]
        frames = iter(features([window for windows in parts for window in windows]))
        for row, windows in zip(rows, parts, strict=True):
            yield waves.shares(row) @ STATISTICS([next(frames) for _ in windows], 0.0)
