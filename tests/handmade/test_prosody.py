import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcscale.errors import UserError
from cpcscale.handmade.prosody import (
    NAMES,
    choose_kind,
    count_syllables,
    feature_names,
    frame_energy,
    prosody,
    track_pitch,
)


def voice(f0_hz: np.ndarray | float, seconds: float, level: float = 0.1) -> np.ndarray:
    """A pulse train through one formant, at a pitch in Hz that may move over time."""
    samples = int(seconds * 16_000)
    phase = np.cumsum(np.broadcast_to(f0_hz, samples)) / 16_000
    pulses = np.diff(np.floor(phase), prepend=0)
    formant = np.exp(-np.arange(400) / 60) * np.sin(2 * np.pi * 500 * np.arange(400) / 16_000)
    wave_S = np.convolve(pulses, formant)[:samples]
    return (level * wave_S / np.abs(wave_S).max()).astype(np.float32)


def noise(samples: int, level: float = 0.05) -> np.ndarray:
    return (level * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


def named(wave_S: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, prosody(wave_S, "pitch").tolist(), strict=True))


def semitones(hertz: float) -> float:
    return float(12 * np.log2(hertz / 27.5))


def test_each_feature_has_a_name_of_its_own():
    assert prosody(noise(8000), "pitch").shape == (len(NAMES),) == (32,)
    assert prosody(noise(8000), "pitch").dtype == np.float32
    assert len(set(NAMES)) == len(NAMES) and feature_names("pitch") == NAMES


@settings(max_examples=20, deadline=None)
@given(st.floats(75, 420))
def test_the_pitch_of_a_steady_voice_is_found(f0_hz):
    found = named(voice(f0_hz, 0.6))
    assert found["f0_percentile_50_st"] == pytest.approx(semitones(f0_hz), abs=0.3)
    assert found["voiced_share"] > 0.8
    assert found["correlation_voiced_mean"] > 0.9


def test_a_rising_voice_rises_and_a_falling_one_falls():
    glide = np.geomspace(100, 200, 16_000)
    up, down = named(voice(glide, 1.0)), named(voice(glide[::-1], 1.0))
    # An octave a second is 0.12 semitones a frame.
    assert up["f0_slope_st_per_frame"] == pytest.approx(0.12, abs=0.02)
    assert down["f0_slope_st_per_frame"] == pytest.approx(-0.12, abs=0.02)
    assert up["f0_range_st"] == pytest.approx(0.8 * 12, abs=1)
    assert up["f0_rise_st_per_frame"] > 0.1 and down["f0_fall_st_per_frame"] < -0.1


def test_noise_and_silence_have_no_pitch_and_are_one_pause():
    for wave_S in (noise(16_000), np.zeros(16_000, np.float32)):
        found = named(wave_S)
        assert found["voiced_share"] == found["voiced_runs_per_s"] == found["syllables_per_s"] == 0
        assert all(found[name] == 0 for name in NAMES if name.startswith("f0_"))
        assert found["pause_mean_s"] == pytest.approx(1.0)
        assert found["correlation_mean"] < 0.3


def test_runs_and_pauses_are_counted_and_measured():
    gap = noise(4800, 0.001)
    found = named(np.concatenate([gap, voice(150, 0.4), gap, voice(150, 0.2), gap]))
    assert found["voiced_runs_per_s"] == pytest.approx(2 / 1.5)
    assert found["voiced_run_mean_s"] == pytest.approx(0.3, abs=0.05)
    assert found["voiced_run_deviation_s"] == pytest.approx(0.1, abs=0.03)
    assert found["pause_mean_s"] == pytest.approx(0.3, abs=0.05)
    assert found["duration_s"] == pytest.approx(1.5)


@pytest.mark.parametrize("rate", [2, 4, 6])
def test_the_beats_of_a_voice_are_its_syllables(rate):
    beat = 0.55 - 0.45 * np.cos(2 * np.pi * rate * np.arange(32_000) / 16_000)
    assert named(beat.astype(np.float32) * voice(150, 2.0))["syllables_per_s"] == pytest.approx(rate, abs=0.5)


def test_peaks_that_are_not_voiced_or_not_deep_are_no_syllables():
    energy_T = -40 + 10 * np.sin(2 * np.pi * np.arange(100) / 25)
    assert count_syllables(energy_T, np.ones(100, bool)) == 4
    assert count_syllables(energy_T, np.arange(100) < 50) == 2
    assert count_syllables(-40 + 0.05 * (energy_T + 40), np.ones(100, bool)) == 0


def test_energy_is_in_decibels_of_full_scale():
    assert frame_energy(np.ones(16_000, np.float32), 100)[50] == pytest.approx(0)
    assert frame_energy(np.full(16_000, 0.1, np.float32), 100)[50] == pytest.approx(-20, abs=1e-3)
    np.testing.assert_allclose(frame_energy(np.zeros(16_000, np.float32), 100), -90.3, atol=0.01)


def test_ten_decibels_more_are_ten_decibels_more_and_nothing_else():
    wave_S = voice(150, 1.0)
    quiet, loud = named(wave_S), named(10**0.5 * wave_S)
    levels = {f"energy_{name}_db" for name in ("mean", "percentile_10", "percentile_50", "percentile_90")}
    levels |= {"energy_voiced_mean_db"}
    for name in levels:
        assert loud[name] - quiet[name] == pytest.approx(10, abs=0.1), name
    for name in set(NAMES) - levels:
        assert loud[name] == pytest.approx(quiet[name], rel=0.05, abs=0.05), name


@pytest.mark.parametrize("samples", [1600, 1679, 1680, 1759, 16_000, 20_481])
def test_frames_of_pitch_and_energy_stand_side_by_side(samples):
    f0_T, correlation_T, voiced_T = track_pitch(noise(samples))
    assert len(f0_T) == len(correlation_T) == len(voiced_T) == len(frame_energy(noise(samples), len(f0_T)))
    assert samples // 160 - 1 <= len(f0_T) <= samples // 160
    assert ((correlation_T >= 0) & (correlation_T <= 1)).all()


@pytest.mark.parametrize(
    "wave_S",
    [noise(1600), np.ones(16_000, np.float32), np.sign(noise(4000)), voice(150, 0.1)],
    ids=["the shortest", "a constant", "full scale", "a short voice"],
)
def test_any_utterance_long_enough_gives_finite_features(wave_S):
    assert np.isfinite(prosody(wave_S, "pitch")).all()


@pytest.mark.parametrize("samples", [0, 480, 1599])
def test_an_utterance_under_a_tenth_of_a_second_is_refused(samples):
    # Not only told: on 480 samples the tracker itself would bring the process down.
    with pytest.raises(UserError, match="too short"):
        prosody(noise(samples), "pitch")
    with pytest.raises(UserError, match="too short"):
        track_pitch(noise(samples))


def test_without_opensmile_auto_is_pitch_and_egemaps_is_refused_with_its_licence(monkeypatch):
    # None in sys.modules is how Python itself says that a package cannot be imported.
    monkeypatch.setitem(sys.modules, "opensmile", None)
    assert choose_kind("auto") == choose_kind("pitch") == "pitch"
    with pytest.raises(UserError, match=r"pip install 'cpcscale\[opensmile\]'.*not for commercial use"):
        choose_kind("egemaps")


def test_a_word_that_is_no_set_is_refused():
    with pytest.raises(UserError, match=r"prosody='egemap' is not one of .*did you mean egemaps"):
        choose_kind("egemap")


def test_with_opensmile_auto_is_egemaps_and_its_licence_is_said(caplog):
    pytest.importorskip("opensmile")
    with caplog.at_level("INFO"):
        assert choose_kind("auto") == choose_kind("egemaps") == "egemaps"
    assert "not for commercial use" in caplog.text
    assert choose_kind("pitch") == "pitch"


def test_egemaps_has_88_finite_features_of_any_utterance():
    pytest.importorskip("opensmile")
    assert len(feature_names("egemaps")) == 88
    for wave_S in (voice(150, 1.0), noise(1600), np.zeros(16_000, np.float32)):
        features = prosody(wave_S, "egemaps")
        assert features.shape == (88,) and features.dtype == np.float32 and np.isfinite(features).all()
    pitch = dict(zip(feature_names("egemaps"), prosody(voice(150, 1.0), "egemaps"), strict=True))
    assert pitch["F0semitoneFrom27.5Hz_sma3nz_percentile50.0"] == pytest.approx(semitones(150), abs=0.5)
    with pytest.raises(UserError, match="too short"):
        prosody(noise(1599), "egemaps")
