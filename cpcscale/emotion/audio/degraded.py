"""Degraded test audio: noise, reverberation, telephone band, gain; the same in any order and process.

    noiseN     pink noise from 20 Hz up, N dB below the whole utterance
    reverb     a room with RT60 of 0.6 s, as loud as the direct path; the level of the utterance stays
    telephone  the band from 300 to 3400 Hz, 8 Butterworth poles at each end
    gainN      N dB louder, or quieter as in gain-12; samples over full scale are clipped

An utterance keeps its length. Random draws depend on (seed, kind, key of the utterance) alone, so noise at another
level is the same noise. S samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

import numpy as np
import scipy
import torch
from scipy import signal

from cpcscale import audio
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.batching import derive_seed as keyed
from cpcscale.errors import UserError, nearest
from cpcscale.train.augment import EffectsConfig, add_effects, coloured_noise, white_noise

# Raise it when `degrade` gives other samples.
VERSION = 1
# The conditions of `cpcscale evaluate` if none are named.
CONDITIONS = ("noise20", "noise10", "noise0", "reverb", "telephone", "gain+12", "gain-12")
_WITH_DB = re.compile(r"(noise|gain)([+-]?\d+(?:\.\d+)?)")
_MOST_DB = 100.0
_PINK = 1.0
_TELEPHONE_HZ = (300, 3400)
_POLES = 8
_ROOM = EffectsConfig(
    noise_p=0, band_drop_p=0, time_drop_p=0, reverb_p=1, reverb_rt60_s=[0.6, 0.6], reverb_direct_db=[0.0, 0.0]
)


@dataclass(frozen=True)
class Condition:
    """A way of degrading audio; `db` is the signal-to-noise ratio of noise, or the gain."""

    name: str
    kind: str
    db: float = 0.0


def parse_condition(name: str) -> Condition:
    """The condition of this name, such as noise10. Raises UserError for an unknown name."""
    if name in ("reverb", "telephone"):
        return Condition(name, name)
    found = _WITH_DB.fullmatch(name)
    if found is None or abs(float(found[2])) > _MOST_DB:
        raise UserError(
            f"condition {name!r} is unknown{nearest(name, list(CONDITIONS))}: give noiseN, reverb, telephone or gainN, "
            f"with N in dB as in noise10 or gain-12, {_MOST_DB:g} at most"
        )
    return Condition(name, found[1], float(found[2]))


def degrade(wave_S: np.ndarray, condition: Condition, seed: int, key: str) -> np.ndarray:
    """The utterance `key`, int16 [S], under a condition, int16 [S]. Silence stays silence."""
    clean_S = wave_S.astype(np.float64) / 32768
    power = float(np.square(clean_S).sum())
    if power == 0:
        return wave_S
    match condition.kind:
        case "gain":
            changed_S = clean_S * 10 ** (condition.db / 20)
        case "noise":
            noise_S = _pink(len(wave_S), keyed(seed, f"noise/{key}"))
            wanted = power * 10 ** (-condition.db / 10)
            changed_S = clean_S + noise_S * np.sqrt(wanted / np.square(noise_S).sum())
        case "telephone":
            changed_S = signal.sosfilt(_telephone(), clean_S)
        case _:
            changed_S = _reverberant(clean_S, keyed(seed, f"reverb/{key}"))
            changed_S = changed_S * np.sqrt(power / np.square(changed_S).sum())
    return audio.to_int16(changed_S)


class DegradedWaves(Waves):
    """The audio of `clean` under a condition, degraded on access and not cached; its windows are those of `clean`.

    It has its own digests, so that features of clean and degraded audio have different cache keys.
    """

    def __init__(self, clean: Waves, condition: Condition, seed: int) -> None:
        what = f"{VERSION} scipy {scipy.__version__} {condition.kind} {condition.db:g} {seed}"
        names = zip(clean.digests, clean.corpus.utterances, strict=True)
        super().__init__(
            clean.corpus,
            clean._source,
            [sha256(f"{digest} {what} {one.key}".encode()).hexdigest() for digest, one in names],
            cache=clean.cache,
            max_s=clean.max_s,
            least_samples=clean.least_samples,
            bad=clean.bad,
        )
        self._clean, self._condition, self._seed = clean, condition, seed
        # The last utterance, because the windows of a long one are read one after the other.
        self._last: tuple[int, np.ndarray] | None = None

    def at_least(self, samples: int) -> Waves:
        return self._degrading(self._clean.at_least(samples))

    def take(self, rows: Iterable[int]) -> Waves:
        return self._degrading(self._clean.take(rows))

    def with_max_s(self, max_s: float) -> Waves:
        return self._degrading(self._clean.with_max_s(max_s))

    def samples(self, row: int) -> int:
        return self._clean.samples(row)

    def __reduce__(self) -> tuple[Callable[..., Waves], tuple[object, ...]]:
        return DegradedWaves, (self._clean, self._condition, self._seed)

    def _degrading(self, clean: Waves) -> Waves:
        return DegradedWaves(clean, self._condition, self._seed)

    def _part(self, row: int, start: int, stop: int) -> np.ndarray:
        last = self._last
        if last is None or last[0] != row:
            name = self.corpus.utterances[row].key
            last = self._last = (row, degrade(self._clean.whole(row), self._condition, self._seed, name))
        return last[1][start:stop]


def _pink(samples: int, key: int) -> np.ndarray:
    noise_BS = coloured_noise(white_noise(torch.tensor([key]), samples), torch.tensor([_PINK], dtype=torch.float64))
    return noise_BS[0].numpy()


def _reverberant(clean_S: np.ndarray, key: int) -> np.ndarray:
    wave_BS = torch.from_numpy(clean_S)[None]
    return add_effects(wave_BS, torch.tensor([key]), torch.tensor([len(clean_S)]), _ROOM)[0].numpy()


@cache
def _telephone() -> np.ndarray:
    return signal.butter(_POLES, _TELEPHONE_HZ, "bandpass", fs=audio.RATE_HZ, output="sos")
