import numpy as np
import pytest

from cpcscale.handmade import functionals, mfcc, prosody
from cpcscale.handmade.targets import FRAME_NAMES, WINDOW_NAMES, measure


def voice(samples: int) -> np.ndarray:
    """int16: a buzz of 150 Hz that stops for a quarter of each second, in a little noise."""
    s = np.arange(samples)
    buzz = sum(np.sin(2 * np.pi * 150 * k * s / 16_000) / k for k in range(1, 9)) * (s % 16_000 < 12_000)
    return (3_000 * buzz + 20 * np.random.default_rng(0).standard_normal(samples)).astype(np.int16)


def test_targets_are_the_features_of_the_classic_systems_without_the_duration():
    wave_S = voice(20_000)
    frame_TF, window_F = measure(wave_S)
    float_S = wave_S.astype(np.float32) / 32_768
    assert (frame_TF.shape, window_F.shape) == ((125, len(FRAME_NAMES)), (len(WINDOW_NAMES),))
    assert "duration_s" not in WINDOW_NAMES and len(set(WINDOW_NAMES)) == len(WINDOW_NAMES)
    classic = [functionals.functionals(float_S)[:-1], prosody.prosody(float_S, "pitch")[:-1]]
    np.testing.assert_array_equal(window_F, np.concatenate(classic))
    np.testing.assert_array_equal(frame_TF[:, 3:], mfcc.mfcc(float_S, 20)[:, 1:])
    f0_T, _, voiced_T = prosody.track_pitch(float_S)
    np.testing.assert_array_equal(frame_TF[: len(f0_T), 2], voiced_T)
    assert 0.4 < voiced_T.mean() < 0.95
    np.testing.assert_array_equal(np.isfinite(frame_TF[: len(f0_T), 1]), voiced_T)
    assert np.nanmedian(frame_TF[:, 1]) == pytest.approx(np.log2(150), abs=0.02)
    assert np.isfinite(frame_TF[: len(f0_T), [0, *range(2, 22)]]).all()


def test_what_a_window_does_not_have_is_nan():
    of_voice = ("f0_", "energy_voiced", "correlation_voiced")
    f0 = np.array([name.startswith(of_voice) for name in WINDOW_NAMES])
    for wave_S in (
        np.zeros(16_000, np.int16),
        (100 * np.random.default_rng(0).standard_normal(16_000)).astype(np.int16),
    ):
        frame_TF, window_F = measure(wave_S)
        assert not (frame_TF[:, 2] > 0).sum() >= 10
        np.testing.assert_array_equal(np.isnan(window_F), f0)
    frame_TF, window_F = measure(voice(15_999))
    assert len(frame_TF) == 99 and np.isfinite(frame_TF[:, 0]).sum() >= 98 and np.isnan(window_F).all()
    for samples in (0, 159, 1_599):
        frame_TF, window_F = measure(voice(samples))
        assert len(frame_TF) == samples // 160 and np.isnan(frame_TF).all() and np.isnan(window_F).all()
