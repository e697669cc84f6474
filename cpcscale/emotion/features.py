"""What a regressor hears in each system: vectors of an utterance, frames of its windows, or waveforms to train on.

What does not depend on the fold is computed once (`prepare`), cached by content, and shared by all folds and trials;
what does is made for a fold from its training speakers alone (`open_source`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import kaldi_native_fbank as knf
import numpy as np
import torch
from torch import Tensor, nn

from cpcscale import model
from cpcscale.emotion.classic import summarise
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders import (
    Encode,
    encoder_digest,
    level_of,
    open_encoder,
    pretrained_on,
    untrained,
    wave_level,
)
from cpcscale.emotion.fit import device
from cpcscale.emotion.functionals import functionals
from cpcscale.emotion.prosody import chosen, prosody, version
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.recogniser import EndToEnd, Recogniser, RecogniserConfig
from cpcscale.emotion.splits import Split
from cpcscale.emotion.waves import Features, Waves, Windows, features
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.model.frontend import log_mel, mfcc

COEFFICIENTS = BANDS = 40
# Longer than any utterance: classic features are of all of it, not of windows.
_WHOLE_S = 1e6


@dataclass(frozen=True)
class Prepared:
    """What all folds of a run share.

    `corpus` are the utterances that can be used, in the order of all else. `vectors_UF` for the classic systems;
    `inputs` the float32 frames [T, C] of each window where they do not depend on the fold; `waves` the int16 windows,
    for all systems but `mean`. `encoder` is the checkpoint's network, for folds that make their own features or train
    it, and `source` says which checkpoint it was.
    """

    corpus: Corpus
    waves: Waves | None = None
    inputs: Sequence[Windows] | None = None
    vectors_UF: np.ndarray | None = None
    encoder: CPC | None = None
    source: dict[str, Any] = field(default_factory=dict)


class Source:
    """The inputs of one fold, and the network on top of them."""

    def __init__(self, recipe: EmotionRecipe, prepared: Prepared, encoder: CPC | None) -> None:
        """`encoder` turns the waveforms into features, or is trained on them; None where they are prepared."""
        self._recipe, self._prepared, self._encoder = recipe, prepared, encoder
        self._device = device(recipe.fit)

    def inputs(self, rows: Sequence[int]) -> list[Windows]:
        """What the network takes for these utterances, window by window."""
        known = self._prepared.inputs
        if known is not None:
            return [known[row] for row in rows]
        waves = self._windows(rows)
        if self._encoder is None or self._recipe.trains_encoder:
            return waves
        return self._encoded(self._encoder, waves)

    def shares(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The weight of each window in what is said of these utterances."""
        assert self._prepared.waves is not None
        return [self._prepared.waves.shares(row) for row in rows]

    def vectors(self, rows: Sequence[int]) -> np.ndarray:
        """float32 [U, F] of these utterances: classic features, or functionals of frames, the mean over windows."""
        if self._prepared.vectors_UF is not None:
            return self._prepared.vectors_UF[list(rows)]
        pairs = zip(self.inputs(rows), self.shares(rows), strict=True)
        return np.stack([share_W @ np.stack([summarise(x_TC) for x_TC in parts]) for parts, share_W in pairs])

    def network(self, train_rows: Sequence[int], settings: RecogniserConfig) -> nn.Module:
        """A new recogniser that standardises by the training utterances, with the encoder where it is to be trained.

        The statistics under a trained encoder are those of its first weights.
        """
        inputs = self.inputs(train_rows)
        encoder = self._encoder if self._recipe.trains_encoder else None
        if encoder is not None:
            inputs = self._encoded(encoder, inputs)
        mean_C, deviation_C = statistics([window for parts in inputs for window in parts])
        recogniser = Recogniser(settings, len(mean_C))
        recogniser.standardise(mean_C, deviation_C)
        if encoder is None:
            return recogniser
        # A copy: several fits of one fold train theirs from the same weights.
        return EndToEnd(copy.deepcopy(encoder), recogniser, self._recipe.encoder.layer)

    def _windows(self, rows: Sequence[int]) -> list[Windows]:
        assert self._prepared.waves is not None
        hop = self._encoder.hop_samples if self._encoder else 1
        waves = self._prepared.waves.at_least(hop)
        return [waves[row] for row in rows]

    def _encoded(self, encoder: CPC, waves: Sequence[Windows]) -> list[Windows]:
        flat = Encode(encoder, self._recipe.encoder.layer, self._device)([one for parts in waves for one in parts])
        found = iter(flat)
        return [tuple(next(found) for _ in parts) for parts in waves]


def prepare(recipe: EmotionRecipe, corpus: Corpus) -> Prepared:
    """Reads the checkpoint and all audio, and computes the features that do not depend on the fold.

    Raises UserError for a missing checkpoint, categories to classify that are not there, and audio that is missing,
    does not decode or is under 0.1 s, unless `corpus.on_bad` skips it.
    """
    if recipe.classify and not any(one.category for one in corpus.utterances):
        raise UserError(f"classify=true, but corpus {corpus.name} names no category of any utterance: leave it out")
    if recipe.system == "mean":
        return Prepared(corpus)
    encoder, source = open_encoder(recipe)
    settings = recipe.corpus
    waves = Waves.open(corpus, recipe.audio_cache, max_s=settings.max_s, on_bad=settings.on_bad)
    shared = Prepared(waves.corpus, waves, encoder=encoder, source=source)
    match recipe.system:
        case "functionals":
            return dataclasses.replace(shared, vectors_UF=_vectors(recipe, waves, "", functionals))
        case "prosody":
            kind = chosen(recipe.prosody)
            measure = partial(prosody, kind=kind)
            return dataclasses.replace(shared, vectors_UF=_vectors(recipe, waves, version(kind), measure))
        case "mfcc":
            measure = partial(mfcc, coefficients=COEFFICIENTS)
            inputs = features("mfcc", _digest(COEFFICIENTS), waves, partial(_each, measure))
        case "logmel":
            inputs = features("logmel", _digest(BANDS), waves, partial(_each, partial(log_mel, bands=BANDS)))
        case "random" if encoder is not None:
            inputs = _encoded(recipe, waves, untrained(recipe, encoder, level_of(encoder)))
        case "precpc" if recipe.encoder.frozen and encoder is not None:
            inputs = _encoded(recipe, waves, encoder)
        case _:
            return shared
    return dataclasses.replace(shared, inputs=inputs)


def open_source(recipe: EmotionRecipe, prepared: Prepared, split: Split) -> Source:
    """The inputs of a fold. Nothing of its test speakers goes into an encoder's weights or level."""
    if prepared.inputs is not None or prepared.vectors_UF is not None:
        return Source(recipe, prepared, None)
    assert prepared.waves is not None
    known = prepared.encoder
    match recipe.system:
        case "precpc":
            encoder = copy.deepcopy(known)
        case "minicpc":
            rows = sorted(split.train_rows + split.dev_rows)
            encoder = pretrained_on(recipe, prepared.corpus, known, rows)
        case _:
            level = (
                wave_level([window for row in split.train_rows for window in prepared.waves[row]])
                if known is None
                else level_of(known)
            )
            encoder = untrained(recipe, known, level)
    return Source(recipe, prepared, encoder)


def statistics(frames: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each feature over all frames, float32 [C], summed in float64 after centring."""
    count = sum(len(x_TC) for x_TC in frames)
    mean = sum(x_TC.sum(axis=0, dtype=np.float64) for x_TC in frames) / count
    square = sum(((x_TC - mean) ** 2).sum(axis=0) for x_TC in frames) / count
    return torch.from_numpy(np.asarray(mean)).float(), torch.from_numpy(np.sqrt(square)).float()


def _vectors(recipe: EmotionRecipe, waves: Waves, kind: str, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    whole = Waves.open(waves.corpus, recipe.audio_cache, max_s=_WHOLE_S)
    found = features(recipe.system, _digest(kind), whole, partial(_each, measure))
    return np.stack([found[row][0] for row in range(len(found))])


def _encoded(recipe: EmotionRecipe, waves: Waves, encoder: CPC) -> Features:
    encode = Encode(encoder, recipe.encoder.layer, device(recipe.fit))
    what = _digest(encoder_digest(encoder), recipe.encoder.layer)
    return features(f"{recipe.system} features", what, waves.at_least(encoder.hop_samples), encode)


@cache
def _sources() -> str:
    """sha256 of the source that computes features: what another version of it made is not taken from the cache."""
    digest = hashlib.sha256(f"{knf.__version__} {torch.__version__}".encode())
    for folder in (Path(model.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(*of: object) -> str:
    return " ".join([_sources(), *map(str, of)])


def _each(measure: Callable[[np.ndarray], np.ndarray], windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [measure(wave.astype(np.float32) / 32768) for wave in windows]
