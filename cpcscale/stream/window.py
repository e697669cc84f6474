"""Windows: how utterances of any length become training units of one length. Pure; counted from the index alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cpcscale import audio, config
from cpcscale.stream.epoch_order import mix

_CROP = -2


@dataclass(kw_only=True)
class WindowConfig:
    """Which windows an utterance has."""

    # tile: all of a long utterance, every sample used. crop: one window an utterance at a keyed place (the paper).
    kind: Literal["tile", "crop"] = "tile"
    # Length of every window; shorter utterances are padded, and no padding is learnt from.
    seconds: float = 10.0

    def __post_init__(self) -> None:
        config.at_least(0.05, **{"window.seconds": self.seconds})

    @property
    def samples(self) -> int:
        """S, the length of every window."""
        return round(self.seconds * audio.RATE_HZ)


def count(spec: WindowConfig, samples: np.ndarray) -> np.ndarray:
    """int64 [utterances]: the number of windows of utterances with these lengths; at least one each."""
    if spec.kind == "crop":
        return np.ones(len(samples), dtype=np.int64)
    return np.maximum(1, -(-samples // spec.samples)).astype(np.int64)


def place(
    spec: WindowConfig, samples: np.ndarray, utterance: np.ndarray, number: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) in samples of windows `number` of these utterances, whose lengths are `samples`.

    A tile's last window ends with the utterance and overlaps its neighbour; only an utterance shorter than a window
    gives a shorter length.
    """
    room = np.maximum(0, samples - spec.samples)
    if spec.kind == "crop":
        # The high bits times the range, so that every start is as likely as the next.
        fraction = (mix(utterance, seed, epoch, _CROP) >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        start = np.floor(fraction * (room + 1)).astype(np.int64)
    else:
        start = np.minimum(number * spec.samples, room)
    return start, np.minimum(samples, spec.samples)


def per_shard(counts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 [shards]: the windows of each shard, from the `counts` of its utterances; `bounds` as Index.bounds."""
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return np.diff(ends[bounds])


def locate(counts: np.ndarray, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(utterance of the shard, window number), int64, of the windows `ordinal` of a shard with these `counts`."""
    ends = np.cumsum(counts)
    row = np.searchsorted(ends, ordinal, side="right")
    return row, ordinal - (ends[row] - counts[row])


def keys(utterance: np.ndarray, number: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """int64 [windows]: the key of every random choice made for a window: a function of (seed, epoch, window id)."""
    return mix(utterance, seed, epoch).view(np.int64) ^ mix(number, seed, epoch, 1).view(np.int64)
