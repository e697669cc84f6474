"""The order of an epoch, as a pure function.

Theorem. Let an epoch have N windows. For every (index, window spec, seed, epoch), positions 0..N-1 map one to one onto
the windows, and the map needs neither the number of workers nor what was read before. With lanes (stream/lanes.py) and
chapters (stream/run_order.py), the windows of global batch t, in order, depend only on (fingerprint, seed, batch size,
lanes, window spec, t), and an epoch has each window exactly once.

Proof. The shards of an epoch stand in a permutation keyed by (seed, epoch), the windows of each shard in one keyed by
(seed, epoch, shard). Position p belongs to the shard whose run of positions holds p, a search in the running sum of
window counts; the rest of p numbers a window of that shard. Both steps are bijections of things that the index alone
counts, so their composition is one. A position is reached by this arithmetic, never by reading.

Permutations are argsorts of a 64-bit integer hash, not a library's shuffle, so they are the same under every version
of every library.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARD_ORDER = -1
# Window orders kept: 64 MiB of them, some thousands of shards.
_KEPT_WINDOWS = 1 << 23


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


class EpochOrder:
    """The order of every epoch of a set whose shards have `windows` int64 [shards] windows."""

    def __init__(self, windows: np.ndarray, seed: int) -> None:
        self.windows, self.seed = np.asarray(windows, np.int64), seed
        self.total = int(self.windows.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._shards: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._kept = 0

    def at(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, ordinal of the window in it), int64 like `positions`, of these positions, each in 0..N-1."""
        shards, ends = self._shard_order(epoch)
        slot = np.searchsorted(ends, positions, side="right")
        shard = shards[slot]
        within = positions - (ends[slot] - self.windows[shard])
        ordinal = np.empty(len(positions), np.int64)
        for number in np.unique(shard).tolist():
            rows = shard == number
            ordinal[rows] = self._window_order(epoch, number)[within[rows]]
        return shard, ordinal

    def shards_between(self, epoch: int, first: int, last: int, most: int) -> list[int]:
        """The shards that hold positions [first, last) of an epoch, in order, at most `most` of them."""
        if first >= last:
            return []
        shards, ends = self._shard_order(epoch)
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        # One after the other: a lane's rest is thousands of shards, and a few are asked for.
        held = (int(shard) for shard in shards[begin : end + 1] if self.windows[shard])
        return list(islice(held, most))

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the position after each one's last window."""
        if epoch not in self._epochs:
            order = permutation(len(self.windows), self.seed, epoch, _SHARD_ORDER)
            # A lane looks at most one epoch ahead, so two stay.
            self._epochs = {kept: value for kept, value in self._epochs.items() if abs(kept - epoch) == 1}
            self._epochs[epoch] = order, np.cumsum(self.windows[order])
        return self._epochs[epoch]

    def _window_order(self, epoch: int, shard: int) -> np.ndarray:
        key = (epoch, shard)
        if key in self._shards:
            self._shards.move_to_end(key)
            return self._shards[key]
        order = permutation(int(self.windows[shard]), self.seed, epoch, shard)
        self._shards[key] = order
        self._kept += len(order)
        while self._kept > _KEPT_WINDOWS and len(self._shards) > 1:
            self._kept -= len(self._shards.popitem(last=False)[1])
        return order
