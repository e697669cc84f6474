"""Measures the updates of one rank, on a batch in memory and on the feed's batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from cpcscale.machine import usable_cores
from cpcscale.model.cpc import CPC
from cpcscale.objective.objectives import ObjectiveConfig
from cpcscale.shards.index import Index
from cpcscale.stream.batch import Batch
from cpcscale.stream.feed import FeedSource
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train.log_metrics import feed_seconds
from cpcscale.train.loop import thread_feed
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.setup import new_network
from cpcscale.train.step import TrainStep
from cpcscale.train.time_account import HiddenSeconds, TimeAccount, TimeTotals, memory_peak_bytes


@dataclass(frozen=True)
class UpdateMeasurement:
    """One measurement: its `amount` in seconds of audio (operations for a limit), wall time, time account (`stalls`)
    and number of updates."""

    amount: float
    wall_s: float
    stalls: TimeTotals = field(default_factory=TimeTotals)
    updates: int = 1

    @property
    def rate(self) -> float:
        return self.amount / self.wall_s


class UpdateBench:
    """The network, the batch and the feed of one rank; a measurement makes `count` updates.

    All ranks must make the same measurements in the same order. The exchange of gradients is counted one update late,
    because DDP knows that of an update only when the next one has started.
    """

    def __init__(self, recipe: Recipe, index: Index, ranks: Ranks, count: int) -> None:
        self.recipe, self.ranks, self._count = recipe, ranks, count
        # As the training loop does.
        torch.set_num_threads(recipe.train.threads or max(1, usable_cores() // ranks.on_node))
        order = RunOrder(shard_windows(index, recipe.window), recipe.seed, recipe.train.lanes, recipe.train.batch)
        self.source = FeedSource(index, order, recipe.window, recipe.feed, recipe.measures)
        self._new = new_network(recipe, self.source, ranks)
        feed = thread_feed(self.source, ranks, 0)
        self.batch = feed.next()
        feed.close()
        self._steps: dict[str, TrainStep] = {}
        self.measure_memory()
        # Before anything else is measured in this process.
        self.peak_mib = memory_peak_bytes(ranks.device) / 2**20

    def measure_memory(self, objective: ObjectiveConfig | None = None) -> UpdateMeasurement:
        """Measures updates on the batch in memory; another objective than the recipe's gets its own network."""
        return self._updated(self._step(objective or self.recipe.objective), lambda: self.batch, dict, self._count)

    def measure_feed(self, count: int | None = None) -> UpdateMeasurement:
        """Measures updates on the feed's batches, without the start of the feed; `count` of them if given."""
        step, feed = self._step(self.recipe.objective), thread_feed(self.source, self.ranks, 0)
        try:
            step(feed.next(), 0, scored=False)
            return self._updated(step, feed.next, feed.seconds, count or self._count)
        finally:
            feed.close()

    def new_model(self) -> CPC:
        """A new network on the device, with the same weights every time."""
        return copy.deepcopy(self._new).to(self.ranks.device)

    def now_s(self) -> float:
        """The time in seconds, after waiting for a GPU to finish its work."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter()

    def _updated(
        self, step: TrainStep, take: Callable[[], Batch], fed: Callable[[], dict[str, float]], count: int
    ) -> UpdateMeasurement:
        def beside() -> HiddenSeconds:
            return HiddenSeconds(*feed_seconds(fed()), 0.0, *step.exchange_s())

        # A barrier: no rank begins before the last one is ready.
        self.ranks.sum(torch.zeros(1, device=self.ranks.device))
        self.now_s()
        before, meter = beside(), TimeAccount(step.timeline)
        for _ in range(count):
            with meter.phase("wait"):
                batch = take()
            step(batch, 0, scored=False)
            meter.count_audio(batch.audio_s)
        self.now_s()
        lap = meter.lap(beside() - before, "unattributed")
        return UpdateMeasurement(lap.audio_s, lap.wall_s, lap, count)

    def _step(self, objective: ObjectiveConfig) -> TrainStep:
        """A TrainStep for this objective with its own network, after a first update as a warm-up."""
        name = f"{objective.scope} {objective.draw}"
        if name not in self._steps:
            recipe = replace(self.recipe, objective=objective)
            self._steps[name] = TrainStep(self.new_model(), recipe, self.ranks, total=1)
            self._steps[name](self.batch, 0, scored=False)
        return self._steps[name]
