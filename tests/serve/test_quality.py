"""What audio is like to a recogniser: noise and hum are refused, speech is not, and what may be doubted is flagged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from speech import AUDIO

from cpcscale import audio
from cpcscale.emotion.audio.degraded import degrade, parse_condition
from cpcscale.released import folder, names
from cpcscale.serve.quality import Quality, QualityMeter
from cpcscale.serve.voice import FRAME, VoiceActivity

ROOT = Path(__file__).parents[2]
RATE = audio.RATE_HZ
TIME_S = np.arange(3 * RATE) / RATE
FILES = sorted(AUDIO.glob("*/*.opus"))[::80]


def quality(wave) -> Quality:
    meter = QualityMeter()
    wave_S = np.asarray(wave, np.float32)
    meter.add(audio.to_int16(wave_S))
    return meter.quality(float(np.abs(wave_S).max()))


def tones(*hz: float) -> np.ndarray:
    return sum(np.sin(2 * np.pi * each * TIME_S) for each in hz) / len(hz)


def noise(slope: float) -> np.ndarray:
    """Noise whose power falls with 1 / f ** slope."""
    hz = np.fft.rfftfreq(len(TIME_S), 1 / RATE)
    rng = np.random.default_rng(1)
    spectrum = (rng.normal(size=len(hz)) + 1j * rng.normal(size=len(hz))) / np.maximum(hz, 20) ** (slope / 2)
    wave = np.fft.irfft(spectrum * (hz > 20))
    return wave / wave.std() / 3


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [audio.to_int16(audio.decode(str(file))) for file in FILES]


def degraded(wave_S: np.ndarray, change: str) -> Quality:
    return quality(degrade(wave_S, parse_condition(change), 0, "") / np.float32(32768))


def test_speech_has_no_flags_and_no_reason(speech):
    found = [quality(wave_S / np.float32(32768)) for wave_S in speech]
    assert {(one.flags, one.reason) for one in found} == {((), "")}
    assert min(one.speech_share for one in found) > 0.6


@pytest.mark.parametrize("level_db", [-50, -30, -10])
@pytest.mark.parametrize(
    "wave",
    [noise(0), noise(1), tones(50), tones(50, 150, 250), tones(1000), tones(261.6, 329.6, 392.0), 0.2 + noise(0) / 9],
    ids=["white", "pink", "hum", "mains", "tone", "chord", "offset"],
)
@pytest.mark.parametrize("seconds", [0.1, 3])
def test_a_level_that_stays_the_same_without_speech_is_refused(wave, level_db, seconds):
    assert quality(wave[: round(seconds * RATE)] * 10 ** (level_db / 20)) == Quality(0.0, (), "no_speech")


def test_what_the_detector_does_not_know_keeps_its_value_if_its_level_changes():
    """As sobs do, and beats, and noise that comes and goes."""
    swelling = noise(1) * (1 + 0.9 * np.sin(2 * np.pi * 3 * TIME_S))
    assert quality(swelling / 9) == Quality(0.0, ("non_speech",))
    beeps = tones(440) * (TIME_S % 1 < 0.3) / 9
    assert quality(beeps).reason == "" and "non_speech" in quality(beeps).flags
    with_a_pause = np.concatenate([np.zeros(RATE), noise(0) / 9])
    assert quality(with_a_pause) == Quality(0.0, ("non_speech",))


def test_a_recording_of_monkeys_is_flagged_and_keeps_its_value():
    assert quality(audio.decode(str(AUDIO / "asterisk_en" / "tt-monkeys.opus"))).flags == ("non_speech", "bandwidth")


def test_speech_in_much_else_is_non_speech(speech):
    short = speech[0][: 2 * RATE] / np.float32(32768)
    assert quality(np.concatenate([short, noise(0) / 99])).flags == ()
    long = quality(np.concatenate([short, np.tile(noise(0) / 99, 6)]))
    assert long.flags == ("non_speech",) and 0.02 < long.speech_share < 0.2


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ("gain-24", {"level"}),
        ("gain+12", {"level", "clipped"}),
        ("gain+40", {"level", "clipped"}),
        ("telephone", {"bandwidth"}),
        ("noise20", set()),
        ("reverb", set()),
    ],
)
def test_speech_that_is_changed_keeps_its_value_with_the_flags_of_the_change(speech, change, flags):
    found = [degraded(wave_S, change) for wave_S in speech]
    assert {one.reason for one in found} == {""}
    assert set().union(*(one.flags for one in found)) == flags
    assert sum(bool(one.flags) for one in found) >= len(found) * 0.7 * bool(flags)


def test_silence_and_a_constant_have_their_reasons():
    assert quality(np.zeros(RATE)).reason == "silent"
    assert quality(np.full(RATE, 1e-6)).reason == "quiet"
    assert quality(np.full(RATE, 0.1)).reason == "constant"


def test_blocks_of_any_length_give_what_the_whole_gives(speech):
    samples_S = np.concatenate(speech)[: 40 * RATE]
    whole = QualityMeter()
    whole.add(samples_S)
    for step in (300, 7919, 160_000):
        parts = QualityMeter()
        for start in range(0, len(samples_S), step):
            parts.add(samples_S[start : start + step])
        assert parts.quality() == whole.quality()
    # The detector, too, whose network remembers.
    frames_TS = samples_S[: len(samples_S) // FRAME * FRAME].reshape(-1, FRAME) / np.float32(32768)
    voice = VoiceActivity()
    by_parts = np.concatenate([voice(frames_TS[start : start + 7]) for start in range(0, len(frames_TS), 7)])
    np.testing.assert_allclose(by_parts, VoiceActivity()(frames_TS), atol=1e-6)


def test_memory_does_not_grow_with_the_audio():
    meter, block = QualityMeter(), audio.to_int16(np.float32(noise(1)))
    meter.add(block)
    tracemalloc.start()
    for _ in range(3):
        meter.add(block)
    _, few = tracemalloc.get_traced_memory()
    for _ in range(60):
        meter.add(block)
    _, many = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert many < few + 100_000


def test_the_wheel_has_the_network_with_its_licence_and_the_released_recognisers(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "cpcscale", tmp_path / "cpcscale", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        released = [f"released/{each}/{file.name}" for each in names() for file in Path(folder(each)).iterdir()]
        assert released
        for name in ("serve/silero_vad.onnx", "serve/silero_vad.LICENSE.txt", "py.typed", *released):
            assert wheel.read(f"cpcscale/{name}") == (ROOT / "cpcscale" / name).read_bytes()
