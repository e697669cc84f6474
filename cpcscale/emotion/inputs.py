"""What a regressor hears in each system: vectors of an utterance, frames of its windows, or waveforms to train on.

What does not depend on the fold is computed once (`prepare`), cached by content, and shared by all folds and trials;
what does is made for a fold from its training speakers alone (`fold_inputs`).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale.emotion.audio.degraded import DegradedWaves, parse_condition
from cpcscale.emotion.audio.prefetch import SelectedRows, flat, in_chunks
from cpcscale.emotion.audio.windows import Features, Waves, Windows, features
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.layer import Encoder, LayerFeatures
from cpcscale.emotion.encoders.networks import (
    OpenedEncoder,
    WindowEncoder,
    features_digest,
    level_of,
    open_encoder,
    pretrained_on,
    pretrained_on_corpus,
    untrained,
    wave_level,
)
from cpcscale.emotion.handmade import functionals, mfcc
from cpcscale.emotion.handmade.prosody import chosen, prosody, version
from cpcscale.emotion.handmade.statistics import summarise
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.training import device
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.protocol.splits import Folds, Split
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.speaker_norm import ScaledFeatures, SpeakerScale, apply_each, speaker_scales, vectors_scale
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

COEFFICIENTS = BANDS = 40
# Longer than any utterance: classic features are of all of it, not of windows.
_WHOLE_S = 1e6
# Encoded at a time where statistics alone are wanted: about half a gigabyte of frames.
_ENCODED_WINDOWS = 512


@dataclass(frozen=True)
class PreparedCorpus:
    """What all folds of a run share.

    `corpus` are the utterances that can be used, in the order of all else, and `folds` these under the protocol.
    `vectors_UF` for the classic systems; `inputs` the float32 frames [T, C] of each window where they do not depend on
    the fold; `waves` the int16 windows, for all systems but `mean`. `encoder` is the checkpoint's network, for folds
    that make their own features or train it, and `source` says which checkpoint it was. `conditions` are the same
    utterances degraded, by name, to test by.
    """

    corpus: Corpus
    folds: Folds
    waves: Waves | None = None
    inputs: Sequence[Windows] | None = None
    vectors_UF: np.ndarray | None = None
    encoder: Encoder | None = None
    source: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, PreparedCorpus] = field(default_factory=dict)


class FoldInputs:
    """The inputs of one fold, and the network on top of them."""

    def __init__(
        self, recipe: EmotionRecipe, prepared: PreparedCorpus, encoder: Encoder | None, train_rows: Sequence[int]
    ) -> None:
        """`encoder` turns the waveforms into features, or is trained on them; None where they are prepared.

        `train_rows` are those of the fold: a recogniser standardises by them, and utterances of unknown speakers are
        scaled by them, where speakers are.
        """
        self._recipe, self._prepared, self._encoder = recipe, prepared, encoder
        self._train_rows = train_rows
        self._training: FoldInputs = self
        self._device = device(recipe.fit)

    def inputs(self, rows: Sequence[int]) -> Sequence[Windows]:
        """What the network takes for these utterances, window by window; read or decoded when it is asked for."""
        found = self._unscaled(rows)
        return ScaledFeatures(found, [self._scales[row] for row in rows]) if self._recipe.speaker_norm else found

    def hearing(self, prepared: PreparedCorpus) -> FoldInputs:
        """The same encoder over other audio of the same utterances."""
        other = FoldInputs(self._recipe, prepared, self._encoder, self._train_rows)
        other._training = self._training
        return other

    def shares(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The weight of each window in what is said of these utterances."""
        assert self._prepared.waves is not None
        return [self._prepared.waves.shares(row) for row in rows]

    def vectors(self, rows: Sequence[int]) -> np.ndarray:
        """float32 [U, F] of these utterances: classic features, or functionals of frames, the mean over windows."""
        if self._prepared.vectors_UF is not None:
            x_UF = self._prepared.vectors_UF[list(rows)]
            return apply_each(x_UF, [self._scales[row] for row in rows]) if self._recipe.speaker_norm else x_UF
        pairs = zip(self.inputs(rows), self.shares(rows), strict=True)
        return np.stack([share_W @ np.stack([summarise(x_TC) for x_TC in parts]) for parts, share_W in pairs])

    def network(self, settings: AttentionHeadConfig) -> nn.Module:
        """A new recogniser that standardises by the training utterances, with the encoder where it is to be trained.

        The statistics under a trained encoder are those of its first weights.
        """
        encoder = self._encoder if self._recipe.trains_encoder else None
        mean_C, deviation_C = self._statistics
        heard = self._encoder or self._prepared.encoder
        mixed = heard is not None and self._recipe.encoder.layer == "mix"
        layers = _hearing(self._recipe, heard).widths if heard is not None and mixed else ()
        recogniser = AttentionHead(settings, len(mean_C), layers)
        recogniser.standardise(mean_C, deviation_C)
        if encoder is None:
            return recogniser
        # A copy: several fits of one fold train theirs from the same weights.
        own = copy.deepcopy(encoder)
        return EncoderWithHead(own, recogniser, self._recipe.encoder.layer, self._recipe.encoder.wave_norm)

    def _windows(self, rows: Sequence[int]) -> Waves:
        assert self._prepared.waves is not None
        least = _hearing(self._recipe, self._encoder).least_samples if self._encoder else 1
        return self._prepared.waves.at_least(least).take(rows)

    def _unscaled(self, rows: Sequence[int]) -> Sequence[Windows]:
        known = self._prepared.inputs
        if known is not None:
            return SelectedRows(known, rows)
        waves = self._windows(rows)
        if self._encoder is None or self._recipe.trains_encoder:
            return waves
        return _encoded(self._recipe, waves, self._encoder)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of what a recogniser hears of the training utterances; once for all fits of the fold."""
        frames = flat(self.inputs(self._train_rows))
        if self._encoder is not None and self._recipe.trains_encoder:
            frames = in_chunks(_encode(self._recipe, self._encoder), frames, _ENCODED_WINDOWS)
        return statistics(frames)

    @cached_property
    def _scales(self) -> list[SpeakerScale]:
        """By speaker, of each utterance of the corpus."""
        speakers_U = self._prepared.corpus.speakers
        return speaker_scales(speakers_U, self._measured, lambda: self._training._measured(self._train_rows))

    def _measured(self, rows: Sequence[int]) -> SpeakerScale:
        if self._prepared.vectors_UF is not None:
            return vectors_scale(self._prepared.vectors_UF[list(rows)])
        mean_C, deviation_C = statistics(flat(self._unscaled(rows)))
        return SpeakerScale(mean_C.numpy(), deviation_C.numpy())


def prepare(recipe: EmotionRecipe, corpus: Corpus, opened: OpenedEncoder | None = None) -> PreparedCorpus:
    """Reads all audio, and computes the features that do not depend on the fold.

    `opened` is the recipe's encoder; without it, it is opened here.

    Raises UserError for a missing checkpoint, categories to classify that are not there, and audio that is missing,
    does not decode or is under 0.1 s, unless `corpus.on_bad` skips it.
    """
    if recipe.classify and not any(one.category for one in corpus.utterances):
        raise UserError(f"classify=true, but corpus {corpus.name} names no category of any utterance: leave it out")
    if recipe.system == "mean":
        return PreparedCorpus(corpus, fold_splits(recipe, corpus))
    encoder, source = opened or open_encoder(recipe)
    refuse_selected(recipe, corpus, source)
    settings = recipe.corpus
    waves = Waves.open(corpus, recipe.audio_cache, max_s=settings.max_s, on_bad=settings.on_bad)
    if recipe.system == "minicpc" and recipe.pretraining_on == "corpus":
        encoder = pretrained_on_corpus(recipe, waves, encoder)
    _say_ablation(recipe)
    shared = PreparedCorpus(waves.corpus, fold_splits(recipe, waves.corpus), encoder=encoder, source=source)
    clean = _with_features(recipe, dataclasses.replace(shared, waves=waves))
    conditions = {
        name: _with_features(
            recipe,
            dataclasses.replace(shared, waves=DegradedWaves(waves, parse_condition(name), recipe.protocol.seed)),
        )
        for name in recipe.test_conditions
    }
    return dataclasses.replace(clean, conditions=conditions)


def _with_features(recipe: EmotionRecipe, shared: PreparedCorpus) -> PreparedCorpus:
    """`shared` with the features of its audio that do not depend on the fold."""
    waves, encoder = shared.waves, shared.encoder
    assert waves is not None
    match recipe.system:
        case "functionals":
            vectors_UF = _vectors(recipe, waves, functionals.version(), functionals.functionals)
            return dataclasses.replace(shared, vectors_UF=vectors_UF)
        case "prosody":
            kind = chosen(recipe.prosody)
            measure = partial(prosody, kind=kind)
            return dataclasses.replace(shared, vectors_UF=_vectors(recipe, waves, version(kind), measure))
        case "mfcc":
            measure = partial(mfcc.mfcc, coefficients=COEFFICIENTS)
            inputs = features("mfcc", f"{COEFFICIENTS} {mfcc.version()}", waves, partial(_each, measure))
        case "logmel":
            measure = partial(mfcc.log_mel, bands=BANDS)
            inputs = features("logmel", f"{BANDS} {mfcc.version()}", waves, partial(_each, measure))
        case "random" if encoder is not None:
            inputs = _encoded(recipe, waves, untrained(recipe, encoder, level_of(encoder)))
        case "precpc" if recipe.encoder.frozen and encoder is not None:
            inputs = _encoded(recipe, waves, encoder)
        case "minicpc" if recipe.pretraining_on == "corpus" and recipe.encoder.frozen and encoder is not None:
            inputs = _encoded(recipe, waves, encoder)
        case _:
            return shared
    return dataclasses.replace(shared, inputs=inputs)


def fold_inputs(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> FoldInputs:
    """The inputs of a fold. Nothing of its test speakers goes into an encoder's weights or level."""
    if prepared.inputs is not None or prepared.vectors_UF is not None:
        return FoldInputs(recipe, prepared, None, split.train_rows)
    assert prepared.waves is not None
    known = prepared.encoder
    match recipe.system:
        case "precpc":
            encoder = copy.deepcopy(known)
        case "minicpc" if recipe.pretraining_on == "corpus":
            encoder = copy.deepcopy(known)
        case "minicpc":
            rows = sorted(split.train_rows + split.dev_rows)
            encoder = pretrained_on(recipe, prepared.corpus, known, rows)
        case _:
            level = wave_level(flat(prepared.waves.take(split.train_rows))) if known is None else level_of(known)
            encoder = untrained(recipe, known, level)
    return FoldInputs(recipe, prepared, encoder, split.train_rows)


def statistics(frames: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each feature over all frames, float32 [C], summed in float64 after centring.

    Each array [T, C] is asked for once, so that no more than one need be in memory: squares are summed about the mean
    of their own array, and moved to that of all (Chan, Golub and LeVeque 1983, eq. 2.1).
    """
    count, mean_C, square_C = 0, np.float64(0), np.float64(0)
    for x_TC in frames:
        own_C = x_TC.mean(axis=0, dtype=np.float64)
        shift_C, total = own_C - mean_C, count + len(x_TC)
        square_C = square_C + ((x_TC - own_C) ** 2).sum(axis=0) + shift_C**2 * (count * len(x_TC) / total)
        mean_C = mean_C + shift_C * (len(x_TC) / total)
        count = total
    return torch.from_numpy(np.asarray(mean_C)).float(), torch.from_numpy(np.sqrt(square_C / count)).float()


def _vectors(
    recipe: EmotionRecipe, waves: Waves, version: str, measure: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    found = features(recipe.system, version, waves.spanning(_WHOLE_S), partial(_each, measure))
    return np.stack([found[row][0] for row in range(len(found))])


def _encoded(recipe: EmotionRecipe, waves: Waves, encoder: Encoder) -> Features:
    hearing = _hearing(recipe, encoder)
    what = features_digest(hearing)
    return features(f"{recipe.system} features", what, waves.at_least(hearing.least_samples), _encode(recipe, encoder))


def _encode(recipe: EmotionRecipe, encoder: Encoder) -> WindowEncoder:
    return WindowEncoder(encoder, recipe.encoder.layer, device(recipe.fit), recipe.encoder.wave_norm)


def _hearing(recipe: EmotionRecipe, encoder: Encoder) -> LayerFeatures:
    return LayerFeatures(encoder, recipe.encoder.layer, recipe.encoder.wave_norm)


def _say_ablation(recipe: EmotionRecipe) -> None:
    if recipe.system in ("minicpc", "precpc") and recipe.encoder.wave_norm != "corpus":
        log.warning(
            "encoder.wave_norm=%s: the encoder was pretrained at the level of encoder.wave_norm=corpus; an ablation",
            recipe.encoder.wave_norm,
        )


def _each(measure: Callable[[np.ndarray], np.ndarray], windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [measure(wave.astype(np.float32) / 32768) for wave in windows]
