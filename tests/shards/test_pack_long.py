"""Promises of long recordings: cut without loss, heard once, mixed over the shards of a group, whole on one side."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore
from trees import backwards, hidden, members, noise, promised, threads, write_tree

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack, pack_sources
from cpcscale.shards.packing.pieces import PackedFile, PackTask, cut, layout, piece_counts
from cpcscale.shards.packing.sources import AudioFile, find_audio
from cpcscale.shards.packing.write_tars import pack_task

# Shards of 4.6 s, four a group, pieces of a second.
SPEC = PackConfig(shard_mb=0.1, max_s=1.0)


def member(samples: int, pieces: int, name: str = "r") -> PackedFile:
    return PackedFile(name, AudioFile("", f"{name}.wav", name, ""), samples, pieces)


def spans(one: PackedFile) -> list[int]:
    return [one.start(piece + 1) - one.start(piece) for piece in range(one.pieces)]


def coded(form: str, wave: np.ndarray, rate_hz: int = 16_000) -> bytes:
    """`wave` [S] or [S, channels] as a file of libsndfile's `form` (format/subtype)."""
    out = io.BytesIO()
    kind, subtype = form.split("/")
    with soundfile.SoundFile(out, "w", rate_hz, 1 if wave.ndim == 1 else wave.shape[1], subtype, format=kind) as file:
        # At once, libsndfile's Vorbis encoder runs out of stack.
        for start in range(0, len(wave), 50_000):
            file.write(wave[start : start + 50_000])
    return out.getvalue()


def utterances(target: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """The metadata and audio of every member of a pack, by key, in tar order."""
    found: dict[str, tuple[dict[str, Any], bytes]] = {}
    for path in sorted(target.rglob("*.tar")):
        with tarfile.open(path) as tar:
            data = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
        for name, content in data.items():
            if not name.endswith(".json"):
                key = name.rpartition(".")[0]
                found[key] = json.loads(data[f"{key}.json"]), content
    return found


def decoded(target: Path) -> dict[str, np.ndarray]:
    """What was packed of each recording, its pieces put together again."""
    pieces: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for meta, data in utterances(target).values():
        pieces[meta["source"]].append((meta.get("start", 0), audio.to_int16(audio.decode(data))))
    return {
        name: np.concatenate([wave for _, wave in sorted(found, key=lambda one: one[0])])
        for name, found in pieces.items()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six recordings of 3 to 8 s by three speakers, and four short files."""
    waves = {f"long/{n}.flac": noise(3 + n, seed=n) for n in range(6)}
    waves |= {f"short/{n}.wav": noise(0.6, seed=10 + n) for n in range(4)}
    speakers = {name: f"s{n % 3}" for n, name in enumerate(waves)}
    return write_tree(tmp_path_factory.mktemp("long") / "audio", waves, speakers)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("long") / "shards"
    pack(str(source), str(target), SPEC)
    return target


@given(st.integers(0, 10**10), st.integers(2, 10**7))
def test_pieces_cover_the_recording_exactly_and_none_is_longer_than_asked_or_shorter_than_half(samples, most):
    pieces = int(piece_counts(np.array([samples]), most)[0])
    if pieces > 10_000:
        most, pieces = samples // 10_000 + 1, int(piece_counts(np.array([samples]), samples // 10_000 + 1)[0])
    lengths = spans(member(samples, pieces))
    assert sum(lengths) == samples
    assert member(samples, pieces).start(0) == 0
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    if samples > most:
        assert min(lengths) >= most // 2
    else:
        assert pieces == 1


def test_no_limit_cuts_nothing():
    assert piece_counts(np.array([0, 1, 10**12]), 0).tolist() == [1, 1, 1]


@given(st.integers(0, 300), st.integers(1, 12), st.integers(1, 60), st.integers(-80, 80))
def test_cutting_a_stream_gives_the_planned_pieces_whatever_its_blocks_and_end(promised_samples, pieces, block, more):
    one = member(promised_samples, min(pieces, max(1, promised_samples)))
    wave = np.arange(max(0, promised_samples + more), dtype=np.float32)
    got = list(cut((wave[start : start + block] for start in range(0, len(wave), block)), one))
    np.testing.assert_array_equal(np.concatenate([np.zeros(0), *got]), wave)
    planned = spans(one)
    # All but the last heard are as planned; the last ends early, or takes what is too much.
    assert [len(part) for part in got[:-1]] == planned[: len(got)][:-1]
    assert len(got) <= one.pieces
    if more >= 0:
        assert len(got) == one.pieces


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=12), st.integers(1, 6))
def test_a_group_gives_each_piece_to_one_shard_and_leaves_none_empty(files, wanted):
    members = tuple(member(pieces * length + pieces // 2, pieces, str(n)) for n, (pieces, length) in enumerate(files))
    total, longest = sum(one.samples for one in members), max(max(spans(one)) for one in members)
    shards = max(1, min(wanted, total // longest))
    got = layout(PackTask("", "", 0, shards, "wav", 0, 0, False, members))
    assert sorted(piece for shard in got for piece in shard) == [
        (number, piece) for number, one in enumerate(members) for piece in range(one.pieces)
    ]
    assert len(got) == shards
    assert all(got)


FORMS = ["WAV/PCM_16", "FLAC/PCM_24", "OGG/VORBIS", "MP3/MPEG_LAYER_III", "AIFF/PCM_16", "WAV/ALAW"]


@pytest.mark.parametrize(
    ("form", "rate_hz"),
    [*itertools.product(FORMS, [16_000, 44_100, 8_000]), *itertools.product(["OGG/OPUS"], [16_000, 48_000, 8_000])],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_streamed_decode_is_the_whole_decode_and_as_long_as_its_header_says(form, rate_hz, channels):
    wave = np.stack([noise(150_001 / 16_000, seed) for seed in range(channels)], axis=1)
    data = coded(form, wave, rate_hz)
    blocks = list(audio.decode_blocks(data))
    assert len(blocks) >= 3
    np.testing.assert_array_equal(np.concatenate(blocks), audio.decode(data))
    assert audio.read_header(data).length == sum(map(len, blocks))


@given(st.integers(4_000, 200_000), st.integers(1, 60_000))
def test_the_length_of_what_is_resampled_is_known_from_the_header(rate_hz, samples):
    data = coded("WAV/PCM_16", np.zeros(samples, np.int16), rate_hz)
    assert audio.read_header(data).length == len(audio.decode(data))


@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_the_pieces_of_a_recording_are_the_recording_bit_for_bit(source, tmp_path, codec):
    packed = pack(str(source), str(tmp_path), replace(SPEC, codec=codec))
    assert packed.quarantine == []
    got = decoded(tmp_path)
    assert sorted(got) == [one.name for one in find_audio(str(source))]
    for name, wave in got.items():
        np.testing.assert_array_equal(wave, audio.to_int16(audio.decode(str(source / name))))


def test_opus_pieces_keep_every_length_and_name_their_recording_and_place(source, tmp_path):
    packed = pack(str(source), str(tmp_path), replace(SPEC, codec="opus"))
    for name, wave in decoded(tmp_path).items():
        assert len(wave) == audio.read_header(str(source / name)).length
    rows = packed.splits["train"].utterances.to_pylist()
    assert {row["recording"] for row in rows} == {one.name for one in find_audio(str(source))}
    whole = [row for row in rows if row["recording"].startswith("short/")]
    assert sorted(row["key"] for row in whole) == [f"short/{n}" for n in range(4)]
    cut_up = sorted(row["key"] for row in rows if row["recording"] == "long/0.flac")
    assert cut_up == ["long/0/00000", "long/0/00001", "long/0/00002"]


def test_a_recording_of_another_rate_is_resampled_as_one_stream_and_then_cut(tmp_path):
    wave = noise(9, seed=3)
    write_tree(tmp_path / "audio", {"a.flac": coded("FLAC/PCM_16", np.stack([wave, wave[::-1]], axis=1), 44_100)})
    pack(str(tmp_path / "audio"), str(tmp_path / "shards"), SPEC)
    whole = audio.to_int16(audio.decode(str(tmp_path / "audio" / "a.flac")))
    np.testing.assert_array_equal(decoded(tmp_path / "shards")["a.flac"], whole)


@pytest.mark.parametrize("run", [backwards, threads])
def test_the_order_of_the_work_changes_no_byte(source, undisturbed, tmp_path, run):
    files = list(find_audio(str(source)))
    pack_sources(files[::-1], str(tmp_path), SPEC, run)
    assert promised(tmp_path) == promised(undisturbed)


def test_recordings_are_mixed_over_the_shards_of_their_group(undisturbed):
    index = Index.load(str(undisturbed / "train"))
    table = Path(undisturbed / "assignment.parquet")
    assert table.exists()
    assert index.shards.num_rows >= 6
    mixed = 0
    for shard in range(index.shards.num_rows):
        rows = index.rows(shard).table
        assert rows.num_rows
        mixed += len(set(rows["recording"].to_pylist())) > 1
        assert index.shards["samples"][shard].as_py() <= 2 * 4.7 * audio.RATE_HZ
    assert mixed >= index.shards.num_rows - 1
    keys = [key for key in index.utterances["key"].to_pylist() if key.startswith("long/5/")]
    assert keys != sorted(keys)


def test_a_corpus_of_whole_files_is_packed_as_if_nothing_were_ever_cut(source, tmp_path):
    for name, spec in (("cut", SPEC), ("never", replace(SPEC, max_s=0.0))):
        pack(str(source / "short"), str(tmp_path / name), spec)
    tars = [
        {name: one for name, one in promised(tmp_path / name).items() if name.endswith(".tar")}
        for name in ("cut", "never")
    ]
    assert tars[0] == tars[1]


@pytest.mark.parametrize("by", ["utterance", "group"])
def test_a_recording_is_held_out_whole_or_not_at_all(source, tmp_path, by):
    packed = pack(str(source), str(tmp_path), replace(SPEC, heldout_share=0.4, heldout_by=by))
    sides = defaultdict(set)
    for split, index in packed.splits.items():
        for row in index.utterances.to_pylist():
            sides[row["recording"] if by == "utterance" else row["group"]].add(split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert {split for splits in sides.values() for split in splits} == {"train", "heldout"}
    assert len(members(packed)) == sum(3 + n for n in range(6)) + 4


def test_a_file_named_like_a_piece_gets_another_key(tmp_path):
    files = {"a.wav": noise(3, 1), "a/00001.wav": noise(0.5, 2), "b/00001.wav": noise(0.5, 3)}
    packed = pack(str(write_tree(tmp_path / "audio", files)), str(tmp_path / "shards"), SPEC)
    rows = packed.splits["train"].utterances.to_pylist()
    keys = {row["key"]: row["recording"] for row in rows}
    assert len(keys) == len(rows) == 5
    assert keys["a/00001"] == "a.wav"
    assert keys["b/00001"] == "b/00001.wav"


def quiet(start_s: float, stop_s: float, seconds: float = 5) -> np.ndarray:
    wave = noise(seconds, seed=int(start_s))
    wave[round(start_s * 16_000) : round(stop_s * 16_000)] = 0
    return wave


def overpromising_mp3() -> bytes:
    """An MP3 of 10 s by its first frame, with 6 s or so of them there."""
    data = coded("MP3/MPEG_LAYER_III", noise(10))
    return data[: len(data) * 6 // 10]


def test_each_piece_left_out_has_a_row_with_its_cause_and_the_others_are_packed(tmp_path):
    files = {
        "quiet.flac": audio.encode(quiet(1, 3), "flac"),
        "cut.flac": audio.encode(noise(8), "flac")[:120_000],
        "promises.mp3": overpromising_mp3(),
        "good.wav": noise(2.5),
    }
    root = write_tree(tmp_path / "audio", files)
    packed = pack(str(root), str(tmp_path / "shards"), SPEC)
    rows = defaultdict(list)
    for row in packed.quarantine:
        rows[row["path"]].append((row["piece"], row["cause"]))
    assert rows["quiet.flac"] == [("00001", "silent"), ("00002", "silent")]
    assert {cause for _, cause in rows["cut.flac"]} == {"unreadable"}
    assert {cause for _, cause in rows["promises.mp3"]} <= {"cut", "short"}
    assert len(rows["promises.mp3"]) >= 3
    assert "good.wav" not in rows
    assert (packed.files_left_out, packed.pieces_left_out) == (0, len(packed.quarantine))
    kept = defaultdict(list)
    for meta, data in utterances(tmp_path / "shards").values():
        kept[meta["source"]].append((meta["start"], audio.to_int16(audio.decode(data))))
    lengths = {name: audio.read_header(str(root / name)).length for name in files}
    pieces = piece_counts(np.array(list(lengths.values())), 16_000)
    assert {name: len(kept[name]) + len(rows[name]) for name in files} == dict(zip(files, pieces, strict=True))
    assert min(len(found) for found in kept.values()) >= 3
    whole = noise(8)
    for start, wave in kept["cut.flac"]:
        np.testing.assert_array_equal(wave, whole[start : start + len(wave)])


def test_what_was_left_out_is_known_after_a_restart_and_a_repair(tmp_path):
    files = {f"{n}.flac": audio.encode(quiet(n, n + 2, 9), "flac") for n in range(4)}
    root, target = write_tree(tmp_path / "audio", files), tmp_path / "shards"
    expected = pack(str(root), str(tmp_path / "undisturbed"), SPEC).quarantine
    assert len(expected) == 8

    def stopping(function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            if function is pack_task and number == 1:
                raise KeyboardInterrupt
            yield function(item)

    with pytest.raises(KeyboardInterrupt):
        pack(str(root), str(target), SPEC, stopping)
    assert pack(str(root), str(target), SPEC).quarantine == expected
    for lost in ("train/shard-000001.tar", "train/index.json"):
        (target / lost).unlink()
        assert pack(str(root), str(target), SPEC).quarantine == expected
        assert promised(target) == promised(tmp_path / "undisturbed")


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_group_that_was_stopped_between_its_shards_goes_on(source, undisturbed, tmp_path, monkeypatch, stop):
    published = []
    put = storage.publishing

    def stopping(url: str) -> Any:
        if url.endswith(".tar"):
            published.append(url)
            if len(published) > stop:
                raise KeyboardInterrupt
        return put(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publishing", stopping)
        with pytest.raises(KeyboardInterrupt):
            pack(str(source), str(tmp_path), SPEC)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert len(written) == stop
    pack(str(source), str(tmp_path), SPEC)
    assert promised(tmp_path) == promised(undisturbed)
    assert not hidden(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_shard_of_another_group_is_refused(source, undisturbed, tmp_path):
    target = tmp_path / "shards"
    pack(str(source), str(target), SPEC)
    (target / "train" / "index.json").unlink()
    last = sorted((target / "train").glob("*.tar"))[-1]
    (target / "train" / "shard-000000.tar").write_bytes(last.read_bytes())
    with pytest.raises(UserError, match="not of this pack"):
        pack(str(source), str(target), SPEC)


def test_a_recording_on_a_store_is_streamed_to_the_same_bytes(source, undisturbed, tmp_path, s3: ObjectStore):
    away, target = storage.join(s3.base, tmp_path.name, "audio"), storage.join(s3.base, tmp_path.name, "shards")
    for path in (path for path in source.rglob("*") if path.is_file()):
        storage.write(storage.join(away, path.relative_to(source).as_posix()), path.read_bytes())
    pack(away, target, SPEC, threads)
    assert promised(target) == promised(undisturbed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_s": 0.5}, "max_s=0.5"),
        ({"min_s": 3.0, "max_s": 5.0}, "at least 6.0"),
        ({"max_s": -1.0}, "max_s=-1.0"),
        ({"group_shards": 0}, "group_shards=0"),
        ({"folder_level": 0}, "folder_level=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        PackConfig(**change)
