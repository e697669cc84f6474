"""Standardises features by each speaker's own mean and deviation: an ablation, marked SPEAKER-ADAPTED. Pure.

It uses audio of test speakers, but no labels.

T frames, C features, U utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

# A single utterance standardised by its own mean would be constant.
_LEAST_UTTERANCES = 2


@dataclass(frozen=True)
class SpeakerScale:
    """The mean and deviation of features, float32 [C] each; calling it standardises features."""

    mean_C: np.ndarray
    deviation_C: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Features standardised along the last axis, float32; a constant feature is only shifted."""
        deviation_C = np.where(self.deviation_C > 1e-6, self.deviation_C, np.float32(1))
        return ((x - self.mean_C) / deviation_C).astype(np.float32)


def speaker_scales(
    speakers_U: Sequence[str], measure: Callable[[Sequence[int]], SpeakerScale], training: Callable[[], SpeakerScale]
) -> list[SpeakerScale]:
    """The scale of each utterance: that of all utterances of its speaker, in whatever part of a split they are.

    `measure` returns the scale of some rows. Rows of unknown speakers ("") and of speakers with a single utterance take
    `training()`, the scale of the training rows.
    """
    rows_of: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers_U):
        rows_of.setdefault(speaker, []).append(row)
    own: Mapping[str, SpeakerScale] = {
        speaker: measure(rows) for speaker, rows in rows_of.items() if speaker and len(rows) >= _LEAST_UTTERANCES
    }
    rest = None if set(rows_of) <= set(own) else training()
    scales = [own.get(speaker, rest) for speaker in speakers_U]
    return [scale for scale in scales if scale is not None]


class ScaledFeatures(Sequence[tuple[np.ndarray, ...]]):
    """The windows [T, C] of utterances, each utterance standardised by its own scale on access."""

    def __init__(self, known: Sequence[tuple[np.ndarray, ...]], scales: Sequence[SpeakerScale]) -> None:
        self._known, self._scales = known, scales

    def __len__(self) -> int:
        return len(self._known)

    @overload
    def __getitem__(self, row: int) -> tuple[np.ndarray, ...]: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[tuple[np.ndarray, ...]]: ...
    def __getitem__(self, row: int | slice) -> tuple[np.ndarray, ...] | Sequence[tuple[np.ndarray, ...]]:
        if isinstance(row, slice):
            return ScaledFeatures(self._known[row], self._scales[row])
        return tuple(self._scales[row](x_TC) for x_TC in self._known[row])


def vectors_scale(x_UF: np.ndarray) -> SpeakerScale:
    """The scale of utterance vectors [U, F]."""
    x_UF = x_UF.astype(np.float64)
    return SpeakerScale(x_UF.mean(axis=0).astype(np.float32), x_UF.std(axis=0).astype(np.float32))


def apply_each(x_UF: np.ndarray, scales: Iterable[SpeakerScale]) -> np.ndarray:
    """Vectors float32 [U, F], each row standardised by its own scale."""
    return np.stack([scale(x_F) for x_F, scale in zip(x_UF, scales, strict=True)])
