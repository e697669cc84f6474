"""Measures the training loop without its network: how fast the rest can be, and what the time account costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpcscale.bench.updates import UpdateMeasurement
from cpcscale.shards.index import Index
from cpcscale.stream.feed import FeedSource
from cpcscale.train.device import Timeline, make_timeline
from cpcscale.train.loop import pretrain, thread_feed
from cpcscale.train.observer import SilentObserver
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.scores import ObjectiveSums
from cpcscale.train.setup import Data
from cpcscale.train.step import TrainStep
from cpcscale.train.time_account import HIDDEN, PHASES, TimeTotals

# Updates in a lap; the first lap is not measured.
LAP = 10
_MARKS, _TIMES = 5_000, 20


class StepWithoutNetwork(TrainStep):
    """An update that only copies its batch to the device, sums its counts over ranks and marks its time."""

    def _with_content(self, piece: Any, int_BS: Tensor) -> Any:
        return piece

    def _piece_by_piece(self, whole: Any, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        yield [ObjectiveSums.zero(objective, self.ranks.device).sums_MN for objective in self.objectives]

    _together = _piece_by_piece

    def _update(self, step: int) -> None:
        pass


def measure_loop(recipe: Recipe, index: Index, ranks: Ranks, updates: int, folder: Path) -> UpdateMeasurement:
    """Measures the loop with a StepWithoutNetwork on the feed's batches; the first lap is left out."""
    laps = _Laps()
    _run(_short(recipe, updates), index, ranks, laps, StepWithoutNetwork, folder)
    return replace(laps.row(), updates=updates - LAP)


def measure_feed_alone(source: FeedSource, ranks: Ranks, updates: int) -> UpdateMeasurement:
    """Takes the batches of the same laps from the feed and discards them."""
    feed = thread_feed(source, ranks, 0)
    try:
        for _ in range(LAP):
            feed.next()
        began = time.perf_counter()
        audio_s = sum(feed.next().audio_s for _ in range(updates - LAP))
        return UpdateMeasurement(audio_s, time.perf_counter() - began)
    finally:
        feed.close()


def count_marks(recipe: Recipe, index: Index, ranks: Ranks, kind: type[TrainStep], folder: Path) -> int:
    """The number of time marks of one update of the loop, with logging."""
    watcher = _Marks(kind)
    _run(_short(recipe, 2), index, ranks, watcher, watcher.make, folder)
    return watcher.by_step[2] - watcher.by_step[1]


def measure_mark_s(device: torch.device) -> float:
    """Seconds that a mark takes, including its share of reading the timeline later."""
    line, seconds = make_timeline(device), []
    line.mark("")
    for _ in range(_TIMES):
        began = time.perf_counter()
        for _ in range(_MARKS):
            line.mark("forward")
        line.seconds()
        seconds.append((time.perf_counter() - began) / _MARKS)
    return statistics.median(seconds)


class _Laps(SilentObserver):
    """Records the metrics of each lap and their times."""

    def __init__(self) -> None:
        self._laps: list[tuple[float, Mapping[str, float]]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._laps.append((time.perf_counter(), values))

    def row(self) -> UpdateMeasurement:
        (began, first), (ended, last) = self._laps[0], self._laps[-1]
        audio_s = 3600 * (last["audio_hours"] - first["audio_hours"])
        exposed, hidden = dict.fromkeys(PHASES, 0.0), dict.fromkeys(HIDDEN, 0.0)
        for (before, _), (now, values) in zip(self._laps, self._laps[1:], strict=False):
            for name in PHASES:
                exposed[name] += values[f"time_{name}"] * (now - before)
            for name in HIDDEN:
                hidden[name] += values[f"hidden_{name}"] * (now - before)
        return UpdateMeasurement(audio_s, ended - began, TimeTotals(ended - began, audio_s, exposed, hidden))


class _CountingTimeline:
    """A timeline that counts its marks."""

    def __init__(self, line: Timeline) -> None:
        self._line, self.marks = line, 0

    def mark(self, name: str) -> None:
        self.marks += 1
        self._line.mark(name)

    def seconds(self) -> dict[str, float]:
        return self._line.seconds()


class _Marks(SilentObserver):
    """Makes a step whose marks are counted, and records the count after each update."""

    def __init__(self, kind: type[TrainStep]) -> None:
        self._kind, self.by_step = kind, dict[int, int]()

    def make(self, *arguments: Any) -> TrainStep:
        step = self._kind(*arguments)
        step.timeline = self._line = _CountingTimeline(step.timeline)
        return step

    def progress(self, step: int, total: int) -> None:
        self.by_step[step] = self._line.marks


def _short(recipe: Recipe, updates: int) -> Recipe:
    """The recipe of a run of `updates` updates from scratch that makes no checkpoint before its end."""
    train = replace(recipe.train, steps=updates, log_every_steps=LAP, log_window_ids="")
    return replace(recipe, init_from="", train=train, checkpoint=replace(recipe.checkpoint, every_steps=updates))


def _run(recipe: Recipe, index: Index, ranks: Ranks, observer: SilentObserver, make_step: Any, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        pretrain(recipe, Data(index, {}), run_dir, ranks, observer, make_step=make_step)
