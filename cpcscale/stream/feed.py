"""Gives a rank its batches: threads read and decode those of the next steps while the current step runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.machine import usable_cores
from cpcscale.shards import cache
from cpcscale.shards.cache import CacheConfig
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader
from cpcscale.storage import TrafficCounts
from cpcscale.stream.batch import Batch, Measures, UnfilledBatch, WindowReader
from cpcscale.stream.lanes import PADDING
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.time_by_name import TimeByName

_PREFETCH_EVERY_S = 1.0


@dataclass(kw_only=True)
class FeedConfig:
    """How batches are made; no key changes what is in them."""

    # threads: each rank decodes. actors: feeder actors anywhere in the cluster decode, for ranks whose cores are busy.
    kind: Literal["threads", "actors"] = "threads"
    # Threads that decode in each rank or feeder; 0: half of a rank's share of the node's cores, all cores of a feeder.
    decode_threads: int = 0
    # Batches to make ahead of the one in use.
    prefetch: int = 4
    # The run stops when the share of windows that do not decode is above this.
    bad_budget: float = 0.01
    cache: CacheConfig = field(default_factory=CacheConfig)
    # Feeder actors for each rank.
    actors: int = 1
    # Cores of each feeder actor.
    actor_cpus: int = 1
    # A Ray resource that the nodes of feeder actors must have; empty: any node.
    actor_resource: str = ""

    def __post_init__(self) -> None:
        config.at_least(0, **{"feed.decode_threads": self.decode_threads, "feed.bad_budget": self.bad_budget})
        config.at_least(1, **{"feed.prefetch": self.prefetch, "feed.actors": self.actors})
        config.at_least(1, **{"feed.actor_cpus": self.actor_cpus})


class Feed(Protocol):
    """Gives the batches of consecutive steps, each a pure function of (index, order, window spec, step)."""

    def next(self) -> Batch:
        """The batch of the next step. Raises UserError when its data cannot be read."""

    def seconds(self) -> dict[str, float]:
        """Seconds that the decode threads spent so far on: wait, fetch, verify, decode, measure, collate."""

    def traffic(self) -> TrafficCounts:
        """What the processes that make the batches sent to and received from object stores so far."""

    def close(self) -> None:
        """Ends threads or actors; safe to call twice."""


@dataclass(frozen=True)
class FeedSource:
    """All that batches depend on (`index`, `order`, `spec`, `measures`), and how they are made (`config`)."""

    index: Index
    order: RunOrder
    spec: WindowConfig
    config: FeedConfig
    measures: Measures | None = None


class ThreadFeed:
    """The feed that decodes in this process: one thread plans the next steps, others read and decode their rows.

    It gives the rows of `lanes`, from step `start` (from 0) on. `lanes_on_node`, the lanes of all ranks of this node,
    decide whether the cache is large enough; by default they are `lanes`.
    """

    def __init__(
        self, source: FeedSource, lanes: Sequence[int], start: int, *, threads: int, lanes_on_node: int | None = None
    ) -> None:
        self.account = TimeByName()
        largest = int(source.index.shards["bytes"].to_numpy().max(initial=0))
        kept = cache.open_cache(source.config.cache, source.index.base, lanes_on_node or len(lanes), largest)
        keep = len(lanes) * (2 + source.config.cache.ahead) + 8
        self._shards = ShardReader(source.index, kept, keep=keep, account=self.account)
        self._reader = WindowReader(self._shards, source.spec, source.order.seed, source.measures)
        self._order, self._lanes, self._step = source.order, list(lanes), start
        self._threads, self._ahead = threads, 1 + source.config.cache.ahead
        self._slots = threading.Semaphore(source.config.prefetch)
        self._planned: queue.SimpleQueue[tuple[UnfilledBatch, list[Future[None]]] | Exception] = queue.SimpleQueue()
        self._failed: Exception | None = None
        self._closed = threading.Event()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._planner = threading.Thread(target=self._plan, name="plan", daemon=True)
        self._planner.start()

    def next(self) -> Batch:
        if self._closed.is_set():
            raise UserError("the feed is closed")
        if self._failed is None:
            planned = self._planned.get()
            try:
                if isinstance(planned, Exception):
                    raise planned
                unfilled, pieces = planned
                for piece in pieces:
                    piece.result()
                self._slots.release()
                return unfilled.to_batch()
            except Exception as error:
                self._failed = error
                raise
        # No batch can follow one that failed.
        raise self._failed

    def seconds(self) -> dict[str, float]:
        return self.account.seconds()

    def traffic(self) -> TrafficCounts:
        return storage.counters()

    def close(self) -> None:
        self._closed.set()
        self._slots.release()
        self._planner.join()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._shards.close()
        while not self._planned.empty():
            self._planned.get()

    def _plan(self) -> None:
        try:
            reading, last = set[int](), 0.0
            while True:
                self._slots.acquire()
                if self._closed.is_set():
                    return
                epoch, shard_B, ordinal_B = self._order.rows(self._step, self._lanes)
                # Repeated now and then: a process that was fetching a shard may have died.
                if not reading.issuperset(shard_B.tolist()) or time.monotonic() - last > _PREFETCH_EVERY_S:
                    reading, last = {PADDING, *self._prefetch_shards()}, time.monotonic()
                self._submit(self._reader.plan(self._step, epoch, shard_B, ordinal_B))
                self._step += 1
        except Exception as error:  # noqa: BLE001 - raised again by next()
            self._planned.put(error)

    def _prefetch_shards(self) -> list[int]:
        """Starts fetching the next shards of all lanes, those of this step first; returns the shards of this step."""
        by_lane = [self._order.next_shards(self._step, lane, self._ahead) for lane in self._lanes]
        by_turn = [[shards[turn] for shards in by_lane if turn < len(shards)] for turn in range(self._ahead)]
        self._shards.prefetch([shard for shards in by_turn for shard in shards])
        return by_turn[0]

    def _submit(self, unfilled: UnfilledBatch) -> None:
        rows = len(unfilled.wave_BS)
        # Two pieces for each thread, because rows take different times; one thread needs one piece.
        count = 1 if self._threads == 1 else min(rows, 2 * self._threads)
        cuts = [rows * number // count for number in range(count + 1)]
        pieces = [self._decoders.submit(self._fill, unfilled, range(*cut)) for cut in pairwise(cuts)]
        self._planned.put((unfilled, pieces))

    def _fill(self, unfilled: UnfilledBatch, rows: range) -> None:
        self.account.mark("wait")
        self._reader.fill(unfilled, rows)


def decode_threads(configured: int, ranks_on_node: int) -> int:
    """The number of decode threads of a rank: as configured, or half of its share of the node's cores for 0."""
    return configured or max(1, usable_cores() // ranks_on_node // 2)


def fixed_batches(source: FeedSource, positions: np.ndarray, size: int) -> Iterator[Batch]:
    """Batches of `size` windows, at these positions of epoch 0: the same at every call, for validation."""
    shards = ShardReader(source.index)
    reader = WindowReader(shards, source.spec, source.order.seed, source.measures)
    try:
        for start in range(0, len(positions), size):
            unfilled = reader.plan(0, 0, *source.order.epoch_order.at(0, positions[start : start + size]))
            reader.fill(unfilled, range(len(unfilled.wave_BS)))
            yield unfilled.to_batch()
    finally:
        shards.close()
