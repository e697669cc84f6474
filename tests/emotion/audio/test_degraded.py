import csv
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_voices import recipe

from cpcscale.emotion.audio.degraded import CONDITIONS, DegradedWaves, degrade, parse_condition
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.finetune_result import combine_folds
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.ccc_intervals import ccc_change, interval, scores
from cpcscale.errors import UserError

RATE_HZ = 16_000


def speech_like(seed: int, samples: int = 8000, level: float = 2000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.rint(rng.normal(0, level, samples) * np.sin(np.arange(samples) / 900)).astype(np.int16)


def power(wave: np.ndarray) -> float:
    return float(np.square(wave.astype(np.float64)).mean())


def db(ratio: float) -> float:
    return 10 * np.log10(ratio)


@given(st.integers(0, 99), st.floats(-5, 30), st.integers(800, 20_000), st.floats(500, 3000))
def test_noise_lies_as_many_db_below_the_whole_utterance_as_asked(seed, snr_db, samples, level):
    wave = speech_like(seed, samples, level)
    noise = degrade(wave, parse_condition(f"noise{snr_db:.2f}"), seed, "u").astype(int) - wave
    assert db(power(wave) / power(noise)) == pytest.approx(snr_db, abs=0.1)


@given(st.integers(0, 99), st.floats(-30, 12))
def test_a_gain_is_exact_to_the_rounding_and_clips_at_full_scale(seed, gain_db):
    wave = speech_like(seed)
    heard = degrade(wave, parse_condition(f"gain{gain_db:.3f}"), 0, "u")
    expected = np.rint(wave * 10 ** (float(f"{gain_db:.3f}") / 20)).clip(-32768, 32767)
    assert np.abs(heard - expected).max() <= 1
    loud = degrade(np.full(100, 20_000, np.int16), parse_condition("gain+12"), 0, "u")
    assert (loud == 32767).all()


def test_the_telephone_keeps_its_band_and_nothing_beyond():
    wave = np.rint(np.random.default_rng(0).normal(0, 3000, RATE_HZ)).astype(np.int16)
    before, after = (
        np.square(np.abs(np.fft.rfft(each.astype(float))))
        for each in (wave, degrade(wave, parse_condition("telephone"), 0, "u"))
    )
    hz = np.fft.rfftfreq(len(wave), 1 / RATE_HZ)
    inside, outside = (hz > 400) & (hz < 3000), (hz < 200) | (hz > 4500)
    assert after[outside].sum() < 1e-3 * before[outside].sum()
    assert after[inside].sum() == pytest.approx(before[inside].sum(), rel=0.02)


def test_a_room_rings_on_after_the_sound_and_keeps_the_level():
    wave = np.zeros(RATE_HZ, np.int16)
    wave[:4000] = speech_like(0, 4000)
    heard = degrade(wave, parse_condition("reverb"), 0, "u")
    assert power(heard) == pytest.approx(power(wave), rel=0.01)
    tail = [power(heard[start : start + 1600]) for start in (4800, 8000, 11_200)]
    assert tail[0] > 10 * tail[1] > 100 * tail[2] > 0


def test_silence_stays_silence_and_lengths_stay(tmp_path):
    for name in CONDITIONS:
        assert not degrade(np.zeros(900, np.int16), parse_condition(name), 0, "u").any()
        heard = degrade(speech_like(1, 901), parse_condition(name), 0, "u")
        assert (heard.shape, heard.dtype) == ((901,), np.int16)


def test_what_is_drawn_follows_from_the_seed_the_kind_and_the_utterance_alone():
    wave = speech_like(3)
    for name in ("noise10", "reverb"):
        first = degrade(wave, parse_condition(name), 0, "u")
        degrade(speech_like(4, 333), parse_condition("noise0"), 5, "v")
        np.testing.assert_array_equal(degrade(wave, parse_condition(name), 0, "u"), first)
        assert (degrade(wave, parse_condition(name), 1, "u") != first).any()
        assert (degrade(wave, parse_condition(name), 0, "v") != first).any()
    loud, soft = (degrade(wave, parse_condition(name), 0, "u").astype(float) - wave for name in ("noise0", "noise20"))
    assert np.abs(loud / 10 - soft).max() <= 1  # the same noise, 20 dB apart


@pytest.mark.parametrize("name", ["noise", "gain", "noise-500", "hall", "gain3dB", ""])
def test_a_condition_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=r"give noiseN, reverb, telephone or gainN"):
        parse_condition(name)
    with pytest.raises(UserError, match="names one twice"):
        recipe("nowhere", "mfcc").__class__(test_conditions=["reverb", "reverb"])


def test_degraded_waves_are_the_same_in_any_order_in_windows_and_in_another_process(folder, tmp_path):
    settings = recipe(folder, "mfcc")
    clean = Waves.open(open_corpus(settings.corpus), settings.audio_cache)
    waves = DegradedWaves(clean, parse_condition("noise0"), 7)
    whole = [waves.whole(row) for row in range(len(waves))]
    for row in (5, 0, 35, 5):
        expected = degrade(clean.whole(row), parse_condition("noise0"), 7, clean.corpus.utterances[row].key)
        np.testing.assert_array_equal(waves[row][0], expected)
        np.testing.assert_array_equal(waves.take([3, row])[1][0], expected)
    parts = waves.with_max_s(0.1)
    assert all(len(window) == 1600 for window in parts[2])
    np.testing.assert_array_equal(parts[2][1], whole[2][800:2400])
    assert len(waves.at_least(10_000)[0][0]) == 10_000
    assert not set(waves.digests) & {*clean.digests, *DegradedWaves(clean, parse_condition("noise0"), 8).digests}
    (tmp_path / "waves").write_bytes(pickle.dumps(waves))
    text = (
        "import pickle, sys, hashlib; waves = pickle.load(open(sys.argv[1], 'rb')); "
        "print(hashlib.sha256(b''.join(waves.whole(row).tobytes() for row in reversed(range(36)))).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", text, str(tmp_path / "waves")], capture_output=True, text=True)
    assert there.stdout.strip() == sha256(b"".join(wave.tobytes() for wave in reversed(whole))).hexdigest()


@pytest.mark.parametrize(
    ("system", "head", "frozen"),
    [
        ("mean", "auto", True),
        ("functionals", "auto", True),
        ("mfcc", "attention", True),
        ("precpc", "svr", True),
        ("precpc", "attention", False),
        ("raw", "attention", True),
    ],
)
def test_a_recogniser_trained_on_clean_audio_is_tested_on_degraded(folder, checkpoint, system, head, frozen):
    base = recipe(folder, system, checkpoint if system == "precpc" else "")
    base = replace(base, head=head, svm_search=False, encoder=replace(base.encoder, frozen=frozen))
    settings = replace(base, test_conditions=["gain+0", "noise0"])
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    folds = [run_fold(settings, prepared, fold) for fold in range(3)]
    result = combine_folds(settings, prepared, folds)
    if system != "raw":
        alone = prepare(base, corpus)
        untouched = combine_folds(base, prepared, [run_fold(base, alone, fold) for fold in range(3)])
        assert (result.ccc, result.curves) == (untouched.ccc, untouched.curves)
    table = list(csv.DictReader(io.StringIO(result.predictions_csv)))
    truth, clean, same, noisy = (
        np.array([[float(row[f"{name}{end}"]) for name in PRIMITIVES] for row in table])
        for end in ("", "_hat", "_hat@gain+0", "_hat@noise0")
    )
    np.testing.assert_allclose(same, clean, atol=2e-4)
    assert (np.abs(noisy - clean).max() > 0.01) == (system != "mean")
    voices = [row["speaker"] for row in table]
    found = result.conditions["noise0"]
    assert found["ccc"] == pytest.approx(scores(truth, noisy), abs=1e-4)
    for name, bounds in interval(truth, noisy, voices).items():
        assert found["interval"][name] == pytest.approx(bounds, abs=1e-3)
    for name, value in found["change"].items():
        assert value == pytest.approx(found["ccc"][name] - result.ccc[name], abs=1e-9)
        low, high = found["change_interval"][name]
        assert low <= value <= high
    assert found["change"] == pytest.approx(ccc_change(truth, clean, noisy, voices)[0], abs=1e-4)


def test_the_change_is_the_jackknife_of_the_difference_written_out():
    rng = np.random.default_rng(0)
    truth, voices = rng.normal(0, 1, (80, 3)), np.repeat([f"voice{number}" for number in range(8)], 10)
    before, after = truth + rng.normal(0, 0.5, truth.shape), truth + rng.normal(0, 2, truth.shape)
    difference, bounds = ccc_change(truth, before, after, list(voices))
    assert difference["mean"] == pytest.approx(scores(truth, after)["mean"] - scores(truth, before)["mean"])
    left_out = [
        scores(truth[rest], after[rest])["mean"] - scores(truth[rest], before[rest])["mean"]
        for rest in (voices != name for name in np.unique(voices))
    ]
    error = np.sqrt(7 / 8 * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert bounds is not None
    assert bounds["mean"] == pytest.approx([difference["mean"] + sign * 2.364624 * error for sign in (-1, 1)], rel=1e-5)
    assert ccc_change(truth[:50], before[:50], after[:50], list(voices[:50]))[1] is None
