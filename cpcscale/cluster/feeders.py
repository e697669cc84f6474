"""Feeder actors: they decode lanes anywhere in the cluster and pass batches on through Ray's object store.

A feeder has no state that matters: it can make the batch of any step of its lanes. If one dies, a new one is asked for
the missing steps and makes the same bytes.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.errors import UserError
from cpcscale.storage import StorageConfig, TrafficCounts
from cpcscale.stream.batch import Batch
from cpcscale.stream.feed import Feed, FeedConfig, FeedSource, ThreadFeed
from cpcscale.stream.lanes import lanes_of_rank

if TYPE_CHECKING:
    # For the type only: it imports torch, which would be most of a feeder's memory.
    from cpcscale.train.ranks import Ranks

log = logging.getLogger(__name__)

# The run fails when one feeder dies more often than this without making a batch in between.
_DEATHS = 5
_PLACING_S = 30.0


class FeederAnswer(NamedTuple):
    """A feeder's answer: a batch, or a UserError as a value (Ray would wrap a raised one), and its feed's figures."""

    batch: Batch | UserError
    seconds: dict[str, float]
    traffic: TrafficCounts


class Feeder:
    """The actor: makes the batch of its lanes for any step, fastest when steps are asked for in order."""

    def __init__(self, source: FeedSource, lanes: Sequence[int], lanes_on_node: int, stored: StorageConfig) -> None:
        storage.configure(stored)
        self._source, self._lanes, self._lanes_on_node = source, lanes, lanes_on_node
        self._feed: ThreadFeed | None = None
        self._step = -1

    def batch(self, step: int) -> FeederAnswer:
        """The rows of its lanes for `step`."""
        try:
            feed = self._feed_at(step)
            batch = feed.next()
        except UserError as error:
            return FeederAnswer(error, {}, storage.counters())
        self._step = step + 1
        return FeederAnswer(batch, feed.seconds(), feed.traffic())

    def close(self) -> None:
        """Ends its threads. A killed actor need not call it."""
        if self._feed:
            self._feed.close()

    def _feed_at(self, step: int) -> ThreadFeed:
        if self._feed and step == self._step:
            return self._feed
        self.close()
        config = self._source.config
        threads = config.decode_threads or config.actor_cpus
        self._feed = ThreadFeed(self._source, self._lanes, step, threads=threads, lanes_on_node=self._lanes_on_node)
        self._step = step
        return self._feed


class ActorFeed:
    """A `stream.feed.Feed` of one rank whose batches are made by feeder actors."""

    def __init__(self, source: FeedSource, lanes: Sequence[int], start: int, stored: StorageConfig) -> None:
        count = min(source.config.actors, len(lanes))
        # Each feeder gets consecutive lanes, so that concatenating the feeders' rows gives the rank's rows in order.
        cuts = [len(lanes) * number // count for number in range(count + 1)]
        self._prefetch = source.config.prefetch
        # Stored once: the feeders of a node share the index.
        shared = ray.put(source)
        # Feeders are spread over the nodes; those of one node share its cache.
        nodes = len(session.live_nodes())
        on_node = max(len(lanes) // count, -(-source.order.lanes.lanes // nodes))
        self._feeders = [
            _Remote(source.config, (shared, list(lanes[cuts[number] : cuts[number + 1]]), on_node, stored))
            for number in range(count)
        ]
        self._step = start

    def next(self) -> Batch:
        step, self._step = self._step, self._step + 1
        for feeder in self._feeders:
            feeder.ask(range(step, step + self._prefetch))
        return _joined([feeder.take(step) for feeder in self._feeders])

    def seconds(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for feeder in self._feeders:
            for name, spent in feeder.seconds.items():
                total[name] += spent
        return dict(total)

    def traffic(self) -> TrafficCounts:
        # The rank's own traffic is that of its checkpoints.
        total = storage.counters()
        for feeder in self._feeders:
            total += feeder.traffic
        return total

    def close(self) -> None:
        for feeder in self._feeders:
            feeder.kill()


def actor_feed(stored: StorageConfig, source: FeedSource, ranks: Ranks, start: int) -> Feed:
    """The feed of this rank, made by feeder actors."""
    return ActorFeed(source, lanes_of_rank(source.order.lanes.lanes, ranks.rank, ranks.world), start, stored)


class _Remote:
    """The rank's handle of one feeder: asks for steps ahead, and starts a new actor when the old one dies."""

    def __init__(self, config: FeedConfig, arguments: tuple[Any, ...]) -> None:
        self._config, self._arguments = config, arguments
        self._asked: deque[tuple[int, Any]] = deque()
        self._deaths = 0
        # As reported with its last batch.
        self.seconds: dict[str, float] = {}
        self.traffic = TrafficCounts()
        self._start()

    def ask(self, steps: range) -> None:
        """Asks for those of these consecutive steps that it has not asked for yet."""
        after = self._asked[-1][0] + 1 if self._asked else steps.start
        for step in range(after, steps.stop):
            self._asked.append((step, self._actor.batch.remote(step)))

    def take(self, step: int) -> Batch:
        """Waits for the batch of `step`, the earliest step that is asked for."""
        while True:
            assert self._asked[0][0] == step
            try:
                made = self._wait(self._asked[0][1])
            except RayTaskError:
                raise
            except RayError as error:
                # The actor died, or its node was lost with the batches that it had made.
                self._replace(error)
                continue
            self._asked.popleft()
            self._deaths = 0
            if isinstance(made.batch, UserError):
                raise made.batch
            self.seconds, self.traffic = made.seconds, made.traffic
            return made.batch

    def kill(self) -> None:
        self._asked.clear()
        ray.kill(self._actor)

    def _wait(self, reference: Any) -> FeederAnswer:
        while True:
            ready, _ = ray.wait([reference], timeout=_PLACING_S)
            if ready:
                return ray.get(reference)
            log.warning(
                "waiting for a feeder: it needs feed.actor_cpus=%d cores%s on one node, or its store is slow",
                self._config.actor_cpus,
                f" and a unit of the resource {self._config.actor_resource}" if self._config.actor_resource else "",
            )

    def _replace(self, error: RayError) -> None:
        self._deaths += 1
        ray.kill(self._actor)
        why = " ".join(str(error).split())[:200]
        if self._deaths > _DEATHS:
            raise UserError(
                f"a feeder died {self._deaths} times without making a batch ({why}): look at its log in Ray's "
                "dashboard, or use feed.kind=threads"
            )
        steps = [step for step, _ in self._asked]
        log.warning("a feeder died and is started again at step %d", steps[0] + 1)
        self._start()
        self._asked = deque((step, self._actor.batch.remote(step)) for step in steps)

    def _start(self) -> None:
        needs = {self._config.actor_resource: 1} if self._config.actor_resource else None
        # Outside of the workers' placement group: a feeder may run on any node.
        options = {"num_cpus": self._config.actor_cpus, "resources": needs, "scheduling_strategy": "SPREAD"}
        self._actor = ray.remote(Feeder).options(**options).remote(*self._arguments)


def _joined(parts: list[Batch]) -> Batch:
    """Concatenates batches into new arrays; arrays from Ray's object store are read-only and would stay in it."""
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    bad = tuple(sorted((bad for part in parts for bad in part.bad), key=lambda bad: (bad.utterance, bad.number)))
    return Batch(parts[0].step, parts[0].epoch, **arrays, bad=bad)
