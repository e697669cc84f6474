"""What a vector head reads of frames: their statistics, without the start of a state, within each window."""

from __future__ import annotations

import kaldi_native_fbank as knf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.handmade.statistics import STATISTICS, Readout, summarise, summarise_slopes


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 3)).astype(np.float32)


@given(st.integers(60, 90), st.integers(0, 50))
def test_the_first_20_of_60_frames_say_nothing(count, seed):
    x_TC = frames(count, seed)
    other_TC = x_TC.copy()
    other_TC[:20] = 1e3
    np.testing.assert_array_equal(summarise_slopes(other_TC), summarise_slopes(x_TC))
    np.testing.assert_array_equal(summarise_slopes(x_TC)[:15], summarise(x_TC[20:]))
    assert not np.array_equal(summarise_slopes(other_TC[:59]), summarise_slopes(x_TC[:59]))


def test_the_slopes_are_those_of_kaldis_deltas_where_all_five_frames_are():
    x_TC = frames(40)
    options = knf.DeltaOptions()
    options.order, options.window = 1, 2
    expected = knf.compute_deltas(options, x_TC)[2:-2, 3:].std(axis=0)
    np.testing.assert_allclose(summarise_slopes(x_TC)[15:], expected, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_five_frames_have_a_slope_and_fewer_have_none(count):
    found = summarise_slopes(np.arange(count)[:, None] * np.ones((1, 3)))
    assert found.dtype == np.float32 and not found[15:].any() and len(found) == 18


@given(st.integers(1, 30), st.integers(1, 30))
def test_each_window_is_read_by_itself_so_that_no_slope_crosses_windows(first, second):
    windows = [frames(first, 1), 100 + frames(second, 2)]
    read = Readout("components", duration=True)
    together = read(windows, 1.5)
    np.testing.assert_array_equal(together, np.concatenate([read([each], 1.5) for each in windows]))
    assert together.dtype == np.float64 and (together[:, -1] == 1.5).all()


def test_vectors_stay_as_they_are_and_have_no_duration_of_the_readout():
    for read in (STATISTICS, Readout("components", duration=True)):
        np.testing.assert_array_equal(read([np.arange(4.0)], 2.0), [np.arange(4.0)])


def test_an_unknown_readout_is_refused():
    with pytest.raises(ValueError, match="readout=quantiles"):
        Readout("quantiles")
