"""Windows: utterances of any length become training examples of one length. Pure; only the index is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cpcscale import audio, config
from cpcscale.stream.epoch_order import mix

_CROP = -2


@dataclass(kw_only=True)
class WindowConfig:
    """How utterances are divided into windows."""

    # tile: consecutive windows that cover all of an utterance. crop: one window at a keyed random place (the paper).
    kind: Literal["tile", "crop"] = "tile"
    # Length of every window in seconds; shorter utterances are padded, and padding does not count in the loss.
    seconds: float = 10.0

    def __post_init__(self) -> None:
        config.at_least(0.05, **{"window.seconds": self.seconds})

    @property
    def samples(self) -> int:
        """S, the length of every window in samples at 16 kHz."""
        return round(self.seconds * audio.RATE_HZ)


def count(spec: WindowConfig, samples: np.ndarray) -> np.ndarray:
    """int64 [utterances]: how many windows utterances of these lengths (samples at 16 kHz) have; at least one each.

    >>> lengths = np.array([8_000, 160_000, 200_000])
    >>> count(WindowConfig(seconds=10), lengths).tolist(), count(WindowConfig(kind="crop"), lengths).tolist()
    ([1, 1, 2], [1, 1, 1])
    """
    if spec.kind == "crop":
        return np.ones(len(samples), dtype=np.int64)
    return np.maximum(1, -(-samples // spec.samples)).astype(np.int64)


def span(
    spec: WindowConfig, samples: np.ndarray, utterance: np.ndarray, number: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) in samples of window `number` of each `utterance`, which has `samples` samples.

    The last tile ends with the utterance and overlaps the one before; only an utterance shorter than a window gives a
    shorter length.
    """
    room = np.maximum(0, samples - spec.samples)
    if spec.kind == "crop":
        # The high bits times the range, so that every start is equally likely.
        fraction = (mix(utterance, seed, epoch, _CROP) >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        start = np.floor(fraction * (room + 1)).astype(np.int64)
    else:
        start = np.minimum(number * spec.samples, room)
    return start, np.minimum(samples, spec.samples)


def per_shard(counts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 [shards]: the windows of each shard; `counts` are those of utterances, `bounds` is as Index.bounds."""
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return np.diff(ends[bounds])


def locate(counts: np.ndarray, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(utterance in the shard, window number in it), int64, of windows numbered over a shard.

    `counts` are the windows of each utterance of the shard.
    """
    ends = np.cumsum(counts)
    row = np.searchsorted(ends, ordinal, side="right")
    return row, ordinal - (ends[row] - counts[row])


def keys(utterance: np.ndarray, number: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """int64 [windows]: the key for all random choices of each window, a function of (seed, epoch, window)."""
    return mix(utterance, seed, epoch).view(np.int64) ^ mix(number, seed, epoch, 1).view(np.int64)
