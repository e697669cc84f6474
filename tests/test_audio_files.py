"""Promises of the audio door: what a file is goes by its content, and no audio of it is lost without a word."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import noise

from cpcscale import audio
from cpcscale.audio import AudioError
from cpcscale.audio import samples as audio_samples

FORMS = {
    "wav": ("WAV", "PCM_16"),
    "float": ("WAV", "FLOAT"),
    "adpcm": ("WAV", "IMA_ADPCM"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "sphere": ("NIST", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "alac": ("CAF", "ALAC_16"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def coded(form: str, seconds: float, seed: int = 0, rate_hz: int = 16_000) -> bytes:
    out = io.BytesIO()
    kind, subtype = FORMS[form]
    wave = noise(seconds * rate_hz / 16_000, seed) / (32768 if subtype == "FLOAT" else 1)
    soundfile.write(
        out, wave.astype(np.float32 if subtype == "FLOAT" else np.int16), rate_hz, format=kind, subtype=subtype
    )
    return out.getvalue()


# The header of a SPHERE file as LDC's corpora have it, and some bytes.
SHORTENED = (
    b"NIST_1A\n   1024\nsample_count -i 99\nsample_n_bytes -i 2\nchannel_count -i 1\nsample_byte_format -s2 01\n"
    b"sample_rate -i 16000\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
).ljust(1024) + b"ajkg\x02" * 50


def untagged(mp3: bytes) -> bytes:
    """An MP3 without its first frame, which states the length."""
    return mp3[mp3.find(mp3[:2], 4) :]


def cause(data: bytes) -> str:
    """Why the audio is refused; empty if it is taken."""
    try:
        audio.decode_checked(data)
    except AudioError as error:
        assert "\n" not in str(error)
        return error.cause
    return ""


WHOLE = {form: coded(form, 1.5) for form in FORMS}
OTHER = {form: coded(form, 0.8, 1) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_file_is_taken_whole_by_path_and_by_content(form, tmp_path):
    info, wave = audio.decode_checked(WHOLE[form])
    assert len(wave) == pytest.approx(24_000, abs=410) and info.length == len(wave)
    path = tmp_path / "a.txt"
    path.write_bytes(WHOLE[form])
    np.testing.assert_array_equal(audio.decode_checked(str(path))[1], wave)
    audio.check_slices(WHOLE[form], audio.to_int16(wave))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(form):
    data, (_, whole) = WHOLE[form], audio.decode_checked(WHOLE[form])

    @settings(deadline=None)
    @given(st.integers(1, len(data) - 1))
    def check(end: int) -> None:
        try:
            _, wave = audio.decode_checked(data[:end])
        except AudioError:
            return
        # Only padding and what is no audio was cut; an Ogg file may end at any page, if none is broken.
        at_page = form in ("vorbis", "opus") and data[end : end + 4] == b"OggS"
        assert len(wave) >= len(whole) - 2 or at_page

    check()
    assert cause(data[: len(data) // 2]) in ("cut", "unreadable", "empty")


@pytest.mark.parametrize("form", ["wav", "float", "rf64", "w64", "aiff", "au", "sphere", "vorbis", "opus", "mp3"])
def test_half_a_file_is_called_cut_with_the_seconds_that_are_there(form):
    with pytest.raises(AudioError) as caught:
        whole = coded(form, 12.0)
        audio.decode_checked(whole[: len(whole) // 2])
    assert caught.value.cause == "cut"
    assert caught.value.seconds == pytest.approx(6.0, abs=1.2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("again", [False, True])
def test_two_files_in_one_are_refused_or_give_all_of_both(form, again):
    second = WHOLE[form] if again else OTHER[form]
    both = WHOLE[form] + second
    assert cause(both) in ("longer", "unreadable")


def test_an_mp3_is_as_long_as_its_frames_whatever_its_first_frame_states():
    data = bytearray(coded("mp3", 6.0))
    at = data.find(b"Xing") + 8
    assert cause(bytes(data)) == ""
    for frames, expected in ((20, "longer"), (0, "longer"), (10_000, "cut")):
        data[at : at + 4] = struct.pack(">I", frames)
        assert cause(bytes(data)) == expected
        # What it is goes by how it decodes, not by its first bytes.
        assert cause(bytes(3) + bytes(data)) in (expected, "unreadable")
    assert cause(untagged(WHOLE["mp3"])[:-50]) == "cut"


def test_tags_and_padding_around_an_mp3_are_not_frames_of_it():
    picture = b"ID3\x04\x00\x00" + bytes([0, 0, 4, 0]) + (b"\xff\xf3\x88\xc0" + bytes(28)) * 16
    plain = audio.decode(WHOLE["mp3"])
    for data in (
        picture + WHOLE["mp3"],
        picture + picture + WHOLE["mp3"],
        WHOLE["mp3"] + b"TAG" + bytes(125),
        WHOLE["mp3"] + bytes(5000),
    ):
        assert len(audio.decode_checked(data)[1]) == len(plain)


def piped(data: bytes, stated: int) -> bytes:
    """A WAV as a program writes it that cannot know its length."""
    at = data.find(b"data") + 4
    return data[:at] + struct.pack("<I", stated) + data[at + 4 :]


@pytest.mark.parametrize("stated", [0, 0xFFFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_a_wav_written_to_a_pipe_is_read_to_its_end(stated, rate_hz):
    whole = coded("wav", 1.5, rate_hz=rate_hz)
    data, wave = piped(whole, stated), audio.decode(whole)
    np.testing.assert_array_equal(audio.decode_checked(data)[1], wave)
    np.testing.assert_array_equal(audio.decode_slice(data, 9_000, 8_000), audio.to_int16(wave)[9_000:17_000])
    assert audio.read_header(data).length == len(wave)


def test_an_au_written_to_a_pipe_is_read_to_its_end():
    for stated in (0, 0xFFFFFFFF):
        data = WHOLE["au"][:8] + struct.pack(">I", stated) + WHOLE["au"][12:]
        np.testing.assert_array_equal(audio.decode_checked(data)[1], audio.decode(WHOLE["au"]))


def test_chunks_behind_the_audio_are_no_audio():
    note = b"LIST" + struct.pack("<I", 12) + b"INFOICMT\x00\x00\x00\x00"
    assert cause(WHOLE["wav"] + note) == ""
    assert cause(WHOLE["wav"] + b"\x00") == ""
    assert cause(WHOLE["wav"] + bytes(4096)) == ""
    assert cause(coded("wav", 0.00625 * 101)) == ""


def test_a_recorder_that_died_before_it_wrote_the_length_loses_nothing_in_silence():
    at = WHOLE["wav"].find(b"data") + 4
    data = WHOLE["wav"][:at] + struct.pack("<I", 8_000) + WHOLE["wav"][at + 4 :]
    assert cause(data) == "longer"


@pytest.mark.parametrize("rate_hz", [1, 8, 1_999, 1_000_000])
def test_a_rate_that_no_speech_has_is_refused(rate_hz):
    data = bytearray(WHOLE["wav"])
    data[24:28] = struct.pack("<I", rate_hz)
    assert cause(bytes(data)) == "rate"
    assert audio.read_header(bytes(data), audio.SoundLimits(rate_hz=(1, 2_000_000))).rate_hz == rate_hz


def pages(ogg: bytes) -> list[bytearray]:
    found = []
    while ogg:
        segments = ogg[26]
        count = 27 + segments + sum(ogg[27 : 27 + segments])
        found.append(bytearray(ogg[:count]))
        ogg = ogg[count:]
    return found


def joined(ogg: list[bytearray]) -> bytes:
    """The pages as a file, each with the right checksum."""
    for page in ogg:
        page[22:26] = bytes(4)
        value = 0
        for byte in page:
            value ^= byte << 24
            for _ in range(8):
                value = (value << 1 ^ (0x104C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
        page[22:26] = value.to_bytes(4, "little")
    return b"".join(ogg)


@pytest.mark.parametrize("form", ["vorbis", "opus"])
def test_an_ogg_whose_end_is_not_certain_loses_nothing_in_silence(form):
    whole = coded(form, 5.0)
    assert joined(pages(whole)) == whole and cause(whole) == ""
    # A writer was killed, or a copy ended, between two pages.
    assert cause(joined(pages(whole)[:-1])) == "cut"
    unmarked = pages(whole)
    unmarked[-1][5] &= ~4
    assert cause(joined(unmarked)) == "cut"
    # Without a position on the last page, libsndfile ends at the page before.
    unplaced = pages(whole)
    unplaced[-1][6:14] = b"\xff" * 8
    assert cause(joined(unplaced)) == "longer"
    # Cut out of a live stream: the first position is not 0.
    live = pages(whole)
    for page in live[2:]:
        position = int.from_bytes(page[6:14], "little")
        page[6:14] = (position + 10**8 if position else 0).to_bytes(8, "little")
    assert cause(joined(live)) == "" and audio.read_header(joined(live)).length == audio.read_header(whole).length
    # A page in the middle is lost, or damaged.
    middle = len(pages(whole)) // 2
    assert cause(joined([page for at, page in enumerate(pages(whole)) if at != middle])) == "cut"
    harmed = bytearray(whole)
    at = sum(map(len, pages(whole)[:middle]))
    harmed[at + 60 : at + 90] = bytes(30)
    assert cause(bytes(harmed)) == "cut"


ID3 = b"ID3\x04\0\0\0\0\0\x64" + bytes(100)


@pytest.mark.parametrize("form", ["wav", "aiff", "au", "flac", "vorbis"])
def test_behind_an_id3_tag_a_file_is_taken_whole_or_refused(form):
    # Of the first three, libsndfile loses as many bytes at the end as the tag has.
    assert cause(ID3 + WHOLE[form]) == ("" if form == "flac" else "unreadable")
    assert cause(ID3 + WHOLE[form][: len(WHOLE[form]) // 2]) == "unreadable"
    assert cause(ID3 + WHOLE["flac"] + OTHER["flac"]) == "longer"


def test_a_tag_behind_a_flac_is_no_damage_in_any_reader():
    tagged = WHOLE["flac"] + b"TAG" + bytes(125)
    whole = audio.decode_checked(tagged)[1]
    np.testing.assert_array_equal(whole, audio.decode(WHOLE["flac"]))
    np.testing.assert_array_equal(np.concatenate(list(audio.decode_blocks(tagged))), whole)


def stereo(wave: np.ndarray, other: np.ndarray, rate_hz: int = 16_000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.stack([wave, other], axis=1).astype(np.int16), rate_hz, format="WAV")
    return out.getvalue()


@pytest.mark.parametrize("seconds", [1.5, 25.0])
def test_channels_that_cancel_each_other_are_refused_and_others_are_not(seconds):
    wave = noise(seconds)
    for other, expected in (
        (-wave, "cancelled"),
        (-0.95 * wave, "cancelled"),
        (wave, ""),
        (0 * wave, ""),
        (-0.5 * wave, ""),
        (noise(seconds, 1), ""),
    ):
        assert cause(stereo(wave, other)) == expected
        try:
            blocks = list(audio.decode_blocks(stereo(wave, other)))
        except AudioError as error:
            # Pieces of a long recording are packed before its end.
            assert error.cause == expected
        else:
            assert expected == "" and sum(map(len, blocks)) == len(wave)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_samples_that_are_opened_are_those_of_the_whole_file_or_are_refused_alike(form, monkeypatch):
    # They come from a temporary file.
    monkeypatch.setattr(audio_samples, "_IN_MEMORY", 1000)
    data = coded(form, 1.0, rate_hz=24_000)
    for given_data in (data, WHOLE[form], data[: len(data) // 2], data + data):
        expected = cause(given_data)
        try:
            with audio.open_samples(given_data) as samples:
                whole = audio.to_int16(audio.decode_checked(given_data)[1])
                np.testing.assert_array_equal(samples[:], whole)
                np.testing.assert_array_equal(samples.part(100, 4000)[50:99], whole[150:199])
                np.testing.assert_array_equal(np.concatenate(list(samples.blocks())), whole)
                assert samples.peak >= np.abs(whole / 32768.0).max() - 2**-15 and samples.part(1, 9).peak == 0
        except AudioError as error:
            assert error.cause == expected
        else:
            assert expected == ""


def test_a_link_to_a_file_that_was_not_fetched_is_a_pointer(tmp_path: Path):
    (tmp_path / "a.wav").symlink_to(".git/annex/objects/x.wav")
    with pytest.raises(AudioError, match="git annex get") as caught:
        audio.read_header(str(tmp_path / "a.wav"))
    assert caught.value.cause == "pointer"


def test_what_stands_in_the_place_of_audio_is_named():
    for data, expected, words in (
        (b"", "empty", "no bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "unreadable", "web page"),
        (b"\x1f\x8b\x08" + bytes(40), "unreadable", "unpack"),
        (b"PK\x03\x04" + bytes(40), "unreadable", "unpack"),
        (b"/annex/objects/MD5E-s5632--0123.wav\n", "pointer", "git annex get"),
        (b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "unreadable", "XML text, as a store"),
        (b'{"message": "rate limit exceeded"}', "unreadable", "JSON"),
        (bytes(3) + b"\x18ftypM4A " + bytes(40), "unreadable", "MP4 .*ffmpeg"),
        (b"\x1aE\xdf\xa3" + bytes(40), "unreadable", "WebM.*ffmpeg"),
        (b"#!AMR\n" + bytes(40), "unreadable", "AMR.*ffmpeg"),
        (b"a.wav".ljust(257, b"\0") + b"ustar\x0000" + bytes(248), "unreadable", "cpcscale index"),
        (b"\x93NUMPY" + bytes(40), "unreadable", "cannot be decoded by libsndfile .*ffmpeg"),
        (SHORTENED, "unreadable", "shorten.*sph2pipe"),
    ):
        with pytest.raises(AudioError, match=words) as caught:
            audio.decode_checked(data)
        assert caught.value.cause == expected


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a"])
def test_the_name_of_a_file_changes_nothing(name, tmp_path):
    for form in ("wav", "flac", "mp3", "opus"):
        path = tmp_path / name
        path.write_bytes(WHOLE[form])
        np.testing.assert_array_equal(audio.decode_checked(str(path))[1], audio.decode_checked(WHOLE[form])[1])


def test_a_folder_or_a_link_to_itself_is_one_line(tmp_path: Path):
    (tmp_path / "self.wav").symlink_to("self.wav")
    for path in (tmp_path, tmp_path / "self.wav", tmp_path / "none.wav"):
        with pytest.raises(AudioError) as caught:
            audio.read_header(str(path))
        assert caught.value.cause == "unreadable"


def refused(wave: np.ndarray, **limits: float) -> str:
    try:
        audio.check_sound(wave.astype(np.float32), audio.SoundLimits(**limits))
    except AudioError as error:
        return error.cause
    return ""


def test_samples_that_cannot_be_speech_are_refused_and_speech_is_not():
    speech = noise(1.0) / np.float32(32768)
    assert refused(speech) == refused(speech * 3) == refused(speech + 0.3) == ""
    assert refused(np.zeros(1600)) == "silent"
    assert refused(speech / 65536) == "quiet"
    assert refused(speech * 32768) == "clipped"
    assert refused(np.full(1600, 0.25)) == "constant"
    assert refused(speech * 32768, clipped=1.0) == ""
    assert refused(np.full(1600, 0.25), offset=1.0) == ""


def test_slices_that_are_not_those_of_the_whole_are_found():
    wave = noise(1.0)
    data = audio.encode(wave, "flac")
    audio.check_slices(data, wave)
    with pytest.raises(AudioError) as caught:
        audio.check_slices(data, np.roll(wave, 500))
    assert caught.value.cause == "seeks"
    with pytest.raises(AudioError) as caught:
        audio.check_slices(data, np.concatenate([wave, wave]))
    assert caught.value.cause == "cut"
