"""What samples are like: their level, and whether they can be speech."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpcscale.audio.encoding import RATE_HZ
from cpcscale.errors import AudioError, UserError

_HIGHEST = 32767


@dataclass(frozen=True)
class Level:
    """The mean and mean square of a signal in [-1, 1), and the `clipped` share of its samples at full scale."""

    mean: float
    mean_square: float
    clipped: float


@dataclass(kw_only=True)
class SoundLimits:
    """What audio may be like; what is not is left out, with the cause."""

    # The lowest and the highest rate that a header may state, in Hz.
    rate_hz: tuple[int, int] = (2_000, 768_000)
    # The largest share of samples at full scale. Samples on another scale than their format's become a square wave.
    clipped: float = 0.2
    # The largest share of the power that may be a constant offset (DC).
    offset: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz[0] <= self.rate_hz[1]:
            raise UserError(f"rate_hz={list(self.rate_hz)} is no range of rates: write [lowest,highest] in Hz")
        for name in ("clipped", "offset"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is not a share between 0 and 1")


class SoundMeter:
    """The level of an int16 signal that comes in blocks of any length, and whether it can be speech."""

    def __init__(self) -> None:
        self.samples = 0
        self._sums = np.zeros(3)

    def add(self, samples: np.ndarray) -> None:
        """The next samples of the signal, int16 [S]."""
        self.samples += len(samples)
        self._sums += _sums(samples)

    def check(self, limits: SoundLimits, peak: float) -> Level:
        """The level so far; `peak` is of the floats that became int16. Raises AudioError as `check_sound` does."""
        level, seconds = Level(*self._sums / self.samples), self.samples / RATE_HZ
        if not level.mean_square:
            if not peak:
                raise AudioError("silent", "every sample is zero", seconds)
            raise AudioError(
                "quiet",
                f"its loudest sample is {peak:.1g} of full scale, less than a step of 16 bits: if these are 16-bit "
                "samples in a 32-bit file, scale them",
                seconds,
            )
        if level.clipped > limits.clipped:
            scale = f", with samples of up to {peak:.3g} where 1 is full scale" if peak > 2 else ""
            why = f"{level.clipped:.0%} of its samples are at full scale{scale} (limit {limits.clipped:g})"
            raise AudioError("clipped", why, seconds)
        if level.mean**2 > limits.offset * level.mean_square:
            raise AudioError(
                "constant",
                f"{level.mean**2 / level.mean_square:.1%} of its power is a constant offset (limit {limits.offset:g})",
                seconds,
            )
        return level


def measure(samples: np.ndarray) -> Level:
    """The level of an int16 signal [S]."""
    return Level(*_sums(samples) / len(samples))


def check_sound(wave: np.ndarray, limits: SoundLimits) -> tuple[np.ndarray, Level]:
    """(int16 samples, their level) of a float32 signal [S].

    Raises AudioError with cause `silent` (every sample is zero), `quiet` (every sample rounds to zero), `clipped` or
    `constant` (it has next to nothing but an offset).
    """
    meter, samples = SoundMeter(), to_int16(wave)
    meter.add(samples)
    return samples, meter.check(limits, float(np.abs(wave).max(initial=0)))


def to_int16(wave: np.ndarray) -> np.ndarray:
    """float samples as int16: clip(rint(wave * 32768))."""
    return np.clip(np.rint(wave * np.float32(32768)), -32768, 32767).astype(np.int16)


def _sums(samples: np.ndarray) -> np.ndarray:
    """The sums of what `Level` has the means of."""
    # Not a dot product: BLAS would start threads in every worker.
    scaled = samples.astype(np.float64) / 32768
    clipped = np.count_nonzero((samples >= _HIGHEST) | (samples < -_HIGHEST))
    return np.array([scaled.sum(), np.square(scaled).sum(), clipped])
