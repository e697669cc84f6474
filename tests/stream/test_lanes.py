"""Promises of lanes: any number of ranks serves them, and every global batch is the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.errors import UserError
from cpcscale.stream.lanes import PADDING, Lanes, lanes_of_rank


@st.composite
def lane_sets(draw: st.DrawFn) -> Lanes:
    lanes = draw(st.integers(1, 12))
    return Lanes(draw(st.integers(lanes, 300)), lanes, lanes * draw(st.integers(1, 6)))


def global_batch(lanes: Lanes, step: int, world: int) -> tuple[int, list[int]]:
    """(epoch, positions lane by lane) of a step, gathered from the ranks of a world of this size."""
    parts = {}
    for rank in range(world):
        for lane in lanes_of_rank(lanes.lanes, rank, world):
            assert lane not in parts
            parts[lane] = lanes.positions(step, lane)
    epochs = {epoch for epoch, _ in parts.values()}
    assert len(epochs) == 1
    return epochs.pop(), [place for lane in sorted(parts) for place in parts[lane][1].tolist()]


def epoch_of(lanes: Lanes, epoch: int, world: int = 1) -> list[list[int]]:
    steps = range(epoch * lanes.steps_per_epoch, (epoch + 1) * lanes.steps_per_epoch)
    batches = [global_batch(lanes, step, world) for step in steps]
    assert {number for number, _ in batches} == {epoch}
    return [positions for _, positions in batches]


@given(lane_sets(), st.integers(0, 5), st.data())
def test_every_epoch_has_each_position_exactly_once_in_any_world(lanes, epoch, data):
    world = data.draw(st.integers(1, lanes.lanes))
    batches = epoch_of(lanes, epoch, world)
    assert all(len(batch) == lanes.batch for batch in batches)
    places = Counter(place for batch in batches for place in batch)
    padding = places.pop(PADDING, 0)
    assert places == Counter(range(lanes.windows))
    assert padding == len(batches) * lanes.batch - lanes.windows


@given(lane_sets(), st.integers(0, 50), st.data())
def test_the_global_batch_does_not_depend_on_the_world_size(lanes, step, data):
    expected = global_batch(lanes, step, 1)
    for world in {2, 3, lanes.lanes, data.draw(st.integers(1, lanes.lanes))}:
        if world <= lanes.lanes:
            assert global_batch(lanes, step, world) == expected


@given(lane_sets())
def test_only_the_last_step_of_an_epoch_has_padding(lanes):
    *full, last = epoch_of(lanes, 0)
    assert all(PADDING not in batch for batch in full)
    assert any(place != PADDING for place in last)


@given(lane_sets(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_run_over_two_then_three_then_one_rank_is_the_undisturbed_run(lanes, first, second, third):
    worlds = [2] * first + [3] * second + [1] * third
    walked = [global_batch(lanes, step, min(world, lanes.lanes)) for step, world in enumerate(worlds)]
    assert walked == [global_batch(lanes, step, 1) for step in range(len(worlds))]


@given(lane_sets())
def test_lanes_are_contiguous_in_order_and_differ_by_at_most_one_window(lanes):
    owned: dict[int, list[int]] = {lane: [] for lane in range(lanes.lanes)}
    for step in range(lanes.steps_per_epoch):
        for lane, places in owned.items():
            places += [place for place in lanes.positions(step, lane)[1].tolist() if place != PADDING]
    assert [place for places in owned.values() for place in places] == list(range(lanes.windows))
    sizes = {len(places) for places in owned.values()}
    assert max(sizes) - min(sizes) <= 1


@given(lane_sets(), st.integers(0, 100))
def test_the_cursors_are_what_the_next_positions_start_at(lanes, step):
    for lane, (epoch, position) in enumerate(lanes.cursors(step)):
        next_epoch, places = lanes.positions(step, lane)
        assert epoch == next_epoch
        # A lane that has run out stands at its end.
        end = lanes.windows * (lane + 1) // lanes.lanes
        assert places[0] == (position if position < end else PADDING)


@pytest.mark.parametrize(
    ("windows", "lanes", "batch", "steps", "last"),
    [
        (4, 4, 4, 1, [0, 1, 2, 3]),
        (5, 4, 4, 2, [PADDING, PADDING, PADDING, 4]),
        (7, 4, 4, 2, [PADDING, 2, 4, 6]),
        (4, 4, 8, 1, [0, PADDING, 1, PADDING, 2, PADDING, 3, PADDING]),
        (6, 1, 4, 2, [4, 5, PADDING, PADDING]),
        (1, 1, 1, 1, [0]),
        (10**12, 1000, 4000, 250_000_000, None),
    ],
)
def test_sizes_at_the_edges(windows, lanes, batch, steps, last):
    walk = Lanes(windows, lanes, batch)
    assert walk.steps_per_epoch == steps
    epoch, positions = global_batch(walk, steps - 1, 1)
    assert epoch == 0
    assert positions == last or (last is None and max(positions) == windows - 1)
    assert global_batch(walk, steps, 1)[0] == 1


@pytest.mark.parametrize(
    ("windows", "lanes", "batch", "words"),
    [
        (100, 4, 6, "train.batch=6 is not a multiple of train.lanes=4"),
        (100, 8, 4, "train.batch=4 is not a multiple of train.lanes=8"),
        (3, 4, 4, "3 windows, fewer than train.lanes=4"),
        (0, 1, 1, "0 windows"),
    ],
)
def test_sizes_that_cannot_be_walked_are_refused_in_one_line(windows, lanes, batch, words):
    with pytest.raises(UserError) as caught:
        Lanes(windows, lanes, batch)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_ranks_than_lanes_are_refused():
    assert [list(lanes_of_rank(3, rank, 3)) for rank in range(3)] == [[0], [1], [2]]
    with pytest.raises(UserError, match=r"4 workers share train\.lanes=3"):
        lanes_of_rank(3, 0, 4)


def test_positions_are_integers_that_index():
    assert Lanes(10, 2, 4).positions(0, 1)[1].dtype == np.int64
