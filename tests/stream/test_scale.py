"""Laws of size: what grows with shards, with ranks or with lanes, and what does not. In counts and bytes, not times."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcscale.bench.scale_set import UTTERANCE_S, make_scale_set
from cpcscale.cluster.feeders import Feeder
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader
from cpcscale.shards.rows import ShardRows
from cpcscale.storage import StorageConfig
from cpcscale.stream.batch import Batch, WindowReader
from cpcscale.stream.feed import FeedConfig, FeedSource
from cpcscale.stream.lanes import PADDING, lanes_of_rank
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

RANKS, SHARDS, UTTERANCES = 1024, 1_000_000, 2400
SPEC = WindowConfig(kind="crop", seconds=UTTERANCE_S)


class CountingIndex(Index):
    """An index that keeps which shards' rows were asked for."""

    asked: list[int]

    def rows(self, shard: int) -> ShardRows:
        self.asked.append(shard)
        return super().rows(shard)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The folder of a set of so many shards: the larger one has an index of several parts and of several blocks."""
    sizes = {shards: str(tmp_path_factory.mktemp("sets") / str(shards)) for shards in (3_000, 200_000)}
    for shards, base in sizes.items():
        make_scale_set(Path(base), shards, UTTERANCES)
    return sizes


def held_and_peak(work: Callable[[], object]) -> tuple[int, int]:
    """(bytes that are held after `work` while its result lives, bytes at most meanwhile)."""
    tracemalloc.start()
    try:
        kept = work()
        held, peak = tracemalloc.get_traced_memory()
        del kept
        return held, peak
    finally:
        tracemalloc.stop()


def planned(shards: int, ranks: int) -> RunOrder:
    """The order as rank 0 of so many has it after its first step, one lane a rank."""
    order = RunOrder(np.full(shards, UTTERANCES), 0, ranks, 8 * ranks)
    order.rows(0, lanes_of_rank(ranks, 0, ranks))
    order.next_shards(0, 0, 2)
    return order


def test_a_ranks_plan_takes_as_much_memory_among_a_thousand_ranks_as_among_sixteen():
    few, many = (held_and_peak(lambda ranks=ranks: planned(100_000, ranks))[0] for ranks in (16, RANKS))
    assert many == pytest.approx(few, rel=0.02)


def test_a_plan_holds_its_counts_and_the_order_of_one_epoch():
    held, _ = held_and_peak(lambda: planned(SHARDS, RANKS))
    # int64 each: windows of a shard; a shard's turn, and the position where it ends.
    assert held < SHARDS * (8 + 16) * 1.02


def test_a_step_and_the_shards_that_come_cost_no_memory_of_the_size_of_the_set():
    order = planned(SHARDS, 4)
    lane = lanes_of_rank(4, 0, 4)
    _, peak = held_and_peak(lambda: [(order.rows(step, lane), order.next_shards(step, 0, 2)) for step in range(4)])
    assert peak < 64 * 1024


@pytest.mark.parametrize("ranks", [RANKS, 64])
def test_a_ranks_steps_read_the_rows_of_its_own_shards_alone_once_each_in_any_set(bases, ranks):
    steps, lanes = 96, lanes_of_rank(RANKS, 3, ranks)
    for shards, base in bases.items():
        index = CountingIndex(base, (loaded := Index.load(base)).shards, loaded.parts)
        index.__dict__["asked"] = []
        order = RunOrder(shard_windows(index, SPEC), 0, RANKS, 8 * RANKS)
        reader = ShardReader(index, keep=3 * len(lanes) + 8)
        wanted = set()
        for step in range(steps):
            epoch, shard_B, ordinal_B = order.rows(step, lanes)
            WindowReader(reader, SPEC, 0).plan(step, epoch, shard_B, ordinal_B)
            wanted |= set(shard_B[shard_B != PADDING].tolist())
        reader.close()
        assert sorted(index.asked) == sorted(wanted)
        # A lane walks through its shards one after the other, however many there are.
        assert len(wanted) <= len(lanes) * (steps * 8 / UTTERANCES + 2), shards


def test_the_rows_of_an_open_shard_keep_no_others_in_memory(bases):
    index = Index.load(bases[200_000])
    for shard in (0, 40, index.shards.num_rows - 1):
        table = index.rows(shard).table
        assert table.num_rows == UTTERANCES
        assert table.get_total_buffer_size() < 1.5 * table.nbytes


def test_what_a_rank_hands_to_its_feeders_is_the_shard_table_once(bases):
    for shards, base in bases.items():
        index = Index.load(base)
        order = RunOrder(shard_windows(index, SPEC), 0, RANKS, 8 * RANKS)
        handed: list[pickle.PickleBuffer] = []
        pickle.dumps(FeedSource(index, order, SPEC, FeedConfig()), protocol=5, buffer_callback=handed.append)
        # The table, and int64 twice: its windows, and the ends of its utterances.
        assert sum(buffer.raw().nbytes for buffer in handed) < index.shards.nbytes + 17 * shards


def test_a_feeder_does_without_torch(run_python):
    status, lines = run_python("import sys, cpcscale.cluster.feeders; print('torch' in sys.modules)")
    assert (status, lines[-1]) == (0, "False"), lines


def test_a_thousand_ranks_have_every_window_of_an_epoch_exactly_once():
    windows = np.random.default_rng(0).integers(0, 40, 300)
    order = RunOrder(windows, 7, RANKS, RANKS)
    epoch = range(order.lanes.steps_per_epoch, 2 * order.lanes.steps_per_epoch)
    seen: Counter[tuple[int, int]] = Counter()
    for step in epoch:
        for rank in range(RANKS):
            _, shard, ordinal = order.rows(step, lanes_of_rank(RANKS, rank, RANKS))
            seen.update(zip(shard.tolist(), ordinal.tolist(), strict=True))
    padding = seen.pop((PADDING, PADDING), 0)
    assert padding == len(epoch) * RANKS - order.epoch_order.total
    assert seen == Counter((shard, number) for shard, count in enumerate(windows.tolist()) for number in range(count))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 40), st.data())
def test_any_number_of_ranks_have_every_window_of_an_epoch_exactly_once(windows, lanes, data):
    counts = np.array([*windows, lanes])
    ranks, order = data.draw(st.integers(1, lanes)), RunOrder(counts, 1, lanes, 2 * lanes)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(order.lanes.steps_per_epoch):
        for rank in range(ranks):
            _, shard, ordinal = order.rows(step, lanes_of_rank(lanes, rank, ranks))
            seen.update(zip(shard.tolist(), ordinal.tolist(), strict=True))
    seen.pop((PADDING, PADDING), None)
    assert seen == Counter((shard, number) for shard, count in enumerate(counts.tolist()) for number in range(count))


def test_the_feeders_of_many_ranks_give_every_utterance_of_an_epoch_once(tmp_path):
    ranks = 48
    index = make_scale_set(tmp_path / "set", 30, 40)
    order = RunOrder(shard_windows(index, SPEC), 0, ranks, 4 * ranks)
    source = FeedSource(index, order, SPEC, FeedConfig(prefetch=1))
    feeders = [Feeder(source, lanes_of_rank(ranks, rank, ranks), ranks, StorageConfig()) for rank in range(ranks)]
    seen: Counter[int] = Counter()
    for step in range(order.lanes.steps_per_epoch):
        for feeder in feeders:
            batch = feeder.batch(step).batch
            assert isinstance(batch, Batch)
            seen.update(batch.utterance_B.tolist())
            assert (batch.samples_B[batch.utterance_B != PADDING] == SPEC.samples).all()
    seen.pop(PADDING, None)
    assert seen == Counter(range(30 * 40))
