"""Promises of the audio codec door: one rounding, slices that equal the whole, and errors that name their cause."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from trees import noise

from cpcscale import audio
from cpcscale.audio import AudioError

SPEECH = Path(__file__).parent / "data" / "speech" / "asterisk_en" / "auth-incorrect.opus"
waves = npst.arrays(np.int16, st.integers(1, 4000), elements=st.integers(-32768, 32767))


def written(wave: np.ndarray, rate_hz: int = audio.RATE_HZ, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate_hz, format=form, subtype=subtype)
    return out.getvalue()


def refusal(action, cause: str) -> str:
    with pytest.raises(AudioError) as caught:
        action()
    assert caught.value.cause == cause
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(waves)
@example(np.array([-32768, 32767, -1, 0, 1], np.int16))
def test_a_16_bit_source_survives_bit_for_bit(wave):
    for codec in ("wav", "flac"):
        np.testing.assert_array_equal(audio.to_int16(audio.decode(audio.encode(wave, codec))), wave)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1))
@example([1.0, -1.0, 0.5 / 32768, 1.5 / 32768, -0.5 / 32768, 2.0, -2.0])
def test_the_rounding_is_to_the_nearest_step_ties_to_even_and_clipped(values):
    wave = np.array(values, np.float32)
    expected = [max(-32768, min(32767, round(float(value) * 32768))) for value in wave]
    np.testing.assert_array_equal(audio.to_int16(wave), expected)
    np.testing.assert_array_equal(audio.to_int16(wave.astype(np.float64)), expected)


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_a_slice_equals_the_same_place_of_the_whole(codec):
    wave = noise(3)
    data = audio.encode(wave, codec)

    @given(st.integers(0, len(wave) - 1), st.integers(1, len(wave)))
    @example(0, len(wave))
    @example(len(wave) - 1, 1)
    def check(start: int, count: int) -> None:
        count = min(count, len(wave) - start)
        got = audio.decode_slice(data, start, count)
        assert got.dtype == np.int16
        np.testing.assert_array_equal(got, wave[start : start + count])

    check()


@pytest.mark.parametrize("seconds", [0.1, 0.2, 1.0, 3.00006, 7.3])
def test_opus_keeps_every_length_and_its_slices_are_exact_in_length_and_place(seconds):
    wave = audio.to_int16(audio.decode(str(SPEECH)))
    wave = np.resize(wave, round(seconds * audio.RATE_HZ))
    data = audio.encode(wave, "opus")
    assert audio.read_header(data).samples == len(wave)
    whole = audio.to_int16(audio.decode(data))
    assert len(whole) == len(wave)
    for share in (0.0, 0.21, 0.5, 0.99):
        start = int(share * len(wave))
        for count in (1, len(wave) - start):
            got = audio.decode_slice(data, start, count)
            assert len(got) == count
            assert np.abs(got.astype(int) - whole[start : start + count]).max() <= 200


def test_opus_of_speech_is_that_speech_in_the_same_place():
    wave = audio.to_int16(audio.decode(str(SPEECH)))
    whole = audio.to_int16(audio.decode(audio.encode(wave, "opus")))
    error = (whole.astype(float) - wave).var() / wave.astype(float).var()
    assert error < 0.02
    assert (np.roll(whole, 1).astype(float) - wave).var() / wave.astype(float).var() > 2 * error


@pytest.mark.parametrize("codec", audio.CODECS)
def test_the_same_signal_gives_the_same_bytes(codec):
    wave = noise(2)
    assert audio.encode(wave, codec) == audio.encode(wave, codec)


def test_opus_made_reproducible_is_still_valid_ogg():
    # libsndfile checks the pages' checksums: one that is wrong loses its page.
    data = audio.encode(noise(5), "opus")
    pages = data.split(b"OggS")[1:]
    assert len(pages) > 2
    assert {page[10:14] for page in pages} == {bytes(4)}
    broken = bytearray(data)
    broken[broken.rindex(b"OggS") + 22] ^= 1
    assert audio.read_header(data).samples == 80_000
    assert audio.read_header(bytes(broken)).samples < 80_000


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
def test_another_rate_and_stereo_become_the_resampled_mean(rate_hz):
    time_s = np.arange(2 * rate_hz) / rate_hz
    left, right = 0.5 * np.sin(2 * np.pi * 440 * time_s), 0.25 * np.sin(2 * np.pi * 1000 * time_s)
    got = audio.decode(written(np.stack([left, right], axis=1), rate_hz, subtype="FLOAT"))
    assert got.dtype == np.float32
    assert len(got) == 32_000
    at_16k = np.arange(32_000) / audio.RATE_HZ
    expected = 0.25 * np.sin(2 * np.pi * 440 * at_16k) + 0.125 * np.sin(2 * np.pi * 1000 * at_16k)
    # The edges ring.
    assert np.abs(got - expected)[200:-200].max() < 1e-3
    mean = ((left + right) / 2).astype(np.float32)
    np.testing.assert_allclose(got, soxr.resample(mean, rate_hz, audio.RATE_HZ), atol=1e-6)


def test_a_tone_above_the_new_rate_is_gone_and_not_folded_back():
    tone = np.sin(2 * np.pi * 11_000 * np.arange(96_000) / 48_000).astype(np.float32)
    assert np.abs(audio.decode(written(tone, 48_000, subtype="FLOAT"))[500:-500]).max() < 1e-3


def test_path_and_bytes_give_the_same(tmp_path):
    data = audio.encode(noise(1), "flac")
    (tmp_path / "x.flac").write_bytes(data)
    assert audio.read_header(str(tmp_path / "x.flac")) == audio.read_header(data) == audio.AudioInfo(16_000, 16_000, 1)
    np.testing.assert_array_equal(audio.decode(str(tmp_path / "x.flac")), audio.decode(data))


def test_probing_gives_the_files_own_rate_and_channels():
    info = audio.read_header(written(np.zeros((4410, 2), np.int16), 44_100))
    assert (info.samples, info.rate_hz, info.channels, info.duration_s) == (4410, 44_100, 2, 0.1)


@pytest.mark.parametrize("data", [b"hello " * 100, written(noise(0.1))[:30], b"fLaC" + bytes(100)])
def test_bytes_that_are_not_audio_are_unreadable(data):
    for action in (audio.read_header, audio.decode):
        message = refusal(lambda action=action: action(data), "unreadable")
        assert "0x" not in message, "an address makes two runs' quarantine tables differ"
    refusal(lambda: audio.decode_slice(data, 0, 10), "unreadable")


def test_a_file_that_is_not_there_is_unreadable_and_named(tmp_path):
    for action in (audio.read_header, audio.decode):
        assert "absent.wav" in refusal(lambda action=action: action(str(tmp_path / "absent.wav")), "unreadable")


def test_a_name_that_is_not_utf_8_is_unreadable_in_words_that_are():
    for action in (audio.read_header, audio.decode):
        refusal(lambda action=action: action("caf\udce9.wav"), "unreadable").encode()


@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU"])
def test_a_file_without_samples_is_empty(form):
    data = written(np.zeros(0, np.int16), form=form)
    for action in (audio.read_header, audio.decode):
        refusal(lambda action=action: action(data), "empty")


def with_claimed_samples(flac: bytes, samples: int) -> bytes:
    """A FLAC whose header claims another number of samples (a 36-bit field; 0 is what an encoder writes to a pipe)."""
    data = bytearray(flac)
    data[21] = (data[21] & 0xF0) | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("samples", [0, 16_001, 2**31, 2**35, 2**36 - 1])
def test_a_header_that_claims_what_is_not_there_is_unreadable_not_an_allocation(samples):
    data = with_claimed_samples(audio.encode(noise(1), "flac"), samples)
    refusal(lambda: audio.decode(data), "unreadable")
    if not 0 < samples < 2**31:
        refusal(lambda: audio.read_header(data), "unreadable")


def test_a_cut_flac_is_unreadable():
    data = audio.encode(noise(1), "flac")
    for share in (0.2, 0.5, 0.9):
        refusal(lambda share=share: audio.decode(data[: int(len(data) * share)]), "unreadable")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_unreadable(value):
    wave = np.zeros(1000, np.float32)
    wave[500] = value
    refusal(lambda: audio.decode(written(wave, subtype="FLOAT")), "unreadable")


@pytest.mark.parametrize("codec", audio.CODECS)
@pytest.mark.parametrize(("start", "count"), [(0, 16_001), (15_999, 2), (16_000, 1), (20_000, 5)])
def test_a_slice_past_the_end_is_cut_and_never_short(codec, start, count):
    data = audio.encode(noise(1), codec)
    assert f"ends at sample {max(16_000, start)}" in refusal(lambda: audio.decode_slice(data, start, count), "cut")


@pytest.mark.parametrize(
    "written_as",
    [
        {"rate_hz": 8_000},
        {"rate_hz": 44_100},
        {"rate_hz": 44_100, "form": "OGG", "subtype": "VORBIS"},
        {"rate_hz": 44_100, "form": "MP3", "subtype": "MPEG_LAYER_III"},
        {"channels": 2},
        {"channels": 2, "rate_hz": 48_000, "form": "FLAC", "subtype": "PCM_24"},
        {"form": "FLAC", "subtype": "PCM_24"},
        {"subtype": "PCM_24"},
        {"subtype": "FLOAT"},
        {"form": "AIFF"},
    ],
    ids=lambda values: " ".join(str(value) for value in values.values()),
)
def test_a_slice_of_any_format_is_that_of_the_whole(written_as):
    wave = np.repeat(noise(2)[:, None], written_as.get("channels", 1), axis=1)
    wave[:, 0] //= 2
    kept = {name: value for name, value in written_as.items() if name != "channels"}
    data = written(wave, **{"rate_hz": 16_000, **kept})
    whole = audio.to_int16(audio.decode(data))
    for start, count in ((0, len(whole)), (100, 5000), (len(whole) - 7, 7)):
        out = np.zeros(count, np.int16)
        got = audio.decode_slice(data, start, count, out)
        assert got is out
        np.testing.assert_array_equal(got, whole[start : start + count])


def test_a_wav_with_other_chunks_or_a_header_that_claims_more_is_read_as_libsndfile_does():
    wave = noise(1)
    plain = written(wave)
    listed = plain[:12] + plain[12:36] + b"LIST" + (5).to_bytes(4, "little") + b"abcde\0" + plain[36:]
    np.testing.assert_array_equal(audio.decode_slice(listed, 3, 500), wave[3:503])
    short = plain[:-1000]
    np.testing.assert_array_equal(audio.decode_slice(short, 3, 500), wave[3:503])
    assert "ends at sample 15500" in refusal(lambda: audio.decode_slice(short, 0, 16_000), "cut")
    assert len(audio.decode(short)) == 15_500


def test_slices_are_the_same_in_many_threads_at_once():
    clips = [written(noise(0.2 + 0.1 * n, seed=n), form="FLAC") for n in range(8)]
    expected = [audio.decode_slice(clip, 100, 2000) for clip in clips]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            got = list(pool.map(lambda clip: audio.decode_slice(clip, 100, 2000), clips))
            np.testing.assert_array_equal(got, expected)


def test_an_audio_error_survives_pickling():
    error = pickle.loads(pickle.dumps(AudioError("silent", "every sample is zero")))  # noqa: S301
    assert (type(error), error.cause, str(error)) == (AudioError, "silent", "every sample is zero")
