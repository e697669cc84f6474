import numpy as np
import pytest

from cpcscale.handmade.mfcc import log_mel, mfcc

FRONTENDS = (mfcc, log_mel)


def tone(samples: int, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / 16_000)).astype(np.float32)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("samples", [0, 79, 80, 159, 160, 239, 240, 400, 16_000, 16_079, 16_080, 16_159, 20_480])
def test_frames_are_the_encoders_frames(frontend, samples):
    features = frontend(tone(samples))
    assert features.shape == (samples // 160, 40)
    assert features.dtype == np.float32


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_silence_and_full_scale_give_finite_values(frontend):
    assert np.isfinite(frontend(np.zeros(16_000, np.float32))).all()
    assert np.isfinite(frontend(np.sign(tone(16_000)))).all()
    assert np.isfinite(frontend(np.zeros(160, np.float32))).all()


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_the_same_wave_gives_the_same_features(frontend):
    np.testing.assert_array_equal(frontend(tone(8000)), frontend(tone(8000)))


def test_log_mel_peaks_at_the_band_of_a_tone_and_rises_as_it_rises():
    peaks = [int(log_mel(tone(16_000, hertz))[50].argmax()) for hertz in (200, 800, 3200, 7000)]
    assert peaks == sorted(peaks) and len(set(peaks)) == 4


def test_the_number_of_coefficients_is_as_asked():
    assert mfcc(tone(16_000), 13).shape == (100, 13)
    assert log_mel(tone(16_000), 80).shape == (100, 80)


def test_ten_times_the_level_shifts_log_energies_by_ln_100():
    quiet, loud = log_mel(0.05 * tone(16_000)), log_mel(0.5 * tone(16_000))
    band = int(loud[50].argmax())
    assert loud[50, band] - quiet[50, band] == pytest.approx(np.log(100), abs=0.01)
