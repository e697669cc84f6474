"""The theorem of stream/epoch_order.py: an epoch has every window exactly once, in an order fixed by its key alone."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.stream import window
from cpcscale.stream.epoch_order import EpochOrder, in_runs, mix, permutation

Window = tuple[int, int]
# Windows of each utterance, shard by shard; utterances and shards without any are legal.
shard_sets = st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=8)
seeds = st.integers(-(2**63), 2**64 - 1)


class Epochs(EpochOrder):
    """A plan that knows the windows of each utterance, and so can number them, as the feed does."""

    def __init__(self, shards: list[list[int]], seed: int) -> None:
        self.shards = shards
        self.firsts = np.cumsum([0, *map(len, shards)])
        bounds = self.firsts
        counts = np.array([count for shard in shards for count in shard], np.int64)
        super().__init__(window.per_shard(counts, bounds), seed)


def plan_of(shards: list[list[int]], seed: int) -> Epochs:
    return Epochs(shards, seed)


def windows_at(plan: Epochs, epoch: int, positions: list[int] | np.ndarray) -> list[Window]:
    shard, ordinal = plan.at(epoch, np.asarray(positions, np.int64))
    found = np.zeros((len(shard), 2), np.int64)
    for each in np.unique(shard):
        row, number = window.locate(np.array(plan.shards[each], np.int64), ordinal[shard == each])
        found[shard == each] = np.stack([plan.firsts[each] + row, number], axis=1)
    return [(utterance, number) for utterance, number in found.tolist()]


def slow_mix(value: int, *keys: int) -> int:
    """splitmix64's output function once for each key, in plain integers."""
    state = value % 2**64
    for key in (*keys, 0):
        state = (state + (key + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


def slow_permutation(size: int, *keys: int) -> list[int]:
    return sorted(range(size), key=lambda value: (slow_mix(value, *keys), value))


def slow_epoch(shards: list[list[int]], seed: int, epoch: int) -> list[Window]:
    """The whole epoch written out: the shards in their order, the windows of each in theirs."""
    firsts = np.cumsum([0, *map(len, shards)]).tolist()
    order = []
    for shard in slow_permutation(len(shards), seed, epoch, -1):
        windows = [(firsts[shard] + u, n) for u, count in enumerate(shards[shard]) for n in range(count)]
        order += [windows[place] for place in slow_permutation(len(windows), seed, epoch, shard)]
    return order


@given(shard_sets, seeds, st.integers(0, 1000))
def test_every_epoch_has_each_window_exactly_once(shards, seed, epoch):
    plan = plan_of(shards, seed)
    flat = [count for shard in shards for count in shard]
    every = [(utterance, number) for utterance, count in enumerate(flat) for number in range(count)]
    assert plan.total == len(every)
    assert sorted(windows_at(plan, epoch, range(plan.total))) == every


@given(shard_sets, seeds, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_any_positions_equal_the_epoch_written_out(shards, seed, epoch, random):
    order = slow_epoch(shards, seed, epoch)
    positions = [random.randrange(len(order)) for _ in range(10)] if order else []
    assert windows_at(plan_of(shards, seed), epoch, positions) == [order[position] for position in positions]


@given(shard_sets, seeds, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10**6)), max_size=20))
def test_what_was_asked_before_does_not_matter(shards, seed, visits):
    used = plan_of(shards, seed)
    for epoch, place in visits:
        if used.total:
            position = [place % used.total]
            assert windows_at(used, epoch, position) == windows_at(plan_of(shards, seed), epoch, position)


def test_more_shards_than_are_kept_in_memory_give_the_same_order():
    shards = [[2, 1]] * 700
    plan = plan_of(shards, 3)
    order = slow_epoch(shards, 3, 0)
    for _ in range(2):
        assert windows_at(plan, 0, range(plan.total)) == order
    assert windows_at(plan, 1, range(5)) == slow_epoch(shards, 3, 1)[:5]
    assert windows_at(plan, 0, range(5)) == order[:5]


@given(st.integers(-(2**63), 2**63 - 1), st.lists(seeds, max_size=4))
def test_the_hash_is_splitmix64_on_every_key(value, keys):
    assert mix(value, *keys).tolist() == [slow_mix(value, *keys)]
    assert mix(np.array([value, 7]), *keys).tolist() == [slow_mix(value, *keys), slow_mix(7, *keys)]


def test_the_order_is_frozen():
    # A run that was begun under one version goes on under another: these values may never change.
    assert mix(1234567).tolist() == [6457827717110365317]  # the first output of splitmix64 for this seed
    assert permutation(12, 0).tolist() == [10, 8, 1, 2, 11, 4, 0, 6, 7, 3, 9, 5]
    assert permutation(12, 7, 3, -1).tolist() == [9, 8, 0, 6, 11, 10, 3, 5, 7, 2, 1, 4]
    assert permutation(12, -5, 2**63).tolist() == [2, 0, 3, 1, 8, 11, 7, 6, 4, 10, 5, 9]
    digest = hashlib.sha256(permutation(100_000, 7, 3, 5).astype("<i8").tobytes()).hexdigest()
    assert digest == "0ed5540ad42cdb3817553f7826f5ca98cde025b3dbbe25b9bc75b9cd59928ff8"
    plan = plan_of([[2, 1], [3, 0], [1, 2]], 5)
    assert windows_at(plan, 1, range(9)) == [(4, 0), (5, 0), (5, 1), (2, 2), (2, 0), (2, 1), (0, 0), (0, 1), (1, 0)]


@given(st.integers(0, 200), st.lists(seeds, min_size=1, max_size=3))
def test_a_permutation_has_every_number_once(size, keys):
    assert sorted(permutation(size, *keys).tolist()) == list(range(size))


def test_seeds_epochs_and_shards_have_orders_of_their_own():
    orders = [permutation(50, seed, epoch, shard) for seed in range(4) for epoch in range(4) for shard in range(-1, 3)]
    orders += [permutation(50, key) for key in (0, 1, -1, 2**63)]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    first, second = (windows_at(plan_of([[3, 3]] * 9, 0), epoch, range(54)) for epoch in (0, 1))
    assert first != second
    assert first != windows_at(plan_of([[3, 3]] * 9, 1), 0, range(54))


def test_the_windows_are_shuffled():
    # 40 equal shards of 50 windows over 50 epochs: each shard comes first, and each window first in its shard, about
    # as often as the next; and an utterance's windows do not follow one another.
    plan = plan_of([[5] * 10] * 40, 11)
    first_shard, first_window, neighbours = np.zeros(40), np.zeros(50), 0
    for epoch in range(50):
        utterance, number = np.array(windows_at(plan, epoch, range(plan.total))).T
        first_shard[utterance[0] // 10] += 1
        heads = np.arange(0, plan.total, 50)
        np.add.at(first_window, utterance[heads] % 10 * 5 + number[heads], 1)
        neighbours += (np.diff(utterance) == 0).sum()
    # Chi-square with 39 and 49 degrees of freedom: 99.9 % lie below 73 and 85.
    assert ((first_shard - 1.25) ** 2 / 1.25).sum() < 73
    assert ((first_window - 40) ** 2 / 40).sum() < 85
    # Two random windows of 50 are of one utterance with probability 4 / 49.
    assert neighbours / (50 * 40 * 49) == pytest.approx(4 / 49, rel=0.05)


def test_a_shard_stays_together_so_that_it_is_read_once_an_epoch():
    plan = plan_of([[2] * 5] * 20, 4)
    shard = plan.at(3, np.arange(plan.total))[0]
    assert sum(a != b for a, b in pairwise(shard.tolist())) == 19


def test_a_large_corpus_is_reached_by_arithmetic():
    # 100,000 shards and 5 * 10^9 windows, more than 32 bits number: only the asked positions are made.
    plan = plan_of([[25_000, 25_000]] * 100_000, 1)
    assert plan.total == 5 * 10**9
    positions = np.array([0, 1, 49_999, 50_000, 2**31, 2**32 + 7, plan.total - 2, plan.total - 1])
    got = windows_at(plan, 9, positions)
    assert len(set(got)) == len(positions)
    assert all(0 <= utterance < 200_000 and 0 <= number < 25_000 for utterance, number in got)
    assert len({utterance // 2 for utterance, _ in got[:3]}) == 1
    assert got[3][0] // 2 != got[0][0] // 2
    assert got == windows_at(plan_of([[25_000, 25_000]] * 100_000, 1), 9, positions)


@given(shard_sets, seeds, st.integers(0, 1000), st.data())
def test_the_shards_between_two_positions_are_those_of_the_windows_between_them(shards, seed, epoch, data):
    plan = plan_of(shards, seed)
    first = data.draw(st.integers(0, plan.total))
    last = data.draw(st.integers(first, plan.total))
    expected = list(dict.fromkeys(plan.at(epoch, np.arange(first, last))[0].tolist()))
    assert plan.shards_between(epoch, first, last, most=100) == expected
    assert plan.shards_between(epoch, first, last, most=1) == expected[:1]


def slow_runs(order: list[int], speaker: list[int], length: int, *keys: int) -> list[int]:
    """Each speaker's windows in their order, cut into runs, and the runs sorted by the key of their first window."""
    runs = [[one] for one in order if speaker[one] < 0]
    for who in set(speaker) - {-1}:
        own = [one for one in order if speaker[one] == who]
        runs += [own[start : start + length] for start in range(0, len(own), length)]
    return [one for run in sorted(runs, key=lambda run: slow_mix(run[0], *keys, -4)) for one in run]


@given(st.lists(st.integers(-1, 3), max_size=30), st.integers(1, 5), seeds, st.integers(0, 3))
def test_runs_of_a_speaker_are_the_definition_written_out_and_every_window_stands_once(speaker, length, seed, epoch):
    order = permutation(len(speaker), seed, epoch)
    found = in_runs(order, np.array(speaker, np.int64), length, seed, epoch).tolist()
    assert found == slow_runs(order.tolist(), speaker, length, seed, epoch)
    assert sorted(found) == list(range(len(speaker)))


def test_an_order_in_runs_has_every_window_once_and_runs_of_1_are_the_order_without():
    windows, speakers = [7, 0, 12], {0: np.array([0, 1] * 3 + [-1]), 2: np.arange(12) % 3}
    ones, threes = (EpochOrder(windows, 5, run, speakers.__getitem__) for run in (1, 3))
    places = np.arange(19)
    for epoch in range(3):
        np.testing.assert_array_equal(ones.at(epoch, places), EpochOrder(windows, 5).at(epoch, places))
        shard, ordinal = threes.at(epoch, places)
        assert len(set(zip(shard.tolist(), ordinal.tolist(), strict=True))) == 19
        # Four windows of each of three speakers: six runs of 3 and of 1.
        said = speakers[2][ordinal[shard == 2]]
        assert (np.diff(said) == 0).sum() >= 6
        assert not np.array_equal(ordinal, ones.at(epoch, places)[1])
