"""Test audio as a poor microphone, room or line would give it: made here, keyed, the same in any order and process.

    noiseN     pink noise from 20 Hz up, N dB below the whole utterance
    reverb     a room of 0.6 s that is as loud as the direct path; the level of the utterance stays
    telephone  the band from 300 to 3400 Hz, 8 Butterworth poles at each end
    gainN      N dB louder, or quieter as in gain-12; what goes over full scale is clipped

An utterance keeps its length. What is drawn follows from (seed, kind, key of the utterance) alone, so that noise of
another level is the same noise. S samples.
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
from cpcscale.emotion.batching import key as keyed
from cpcscale.errors import UserError, nearest
from cpcscale.train.augment import EffectsConfig, add_effects, coloured_noise, white_noise

# Raise it when `degraded` gives other samples.
VERSION = 1
# What `cpcscale evaluate` tests under where no other conditions are named.
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
    """One way of degrading: its `kind`, and the signal-to-noise ratio or the gain where it has one."""

    name: str
    kind: str
    db: float = 0.0


def parse_condition(name: str) -> Condition:
    """The condition of this name. Raises UserError for a name that is none."""
    if name in ("reverb", "telephone"):
        return Condition(name, name)
    found = _WITH_DB.fullmatch(name)
    if found is None or abs(float(found[2])) > _MOST_DB:
        raise UserError(
            f"condition {name!r} is none{nearest(name, list(CONDITIONS))}: give noiseN, reverb, telephone or gainN, "
            f"with N in dB as in noise10 or gain-12, {_MOST_DB:g} at most"
        )
    return Condition(name, found[1], float(found[2]))


def degraded(wave_S: np.ndarray, condition: Condition, seed: int, key: str) -> np.ndarray:
    """int16 [S]: the whole utterance `key`, int16 [S], under a condition. Silence stays silence."""
    clean_S = wave_S.astype(np.float64) / 32768
    power = float(np.square(clean_S).sum())
    if power == 0:
        return wave_S
    match condition.kind:
        case "gain":
            heard_S = clean_S * 10 ** (condition.db / 20)
        case "noise":
            noise_S = _pink(len(wave_S), keyed(seed, f"noise/{key}"))
            wanted = power * 10 ** (-condition.db / 10)
            heard_S = clean_S + noise_S * np.sqrt(wanted / np.square(noise_S).sum())
        case "telephone":
            heard_S = signal.sosfilt(_telephone(), clean_S)
        case _:
            heard_S = _reverberant(clean_S, keyed(seed, f"reverb/{key}"))
            heard_S = heard_S * np.sqrt(power / np.square(heard_S).sum())
    return audio.to_int16(heard_S)


class DegradedWaves(Waves):
    """`clean` with each utterance degraded when it is asked for; its windows are those of `clean`, and not cached.

    Its digests are its own, so that features of it are cached by what is heard.
    """

    def __init__(self, clean: Waves, condition: Condition, seed: int) -> None:
        what = f"{VERSION} scipy {scipy.__version__} {condition.kind} {condition.db:g} {seed}"
        names = zip(clean.digests, clean.corpus.utterances, strict=True)
        super().__init__(
            clean.corpus,
            clean._held,
            [sha256(f"{digest} {what} {one.key}".encode()).hexdigest() for digest, one in names],
            cache=clean.cache,
            max_s=clean.max_s,
            least_samples=clean.least_samples,
            bad=clean.bad,
        )
        self._clean, self._condition, self._seed = clean, condition, seed
        # The windows of a long utterance are asked for one after the other.
        self._last: tuple[int, np.ndarray] | None = None

    def at_least(self, samples: int) -> Waves:
        return self._over(self._clean.at_least(samples))

    def take(self, rows: Iterable[int]) -> Waves:
        return self._over(self._clean.take(rows))

    def spanning(self, max_s: float) -> Waves:
        return self._over(self._clean.spanning(max_s))

    def samples(self, row: int) -> int:
        return self._clean.samples(row)

    def __reduce__(self) -> tuple[Callable[..., Waves], tuple[object, ...]]:
        return DegradedWaves, (self._clean, self._condition, self._seed)

    def _over(self, clean: Waves) -> Waves:
        return DegradedWaves(clean, self._condition, self._seed)

    def _part(self, row: int, start: int, stop: int) -> np.ndarray:
        last = self._last
        if last is None or last[0] != row:
            name = self.corpus.utterances[row].key
            last = self._last = (row, degraded(self._clean.whole(row), self._condition, self._seed, name))
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
