"""The actors of a run of any size, each a real one: what they hold, and what a step of them costs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import ray
from ray.experimental import get_object_locations

from cpcscale.cluster import session
from cpcscale.cluster.feeders import ActorFeed, Feeder
from cpcscale.cluster.mailbox import Mailbox, MailboxObserver
from cpcscale.errors import UserError
from cpcscale.freed_memory import private_mib
from cpcscale.shards.index import Index
from cpcscale.storage import StorageConfig
from cpcscale.stream.feed import FeedConfig, FeedSource
from cpcscale.stream.lanes import PADDING, served
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

_MESSAGES = 2000


def measure_feeders(base: str, ranks: int, batch: int, steps: int, window: WindowConfig) -> dict[str, Any]:
    """One feeder for each of so many ranks, all in this process: the lanes, threads and readers of each are its own.

    Returns `first_s` until each has given a batch, `batch_us` of a later one, `kib_each` of memory, and `wrong` rows:
    those whose window is not the plan's.
    """
    source = _source(Index.load(base), ranks, batch, window, FeedConfig(prefetch=1))
    source.order.rows(0, [0])
    before, began, wrong, later_s = private_mib(), time.perf_counter(), 0, 0.0
    made = [Feeder(source, served(ranks, rank, ranks), ranks, StorageConfig()) for rank in range(ranks)]
    wrong += _wrong(source, 0, made)
    first_s = time.perf_counter() - began
    for step in range(1, steps + 1):
        began = time.perf_counter()
        wrong += _wrong(source, step, made)
        later_s += time.perf_counter() - began
    kib_each = 1024 * (private_mib() - before) / ranks
    # Threads at work when their process ends would abort it.
    for feeder in made:
        feeder.close()
    return {
        "first_s": round(first_s, 2),
        "batch_us": round(1e6 * later_s / steps / ranks, 1),
        "kib_each": round(kib_each, 1),
        "wrong": wrong,
    }


def measure_actors(base: str, ranks: int, batch: int, steps: int, window: WindowConfig) -> dict[str, Any]:
    """Driver, mailbox, one rank of so many and its feeder, each a process of a Ray of their own.

    Returns the private MiB of each, those that are shared through the object store (`store_mib`, once a rank and node),
    `first_batch_s` and `step_us` of the rank's feed, `put_us` of a message to the mailbox and `message_bytes` there.
    """
    os.environ.pop("RAY_ADDRESS", None)
    index = Index.load(base)
    # As the driver does to refuse what the workers would refuse.
    RunOrder(shard_windows(index, window), 0, ranks, batch)
    with session.connected(4):
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        rank = ray.remote(num_cpus=1)(_Rank).remote(base, ranks, batch, window)
        fed = ray.get(rank.measure_feed.remote(steps))
        ours = _by_name(("ray::Feeder", "ray::Mailbox"))
        put_us, message_bytes = _told(mailbox)
        driver_mib = private_mib()
    return {
        "driver_mib": round(driver_mib, 1),
        "mailbox_mib": round(ours["ray::Mailbox"], 1),
        "feeder_mib": round(ours["ray::Feeder"], 1),
        **fed,
        "put_us": round(put_us, 1),
        "message_bytes": message_bytes,
    }


def _told(mailbox: Any) -> tuple[float, int]:
    """(microseconds a message, bytes of one that nobody has taken yet), of the metrics of a logged step."""
    observer, values = MailboxObserver(mailbox), {f"accuracy_k{k:02d}": 0.5 for k in range(1, 41)}
    held = []
    # The first lot warms both ends up.
    for _ in range(2):
        began = time.perf_counter()
        for step in range(_MESSAGES):
            observer.metrics(step, values)
        ray.get(mailbox.stopping.remote())
        put_us = 1e6 * (time.perf_counter() - began) / _MESSAGES
        held.append(_by_name(("ray::Mailbox",))["ray::Mailbox"])
    return put_us, round((held[1] - held[0]) * 2**20 / _MESSAGES)


class _Rank:
    """Rank 0 of a run whose batches are made by feeder actors."""

    def __init__(self, base: str, ranks: int, batch: int, window: WindowConfig) -> None:
        self._source = _source(Index.load(base), ranks, batch, window, FeedConfig(kind="actors"))
        self._lanes = served(ranks, 0, ranks)

    def measure_feed(self, steps: int) -> dict[str, Any]:
        """The figures of a feed that stays open, so that its feeder can be looked at."""
        began = time.perf_counter()
        self._feed = ActorFeed(self._source, self._lanes, 0, StorageConfig())
        self._feed.next()
        first = time.perf_counter()
        for _ in range(steps):
            self._feed.next()
        last = time.perf_counter()
        size = get_object_locations([shared := ray.put(self._source)])[shared]["object_size"]
        return {
            "rank_mib": round(private_mib(), 1),
            "store_mib": round(size / 2**20, 1),
            "first_batch_s": round(first - began, 2),
            "step_us": round(1e6 * (last - first) / steps, 1),
        }


def _source(index: Index, ranks: int, batch: int, window: WindowConfig, config: FeedConfig) -> FeedSource:
    return FeedSource(index, RunOrder(shard_windows(index, window), 0, ranks, batch), window, config)


def _wrong(source: FeedSource, step: int, made: Sequence[Feeder]) -> int:
    """Rows of the global batch of `step`, put together from all feeders, that the order does not give to it."""
    given = []
    for batch in [feeder.batch(step).batch for feeder in made]:
        if isinstance(batch, UserError):
            raise batch
        given.append(batch.utterance_B)
    found = np.concatenate(given)
    _, shard, ordinal = source.order.rows(step, range(source.order.lanes.lanes))
    # Of a crop the window's number in its shard is its utterance's.
    wanted = np.where(shard == PADDING, PADDING, source.index.bounds[shard] + ordinal)
    return int((found != wanted).sum())


def _by_name(names: Sequence[str]) -> dict[str, float]:
    """The private MiB of the newest process below this one whose name begins with each of these."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        found |= {name: private_mib(process) for name in names if title.startswith(name)}
    return found
