"""Promises of the order: a global batch is a function of its step, also when shards are appended in mid-run."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.stream.lanes import PADDING, lanes_of_rank
from cpcscale.stream.run_order import Chapter, RunOrder

Row = tuple[int, int]


@st.composite
def orders(draw: st.DrawFn, appended: bool = False) -> RunOrder:
    windows = np.array(draw(st.lists(st.integers(0, 20), min_size=2, max_size=12)), np.int64)
    lanes = draw(st.integers(1, 6))
    shards = draw(st.integers(1, len(windows) - 1)) if appended else len(windows)
    # Enough windows in the first shard for every lane.
    windows[0] += lanes
    batch, seed = lanes * draw(st.integers(1, 3)), draw(st.integers(0, 99))
    order = RunOrder(windows, seed, lanes, batch, [Chapter(0, 0, shards)])
    if not appended:
        return order
    step, epoch = order.next_epoch(draw(st.integers(0, 3 * order.lanes.steps_per_epoch)))
    begun = [Chapter(0, 0, shards)] if step else []
    return RunOrder(windows, seed, lanes, batch, [*begun, Chapter(step, epoch, len(windows))])


def global_batch(order: RunOrder, step: int, world: int = 1) -> tuple[int, list[Row]]:
    """(epoch, (shard, ordinal) of every row) of a step, put together from the ranks of a world of this size."""
    lanes = order.lanes.lanes
    rows = np.zeros((lanes, order.lanes.per_step, 2), np.int64)
    epochs = set()
    for rank in range(world):
        mine = lanes_of_rank(lanes, rank, world)
        epoch, shard, ordinal = order.rows(step, mine)
        rows[list(mine)] = np.stack([shard, ordinal], axis=1).reshape(len(mine), -1, 2)
        epochs.add(epoch)
    assert len(epochs) == 1
    return epochs.pop(), [tuple(row) for row in rows.reshape(-1, 2).tolist()]


def every_window(windows: np.ndarray) -> Counter[Row]:
    return Counter((shard, ordinal) for shard, count in enumerate(windows.tolist()) for ordinal in range(count))


@given(orders(), st.integers(0, 40), st.data())
def test_a_global_batch_does_not_depend_on_the_world_size(order, step, data):
    world = data.draw(st.integers(1, order.lanes.lanes))
    assert global_batch(order, step, world) == global_batch(order, step)


@given(orders(appended=True), st.data())
def test_every_epoch_has_each_window_of_its_version_exactly_once(order, data):
    last = order.chapters[-1]
    steps = last.step + 2 * order.lanes.steps_per_epoch
    by_epoch: dict[int, Counter[Row]] = {}
    for step in range(steps):
        epoch, rows = global_batch(order, step, data.draw(st.integers(1, order.lanes.lanes)))
        by_epoch.setdefault(epoch, Counter()).update(row for row in rows if row[0] != PADDING)
    assert sorted(by_epoch) == list(range(last.epoch + 2)), "no epoch is skipped or begun twice"
    for epoch, seen in by_epoch.items():
        chapter = max((each for each in order.chapters if each.epoch <= epoch), key=lambda each: each.epoch)
        assert seen == every_window(order.epoch_order.windows[: chapter.shards])


@given(orders(appended=True))
def test_steps_before_the_edge_are_those_of_the_run_before_shards_were_appended(order):
    first = order.chapters[0]
    before = RunOrder(order.epoch_order.windows, order.seed, order.lanes.lanes, order.batch, [first])
    for step in range(order.chapters[-1].step):
        assert global_batch(order, step) == global_batch(before, step)
        assert order.cursors(step) == before.cursors(step)


@given(orders(appended=True), st.integers(0, 60), st.integers(1, 4))
def test_the_shards_that_come_are_those_that_the_next_steps_need(order, step, most):
    for lane in range(order.lanes.lanes):
        met: list[int] = []
        for later in range(step, step + 2 * order.lanes.steps_per_epoch + 2):
            met += order.rows(later, [lane])[1].tolist()
        needed = [shard for shard in dict.fromkeys(met) if shard != PADDING]
        coming = order.next_shards(step, lane, most)
        assert coming == needed[: len(coming)]
        assert len(coming) <= most
        assert coming[:1] == needed[:1]


@given(orders(), st.floats(0.1, 5))
def test_a_run_of_whole_epochs_ends_at_an_edge(order, epochs):
    assert order.steps_for(round(epochs) + 1) % order.lanes.steps_per_epoch == 0
    assert order.steps_for(epochs) >= 1


def test_shards_that_come_in_after_the_end_of_a_run_do_not_move_its_end():
    # Four steps an epoch, then, from the third epoch on, more.
    windows = np.array([10, 3, 100])
    alone = RunOrder(windows, 0, 2, 4, [Chapter(0, 0, 2)])
    appended = RunOrder(windows, 0, 2, 4, [Chapter(0, 0, 2), Chapter(12, 3, 3)])
    for epochs in (0.5, 1, 2.5, 2.75):
        assert appended.steps_for(epochs) == alone.steps_for(epochs)
    assert appended.steps_for(3) == alone.steps_for(3) == 12
    assert appended.steps_for(4) == 12 + appended.lanes.steps_per_epoch > alone.steps_for(4)


def test_an_edge_is_where_an_epoch_begins():
    order = RunOrder(np.array([10, 3]), 0, 2, 4)
    assert order.lanes.steps_per_epoch == 4
    assert [order.next_epoch(step) for step in (0, 1, 3, 4, 5)] == [(0, 0), (4, 1), (4, 1), (4, 1), (8, 2)]
