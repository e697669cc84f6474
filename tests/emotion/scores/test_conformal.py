"""Intervals hold for speakers that nobody knows, and only so many speakers give any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.emotion.held_out import HeldOut, Reference, readout
from cpcscale.emotion.scores.conformal import half_widths, interval_level


def errors_of(draw: np.random.Generator, speakers: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors [U, 1] of speakers who each have a bias, a spread and a number of utterances; and their speakers [U]."""
    speaker_U = np.repeat(np.arange(speakers), draw.integers(1, 12, speakers))
    bias_U, spread_U = (values[speaker_U] for values in (draw.normal(0, 1, speakers), draw.gamma(2, 1, speakers)))
    return (bias_U + spread_U * draw.standard_normal(len(speaker_U)))[:, None], speaker_U


@pytest.mark.parametrize(("speakers", "level"), [(4, 0.8), (9, 0.8), (19, 0.9), (40, 0.9)])
def test_as_many_labels_of_new_speakers_lie_within_as_is_said(speakers, level):
    draw, covered = np.random.default_rng(speakers), []
    assert interval_level(speakers) == level
    for _ in range(1000):
        error_UP, speaker_U = errors_of(draw, speakers + 1)
        known = speaker_U < speakers
        [half] = half_widths(np.abs(error_UP[known]), speaker_U[known], level)
        covered.append(np.mean(np.abs(error_UP[~known]) <= half))
    slack = 2 * np.std(covered) / np.sqrt(len(covered))
    assert level - slack <= np.mean(covered) <= level + 1 / (speakers + 1) + slack


@given(st.integers(0, 10**6), st.integers(4, 12))
def test_it_depends_on_no_order_and_on_no_number_of_utterances_that_say_the_same(seed, speakers):
    draw = np.random.default_rng(seed)
    error_UP, speaker_U = errors_of(draw, speakers)
    half_P = half_widths(np.abs(error_UP), speaker_U, 0.8)
    order = draw.permutation(len(speaker_U))
    np.testing.assert_array_equal(half_widths(np.abs(error_UP[order]), speaker_U[order] * 7, 0.8), half_P)
    twice = np.concatenate([error_UP, error_UP[speaker_U == 0]]), np.concatenate([speaker_U, speaker_U[speaker_U == 0]])
    np.testing.assert_array_equal(half_widths(np.abs(twice[0]), twice[1], 0.8), half_P)


def test_too_few_speakers_give_none_and_unknown_ones_do_not_count():
    error_UP = np.ones((8, 3))
    assert interval_level(3) == 0
    known = HeldOut.of(error_UP, error_UP, np.ones(8), ["a", "a", "b", "b", "c", "", "", "d"], 0)
    assert known.level == 0.8 and len(known.sizes_UP) == 6 and not known.informative_P.any()
    assert HeldOut.of(error_UP, error_UP, np.ones(8), ["a", "a", "b", "b", "c", "", "", ""], 0) is None


def test_what_is_kept_of_the_speakers_is_a_number_and_sizes():
    draw = np.random.default_rng(0)
    names = [f"speaker {row % 5}" for row in range(40)]
    made = HeldOut.of(draw.normal(size=(40, 3)), draw.normal(size=(40, 3)) * 9, draw.random(40), names, 1)
    assert set(made.arrays()) == {"sizes_UP", "distance_U", "speaker_U", "constant_P"}
    assert (made.sizes_UP >= 0).all() and sorted(set(made.speaker_U)) == list(range(5)) and made.informative_P.all()
    again = HeldOut.from_arrays(made.arrays())
    np.testing.assert_array_equal(again.half_P, made.half_P)
    for spoilt in ({"sizes_UP": made.sizes_UP[1:]}, {"constant_P": np.ones(2)}, {"distance_U": -made.distance_U}):
        with pytest.raises(ValueError, match="not those of a recogniser"):
            HeldOut.from_arrays(made.arrays() | spoilt)


def test_what_is_far_from_all_that_was_learnt_from_is_unlike_it():
    draw = np.random.default_rng(0)
    known = draw.normal(3, 2, (500, 20))
    reference = Reference.of(known)
    distances = np.array([reference.distance(one_F) for one_F in known])
    assert distances.mean() == pytest.approx(1, abs=0.05) and reference.distance(known[0] + 20) > 5
    # Frames are read as their mean, windows by their shares; a feature that never changes counts for nothing.
    frames = [np.full((4, 2), 1.0), np.full((9, 2), 4.0)]
    np.testing.assert_allclose(readout(frames, np.array([0.75, 0.25])), [1.75, 1.75])
    assert np.isfinite(Reference.of(np.ones((3, 2))).distance(np.ones(2)))
