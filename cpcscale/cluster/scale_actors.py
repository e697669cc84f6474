"""Measures the actors of a run of any size: the memory of feeders, mailbox, rank and driver, and the time of a step."""

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
from cpcscale.stream.lanes import PADDING, lanes_of_rank
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

_MESSAGES = 2000


def measure_feeders(base: str, ranks: int, batch: int, steps: int, window: WindowConfig) -> dict[str, Any]:
    """Measures one feeder for each of `ranks` ranks, all in this process, each with its own lanes, threads and readers.

    Returns `first_s`, the seconds until each has made a batch; `batch_us`, the microseconds of a later one; `kib_each`,
    the memory of each; and `wrong`, the number of rows whose window is not the plan's.
    """
    source = _source(Index.load(base), ranks, batch, window, FeedConfig(prefetch=1))
    source.order.rows(0, [0])
    before, began, wrong, later_s = private_mib(), time.perf_counter(), 0, 0.0
    made = [Feeder(source, lanes_of_rank(ranks, rank, ranks), ranks, StorageConfig()) for rank in range(ranks)]
    wrong += _wrong(source, 0, made)
    first_s = time.perf_counter() - began
    for step in range(1, steps + 1):
        began = time.perf_counter()
        wrong += _wrong(source, step, made)
        later_s += time.perf_counter() - began
    kib_each = 1024 * (private_mib() - before) / ranks
    # Threads that still work when the process exits would abort it.
    for feeder in made:
        feeder.close()
    return {
        "first_s": round(first_s, 2),
        "batch_us": round(1e6 * later_s / steps / ranks, 1),
        "kib_each": round(kib_each, 1),
        "wrong": wrong,
    }


def measure_actors(base: str, ranks: int, batch: int, steps: int, window: WindowConfig) -> dict[str, Any]:
    """Measures a driver, its mailbox, one of `ranks` ranks and its feeder, as processes of a local Ray.

    Returns the private MiB of each, the MiB shared through the object store (`store_mib`, once for each rank and node),
    `first_batch_s` and `step_us` of the rank's feed, `put_us` to send a message to the mailbox and `message_bytes`, the
    size of one there.
    """
    os.environ.pop("RAY_ADDRESS", None)
    index = Index.load(base)
    # The driver makes it too, to check the data before workers start.
    RunOrder(shard_windows(index, window), 0, ranks, batch)
    with session.connected(4):
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        rank = ray.remote(num_cpus=1)(_Rank).remote(base, ranks, batch, window)
        fed = ray.get(rank.measure_feed.remote(steps))
        ours = _by_name(("ray::Feeder", "ray::Mailbox"))
        put_us, message_bytes = _measure_messages(mailbox)
        driver_mib = private_mib()
    return {
        "driver_mib": round(driver_mib, 1),
        "mailbox_mib": round(ours["ray::Mailbox"], 1),
        "feeder_mib": round(ours["ray::Feeder"], 1),
        **fed,
        "put_us": round(put_us, 1),
        "message_bytes": message_bytes,
    }


def _measure_messages(mailbox: Any) -> tuple[float, int]:
    """(microseconds to send a message, bytes of one in the mailbox); a message holds the metrics of a logged step."""
    observer, values = MailboxObserver(mailbox), {f"accuracy_k{k:02d}": 0.5 for k in range(1, 41)}
    held = []
    # The first round is a warm-up.
    for _ in range(2):
        began = time.perf_counter()
        for step in range(_MESSAGES):
            observer.metrics(step, values)
        ray.get(mailbox.stopping.remote())
        put_us = 1e6 * (time.perf_counter() - began) / _MESSAGES
        held.append(_by_name(("ray::Mailbox",))["ray::Mailbox"])
    return put_us, round((held[1] - held[0]) * 2**20 / _MESSAGES)


class _Rank:
    """The actor of rank 0 of a run whose batches are made by feeder actors."""

    def __init__(self, base: str, ranks: int, batch: int, window: WindowConfig) -> None:
        self._source = _source(Index.load(base), ranks, batch, window, FeedConfig(kind="actors"))
        self._lanes = lanes_of_rank(ranks, 0, ranks)

    def measure_feed(self, steps: int) -> dict[str, Any]:
        """Measures a feed, and leaves it open so that the memory of its feeder can be measured."""
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
    """The number of rows in the feeders' global batch of `step` that differ from the order of the data."""
    given = []
    for batch in [feeder.batch(step).batch for feeder in made]:
        if isinstance(batch, UserError):
            raise batch
        given.append(batch.utterance_B)
    found = np.concatenate(given)
    _, shard, ordinal = source.order.rows(step, range(source.order.lanes.lanes))
    # With crops there is one window for each utterance, so both have the same number in their shard.
    wanted = np.where(shard == PADDING, PADDING, source.index.bounds[shard] + ordinal)
    return int((found != wanted).sum())


def _by_name(names: Sequence[str]) -> dict[str, float]:
    """{name: private MiB of the newest child process whose title starts with it}."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        found |= {name: private_mib(process) for name in names if title.startswith(name)}
    return found
