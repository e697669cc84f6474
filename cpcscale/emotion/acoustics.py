"""What the pooled frames of a network keep of speech, measured without labels: level, pitch, rate, speaker.

`level`, `pitch` and `rate` follow from the audio itself: mean power in dB, mean F0 in semitones, syllables a second. A
ridge regression predicts them from the mean and deviation of z, or of c, over time, over folds of whole speakers; the
figure is the CCC. `speaker` is the share of utterances whose speaker a linear classifier finds among the known ones of
the same language, after other recordings of each: among all languages, or within a recording, it would find the
channel. Nothing here is random, so two networks differ by their weights alone.

U utterances, S samples, T frames, C channels, F features, P measures, A values of alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from cpcscale import audio
from cpcscale.emotion.encoders.networks import WindowEncoder
from cpcscale.emotion.heads.blocks import standardised
from cpcscale.emotion.heads.training import FitConfig, fit_device
from cpcscale.emotion.heads.vectors import inner_folds
from cpcscale.emotion.scores.ccc import ccc
from cpcscale.errors import UserError
from cpcscale.handmade import prosody
from cpcscale.handmade.statistics import settled
from cpcscale.model.cpc import CPC
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader
from cpcscale.stream.batch import WindowReader
from cpcscale.stream.epoch_order import permutation
from cpcscale.stream.window import WindowConfig

LAYERS = ("z", "c")
# The measures that are predicted.
MEASURES = ("level", "pitch", "rate")
# The weights of the squared weights of a ridge regression, for each feature, of which inner folds choose.
_ALPHAS = np.array([10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01])
_FOLDS, _SEED = 5, 0
# An utterance is used from this length on, and if it has so many voiced frames, or its pitch says nothing.
_LEAST_S, _LEAST_VOICED = 1.0, 10
# Of a speaker, so many utterances are enough; of a large set, so many are looked at.
_EACH, _CANDIDATES = 10, 50_000
_TOGETHER = 16


@dataclass(frozen=True)
class _Place:
    """An utterance of a shard set, with the names that its index has for it."""

    shard: int
    row: int
    group: str
    recording: str
    language: str

    @property
    def speaker(self) -> str:
        """Empty if it is not known: a group is then the recording."""
        return "" if self.group == self.recording else self.group


@dataclass(frozen=True)
class Speech:
    """Utterances with what is measured of them: int16 waveforms, target float64 [U, P], names of groups (speakers,
    else recordings), and `judged`, the rows of each language by which speakers are told apart."""

    waves: list[np.ndarray]
    target_UP: np.ndarray
    group_U: list[str]
    judged: list[Judged]

    @property
    def chance(self) -> float | None:
        """The share of speakers that a guess finds; None where no speakers can be told apart."""
        counts = [len(part.row_U) for part in self.judged]
        return float(np.average([1 / part.speakers for part in self.judged], weights=counts)) if counts else None


@dataclass(frozen=True)
class Judged:
    """Utterances `row_U` of `speakers` speakers of one language, the recordings of each in two halves."""

    speakers: int
    row_U: np.ndarray
    speaker_U: np.ndarray
    half_U: np.ndarray


def draw_speech(index: Index, count: int, seconds: float) -> Speech:
    """`count` utterances of a set, or crops of at most `seconds`: the same at every call.

    About ten of each speaker, more where there are few speakers. Raises UserError where there are too few.
    """
    places = _chosen(index, count)
    kept, waves, targets = [], [], []
    for place, wave_S in zip(places, _waves(index, places, seconds), strict=True):
        if len(wave_S):
            values = prosody.prosody(wave_S.astype(np.float32) / 32768, "pitch")
            measured = dict(zip(prosody.NAMES, values, strict=True))
            if measured["voiced_share"] * len(wave_S) >= _LEAST_VOICED * audio.RATE_HZ / 100:
                kept.append(place)
                waves.append(wave_S)
                level_db = 10 * np.log10(np.square(wave_S / 32768).mean())
                targets.append([level_db, measured["f0_mean_st"], measured["syllables_per_s"]])
    groups = [place.group or place.recording for place in kept]
    if len(set(groups)) < 3:
        raise UserError(
            f"{index.base} has {len(kept)} voiced utterances of at least {_LEAST_S:g} s, of {len(set(groups))} "
            "speakers or recordings, and 3 are needed to predict for others than were learnt from: give another set "
            "by shards=FOLDER"
        )
    return Speech(waves, np.array(targets, np.float64), groups, list(_judged(kept)))


def measure_network(speech: Speech, network: CPC) -> dict[str, dict[str, float]]:
    """{layer: {measure: figure}} for LAYERS; `speaker` is among the measures where speakers can be told apart."""
    pooled_U2C = np.stack(list(_pooled(speech, network)))
    found, start = {}, 0
    for layer, width in zip(LAYERS, network.widths("both"), strict=True):
        x_UF = pooled_U2C[:, :, start : start + width].reshape(len(pooled_U2C), -1)
        start += width
        figures = ccc(speech.target_UP, _predicted(x_UF, speech.target_UP, speech.group_U)).tolist()
        found[layer] = dict(zip(MEASURES, figures, strict=True))
        if speech.judged:
            right = [row for part in speech.judged for row in _recognised(x_UF, part)]
            found[layer]["speaker"] = float(np.mean(right))
    return found


def _chosen(index: Index, count: int) -> list[_Place]:
    found: list[_Place] = []
    for shard in permutation(index.shards.num_rows, _SEED).tolist():
        rows = index.rows(shard)
        usable = np.flatnonzero(~rows.excluded & (rows.samples >= _LEAST_S * audio.RATE_HZ))
        names = rows.table.select(["group", "recording", "language"]).take(usable).to_pylist()
        found += [_Place(shard, int(row), **each) for row, each in zip(usable, names, strict=True)]
        if len(found) >= _CANDIDATES:
            break
    by_group: dict[str, list[_Place]] = {}
    for number in permutation(len(found), _SEED).tolist():
        by_group.setdefault(found[number].group or found[number].recording, []).append(found[number])
    each = max(_EACH, -(-count // max(1, len(by_group))))
    chosen = islice(chain.from_iterable(part[:each] for part in by_group.values()), count)
    return sorted(chosen, key=lambda place: (place.shard, place.row))


def _waves(index: Index, places: Sequence[_Place], seconds: float) -> Iterator[np.ndarray]:
    """The audio of each, int16 [S], at the crop of epoch 0; empty where it does not decode."""
    shards = ShardReader(index)
    reader = WindowReader(shards, WindowConfig(kind="crop", seconds=seconds), _SEED)
    try:
        for start in range(0, len(places), _TOGETHER):
            part = places[start : start + _TOGETHER]
            unfilled = reader.plan(
                0, 0, np.array([place.shard for place in part]), np.array([place.row for place in part])
            )
            reader.fill(unfilled, range(len(part)))
            batch = unfilled.to_batch()
            yield from (
                wave_S[:samples].copy() for wave_S, samples in zip(batch.wave_BS, batch.samples_B.tolist(), strict=True)
            )
    finally:
        shards.close()


def _judged(places: Sequence[_Place]) -> Iterator[Judged]:
    for language in sorted({place.language for place in places}):
        recordings: dict[str, set[str]] = {}
        for place in places:
            if place.language == language and place.speaker:
                recordings.setdefault(place.speaker, set()).add(place.recording)
        names = sorted(speaker for speaker, known in recordings.items() if len(known) > 1)
        if len(names) < 2:
            continue
        half = {(name, each): n % 2 for name in names for n, each in enumerate(sorted(recordings[name]))}
        rows = [row for row, place in enumerate(places) if place.language == language and place.speaker in names]
        speaker_U = [names.index(places[row].speaker) for row in rows]
        half_U = [half[places[row].speaker, places[row].recording] for row in rows]
        yield Judged(len(names), np.array(rows), np.array(speaker_U), np.array(half_U))


def _pooled(speech: Speech, network: CPC) -> Iterator[np.ndarray]:
    """Mean and deviation of z and c side by side, float64 [2, C], of each utterance."""
    encode = WindowEncoder(network, "both", fit_device(FitConfig()))
    for start in range(0, len(speech.waves), _TOGETHER):
        for x_TC in encode(speech.waves[start : start + _TOGETHER]):
            kept_TC = settled(x_TC).astype(np.float64)
            yield np.stack([kept_TC.mean(axis=0), kept_TC.std(axis=0)])


def _predicted(x_UF: np.ndarray, y_UP: np.ndarray, group_U: Sequence[str]) -> np.ndarray:
    """What a ridge regression predicts of each utterance after those of other groups, [U, P].

    Alpha is chosen for each measure by the squared error in inner folds, which are of whole groups too.
    """
    guess_UP = np.empty_like(y_UP)
    for train, test in inner_folds(group_U, _FOLDS, str(_SEED)):
        error_AP = np.zeros((len(_ALPHAS), y_UP.shape[1]))
        for fitted, judged in inner_folds([group_U[row] for row in train], _FOLDS - 1, str(_SEED)):
            guess_AUP = _ridges(x_UF[train[fitted]], y_UP[train[fitted]], x_UF[train[judged]], _ALPHAS)
            error_AP += np.square(guess_AUP - y_UP[train[judged]]).sum(axis=1)
        guess_AUP = _ridges(x_UF[train], y_UP[train], x_UF[test], _ALPHAS)
        for measure, best in enumerate(error_AP.argmin(axis=0)):
            guess_UP[test, measure] = guess_AUP[best, :, measure]
    return guess_UP


def _recognised(x_UF: np.ndarray, part: Judged) -> Iterator[bool]:
    """Whether the speaker of each utterance is found after the recordings of the other half."""
    own_UK = np.eye(part.speakers)[part.speaker_U]
    for half in (0, 1):
        train, test = part.half_U != half, part.half_U == half
        guess_UK = _ridges(x_UF[part.row_U[train]], own_UK[train], x_UF[part.row_U[test]], np.ones(1))[0]
        yield from (guess_UK.argmax(axis=1) == part.speaker_U[test]).tolist()


def _ridges(x_UF: np.ndarray, y_UP: np.ndarray, other_UF: np.ndarray, alpha_A: np.ndarray) -> np.ndarray:
    """Predictions [A, U, P] for other rows by the ridge regression of y on standardised x with each alpha.

    In the space of the rows, where one decomposition serves all alphas (Saunders et al. 1998, ICML).
    """
    mean_F, deviation_F = x_UF.mean(axis=0), x_UF.std(axis=0)
    scale_F = np.where(deviation_F > 0, deviation_F, 1.0)
    fitted_UF, asked_UF = (standardised(rows, mean_F, scale_F) for rows in (x_UF, other_UF))
    mean_P, width = y_UP.mean(axis=0), x_UF.shape[1]
    value_U, vector_UU = np.linalg.eigh(fitted_UF @ fitted_UF.T)
    inverse_AU = 1 / (value_U.clip(min=0) + alpha_A[:, None] * width)
    weight_AUP = vector_UU @ (inverse_AU[:, :, None] * (vector_UU.T @ (y_UP - mean_P)))
    return np.asarray(asked_UF @ fitted_UF.T @ weight_AUP + mean_P)
