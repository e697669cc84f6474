"""A probe: the emotion in a network's context vectors, scored on a small labelled set, always in the same way.

Functionals of c of each utterance (statistics.summarise) go into one support vector regression, nothing of which is
searched, over folds of whole speakers: no draw of chance is in it, and two checkpoints differ by their weights alone.
The figures are those of a fine-tuning with system=precpc, head=svr and svm_search=false.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.encoders.networks import WindowEncoder
from cpcscale.emotion.finetune_result import combine
from cpcscale.emotion.handmade.statistics import summarise
from cpcscale.emotion.heads.training import FitConfig, device
from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe, ProtocolConfig
from cpcscale.model.cpc import CPC

# Utterances that are encoded at a time.
_TOGETHER = 64


def probe_recipe(corpus: CorpusConfig, split: str, audio_cache: AudioCacheConfig) -> EmotionRecipe:
    """What a probe on this corpus under this protocol computes."""
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
    """The audio of a probe. Raises UserError where it cannot be used, unless `corpus.on_bad` skips it."""
    settings = recipe.corpus
    return Waves.open(corpus, recipe.audio_cache, max_s=settings.max_s, on_bad=settings.on_bad)


def probe(recipe: EmotionRecipe, waves: Waves, network: CPC) -> dict[str, float]:
    """CCC by primitive and their `mean`, pooled over the folds' test speakers.

    Nothing is cached of what the network makes: there is another one at the next checkpoint.
    """
    vectors_UF = np.stack(list(_vectors(recipe, waves, network)))
    prepared = PreparedCorpus(waves.corpus, fold_splits(recipe, waves.corpus), waves, vectors_UF=vectors_UF)
    results = [run_fold(recipe, prepared, fold) for fold in range(len(prepared.folds.splits))]
    return combine(recipe, prepared, results).ccc


def _vectors(recipe: EmotionRecipe, waves: Waves, network: CPC) -> Iterator[np.ndarray]:
    """float32 [F] of each utterance: functionals of c, the mean over its windows."""
    encode, heard = WindowEncoder(network, "c", device(recipe.fit)), waves.at_least(network.hop_samples)
    for start in range(0, len(heard), _TOGETHER):
        rows = range(start, min(start + _TOGETHER, len(heard)))
        parts = [heard[row] for row in rows]
        frames = iter(encode([window for windows in parts for window in windows]))
        for row, windows in zip(rows, parts, strict=True):
            yield heard.shares(row) @ np.stack([summarise(next(frames)) for _ in windows])
