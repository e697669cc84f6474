"""The order of an epoch, as a pure function.

Theorem. Let an epoch have N windows. For every (index, window spec, seed, epoch), positions 0..N-1 map one to one onto
the windows, and the map needs neither the number of workers nor what was read before. A position is reached by
arithmetic: the shards stand in a keyed permutation, the windows of each shard in a keyed permutation of their own.

Permutations are argsorts of a 64-bit integer hash, not a library's shuffle, so they are the same under every version
of every library.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARD_ORDER = -1


def mix(values: np.ndarray | int, *keys: int) -> np.ndarray:
    """uint64 hashes of integers `values` under integer `keys`: splitmix64 (Steele et al. 2014), one round a key."""
    with np.errstate(over="ignore"):
        state = np.atleast_1d(np.asarray(values)).astype(np.int64).view(np.uint64)
        for key in (*keys, 0):
            state = state + np.uint64(int(key) % 2**64) * _GOLDEN + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permutation(size: int, *keys: int) -> np.ndarray:
    """int64 [size]: a keyed permutation of 0..size-1."""
    return np.argsort(mix(np.arange(size), *keys), kind="stable")


@dataclass
class Plan:
    """The order of every epoch of one shard set.

    `windows` int64 [utterances]: how many windows each utterance has, in index order; `bounds` int64 [shards + 1]: the
    utterances of each shard (Index.bounds).
    """

    windows: np.ndarray
    bounds: np.ndarray
    seed: int
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    _shards: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._first = np.concatenate([[0], np.cumsum(self.windows)]).astype(np.int64)
        self._shard_first = self._first[self.bounds]

    @property
    def total(self) -> int:
        """N, the number of windows in an epoch."""
        return int(self._first[-1])

    def at(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(utterance, window number), int64 like `positions`, of these positions of an epoch, each in 0..N-1."""
        shards, ends = self._shard_order(epoch)
        slot = np.searchsorted(ends, positions, side="right")
        shard = shards[slot]
        within = positions - np.where(slot > 0, ends[slot - 1], 0)
        ordinals = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(shard):
            rows = shard == number
            ordinals[rows] = self._shard_first[number] + self._window_order(epoch, int(number))[within[rows]]
        utterance = np.searchsorted(self._first, ordinals, side="right") - 1
        return utterance, ordinals - self._first[utterance]

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the position after each one's last window."""
        if epoch not in self._epochs:
            order = permutation(len(self.bounds) - 1, self.seed, epoch, _SHARD_ORDER)
            # A lane looks at most one epoch ahead, so two stay.
            self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = order, np.cumsum(np.diff(self._shard_first)[order])
        return self._epochs[epoch]

    def _window_order(self, epoch: int, shard: int) -> np.ndarray:
        key = (epoch, shard)
        if key not in self._shards:
            if len(self._shards) >= 256:
                self._shards.clear()
            size = int(self._shard_first[shard + 1] - self._shard_first[shard])
            self._shards[key] = permutation(size, self.seed, epoch, shard)
        return self._shards[key]
