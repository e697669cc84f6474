"""What audio is like to a recogniser: how much of it is speech, and what makes its values doubtful.

    non_speech  under a fifth of the frames are speech
    clipped     over one sample in a thousand is at full scale
    level       speech under -40 or over -10 dB of full scale
    bandwidth   next to nothing above the telephone band

No audio is taken away by this, and nothing but a level that stays the same, without any speech, is refused. T frames of
32 ms, S samples, F frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cpcscale import audio
from cpcscale.serve.voice import FRAME, VoiceActivity

# A frame is speech from this probability on.
_SPEECH = 0.5
_BLOCK = 512 * FRAME
# The share of frames: of the speech that was measured, the lowest is 0.6; of noise, music and beeps, the highest 0.01.
_LEAST_SHARE = 0.2
# No frame over this probability, and a level that deviates by less: white and pink noise, hum and chords have 0.2 dB to
# 0.8 dB, speech 6 dB and more.
_NO_SPEECH, _STATIONARY_DB = 0.2, 2.0
_CLIPPED = 1e-3
# The nominal level of speech in ITU-T P.830, -26 dB of full scale, with its range of 12 dB to both sides, and a margin.
_LEVEL_DB = (-40.0, -10.0)
# The power of the frequencies above the telephone band, against those in it.
_TELEPHONE_HZ, _ABOVE_HZ, _LEAST_ABOVE_DB = (300.0, 3400.0), (5000.0, 7600.0), -40.0
_HZ = np.fft.rfftfreq(FRAME, 1 / audio.RATE_HZ)
_WINDOW = np.hanning(FRAME).astype(np.float32)
# That of a rounding to 16 bits.
_LEAST_POWER = 1e-10
# Silence is refused, a constant too; all else is not a matter of the door.
_LIMITS = audio.SoundLimits(clipped=1.0, offset=1 - 1e-6)


@dataclass(frozen=True)
class Quality:
    """`speech_share`: of the frames, 0 to 1. `reason`: why there can be no value, else "". `flags`: as above."""

    speech_share: float
    flags: tuple[str, ...] = ()
    reason: str = ""


class QualityMeter:
    """The quality of audio that comes in blocks of any length; memory does not grow."""

    def __init__(self) -> None:
        self._sound, self._voice = audio.SoundMeter(), VoiceActivity()
        self._rest_S = np.zeros(0, np.int16)
        self._frames = self._speech_frames = 0
        self._most = 0.0
        self._power = self._speech_power = 0.0
        self._level_sums = np.zeros(2)
        self._power_F = np.zeros(len(_HZ))

    def add(self, samples_S: np.ndarray) -> None:
        """The next samples, int16 [S] at 16 kHz."""
        for start in range(0, len(samples_S), _BLOCK):
            part_S = samples_S[start : start + _BLOCK]
            self._sound.add(part_S)
            known_S = np.concatenate([self._rest_S, part_S])
            whole = len(known_S) // FRAME * FRAME
            self._rest_S = known_S[whole:]
            if whole:
                self._add_frames(known_S[:whole].reshape(-1, FRAME) / np.float32(32768))

    def quality(self, peak: float = 0.0) -> Quality:
        """That of all that was added; `peak` is of the floats that became int16.

        What is left of a frame at the end counts for the level alone.
        """
        try:
            level = self._sound.check(_LIMITS, peak)
        except audio.AudioError as error:
            return Quality(0.0, reason=error.cause)
        if not self._frames:
            return Quality(math.nan)
        share = self._speech_frames / self._frames
        mean, mean_square = self._level_sums / self._frames
        if self._most <= _NO_SPEECH and mean_square - mean**2 < _STATIONARY_DB**2:
            return Quality(share, reason="no_speech")
        speech_db = 10 * math.log10(
            self._speech_power / self._speech_frames if self._speech_frames else self._power / self._frames
        )
        found = {
            "non_speech": share < _LEAST_SHARE,
            "clipped": level.clipped > _CLIPPED,
            "level": not _LEVEL_DB[0] <= speech_db <= _LEVEL_DB[1],
            "bandwidth": self._band_db() < _LEAST_ABOVE_DB,
        }
        return Quality(share, tuple(name for name, holds in found.items() if holds))

    def _add_frames(self, frames_TS: np.ndarray) -> None:
        probability_T, power_T = self._voice(frames_TS), frames_TS.var(axis=1, dtype=np.float64) + _LEAST_POWER
        level_T, speech_T = 10 * np.log10(power_T), probability_T >= _SPEECH
        self._frames += len(frames_TS)
        self._speech_frames += int(speech_T.sum())
        self._most = max(self._most, float(probability_T.max()))
        self._power += float(power_T.sum())
        self._speech_power += float(power_T[speech_T].sum())
        self._level_sums += level_T.sum(), np.square(level_T).sum()
        self._power_F += np.square(np.abs(np.fft.rfft(frames_TS * _WINDOW, axis=1))).sum(axis=0)

    def _band_db(self) -> float:
        bands = (self._power_F[(low <= _HZ) & (high > _HZ)].sum() for low, high in (_ABOVE_HZ, _TELEPHONE_HZ))
        above, telephone = (power + _LEAST_POWER for power in bands)
        return 10 * math.log10(above / telephone)
