"""Feeder actors: lanes decoded anywhere in the cluster, their batches handed over through the Ray object store.

A feeder holds nothing that cannot be made again: it answers for any step of its lanes. A dead one is replaced, asked
for the steps that it still owed, and gives the same bytes.
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
from cpcscale.stream.lanes import served

if TYPE_CHECKING:
    # It brings torch, which is most of the memory of a feeder that does without.
    from cpcscale.train.ranks import Ranks

log = logging.getLogger(__name__)

# Deaths of one feeder without a batch between them before the run fails.
_DEATHS = 5
_PLACING_S = 30.0


class FeederAnswer(NamedTuple):
    """A feeder's answer: a batch, or a user's error as a value, which Ray does not wrap; and its figures (see Feed)."""

    batch: Batch | UserError
    seconds: dict[str, float]
    traffic: TrafficCounts


class Feeder:
    """The actor: batches of its lanes, of any step; cheapest in the order of steps."""

    def __init__(self, source: FeedSource, lanes: Sequence[int], lanes_on_node: int, stored: StorageConfig) -> None:
        storage.configure(stored)
        self._source, self._lanes, self._lanes_on_node = source, lanes, lanes_on_node
        self._feed: ThreadFeed | None = None
        self._step = -1

    def batch(self, step: int) -> FeederAnswer:
        """The rows that its lanes give to `step`."""
        try:
            feed = self._feed_at(step)
            batch = feed.next()
        except UserError as error:
            return FeederAnswer(error, {}, storage.counters())
        self._step = step + 1
        return FeederAnswer(batch, feed.seconds(), feed.traffic())

    def close(self) -> None:
        """Ends its threads; a killed actor does without."""
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
    """The feed of a rank whose batches are made by feeder actors; see stream.feed.Feed."""

    def __init__(self, source: FeedSource, lanes: Sequence[int], start: int, stored: StorageConfig) -> None:
        count = min(source.config.actors, len(lanes))
        # Consecutive lanes stay together, so that the rows of the feeders one after the other are those of the rank.
        cuts = [len(lanes) * number // count for number in range(count + 1)]
        self._ahead = source.config.prefetch
        # Put once: the feeders of a node share the index.
        shared = ray.put(source)
        # Feeders are spread over the nodes, and share the cache of each.
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
            feeder.ask(range(step, step + self._ahead))
        return _joined([feeder.take(step) for feeder in self._feeders])

    def seconds(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for feeder in self._feeders:
            for name, spent in feeder.seconds.items():
                total[name] += spent
        return dict(total)

    def traffic(self) -> TrafficCounts:
        # A rank saves checkpoints itself.
        total = storage.counters()
        for feeder in self._feeders:
            total += feeder.traffic
        return total

    def close(self) -> None:
        for feeder in self._feeders:
            feeder.kill()


def actor_feed(stored: StorageConfig, source: FeedSource, ranks: Ranks, start: int) -> Feed:
    """The feed of a rank, by feeder actors."""
    return ActorFeed(source, served(source.order.lanes.lanes, ranks.rank, ranks.world), start, stored)


class _Remote:
    """One feeder as the rank sees it: a bounded number of steps asked for, a new actor when the old one is dead."""

    def __init__(self, config: FeedConfig, arguments: tuple[Any, ...]) -> None:
        self._config, self._arguments = config, arguments
        self._asked: deque[tuple[int, Any]] = deque()
        self._deaths = 0
        # As of its last batch.
        self.seconds: dict[str, float] = {}
        self.traffic = TrafficCounts()
        self._start()

    def ask(self, steps: range) -> None:
        """Asks for those of these consecutive steps that were not asked for yet."""
        after = self._asked[-1][0] + 1 if self._asked else steps.start
        for step in range(after, steps.stop):
            self._asked.append((step, self._actor.batch.remote(step)))

    def take(self, step: int) -> Batch:
        """The batch of `step`, the first that was asked for."""
        while True:
            assert self._asked[0][0] == step
            try:
                made = self._wait(self._asked[0][1])
            except RayTaskError:
                raise
            except RayError as error:
                # The actor died, or its node with the batches that it had made.
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
                f"a feeder died {self._deaths} times without giving a batch ({why}): look at its log in Ray's "
                "dashboard, or use feed.kind=threads"
            )
        steps = [step for step, _ in self._asked]
        log.warning("a feeder died and is started again at step %d", steps[0] + 1)
        self._start()
        self._asked = deque((step, self._actor.batch.remote(step)) for step in steps)

    def _start(self) -> None:
        needs = {self._config.actor_resource: 1} if self._config.actor_resource else None
        # Outside of the workers' placement group: a feeder may stand on any node.
        options = {"num_cpus": self._config.actor_cpus, "resources": needs, "scheduling_strategy": "SPREAD"}
        self._actor = ray.remote(Feeder).options(**options).remote(*self._arguments)


def _joined(parts: list[Batch]) -> Batch:
    """One batch of several, its arrays this process's own: what Ray hands over is read-only and stays in its store."""
    names = ("wave_BS", "samples_B", "key_B", "group_B", "utterance_B", "number_B")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    bad = tuple(sorted((bad for part in parts for bad in part.bad), key=lambda bad: (bad.utterance, bad.number)))
    return Batch(parts[0].step, parts[0].epoch, **arrays, bad=bad)
