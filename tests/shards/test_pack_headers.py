"""Promises of pass 1: the true length from as few bytes as the format allows; no file is lost to a failing store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faulty_store import FaultyStore
from object_store import ObjectStore
from test_pack_long import coded
from trees import members, noise, write_tree

from cpcscale import audio, storage
from cpcscale.audio import mp3
from cpcscale.errors import UserError
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing import fetch
from cpcscale.shards.packing.headers import read_headers
from cpcscale.shards.packing.sources import AudioFile
from cpcscale.storage import StorageConfig

# By what is read beside the first 64 KB: Ogg's length stands in its last page, that of an MP3 in its first frame.
NEEDS = {
    "WAV/PCM_16": 0,
    "FLAC/PCM_16": 0,
    "AIFF/PCM_16": 0,
    "AU/PCM_16": 0,
    "NIST/PCM_16": 0,
    "OGG/VORBIS": 2,
    "OGG/OPUS": 2,
    "MP3/MPEG_LAYER_III": 1,
}
IMPATIENT = StorageConfig(total_timeout_s=0.3, backoff_base_s=0.01, backoff_cap_s=0.1)
SUFFIXES = {"NIST": "sph", "OGG": "ogg"}


def at_store(s3: ObjectStore, folder: Path, form: str, data: bytes) -> AudioFile:
    kind = form.partition("/")[0]
    name = f"a.{SUFFIXES.get(kind, kind.lower())}"
    url = storage.join(s3.base, folder.name, name)
    storage.write(url, data)
    return AudioFile(url, name, name, "")


@pytest.mark.parametrize("form", NEEDS)
def test_a_large_file_on_a_store_is_probed_by_its_ends_alone(s3, tmp_path, form):
    data = coded(form, noise(120), 16_000)
    source = at_store(s3, tmp_path, form, data)
    before = storage.counters()
    probed = read_headers([source])
    read = storage.counters() - before
    assert probed.left_out == []
    assert probed.samples.tolist() == [audio.read_header(data).length]
    # Ogg's last page may lie across two chunks, and a search begins one before it.
    assert read.bytes_read <= (1 + NEEDS[form]) * fetch.HEADER_BYTES
    assert read.bytes_read < len(data) / 2
    assert read.requests <= 2 + NEEDS[form]


def test_a_small_file_on_a_store_is_one_request(s3, tmp_path):
    source = at_store(s3, tmp_path, "FLAC/PCM_16", coded("FLAC/PCM_16", noise(1)))
    before = storage.counters()
    assert read_headers([source]).samples.tolist() == [16_000]
    assert (storage.counters() - before).requests == 1


def test_an_empty_or_broken_object_is_left_out_with_its_cause(s3, tmp_path):
    rows = [at_store(s3, tmp_path / f"{n}", "WAV/PCM_16", data) for n, data in enumerate((b"", b"x" * 200_000))]
    probed = read_headers(rows)
    assert probed.samples.tolist() == [-1, -1]
    assert [row["cause"] for row in probed.left_out] == ["empty", "unreadable"]


@pytest.mark.parametrize("form", NEEDS)
@pytest.mark.parametrize("chunk_bytes", [1000, fetch.HEADER_BYTES])
def test_a_streamed_object_is_the_file(s3, tmp_path, form, chunk_bytes):
    data = coded(form, noise(9), 16_000)
    source = at_store(s3, tmp_path, form, data)
    with fetch.opened(source.path, chunk_bytes) as file:
        np.testing.assert_array_equal(np.concatenate(list(audio.decode_blocks(file))), audio.decode(data))


def test_a_store_that_fails_stops_the_pack_and_no_file_is_called_broken(tmp_path, faulty_s3: FaultyStore):
    root = storage.join(faulty_s3.base, "audio")
    for name in ("a.wav", "b.wav"):
        storage.write(storage.join(root, name), audio.encode(noise(9), "wav"))
    storage.configure(IMPATIENT)
    faulty_s3.fail("unavailable", method="GET", path="b.wav")
    with pytest.raises(UserError, match=r"b\.wav cannot be read or written, \d+ tries") as caught:
        pack(root, str(tmp_path / "shards"), PackConfig(max_s=5.0))
    assert not isinstance(caught.value, audio.AudioError)
    assert not list(tmp_path.iterdir())
    faulty_s3.heal()
    packed = pack(root, str(tmp_path / "shards"), PackConfig(max_s=5.0))
    assert packed.quarantine == []
    assert len(members(packed)) == 4


def test_a_request_that_fails_while_libsndfile_reads_is_not_the_end_of_the_file(faulty_s3: FaultyStore):
    url = storage.join(faulty_s3.base, "a.flac")
    storage.write(url, audio.encode(noise(9), "flac"))
    storage.configure(IMPATIENT)
    with pytest.raises(UserError, match="cannot be read or written") as caught, fetch.opened(url, 20_000) as file:
        faulty_s3.fail("unavailable", method="GET")
        list(audio.decode_blocks(file))
    assert not isinstance(caught.value, audio.AudioError)


def untagged(data: bytes) -> bytes:
    """An MP3 without its first frame, which holds the length."""
    second = data.find(data[:2], 4)
    return data[second:]


def constant(frames: int) -> bytes:
    """MPEG-2 layer III of 64 kbit/s at 16 kHz, without any frame that gives a length: silence, 36 ms a frame."""
    return (b"\xff\xf3\x88\xc0" + bytes(284)) * frames


def test_an_mp3_whose_length_is_a_guess_is_left_out_not_cut_short(tmp_path):
    loud, silence = noise(20)[:160_000], np.zeros(160_000, np.int16)
    data = coded("MP3/MPEG_LAYER_III", np.concatenate([silence, loud]))
    ends_low = coded("MP3/MPEG_LAYER_III", np.concatenate([loud, silence]))
    files = {"tagged.mp3": data, "too_long.mp3": untagged(data), "with_id3.mp3": id3() + data}
    root = write_tree(tmp_path / "audio", {**files, "too_short.mp3": untagged(ends_low)})
    packed = pack(str(root), str(tmp_path / "shards"), PackConfig())
    # By the rate of its first frames, libsndfile takes one for 48 s and the other one for 10 s; it reads no further.
    assert sorted(members(packed)) == ["tagged", "too_long", "with_id3"]
    seconds = packed.splits["train"].duration_s
    assert seconds == pytest.approx(3 * 20, abs=0.2)
    [row] = packed.quarantine
    assert (row["path"], row["cause"]) == ("too_short.mp3", "longer")
    assert float(row["seconds"]) == pytest.approx(20.1, abs=0.1)
    assert "20.1 s by its frames" in row["why"]


def id3() -> bytes:
    """An ID3v2 tag of 300 bytes, among them what reads as the head of a frame."""
    return b"ID3\x04\x00\x00" + bytes([0, 0, 2, 44]) + b"\xff\xf3\x88\xc0" + bytes(296)


def test_an_mp3_of_constant_bit_rate_needs_no_length(tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(id3() + constant(500) + b"TAG" + bytes(125))
    with path.open("rb") as file:
        assert mp3.read_frames(file) == mp3.Frames(500, 576, stated=None, cut=False)
    [samples] = read_headers([AudioFile(str(path), "a.mp3", "a", "")]).samples
    assert abs(samples - 500 * 576) <= 4 * 576


def test_frames_are_counted_through_garbage_and_a_cut_end(tmp_path):
    path = tmp_path / "a.mp3"
    for data, frames, cut in (
        (constant(3) + b"\xff\x00garbage\xff" + constant(2), 5, False),
        (constant(3000)[:-100], 2999, True),
        (b"", 0, False),
        (b"\xff", 0, False),
    ):
        path.write_bytes(data)
        with path.open("rb") as file:
            found = mp3.read_frames(file)
        assert (found.count, found.cut) == (frames, cut)
