"""Promises of windows: all of the audio and nothing outside it, at places that follow from keys alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpcscale.stream import window
from cpcscale.stream.window import WindowConfig

lengths = st.lists(st.integers(1, 100_000), min_size=1, max_size=20)
seconds = st.floats(0.05, 3)
TILE, CROP = WindowConfig(kind="tile", seconds=1.0), WindowConfig(kind="crop", seconds=1.0)


def places(spec: WindowConfig, samples: list[int], seed: int = 0, epoch: int = 0) -> list[tuple[int, int, int]]:
    """(utterance, start, length) of every window of these utterances."""
    length = np.array(samples, np.int64)
    counts = window.count(spec, length)
    utterance = np.repeat(np.arange(len(samples)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    starts, sizes = window.span(spec, length[utterance], utterance, number, seed, epoch)
    return list(zip(utterance.tolist(), starts.tolist(), sizes.tolist(), strict=True))


@given(st.sampled_from(["tile", "crop"]), seconds, lengths, st.integers(0, 99), st.integers(0, 99))
@example("tile", 1.0, [1, 15_999, 16_000, 16_001, 31_999, 32_000, 32_001], 0, 0)
def test_a_window_lies_in_its_utterance_and_only_a_short_utterance_gives_a_short_one(
    kind, seconds, samples, seed, epoch
):
    spec = WindowConfig(kind=kind, seconds=seconds)
    for utterance, start, size in places(spec, samples, seed, epoch):
        assert start >= 0
        assert start + size <= samples[utterance]
        assert size == min(spec.samples, samples[utterance])


@given(seconds, lengths)
def test_tiles_cover_every_sample_and_no_more_of_them_than_needed(seconds, samples):
    spec = WindowConfig(kind="tile", seconds=seconds)
    covered = [np.zeros(count, bool) for count in samples]
    for utterance, start, size in places(spec, samples):
        covered[utterance][start : start + size] = True
    assert all(mask.all() for mask in covered)
    counts = window.count(spec, np.array(samples))
    assert counts.tolist() == [max(1, -(-count // spec.samples)) for count in samples]


@given(lengths)
def test_tiles_do_not_depend_on_the_seed_or_the_epoch(samples):
    assert places(TILE, samples, 1, 2) == places(TILE, samples, 3, 4)


@given(lengths)
def test_a_crop_is_one_window_an_utterance(samples):
    assert window.count(CROP, np.array(samples)).tolist() == [1] * len(samples)


def test_crop_starts_are_uniform_over_the_room_ends_included():
    # Room for 10 starts, 20,000 utterances: chi-square with 9 degrees of freedom lies below 27.9 in 99.9 %.
    starts = [start for _, start, _ in places(CROP, [16_009] * 20_000)]
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    # Over a long room the starts of one utterance in many epochs are uniform too, and unrelated to its neighbour's.
    starts_EU = np.array([[start for _, start, _ in places(CROP, [160_000] * 2, 5, epoch)] for epoch in range(2000)])
    share_EU = starts_EU / 144_000
    np.testing.assert_allclose(share_EU.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(share_EU.var(axis=0), 1 / 12, atol=0.01)
    assert abs(np.corrcoef(share_EU.T)[0, 1]) < 0.1


def test_a_crop_is_keyed_by_seed_epoch_and_utterance_and_by_nothing_else():
    base = [start for _, start, _ in places(CROP, [160_000] * 8)]
    assert len(set(base)) == 8
    for seed, epoch in ((1, 0), (0, 1)):
        assert not set(base) & {start for _, start, _ in places(CROP, [160_000] * 8, seed, epoch)}
    # The same window alone, among others, or in another order stands in the same place.
    some = np.array([5, 2])
    starts, _ = window.span(CROP, np.array([160_000] * 2), some, np.zeros(2, np.int64), 0, 0)
    assert starts.tolist() == [base[5], base[2]]


def test_places_and_keys_are_frozen():
    # They decide what a resumed run hears and which negatives it draws.
    utterance, number = np.array([0, 1, 7]), np.array([0, 2, 1])
    starts, _ = window.span(CROP, np.array([160_000] * 3), utterance, number, 3, 4)
    assert starts.tolist() == [7544, 114983, 27389]
    assert window.keys(utterance, number, 3, 4).tolist() == [
        952574182965205875,
        3869942922231135900,
        -2245159858593176099,
    ]


def test_every_window_of_every_epoch_and_seed_has_a_key_of_its_own():
    utterance, number = (part.ravel() for part in np.meshgrid(np.arange(300), np.arange(30)))
    keys = [window.keys(utterance, number, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(key.dtype == np.int64 for key in keys)
    assert len(np.unique(np.concatenate(keys))) == 9 * 9000


@pytest.mark.parametrize(("seconds", "samples"), [(0.05, 800), (1.28, 20_480), (10.0, 160_000), (0.1, 1600)])
def test_the_length_is_in_samples_at_16_khz(seconds, samples):
    assert WindowConfig(seconds=seconds).samples == samples
