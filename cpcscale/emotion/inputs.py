"""The input of the regressor in each system: a vector an utterance, frames of its windows, or waveforms to train on.

`prepare` computes once what all folds and trials share, and caches it. `fold_inputs` makes what depends on the fold,
from its training speakers alone.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale import audio
from cpcscale.emotion.audio.degraded import DegradedWaves, parse_condition
from cpcscale.emotion.audio.prefetch import SelectedRows, flatten_windows, map_in_chunks
from cpcscale.emotion.audio.windows import CachedFeatures, Waves, Windows, compute_features
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.networks import OpenedEncoder, WindowEncoder, open_encoder
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.blocks import Block
from cpcscale.emotion.heads.training import fit_device
from cpcscale.emotion.held_out import readout
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.protocol.splits import Folds, Split
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.speaker_norm import ScaledFeatures, SpeakerScale, apply_each, speaker_scales, vectors_scale
from cpcscale.emotion.systems.fusion import FusedFeatures, parts_of
from cpcscale.emotion.systems.system import Features
from cpcscale.errors import UserError
from cpcscale.model.layers import LayeredNetwork

log = logging.getLogger(__name__)

# Longer than any utterance: classic features are of the whole utterance, not of windows.
_WHOLE_S = 1e6
# Windows encoded at a time when only statistics are kept: about half a gigabyte of frames.
_ENCODED_WINDOWS = 512


@dataclass(frozen=True)
class PreparedCorpus:
    """The data that all folds of a run share.

    `corpus` has the usable utterances, in the row order of everything else, and `folds` splits them. `vectors_UF` are
    the features of the classic systems; `inputs` the float32 frames [T, C] of each window, if they do not depend on the
    fold; `features` made these two. `waves` are the int16 windows, for all systems but `mean`. `encoder` is the
    checkpoint's network, for folds that make their own features or train it, and `source` the metadata of that
    checkpoint. `conditions` has the same data from degraded audio, by the name of the condition. `parts`: of a fusion,
    the data of each of its systems, in place of features here.
    """

    corpus: Corpus
    folds: Folds
    waves: Waves | None = None
    inputs: Sequence[Windows] | None = None
    vectors_UF: np.ndarray | None = None
    features: Features | None = None
    encoder: LayeredNetwork | None = None
    source: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, PreparedCorpus] = field(default_factory=dict)
    parts: tuple[PreparedCorpus, ...] = ()


class FoldInputs:
    """The inputs of one fold, and the network on top of them."""

    def __init__(
        self, recipe: EmotionRecipe, prepared: PreparedCorpus, features: Features, train_rows: Sequence[int]
    ) -> None:
        """`features` turns waveforms into the head's input; if the encoder is trained, those of its initial weights.

        `train_rows` are the fold's: the recogniser standardises by them, and with `speaker_norm` so do utterances of
        unknown speakers.
        """
        self._recipe, self._prepared, self.features = recipe, prepared, features
        self._train_rows = train_rows
        self._training: FoldInputs = self
        self._device = fit_device(recipe.fit)

    def inputs(self, rows: Sequence[int]) -> Sequence[Windows]:
        """The network's input for these utterances, a tuple of windows each; read or decoded on access."""
        found = self._unscaled(rows)
        return ScaledFeatures(found, [self._scales[row] for row in rows]) if self._recipe.speaker_norm else found

    def with_audio(self, prepared: PreparedCorpus) -> FoldInputs:
        """The same features of other audio of the same utterances."""
        other = FoldInputs(self._recipe, prepared, self.features, self._train_rows)
        other._training = self._training
        return other

    def trained_on(self, rows: Sequence[int]) -> FoldInputs:
        """The same features, standardised by other training rows."""
        return FoldInputs(self._recipe, self._prepared, self.features, rows)

    def shares(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The weights of the windows of each of these utterances, [W] each."""
        assert self._prepared.waves is not None
        return [self._prepared.waves.shares(row) for row in rows]

    def vectors(self, rows: Sequence[int]) -> np.ndarray:
        """Vectors of these utterances, [U, F]: classic features, or statistics of frames averaged over windows."""
        if self._prepared.vectors_UF is not None:
            x_UF = self._prepared.vectors_UF[list(rows)]
            return apply_each(x_UF, [self._scales[row] for row in rows]) if self._recipe.speaker_norm else x_UF
        assert self._prepared.waves is not None
        read, waves = self._recipe.vector_readout, self._prepared.waves
        pairs = zip(rows, self.inputs(rows), strict=True)
        return np.stack([waves.shares(row) @ read(parts, waves.samples(row) / audio.RATE_HZ) for row, parts in pairs])

    @cached_property
    def block(self) -> Block:
        """What `vectors` gives, as one block: of frames, their statistics are to be reduced."""
        width = self.vectors(self._train_rows[:1]).shape[1]
        read = self._recipe.readout
        if self._prepared.vectors_UF is not None or "components" not in read:
            return Block(width)
        return Block(width, width - self._recipe.duration, whole="slopes" in read)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of `vectors`; none: they are standardised as they are."""
        return () if self._recipe.readout == "statistics" else (self.block,)

    def means(self, features: Features | FusedFeatures, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Vectors of these utterances, or means over time of the frames that `features`, once fitted, make of them."""
        (own,) = parts_of(features)
        pairs = zip(self._head_inputs(own, rows), self.shares(rows), strict=True)
        return (readout(parts, share_W) for parts, share_W in pairs)

    def _head_inputs(self, features: Features, rows: Sequence[int]) -> Iterator[Windows]:
        """What `features`, those of the fold once it is fitted, make of these utterances."""
        if self._prepared.vectors_UF is not None:
            return ((x_F,) for x_F in self._prepared.vectors_UF[list(rows)])
        found = iter(self.inputs(rows))
        return (tuple(features(parts)) for parts in found) if self._recipe.trains_encoder else found

    def network(self, settings: AttentionHeadConfig) -> nn.Module:
        """A new recogniser that standardises by the training utterances; with the encoder, if that is to be trained.

        Under a trained encoder, the statistics are those of its initial weights.
        """
        mean_C, deviation_C = self._statistics
        encoded = self.features if isinstance(self.features, WindowEncoder) else None
        layers = encoded.encoder.widths("mix") if encoded and encoded.layer == "mix" else ()
        recogniser = AttentionHead(settings, len(mean_C), layers)
        recogniser.standardise(mean_C, deviation_C)
        if encoded is None or not self._recipe.trains_encoder:
            return recogniser
        # A copy: several fits of one fold start from the same weights.
        return EncoderWithHead(copy.deepcopy(encoded.encoder), recogniser, encoded.layer, encoded.wave_norm)

    def _unscaled(self, rows: Sequence[int]) -> Sequence[Windows]:
        known = self._prepared.inputs
        if known is not None:
            return SelectedRows(known, rows)
        assert self._prepared.waves is not None
        waves = self._prepared.waves.at_least(self.features.least_samples).take(rows)
        return waves if self._recipe.trains_encoder else _computed(self.features, waves)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of the recogniser's input over the training utterances; once for all fits of the fold."""
        frames = flatten_windows(self.inputs(self._train_rows))
        if self._recipe.trains_encoder:
            frames = map_in_chunks(self.features, frames, _ENCODED_WINDOWS)
        return statistics(frames)

    @cached_property
    def _scales(self) -> list[SpeakerScale]:
        """The speaker's scale for each utterance of the corpus."""
        speakers_U = self._prepared.corpus.speakers
        return speaker_scales(speakers_U, self._measure_scale, lambda: self._training._measure_scale(self._train_rows))

    def _measure_scale(self, rows: Sequence[int]) -> SpeakerScale:
        if self._prepared.vectors_UF is not None:
            return vectors_scale(self._prepared.vectors_UF[list(rows)])
        mean_C, deviation_C = statistics(flatten_windows(self._unscaled(rows)))
        return SpeakerScale(mean_C.numpy(), deviation_C.numpy())


class FusedInputs:
    """The vectors of a fold of a fusion: those of its parts, side by side."""

    def __init__(self, systems: Sequence[str], parts: Sequence[FoldInputs]) -> None:
        self._systems, self._parts = systems, parts
        self.features = FusedFeatures(tuple((name, part.features) for name, part in zip(systems, parts, strict=True)))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """A block for each part."""
        return tuple(part.block for part in self._parts)

    def vectors(self, rows: Sequence[int]) -> np.ndarray:
        """Vectors of these utterances, [U, F]."""
        return np.concatenate([part.vectors(rows) for part in self._parts], axis=1)

    def means(self, features: Features | FusedFeatures, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """As those of the parts."""
        pairs = zip(self._parts, parts_of(features), strict=True)
        return map(np.concatenate, zip(*(part.means(each, rows) for part, each in pairs), strict=True))

    def with_audio(self, prepared: PreparedCorpus) -> FusedInputs:
        """The same features of other audio of the same utterances."""
        pairs = zip(self._parts, prepared.parts, strict=True)
        return FusedInputs(self._systems, [part.with_audio(other) for part, other in pairs])


def prepare(recipe: EmotionRecipe, corpus: Corpus, opened: OpenedEncoder | None = None) -> PreparedCorpus:
    """Opens all audio and computes the features that do not depend on the fold.

    `opened` is the recipe's encoder; without it, the encoder is opened here. Raises UserError for a missing checkpoint,
    `classify` on a corpus without categories, and audio that is missing, does not decode or is under 0.1 s, unless
    `corpus.on_bad` skips it.
    """
    if recipe.classify and not any(one.category for one in corpus.utterances):
        raise UserError(f"classify=true, but corpus {corpus.name} has no categories: use classify=false")
    if recipe.regressor == "mean":
        return PreparedCorpus(corpus, fold_splits(recipe, corpus))
    encoder, source = opened or open_encoder(recipe)
    refuse_selected(recipe, corpus, source)
    settings = recipe.corpus
    waves = Waves.open(corpus, recipe.audio_cache, max_s=settings.max_s, on_bad=settings.on_bad)
    _warn_ablation(recipe)
    return _prepared(recipe, waves, encoder, source)


def _prepared(
    recipe: EmotionRecipe, waves: Waves, encoder: LayeredNetwork | None, source: dict[str, Any]
) -> PreparedCorpus:
    if recipe.parts:
        parts = tuple(
            _prepared(part, waves, encoder if part.definition.takes_network else None, source) for part in recipe.parts
        )
        fused = dataclasses.replace(parts[0], features=None, inputs=None, vectors_UF=None, parts=parts)
        conditions = {
            name: dataclasses.replace(fused, conditions={}, parts=tuple(part.conditions[name] for part in parts))
            for name in recipe.test_conditions
        }
        return dataclasses.replace(fused, conditions=conditions)
    encoder = recipe.definition.pretrain(recipe, waves, encoder)
    features = recipe.definition.shared_features(recipe, encoder)
    folds = fold_splits(recipe, waves.corpus)
    shared = PreparedCorpus(waves.corpus, folds, features=features, encoder=encoder, source=source)
    conditions = {
        name: _with_features(shared, DegradedWaves(waves, parse_condition(name), recipe.protocol.seed))
        for name in recipe.test_conditions
    }
    return dataclasses.replace(_with_features(shared, waves), conditions=conditions)


def _with_features(shared: PreparedCorpus, waves: Waves) -> PreparedCorpus:
    """`shared` with this audio, and the features of it that do not depend on the fold."""
    if shared.features is None:
        return dataclasses.replace(shared, waves=waves)
    computed = _computed(shared.features, waves)
    if not shared.features.whole:
        return dataclasses.replace(shared, waves=waves, inputs=computed)
    vectors_UF = np.stack([computed[row][0] for row in range(len(computed))])
    return dataclasses.replace(shared, waves=waves, vectors_UF=vectors_UF)


def fold_inputs(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> FoldInputs | FusedInputs:
    """The inputs of a fold. An encoder made for it takes its weights and input level from training speakers alone."""
    if prepared.parts:
        pairs = zip(recipe.parts, prepared.parts, strict=True)
        return FusedInputs([part.system for part in recipe.parts], [_fold_inputs(*pair, split) for pair in pairs])
    return _fold_inputs(recipe, prepared, split)


def _fold_inputs(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> FoldInputs:
    features = prepared.features or recipe.definition.fold_features(recipe, prepared, split)
    return FoldInputs(recipe, prepared, features, split.train_rows)


def statistics(frames: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each feature over all frames, float32 [C], summed in float64 after centring.

    Each array [T, C] is read once, so one at a time is in memory: squares are summed about the mean of their array and
    then moved to the mean of all (Chan, Golub and LeVeque 1983, eq. 2.1).
    """
    count, mean_C, square_C = 0, np.float64(0), np.float64(0)
    for x_TC in frames:
        own_C = x_TC.mean(axis=0, dtype=np.float64)
        shift_C, total = own_C - mean_C, count + len(x_TC)
        square_C = square_C + ((x_TC - own_C) ** 2).sum(axis=0) + shift_C**2 * (count * len(x_TC) / total)
        mean_C = mean_C + shift_C * (len(x_TC) / total)
        count = total
    return torch.from_numpy(np.asarray(mean_C)).float(), torch.from_numpy(np.sqrt(square_C / count)).float()


def _computed(features: Features, waves: Waves) -> CachedFeatures:
    waves = waves.with_max_s(_WHOLE_S) if features.whole else waves.at_least(features.least_samples)
    return compute_features(features.name, features.digest, waves, features)


def _warn_ablation(recipe: EmotionRecipe) -> None:
    pretrained = recipe.definition.takes_weights or recipe.definition.pretrains
    if pretrained and recipe.encoder.wave_norm != "corpus":
        log.warning(
            "encoder.wave_norm=%s is an ablation: the encoder was pretrained at the level of encoder.wave_norm=corpus",
            recipe.encoder.wave_norm,
        )
