"""What hands a rank its batches: threads that read and decode the coming steps while the current one runs."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from cpcscale import config
from cpcscale.account import Account
from cpcscale.errors import UserError
from cpcscale.shards import cache
from cpcscale.shards.cache import CacheConfig
from cpcscale.shards.index import Index
from cpcscale.shards.read import ShardReader
from cpcscale.stream.draft import Batch, WindowReader
from cpcscale.stream.order import Order
from cpcscale.stream.window import WindowConfig

_WANT_EVERY_S = 1.0


@dataclass(kw_only=True)
class FeedConfig:
    """How batches reach the model; no key changes what is in them."""

    # threads: decoded in each rank. actors: decoded anywhere in the cluster, for ranks whose cores are busy.
    kind: Literal["threads", "actors"] = "threads"
    # Threads that decode in each rank or feeder; 0: half of the rank's share of the node's cores, a feeder's cores.
    decode_threads: int = 0
    # Batches made ahead of the one in use.
    prefetch: int = 4
    # Share of windows whose audio does not decode that stops the run.
    bad_budget: float = 0.01
    cache: CacheConfig = field(default_factory=CacheConfig)
    # Feeder actors of each rank, the cores of each, and a Ray resource that their nodes must have (empty: any node).
    actors: int = 1
    actor_cpus: int = 1
    actor_resource: str = ""

    def __post_init__(self) -> None:
        config.at_least(0, **{"feed.decode_threads": self.decode_threads, "feed.bad_budget": self.bad_budget})
        config.at_least(1, **{"feed.prefetch": self.prefetch, "feed.actors": self.actors})
        config.at_least(1, **{"feed.actor_cpus": self.actor_cpus})


class Feed(Protocol):
    """Batches of consecutive steps, each a pure function of (index, order, window spec, step)."""

    def next(self) -> Batch:
        """The next step's batch; raises UserError when its data cannot be had."""

    def seconds(self) -> dict[str, float]:
        """Seconds of the decode threads so far: wait, fetch, verify, decode, collate."""

    def close(self) -> None:
        """Ends threads or actors; safe to call twice."""


@dataclass(frozen=True)
class Source:
    """All that the batches of a run are a function of, and the way they are fetched."""

    index: Index
    order: Order
    spec: WindowConfig
    config: FeedConfig


class ThreadFeed:
    """The feed that decodes in this process: one thread plans the coming steps, others read and decode their rows.

    `lanes` are those served, `start` the first step (from 0); `lanes_on_node` decide whether the cache is large enough.
    """

    def __init__(
        self, source: Source, lanes: Sequence[int], start: int, *, threads: int, lanes_on_node: int | None = None
    ) -> None:
        self.account = Account()
        largest = int(max(source.index.shards["bytes"].to_numpy(), default=0))
        kept = cache.choose(source.config.cache, source.index.base, lanes_on_node or len(lanes), largest)
        keep = len(lanes) * (2 + source.config.cache.ahead) + 8
        self._shards = ShardReader(source.index, kept, keep=keep, account=self.account)
        self._reader = WindowReader(self._shards, source.spec, source.order.seed)
        self._order, self._lanes, self._step = source.order, list(lanes), start
        self._threads, self._ahead = threads, 1 + source.config.cache.ahead
        self._slots = threading.Semaphore(source.config.prefetch)
        self._made: queue.SimpleQueue[Future[Batch] | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._planner = threading.Thread(target=self._plan, name="plan", daemon=True)
        self._planner.start()

    def next(self) -> Batch:
        if self._closed.is_set():
            raise UserError("the feed is closed")
        made = self._made.get()
        if isinstance(made, BaseException):
            # Nothing comes after it: the next call meets it again.
            self._made.put(made)
            raise made
        batch = made.result()
        self._slots.release()
        return batch

    def seconds(self) -> dict[str, float]:
        return self.account.seconds()

    def close(self) -> None:
        self._closed.set()
        self._slots.release()
        self._planner.join()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._shards.close()
        while not self._made.empty():
            self._made.get()

    def _plan(self) -> None:
        try:
            wanted: list[int] = []
            said = 0.0
            while True:
                self._slots.acquire()
                if self._closed.is_set():
                    return
                now = time.monotonic()
                coming = self._coming()
                if coming != wanted or now - said > _WANT_EVERY_S:
                    wanted, said = coming, now
                    self._shards.want(coming)
                self._submit()
                self._step += 1
        except BaseException as error:  # noqa: BLE001 - it is raised where the batches are taken
            self._made.put(error)

    def _coming(self) -> list[int]:
        """The shards that all lanes read now, then those after them."""
        by_lane = [self._order.coming(self._step, lane, self._ahead) for lane in self._lanes]
        return [shards[turn] for turn in range(self._ahead) for shards in by_lane if turn < len(shards)]

    def _submit(self) -> None:
        draft = self._reader.draft(self._step, *self._order.rows(self._step, self._lanes))
        rows = len(draft.wave_BS)
        # Two pieces a thread level out rows of different cost; a single thread needs none of it.
        pieces = 1 if self._threads == 1 else min(rows, 2 * self._threads)
        done: Future[Batch] = Future()
        left = [pieces]
        lock = threading.Lock()

        def work(piece: int) -> None:
            self.account.mark("wait")
            try:
                self._reader.fill(draft, range(rows * piece // pieces, rows * (piece + 1) // pieces))
                with lock:
                    left[0] -= 1
                    last = not left[0]
                if last and not done.done():
                    done.set_result(draft.batch())
            except BaseException as error:  # noqa: BLE001 - it is raised where the batch is taken
                with lock:
                    if not done.done():
                        done.set_exception(error)
            self.account.mark("collate")

        for piece in range(pieces):
            self._decoders.submit(work, piece)
        self._made.put(done)


def decode_threads(configured: int, ranks_on_node: int) -> int:
    """The number of decode threads of a rank: as configured, else half of its share of the node's cores."""
    return configured or max(1, (os.cpu_count() or 1) // ranks_on_node // 2)


def fixed_batches(source: Source, positions: np.ndarray, size: int) -> Iterator[Batch]:
    """The windows at these positions of epoch 0, `size` at a time: what validation scores at every visit."""
    shards = ShardReader(source.index)
    reader = WindowReader(shards, source.spec, source.order.seed)
    try:
        for start in range(0, len(positions), size):
            draft = reader.draft(0, 0, *source.order.plan.at(0, positions[start : start + size]))
            reader.fill(draft, range(len(draft.wave_BS)))
            yield draft.batch()
    finally:
        shards.close()
