"""The order of an epoch, as a pure function.

Theorem. Let an epoch have N windows. For every (index, window spec, seed, epoch), positions 0..N-1 map one to one onto
the windows, and the map depends neither on the number of workers nor on what was read before. With lanes
(stream/lanes.py) and chapters (stream/run_order.py), the windows of global batch t, in order, depend only on
(fingerprint, seed, batch size, lanes, window spec, t), and an epoch has each window exactly once.

Proof. The shards of an epoch are in an order that is a permutation keyed by (seed, epoch), the windows of each shard in
one keyed by (seed, epoch, shard), which `in_runs` may rearrange. Position p is in the shard whose run of positions
holds p, which a search in the running sum of window counts finds; the rest of p selects a window of that shard. Both
steps are bijections, and all counts come from the index, so their composition is a bijection too. No audio is read to
reach a position.

Permutations are argsorts of a 64-bit integer hash, not the shuffle of a library, so they are the same under every
version of every library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARD_ORDER = -1
_RUNS = -4
# Window numbers kept in memory: 64 MiB, the orders of some thousand shards.
_KEPT_WINDOWS = 1 << 23


def mix(values: np.ndarray | int, *keys: int) -> np.ndarray:
    """uint64 hashes of the integers `values` under integer `keys`, by splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = np.atleast_1d(np.asarray(values)).astype(np.int64).view(np.uint64)
        for key in (*keys, 0):
            state = state + np.uint64(int(key) % 2**64) * _GOLDEN + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permutation(size: int, *keys: int) -> np.ndarray:
    """int64 [size]: the permutation of 0..size-1 that the keys give.

    >>> permutation(5, 0).tolist(), permutation(5, 1).tolist()
    ([1, 2, 4, 0, 3], [2, 0, 3, 1, 4])
    """
    return np.argsort(mix(np.arange(size), *keys), kind="stable")


def in_runs(order: np.ndarray, speaker: np.ndarray, length: int, *keys: int) -> np.ndarray:
    """The permutation `order` rearranged so that windows of one speaker follow each other in runs.

    `speaker` int64 numbers the speaker of each window; -1: unknown, a run of its own. The windows of each speaker, in
    the given order, are cut into runs of `length`, of which the last may be shorter. The keys permute the runs.

    >>> in_runs(np.array([4, 0, 3, 1, 2]), np.array([0, 0, 0, 1, 1]), 2, 7).tolist()
    [0, 1, 2, 4, 3]
    """
    of_place = speaker[order]
    # Places speaker by speaker, and how many of the same speaker come before each.
    places = np.argsort(of_place, kind="stable")
    before = np.arange(len(order)) - np.searchsorted(of_place[places], of_place[places])
    first = places[np.arange(len(order)) - before % length]
    first = np.where(of_place[places] < 0, places, first)
    return order[places[np.lexsort((before, mix(order[first], *keys, _RUNS)))]]


class EpochOrder:
    """The order of every epoch of a set whose shards have `windows` int64 [shards] windows.

    With `run` above 1, windows of a speaker come in runs of so many; `speakers` gives those of a shard (`in_runs`).

    >>> order = EpochOrder([2, 3], seed=0)
    >>> for epoch in range(2):
    ...     shard, window = order.at(epoch, np.arange(5))
    ...     print(list(zip(shard.tolist(), window.tolist())))
    [(1, 1), (1, 0), (1, 2), (0, 0), (0, 1)]
    [(1, 0), (1, 2), (1, 1), (0, 0), (0, 1)]
    """

    def __init__(
        self, windows: np.ndarray, seed: int, run: int = 1, speakers: Callable[[int], np.ndarray] | None = None
    ) -> None:
        self.windows, self.seed = np.asarray(windows, np.int64), seed
        self._run, self._speakers = run, speakers
        self.total = int(self.windows.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._shards: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._kept = 0

    def at(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, number of the window in it), int64, at these positions of an epoch, each in 0..N-1."""
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
        """The first `most` shards, in order, that hold positions [first, last) of an epoch."""
        if first >= last:
            return []
        shards, ends = self._shard_order(epoch)
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        # Lazily: the rest of a lane may be thousands of shards, and only a few are wanted.
        held = (int(shard) for shard in shards[begin : end + 1] if self.windows[shard])
        return list(islice(held, most))

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards of an epoch in order, the position after the last window of each)."""
        if epoch not in self._epochs:
            order = permutation(len(self.windows), self.seed, epoch, _SHARD_ORDER)
            # Lanes need the current epoch and the next one, so two are kept.
            self._epochs = {kept: value for kept, value in self._epochs.items() if abs(kept - epoch) == 1}
            self._epochs[epoch] = order, np.cumsum(self.windows[order])
        return self._epochs[epoch]

    def _window_order(self, epoch: int, shard: int) -> np.ndarray:
        key = (epoch, shard)
        if key in self._shards:
            self._shards.move_to_end(key)
            return self._shards[key]
        order = permutation(int(self.windows[shard]), self.seed, epoch, shard)
        if self._run > 1 and self._speakers:
            order = in_runs(order, self._speakers(shard), self._run, self.seed, epoch, shard)
        self._shards[key] = order
        self._kept += len(order)
        while self._kept > _KEPT_WINDOWS and len(self._shards) > 1:
            self._kept -= len(self._shards.popitem(last=False)[1])
        return order
