"""What a procedure did on speakers that it did not know: sizes of its errors, and how unlike its training they were.

It is what the intervals of a saved recogniser and its flag `unlike_training` rest on. It holds no label, key or path.
U utterances, F features, P primitives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.conformal import half_widths, interval_level

# Of held-out utterances, as many are no further from the training rows than the limit of `unlike_training`.
_ALIKE = 0.99
# An interval that is nearly as wide as that of a constant says nothing.
_INFORMATIVE = 0.9


@dataclass(frozen=True)
class Reference:
    """Mean and deviation of the readouts of the utterances that a recogniser has learnt from, float64 [F] each."""

    mean_F: np.ndarray
    deviation_F: np.ndarray

    @classmethod
    def of(cls, readouts: Iterable[np.ndarray]) -> Reference:
        """That of these readouts [F]."""
        x_UF = np.stack(list(readouts)).astype(np.float64)
        deviation_F = x_UF.std(axis=0)
        return cls(x_UF.mean(axis=0), np.where(deviation_F > 0, deviation_F, 1.0))

    def distance(self, readout_F: np.ndarray) -> float:
        """The root mean square of a readout that is standardised by it: about 1 for utterances like those."""
        return float(np.sqrt(np.mean(((readout_F - self.mean_F) / self.deviation_F) ** 2)))


def window_means(windows: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [W, F]: the vector of each window, or the mean over time of its frames."""
    return np.stack([each if each.ndim == 1 else each.mean(axis=0, dtype=np.float64) for each in windows])


def readout(parts: Sequence[np.ndarray], share_W: np.ndarray) -> np.ndarray:
    """[F]: the vector of an utterance, or the mean over time of the frames [T, C] of its windows."""
    return parts[0] if parts[0].ndim == 1 else np.asarray(share_W @ window_means(parts))


@dataclass(frozen=True)
class HeldOut:
    """Errors on held-out speakers, who have random numbers.

    `sizes_UP` are |label - prediction| on [-1, 1], `distance_U` those of `Reference` (empty where there is none),
    `speaker_U` the speakers' numbers, and `constant_P` the half-widths of the intervals of `system=mean` on the same
    utterances.
    """

    sizes_UP: np.ndarray
    distance_U: np.ndarray
    speaker_U: np.ndarray
    constant_P: np.ndarray

    @classmethod
    def of(
        cls,
        error_UP: np.ndarray,
        constant_error_UP: np.ndarray,
        distance_U: np.ndarray,
        speakers: Sequence[str],
        seed: int,
    ) -> HeldOut | None:
        """That of errors [U, P] on [-1, 1], and of those of `system=mean`. None: too few speakers for an interval.

        Utterances of the speaker "", whom nobody knows, are left out.
        """
        named = np.array([row for row, speaker in enumerate(speakers) if speaker], dtype=int)
        names = sorted({speakers[row] for row in named})
        if not (level := interval_level(len(names))):
            return None
        random = np.random.default_rng(seed)
        number = dict(zip(names, random.permutation(len(names)).tolist(), strict=True))
        # By number, and at random within a speaker, so that the order says nothing of the corpus.
        named = random.permutation(named)
        speaker_U = np.array([number[speakers[row]] for row in named], np.int32)
        order = np.argsort(speaker_U, kind="stable")
        rows, speaker_U = named[order], speaker_U[order]
        constant_P = half_widths(np.abs(constant_error_UP[rows]), speaker_U, level)
        distance_U = distance_U[rows] if len(distance_U) else distance_U
        return cls(np.abs(error_UP[rows]).astype(np.float32), distance_U.astype(np.float32), speaker_U, constant_P)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> HeldOut:
        """That of `arrays`. Raises ValueError for arrays that are not of it."""
        made = cls(**arrays)
        count = len(made.speaker_U)
        if (
            made.sizes_UP.shape != (count, len(PRIMITIVES))
            or made.constant_P.shape != (len(PRIMITIVES),)
            or made.distance_U.shape not in ((count,), (0,))
            or not all(np.isfinite(array).all() and (array >= 0).all() for array in arrays.values())
            or not made.level
        ):
            raise ValueError("the residuals are not those of a recogniser")
        return made

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def level(self) -> float:
        """The probability of the intervals; 0: there are none."""
        return interval_level(len(np.unique(self.speaker_U)))

    @cached_property
    def half_P(self) -> np.ndarray:
        """The half-widths of the intervals, on [-1, 1]."""
        return half_widths(self.sizes_UP, self.speaker_U, self.level)

    @cached_property
    def informative_P(self) -> np.ndarray:
        """Whether the interval of each primitive is clearly narrower than that of a constant."""
        return self.half_P <= _INFORMATIVE * self.constant_P

    @cached_property
    def limit(self) -> float:
        """The distance above which an utterance is unlike those of training; infinite where distances are not known."""
        return float(np.quantile(self.distance_U, _ALIKE)) if len(self.distance_U) else np.inf
