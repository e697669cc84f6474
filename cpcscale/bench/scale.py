"""`cpcscale bench scale`: index, order, ranks and feeders of a run of any size, on a set with hardly any audio.

It uses the code of a real run: an index on disk that is read by row groups, the order of the data, feeds and actors.
Each measurement runs in its own process. Only the shards share one small tar, and no network is trained.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpcscale import config
from cpcscale.bench import scale_set
from cpcscale.bench.fresh_process import peak_mib, run_in_fresh_process
from cpcscale.cluster import scale_actors
from cpcscale.errors import UserError
from cpcscale.freed_memory import private_mib
from cpcscale.progress import note
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader
from cpcscale.stream.batch import WindowReader
from cpcscale.stream.feed import FeedConfig, FeedSource, ThreadFeed
from cpcscale.stream.lanes import PADDING, lanes_of_rank
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

WINDOW = WindowConfig(kind="crop", seconds=scale_set.UTTERANCE_S)
# Divisors for the smaller set and for fewer ranks, which show what grows with shards and with lanes.
_SMALLER = 4
_FEWER = 16


@dataclass(kw_only=True)
class ScaleBenchConfig:
    """The settings of `cpcscale bench scale`: the size of the run that is measured."""

    # Shards of the set.
    shards: int = 1_000_000
    # Utterances in each shard.
    utterances: int = 240
    # Ranks, with one lane each.
    ranks: int = 1024
    # Windows of each rank in a step.
    windows: int = 8
    # Steps that are measured: enough that every lane changes its shard.
    steps: int = 64

    def __post_init__(self) -> None:
        config.at_least(1, utterances=self.utterances, ranks=self.ranks, windows=self.windows, steps=self.steps)
        if self.shards < _SMALLER * self.ranks:
            raise UserError(
                f"shards={self.shards} is less than {_SMALLER} for each of ranks={self.ranks}: the bench also "
                f"measures a set of a {_SMALLER}th of them, where every lane needs a shard"
            )

    @property
    def batch(self) -> int:
        return self.ranks * self.windows


def bench_scale(spec: ScaleBenchConfig) -> dict[str, Any]:
    """Measures the set, and one with a quarter of the shards, and returns the figures.

    `rank`, and `rank_of_many` with more lanes on each of fewer ranks, hold its `lanes`; the seconds to open the index
    (`open_s`), to order an epoch (`epoch_s`) and to the feed's `first_batch_s`; the microseconds of a step, median and
    worst (a step that changes a shard), to find its rows (`order_us`), locate their members (`draft_us`) and list the
    next shards (`coming_us`); the microseconds of a step of the feed (`feed_us`); private and peak MiB, and how many
    bytes of both each shard adds (`bytes_per_shard`). `position` is the size of the cursors in a checkpoint, also by
    lane. `step` is the time to find the rows of all ranks (`us_per_rank`) and the number of `wrong` rows in an epoch's
    first and last step. `feeders` and `actors` are described in scale_actors.py.
    """
    with tempfile.TemporaryDirectory(prefix="cpcscale-bench-") as folder:
        bases = []
        for shards in (spec.shards, spec.shards // _SMALLER):
            note(f"bench scale: a set of {shards:,} shards and {shards * spec.utterances:,} utterances")
            bases.append(str(Path(folder, str(shards))))
            scale_set.make_scale_set(Path(bases[-1]), shards, spec.utterances)
        note(f"bench scale: {spec.ranks:,} ranks, by one of them")
        rank = _grown(spec, bases, _rank, spec.ranks)
        many = _grown(spec, bases, _rank, max(1, spec.ranks // _FEWER))
        step = run_in_fresh_process(_all_ranks, bases[0], spec.ranks, spec.batch)
        note(f"bench scale: {spec.ranks:,} feeders in one process")
        fed = run_in_fresh_process(scale_actors.measure_feeders, bases[0], spec.ranks, spec.batch, 2, WINDOW)
        note("bench scale: a rank with its feeder, driver and mailbox, on a local Ray")
        acted = _grown(spec, bases, scale_actors.measure_actors, WINDOW)
    return {
        "shards": spec.shards,
        "utterances": spec.shards * spec.utterances,
        "ranks": spec.ranks,
        "rank": rank,
        "rank_of_many": many,
        "position": step.pop("position"),
        "step": step,
        "feeders": fed,
        "actors": acted,
    }


def _grown(spec: ScaleBenchConfig, bases: list[str], work: Callable[..., dict[str, Any]], *more: Any) -> dict[str, Any]:
    """The figures of the whole set, and the bytes by which each `..._mib` grows with a shard."""
    whole, part = (run_in_fresh_process(work, base, spec.ranks, spec.batch, spec.steps, *more) for base in bases)
    shards = spec.shards - spec.shards // _SMALLER
    grown = {
        name.removesuffix("_mib"): round((whole[name] - part[name]) * 2**20 / shards, 1)
        for name in whole
        if name.endswith("_mib")
    }
    return {**whole, "bytes_per_shard": grown}


def _rank(base: str, lanes: int, batch: int, steps: int, world: int) -> dict[str, Any]:
    """Measures rank 0 of `world`; see `bench_scale`."""
    began = time.perf_counter()
    index = Index.load(base)
    opened = time.perf_counter()
    order = RunOrder(shard_windows(index, WINDOW), 0, lanes, batch)
    mine = lanes_of_rank(lanes, 0, world)
    order.rows(0, mine)
    ordered = time.perf_counter()
    shards = ShardReader(index, keep=3 * len(mine) + 8)
    reader = WindowReader(shards, WINDOW, 0)
    spent: dict[str, list[float]] = {"order_us": [], "draft_us": [], "coming_us": []}
    for step in range(steps):
        marks = [time.perf_counter()]
        epoch, shard_B, ordinal_B = order.rows(step, mine)
        marks.append(time.perf_counter())
        reader.plan(step, epoch, shard_B, ordinal_B)
        marks.append(time.perf_counter())
        for lane in mine:
            order.next_shards(step, lane, 1)
        marks.append(time.perf_counter())
        for values, first, last in zip(spent.values(), marks, marks[1:], strict=False):
            values.append(1e6 * (last - first))
    shards.close()
    return {
        "lanes": len(mine),
        "open_s": round(opened - began, 3),
        "epoch_s": round(ordered - opened, 3),
        **{name: [round(statistics.median(each), 1), round(max(each), 1)] for name, each in spent.items()},
        **_fed(FeedSource(index, order, WINDOW, FeedConfig()), mine, steps),
        "private_mib": round(private_mib(), 1),
        "peak_mib": peak_mib(),
    }


def _fed(source: FeedSource, lanes: range, steps: int) -> dict[str, Any]:
    began = time.perf_counter()
    feed = ThreadFeed(source, lanes, 0, threads=1)
    try:
        feed.next()
        first = time.perf_counter()
        for _ in range(steps):
            feed.next()
        last = time.perf_counter()
    finally:
        feed.close()
    return {"first_batch_s": round(first - began, 3), "feed_us": round(1e6 * (last - first) / steps, 1)}


def _all_ranks(base: str, ranks: int, batch: int) -> dict[str, Any]:
    """Compares the rows of all ranks with the plan, in an epoch's first and last step; see `bench_scale`."""
    order = RunOrder(shard_windows(Index.load(base), WINDOW), 0, ranks, batch)
    order.rows(0, [0])
    wrong, spent = 0, 0.0
    steps = (0, order.lanes.steps_per_epoch - 1)
    for step in steps:
        began = time.perf_counter()
        rows = [order.rows(step, lanes_of_rank(ranks, rank, ranks))[1:] for rank in range(ranks)]
        spent += time.perf_counter() - began
        found = np.concatenate([np.stack(each, axis=1) for each in rows])
        positions = order.lanes.positions(step, range(ranks))[1]
        wanted = np.full_like(found, PADDING)
        wanted[positions != PADDING] = np.stack(order.epoch_order.at(0, positions[positions != PADDING]), axis=1)
        real = found[found[:, 0] != PADDING]
        wrong += int((found != wanted).any(axis=1).sum()) + len(real) - len(np.unique(real, axis=0))
    cursors = len(json.dumps(order.cursors(steps[-1])))
    return {
        "us_per_rank": round(1e6 * spent / len(steps) / ranks, 1),
        "wrong": wrong,
        "position": {"bytes": cursors, "bytes_per_lane": round(cursors / ranks, 1)},
    }
