"""What hands a rank its batches: threads that read and decode the coming steps while the current one runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cpcscale import audio, config
from cpcscale.shards.index import Index
from cpcscale.shards.read import ShardReader
from cpcscale.stream import window
from cpcscale.stream.lane import PADDING, Lanes
from cpcscale.stream.plan import Plan
from cpcscale.stream.window import WindowConfig


@dataclass(kw_only=True)
class FeedConfig:
    """How batches reach the model; no key changes what is in them."""

    # Threads that read and decode in each rank; 0: one for every two cores of the rank's share, at least one.
    decode_threads: int = 0
    # Batches made ahead of the one in use.
    prefetch: int = 4
    # Share of windows whose audio does not decode that stops the run.
    bad_budget: float = 0.01

    def __post_init__(self) -> None:
        config.at_least(0, **{"feed.decode_threads": self.decode_threads, "feed.bad_budget": self.bad_budget})
        config.at_least(1, **{"feed.prefetch": self.prefetch})


@dataclass(frozen=True)
class BadWindow:
    """A window whose bytes match their checksum but do not decode: it keeps its place with weight 0."""

    utterance: int
    number: int
    cause: str


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that a rank's lanes give, lane by lane.

    `wave_BS` int16, zero after `samples_B`; `samples_B` is 0 for padding and for bad windows; `key_B` int64 keys every
    random choice; `utterance_B` is -1 for padding.
    """

    step: int
    epoch: int
    wave_BS: np.ndarray
    samples_B: np.ndarray
    key_B: np.ndarray
    utterance_B: np.ndarray
    number_B: np.ndarray
    bad: tuple[BadWindow, ...]

    @property
    def audio_s(self) -> float:
        """Seconds of audio that count in this batch."""
        return float(self.samples_B.sum()) / audio.RATE_HZ


class Feed(Protocol):
    """Batches of consecutive steps, each a pure function of (index, plan, lanes, window spec, step)."""

    def next(self) -> Batch:
        """The next step's batch; raises UserError when its data cannot be had."""

    def close(self) -> None:
        """Ends threads or actors; safe to call twice."""


class WindowReader:
    """Reads and decodes windows of one shard set."""

    def __init__(self, index: Index, spec: WindowConfig, seed: int) -> None:
        self._reader, self._spec, self._seed = ShardReader(index), spec, seed
        self._samples = index.samples

    def batch(self, step: int, epoch: int, utterance_B: np.ndarray, number_B: np.ndarray) -> Batch:
        """A batch of these windows; -1 marks padding."""
        real = utterance_B != PADDING
        starts, lengths = np.zeros(len(real), np.int64), np.zeros(len(real), np.int64)
        key_B = np.zeros(len(real), np.int64)
        rows = utterance_B[real], number_B[real]
        starts[real], lengths[real] = window.place(
            self._spec, self._samples[utterance_B[real]], *rows, self._seed, epoch
        )
        key_B[real] = window.keys(*rows, self._seed, epoch)
        wave_BS = np.zeros((len(real), self._spec.samples), np.int16)
        bad = []
        for row in np.flatnonzero(real):
            data = self._reader.member(int(utterance_B[row]))
            try:
                wave_BS[row, : lengths[row]] = audio.decode_slice(data, int(starts[row]), int(lengths[row]))
            except audio.AudioError as error:
                lengths[row] = 0
                bad.append(BadWindow(int(utterance_B[row]), int(number_B[row]), str(error)))
        return Batch(step, epoch, wave_BS, lengths, key_B, utterance_B, number_B, tuple(bad))


class ThreadFeed:
    """The feed that decodes in the rank: each thread makes the rows of one lane of a coming step.

    `lanes_served` are this rank's lanes, `start` the first step (from 0).
    """

    def __init__(
        self,
        reader: WindowReader,
        plan: Plan,
        lanes: Lanes,
        lanes_served: range,
        start: int,
        *,
        threads: int,
        prefetch: int,
    ) -> None:
        self._reader, self._plan, self._lanes, self._served = reader, plan, lanes, lanes_served
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._prefetch = prefetch
        self._step = start
        self._pending: deque[list[Future[Batch]]] = deque()

    def next(self) -> Batch:
        while len(self._pending) < self._prefetch:
            self._submit()
        parts = [future.result() for future in self._pending.popleft()]
        self._submit()
        return _joined(parts)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _submit(self) -> None:
        # The plan's caches are touched here, in the caller's thread, so that the decode threads share nothing mutable.
        futures = []
        for lane in self._served:
            epoch, positions = self._lanes.positions(self._step, lane)
            utterance_B, number_B = planned(self._plan, epoch, positions)
            futures.append(self._pool.submit(self._reader.batch, self._step, epoch, utterance_B, number_B))
        self._pending.append(futures)
        self._step += 1


def planned(plan: Plan, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(utterance, window number) at these positions, -1 where the position is padding."""
    utterance, number = np.full(len(positions), PADDING), np.full(len(positions), PADDING)
    real = positions != PADDING
    utterance[real], number[real] = plan.at(epoch, positions[real])
    return utterance, number


def decode_threads(configured: int, ranks_on_node: int) -> int:
    """The number of decode threads of a rank: as configured, else half of its share of the node's cores."""
    return configured or max(1, (os.cpu_count() or 1) // ranks_on_node // 2)


def fixed_batches(reader: WindowReader, plan: Plan, rows: np.ndarray, size: int) -> Iterator[Batch]:
    """The windows at these positions of epoch 0, `size` at a time: what validation scores at every visit."""
    for start in range(0, len(rows), size):
        yield reader.batch(0, 0, *planned(plan, 0, rows[start : start + size]))


def _joined(parts: list[Batch]) -> Batch:
    return Batch(
        step=parts[0].step,
        epoch=parts[0].epoch,
        wave_BS=np.concatenate([part.wave_BS for part in parts]),
        samples_B=np.concatenate([part.samples_B for part in parts]),
        key_B=np.concatenate([part.key_B for part in parts]),
        utterance_B=np.concatenate([part.utterance_B for part in parts]),
        number_B=np.concatenate([part.number_B for part in parts]),
        bad=tuple(bad for part in parts for bad in part.bad),
    )
