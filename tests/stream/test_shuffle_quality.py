"""Promises of the shuffle figure: the closed form is the mean over every batch there is, and counting counts pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.stream.shuffle_quality import count_pairs, expected_pairs, sample_steps, shuffle_quality


@given(windows=st.lists(st.integers(1, 4), min_size=1, max_size=4), batch=st.integers(0, 5))
def test_the_perfect_shuffles_pairs_are_the_mean_over_every_batch(windows, batch):
    recording = np.repeat(np.arange(len(windows)), windows)
    batch = min(batch, len(recording))
    every = [count_pairs(recording[list(rows)]) for rows in itertools.combinations(range(len(recording)), batch)]
    same = sum(count * (count - 1) for count in windows)
    assert expected_pairs(batch, len(recording), same) == pytest.approx(np.mean(every))


@given(st.lists(st.integers(0, 5), max_size=30))
def test_pairs_are_counted_as_by_hand(recording):
    by_hand = sum(a == b for a, b in itertools.combinations(recording, 2))
    assert count_pairs(np.array(recording, np.uint64)) == by_hand


def test_batches_that_are_not_full_are_held_against_batches_of_their_size():
    figure = shuffle_quality([(4, 1), (4, 3), (2, 0)], windows=10, same=20, exact=True)
    assert figure.pairs == pytest.approx(4 / 3)
    assert figure.perfect == pytest.approx((6 + 6 + 1) * 20 / 90 / 3)
    assert figure.ratio == pytest.approx(4 / (13 * 20 / 90))
    assert figure.error == 0


def test_without_two_windows_of_a_recording_there_is_no_ratio():
    assert shuffle_quality([(4, 0)], windows=10, same=0, exact=True).ratio is None
    assert shuffle_quality([], windows=0, same=0, exact=True).batches == 0


def test_sampled_steps_are_keyed_different_and_all_when_there_are_few():
    assert sample_steps(5, 8, 0).tolist() == [0, 1, 2, 3, 4]
    first, again, other = sample_steps(10_000, 50, 1), sample_steps(10_000, 50, 1), sample_steps(10_000, 50, 2)
    assert len(set(first.tolist())) == 50
    assert first.tolist() == again.tolist() == sorted(first.tolist())
    assert first.tolist() != other.tolist()
    # From all of the epoch, not from its start.
    assert 3_000 < first.mean() < 7_000
