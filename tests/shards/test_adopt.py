"""Promises of indexing tars that others made: every member is where the index says, and nothing is left out unsaid."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from foreign import FORMS, by_hand, by_tar, by_webdataset, flac, read_back, shar, sound
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore
from trees import contents, noise, write_tree

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.adoption import read_tar
from cpcscale.shards.adoption.adopt import AdoptedSet, adopt, exclude_from
from cpcscale.shards.adoption.labels import LabelColumns
from cpcscale.shards.adoption.read_tar import IndexConfig, measure_member
from cpcscale.shards.adoption.tar_members import TarScan
from cpcscale.shards.index import Index


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def indexed(base: Path | str, **settings: Any) -> AdoptedSet:
    return adopt(str(base), IndexConfig(**settings))


def column(index: Index, name: str) -> dict[str, Any]:
    """A column by key."""
    table = index.utterances
    return dict(zip(table["key"].to_pylist(), table[name].to_pylist(), strict=True))


def left_out(base: Path) -> dict[str, str]:
    """The cause by which each member, or whole tar, is left out, from the table beside the index."""
    with (base / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["why"] for row in rows)
    return {f"{row['shard']}:{row['member']}": row["cause"] for row in rows}


# Layouts


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_a_folder_tree_that_tar_packed_is_indexed_whatever_its_format(tmp_path, form):
    long = "x" * (60 if form == "v7" else 90)
    names = [f"p{speaker}/{long}/{n}.wav" for speaker in range(3) for n in range(2)]
    names += [f"p0/{long}/{'y' * 120}.wav"] if form in ("gnu", "oldgnu", "pax") else []
    tree = write_tree(tmp_path / "tree", {name: noise(0.4, n) for n, name in enumerate(names)} | {"LICENSE": b"mine"})
    before = {name: (tree / name).read_bytes() for name in names}
    path = by_tar(tmp_path / "set" / "deep" / "a.tar", tree, f"--format={form}")
    tar_bytes = path.read_bytes()
    adopted = indexed(tmp_path / "set", group_folder=1, language="it")
    assert read_back(Index.load(str(tmp_path / "set"))) == {
        f"deep/a.tar:{name.removesuffix('.wav')}": data for name, data in before.items()
    }
    assert column(adopted.index, "group") == {name.removesuffix(".wav"): name[:2] for name in names}
    assert set(column(adopted.index, "language").values()) == {"it"}
    assert set(column(adopted.index, "rate_hz").values()) == {16_000}
    assert not left_out(tmp_path / "set")
    assert path.read_bytes() == tar_bytes


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_links_and_sparse_files_of_a_tar_are_left_out_and_said(tmp_path, form):
    tree = write_tree(tmp_path / "tree", {"a/1.wav": noise(0.4), "a/2.wav": noise(0.4, 1)})
    (tree / "a" / "3.wav").hardlink_to(tree / "a" / "2.wav")
    (tree / "a" / "4.wav").symlink_to("1.wav")
    with (tree / "a" / "5.wav").open("wb") as file:
        file.write(sound("wav", 0.4))
        file.seek(3_000_000)
        file.write(b"end")
    by_tar(tmp_path / "set" / "a.tar", tree, "-S", f"--format={form}")
    index = indexed(tmp_path / "set").index
    # Which of the two names of one file comes first, and so holds the bytes, is up to the folder.
    (kept,) = {"a/2", "a/3"} & set(column(index, "key"))
    other = {"a/2": "3", "a/3": "2"}[kept]
    assert set(read_back(index)) == {"a.tar:a/1", f"a.tar:{kept}"}
    assert left_out(tmp_path / "set") == {f"a.tar:./a/{n}.wav": "link" for n in (other, "4", "5")}


def test_names_that_lead_out_of_the_tar_are_keys_and_no_paths(tmp_path):
    names = ["../../up.flac", "/etc/abs.flac", "./here.flac", "a/../b.flac", "C:\\x.flac", "two.dots.flac"]
    by_hand(tmp_path / "deep" / "set" / "a.tar", {name: flac(seed=n) for n, name in enumerate(names)})
    index = indexed(tmp_path / "deep" / "set").index
    assert list(column(index, "key")) == ["../../up", "etc/abs", "here", "a/../b", "C:\\x", "two.dots"]
    assert len(read_back(index)) == len(names)
    assert {path.name for path in tmp_path.rglob("*.flac")} == set()
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}


def test_what_webdatasets_writer_wrote_is_indexed_with_its_json(tmp_path):
    samples = [
        {"__key__": f"{n:06d}", "flac": flac(seed=n), "json": {"speaker_id": 100 + n % 3, "lang": "fr"}, "txt": "oui"}
        for n in range(7)
    ]
    by_webdataset(tmp_path / "0.tar", samples[:4])
    by_webdataset(tmp_path / "1.tar", samples[4:])
    adopted = indexed(tmp_path)
    assert column(adopted.index, "group") == {f"{n:06d}": str(100 + n % 3) for n in range(7)}
    assert set(column(adopted.index, "language").values()) == {"fr"}
    assert adopted.origins == {"group: JSON speaker_id": 7, "language: JSON lang": 7}
    assert list(read_back(adopted.index).values()) == [sample["flac"] for sample in samples]


@pytest.mark.parametrize("first", ["json", "flac"])
def test_json_counts_wherever_it_stands_in_the_tar_and_for_each_channel_of_its_key(tmp_path, first):
    told = json.dumps({"spk": "anna"}).encode()
    members = [("s/1.left.flac", flac(seed=1)), ("s/1.right.flac", flac(seed=2)), ("s/1.json", told)]
    by_hand(tmp_path / "a.tar", members if first == "flac" else members[::-1])
    assert column(indexed(tmp_path).index, "group") == {"s/1.left": "anna", "s/1.right": "anna"}


def test_a_lhotse_shar_is_indexed_with_the_speakers_of_its_cuts(tmp_path):
    one, two, none = [("anna", "de")], [("anna", "de"), ("bert", "de")], []
    shar(tmp_path, 0, [("c0", flac(seed=0), one), ("c1", flac(seed=1), two)])
    shar(tmp_path, 1, [("c2", flac(seed=2), [("bert", "nl")] * 2), ("c3", flac(seed=3), none)])
    adopted = indexed(tmp_path)
    assert adopted.index.shards["path"].to_pylist() == ["recording.000000.tar", "recording.000001.tar"]
    groups = column(adopted.index, "group")
    assert groups == {"c0": "anna", "c1": "rec-c1", "c2": "bert", "c3": "rec-c3"}
    assert column(adopted.index, "language") == {"c0": "de", "c1": "de", "c2": "nl", "c3": ""}
    assert column(adopted.index, "recording") == {f"c{n}": f"rec-c{n}" for n in range(4)}
    assert len(read_back(adopted.index)) == 4


def test_cuts_that_are_not_compressed_count_like_those_that_are(tmp_path):
    shar(tmp_path, 0, [("c0", flac(seed=0), [("anna", "de")])])
    shar(tmp_path, 1, [("c1", flac(seed=1), [("bert", "nl")])])
    packed = tmp_path / "cuts.000001.jsonl.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert column(indexed(tmp_path).index, "group") == {"c0": "anna", "c1": "bert"}


def test_a_mixed_cut_has_the_speaker_of_its_tracks(tmp_path):
    shar(tmp_path, 0, [(f"c{n}", flac(seed=n), []) for n in range(3)])
    told = [[("anna", "de")], [("anna", "de"), ("anna", "de")], [("anna", "de"), ("bert", "de")]]
    cuts = []
    for number, speakers in enumerate(told):
        tracks = [
            {"cut": {"id": f"x{at}", "supervisions": [{"speaker": speaker, "language": language}]}, "offset": at}
            for at, (speaker, language) in enumerate(speakers)
        ]
        padding = {"cut": {"id": "p", "duration": 1.0, "type": "PaddingCut"}, "offset": 3.0}
        cuts.append({"id": f"c{number}", "tracks": [*tracks, padding], "type": "MixedCut"})
    lines = "".join(json.dumps(cut) + "\n" for cut in cuts)
    (tmp_path / "cuts.000000.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    adopted = indexed(tmp_path)
    groups = column(adopted.index, "group")
    assert groups["c0"] == groups["c1"] == "anna" and groups["c2"] not in ("anna", "bert")
    assert set(column(adopted.index, "language").values()) == {"de"}


def test_hidden_members_are_passed_over_as_hidden_files_are(tmp_path):
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(99)
    told = json.dumps({"speaker": "anna"}).encode()
    members = [("./._a.flac", double), ("./a.flac", flac()), ("./._a.json", double), ("./a.json", told)]
    by_hand(tmp_path / "a.tar", [*members, ("__MACOSX/._a.flac", double), (".Trash/b.flac", flac(seed=1))])
    adopted = indexed(tmp_path)
    assert column(adopted.index, "group") == {"a": "anna"}
    assert not adopted.left_out and not adopted.notes and adopted.account.passed_over == {"hidden": 4}


@pytest.mark.parametrize(
    ("content", "library"),
    [({"shards": [{"format": "mds"}], "version": 2}, "MosaicML"), ({"chunks": [], "config": {}}, "LitData")],
    ids=["mds", "litdata"],
)
def test_the_index_of_another_library_is_named_and_not_to_be_removed(tmp_path, content, library):
    (tmp_path / "index.json").write_text(json.dumps(content))
    told = refusal(lambda: indexed(tmp_path))
    assert library in told and "leave it there" in told and "remove" not in told


@pytest.mark.parametrize(
    "harm",
    # Without the time, which would be part of a test's name.
    [
        b"not gzip",
        gzip.compress(b"{", mtime=0),
        gzip.compress(b"[1]\n", mtime=0),
        gzip.compress(b"x" * 99, mtime=0)[:-9],
    ],
)
def test_cuts_that_cannot_be_read_are_named_and_no_index_is_made(tmp_path, harm):
    shar(tmp_path, 0, [("c0", flac(), [("anna", "de")])])
    (tmp_path / "cuts.000000.jsonl.gz").write_bytes(harm)
    assert "cuts.000000.jsonl.gz" in refusal(lambda: indexed(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_export_of_mp3_and_wav_with_json_is_indexed(tmp_path):
    members: dict[str, bytes] = {}
    for n, (suffix, rate, channels) in enumerate([("mp3", 44_100, 2), ("wav", 48_000, 2), ("mp3", 16_000, 1)]):
        members |= {f"{n}.{suffix}": sound(suffix, 1.3, rate, channels, n), f"{n}.json": b'{"client_id": "c%d"}' % n}
    by_hand(tmp_path / "a.tar", members)
    index = indexed(tmp_path).index
    assert column(index, "codec") == {"0": "mp3", "1": "wav", "2": "mp3"}
    assert column(index, "rate_hz") == {"0": 44_100, "1": 48_000, "2": 16_000}
    assert column(index, "group") == {"0": "c0", "1": "c1", "2": "c2"}
    assert len(read_back(index)) == 3


def test_a_set_that_pack_wrote_gets_the_fingerprint_that_pack_gave_it(shard_set, tmp_path):
    packed = Index.load(str(shard_set))
    for path in shard_set.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index = indexed(tmp_path).index
    assert index.fingerprint == packed.fingerprint
    assert column(index, "recording") == column(packed, "recording")
    np.testing.assert_allclose(index.wave_scale(), packed.wave_scale(), rtol=1e-9)


# Lengths and levels


@given(
    suffix=st.sampled_from(sorted(FORMS)),
    rate_hz=st.sampled_from([8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]),
    frames=st.integers(4_000, 40_000),
    channels=st.integers(1, 2),
)
def test_a_length_is_that_of_decoding_whether_or_not_the_member_is_decoded(suffix, rate_hz, frames, channels):
    if suffix == "opus":
        rate_hz = {11_025: 12_000, 22_050: 24_000, 32_000: 24_000, 44_100: 48_000}.get(rate_hz, rate_hz)
    data = sound(suffix, frames / rate_hz, rate_hz, channels)
    length = len(audio.decode(data))
    by_header, by_decoding = (measure_member(data, 0.0, decode) for decode in (False, True))
    assert by_header["samples"] == by_decoding["samples"] == length
    # What states no exact length is decoded in any case.
    assert np.isnan(by_header["mean_square"]) == (suffix != "mp3")


def test_lengths_at_the_halves_are_rounded_as_soxr_does():
    # Every odd number of samples at 32 kHz lies at a half, where Python's round would go to the even one.
    for frames in range(9_001, 9_021, 2):
        data = sound("wav", frames / 32_000, 32_000)
        assert measure_member(data, 0.0, False)["samples"] == len(audio.decode(data)) == (frames + 1) // 2


def test_an_mp3_whose_header_promises_too_much_is_left_out_as_cut(tmp_path):
    whole = sound("mp3", 3.0)
    by_hand(tmp_path / "a.tar", {"a.mp3": whole[: len(whole) // 2], "b.mp3": whole})
    adopted = indexed(tmp_path, level_share=0.0)
    assert (adopted.left_out, list(read_back(adopted.index))) == ({"cut": 1}, ["a.tar:b"])


def test_levels_are_those_of_the_samples_that_training_hears(tmp_path):
    waves = {f"{n}": noise(0.5 + n, n, 500 * (n + 1)) + np.int16(300 * n) for n in range(4)}
    by_hand(tmp_path / "a.tar", {f"{key}.flac": audio.encode(wave, "flac") for key, wave in waves.items()})
    index = indexed(tmp_path).index
    mean, square = column(index, "mean"), column(index, "mean_square")
    for key, wave in waves.items():
        assert mean[key] == pytest.approx((wave / 32768).mean(), abs=1e-12)
        assert square[key] == pytest.approx(np.square(wave / 32768).mean(), rel=1e-12)


def test_a_share_of_levels_is_keyed_and_the_rest_has_the_average_of_its_shard(tmp_path, monkeypatch):
    members = {f"{n:03d}.flac": audio.encode(noise(0.3 + 0.01 * n, n, 100 + 50 * n), "flac") for n in range(60)}
    by_hand(tmp_path / "all" / "a.tar", members)
    shutil.copytree(tmp_path / "all", tmp_path / "some")
    exact = column(indexed(tmp_path / "all").index, "mean_square")
    decoded = 0
    decode = audio.decode_checked

    def counting(data: bytes, limits: audio.SoundLimits) -> tuple[audio.AudioInfo, np.ndarray]:
        nonlocal decoded
        decoded += 1
        return decode(data, limits)

    monkeypatch.setattr(read_tar.audio, "decode_checked", counting)
    index = indexed(tmp_path / "some", level_share=0.3).index
    table = index.utterances
    got, samples = column(index, "mean_square"), table["samples"].to_numpy()
    known = [key for key in got if got[key] == exact[key]]
    assert len(known) == decoded
    assert 9 <= decoded <= 27
    weights = [samples[int(key)] for key in known]
    average = np.average([exact[key] for key in known], weights=weights)
    rest = {got[key] for key in got if key not in known}
    assert len(rest) == 1
    assert rest.pop() == pytest.approx(average, rel=1e-12)
    # The levels of the set are then those of the decoded share.
    assert index.shards["mean_square"][0].as_py() == pytest.approx(average, rel=1e-9)
    assert column(index, "samples") == column(Index.load(str(tmp_path / "all")), "samples")


def test_every_shard_has_a_level_at_any_share(tmp_path):
    for shard in range(3):
        members = {"bad.flac": b"junk" * 99} | {f"{n}.flac": flac(seed=10 * shard + n) for n in range(3)}
        by_hand(tmp_path / f"{shard}.tar", members)
    index = indexed(tmp_path, level_share=0.0).index
    assert min(index.shards["mean_square"].to_pylist()) > 0
    assert set(left_out(tmp_path).values()) == {"unreadable"}


# Groups and languages


def test_a_member_without_a_speaker_is_its_own_group_also_where_shards_number_alike(tmp_path):
    for shard in range(2):
        by_hand(tmp_path / f"{shard}.tar", {f"{n}.flac": flac(seed=10 * shard + n) for n in range(3)})
    adopted = indexed(tmp_path)
    groups = adopted.index.utterances["group"].to_pylist()
    assert len(set(groups)) == 6
    assert groups == adopted.index.utterances["recording"].to_pylist()
    # The name of a tar is no part of the data: it may move.
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in range(2):
        shutil.copy(tmp_path / f"{shard}.tar", moved / f"other-{shard}.tar")
    assert indexed(moved).index.fingerprint == adopted.index.fingerprint


@pytest.mark.parametrize(("level", "expected"), [(1, "train"), (2, "84"), (3, "121"), (-1, "121"), (-3, "train")])
def test_a_folder_of_the_path_names_the_group(tmp_path, level, expected):
    by_hand(tmp_path / "a.tar", {"./train/84/121/x.flac": flac()})
    assert column(indexed(tmp_path, group_folder=level).index, "group") == {"train/84/121/x": expected}


def test_a_member_that_lies_too_high_for_its_folder_is_its_own_group(tmp_path):
    by_hand(tmp_path / "a.tar", {"x.flac": flac(), "s/y.flac": flac(seed=1)})
    adopted = indexed(tmp_path, group_folder=1)
    assert column(adopted.index, "group")["x"].startswith("x@")
    assert adopted.origins["group: its recording"] == adopted.origins["group: folder 1"] == 1


def test_columns_are_found_by_name_by_path_and_in_lists(tmp_path):
    told = {"meta": {"who": {"name": " Ånna "}, "a.b": 1}, "langs": ["xx", {"code": "sv"}], "tape": 7.0}
    by_hand(tmp_path / "a.tar", {"x.flac": flac(), "x.json": json.dumps(told).encode()})
    names = LabelColumns(group="meta.who.name", language="langs.1.code", recording="tape")
    index = indexed(tmp_path, columns=names).index
    row = index.utterances.to_pylist()[0]
    assert (row["group"], row["language"], row["recording"]) == ("Ånna", "sv", "7")


@pytest.mark.parametrize("value", [None, "", "  ", True, [], {}, {"speaker": "x"}, float("nan")])
def test_a_value_that_is_no_name_is_none(tmp_path, value):
    by_hand(tmp_path / "a.tar", {"x.flac": flac(), "x.json": json.dumps({"speaker": value, "spk": "anna"}).encode()})
    assert column(indexed(tmp_path).index, "group") == {"x": "anna"}


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[1]", b"3", b"[" * 100_000, b""])
def test_json_that_is_none_is_counted_and_its_audio_is_its_own_group(tmp_path, text):
    by_hand(tmp_path / "a.tar", {"x.flac": flac(), "x.json": text})
    adopted = indexed(tmp_path)
    assert adopted.notes == {"JSON files that cannot be read": 1}
    assert column(adopted.index, "group")["x"].startswith("x@")


def test_half_a_character_in_json_does_not_break_the_table(tmp_path):
    by_hand(tmp_path / "a.tar", {"x.flac": flac(), "x.json": b'{"speaker": "\\ud800x"}'})
    assert column(indexed(tmp_path).index, "group") == {"x": "\\ud800x"}


@pytest.mark.parametrize(
    "text",
    [
        "path\tclient_id\tlocale\tsentence\nclips/0.mp3\tanna\tde\t\"Ja\nclips/1.mp3\tbert\tnl\t''\n",
        '\ufeffkey,speaker,language,text\nclips/0,anna,de,"a, ""b""\nc"\n./clips/1,bert,nl,\n',
        "file,spk,lang\n0.mp3,anna,de\n1.mp3,bert,nl\n2.mp3,carl,sv\n",
        "speaker,id,language\nanna,0,de\nbert,1,nl\n",
        "path,speaker,language\rclips/0.mp3,anna,de\rclips/1.mp3,bert,nl\r",
        "\ufeff\ufeffpath; speaker; language\nclips/0.mp3; anna; de\nclips/1.mp3; bert; nl\n",
        '{"audio_filepath": "clips/0.mp3", "speaker": "anna", "lang": "de"}\n'
        '{"audio_filepath": "clips/1.mp3", "speaker": "bert", "lang": "nl", "offset": 0}\n',
        '{"file_name": "0.mp3", "speaker_id": "anna", "locale": "de"}\n'
        '{"file_name": "1.mp3", "speaker_id": "bert", "locale": "nl"}',
    ],
)
def test_a_manifest_names_members_by_path_key_or_file_name(tmp_path, text):
    by_hand(tmp_path / "set" / "a.tar", {f"clips/{n}.mp3": sound("mp3", 0.5, seed=n) for n in range(2)})
    (tmp_path / "table").write_text(text, encoding="utf-8")
    index = indexed(tmp_path / "set", manifest=str(tmp_path / "table")).index
    assert column(index, "group") == {"clips/0": "anna", "clips/1": "bert"}
    assert column(index, "language") == {"clips/0": "de", "clips/1": "nl"}


def test_speakers_of_a_manifest_and_of_json_have_one_spelling(tmp_path):
    told = [b'{"speaker": 1}', b'{"speaker": 1.0}', b'{"speaker": "1.0"}', b'{"speaker": "N/A"}', b'{"speaker": null}']
    members = {f"{n}.json": data for n, data in enumerate(told)} | {f"{n}.flac": flac(seed=n) for n in range(8)}
    members["Mu\u0308.flac"] = flac(seed=8)
    by_hand(tmp_path / "set" / "a.tar", members)
    (tmp_path / "m.csv").write_text("key,speaker\n5,1\n6,1.0\n7,None\nM\u00fc,2\n", encoding="utf-8")
    groups = column(indexed(tmp_path / "set", manifest=str(tmp_path / "m.csv")).index, "group")
    assert [groups[key] for key in ("0", "1", "2", "5", "6", "Mu\u0308")] == ["1"] * 5 + ["2"]
    assert all(groups[key].startswith(f"{key}@") for key in "347")


def test_a_manifest_goes_over_json_and_json_over_the_folder_field_by_field(tmp_path):
    told = json.dumps({"speaker": "json", "language": "json"}).encode()
    members = {"dir/0.flac": flac(), "dir/0.json": told, "dir/1.flac": flac(seed=1), "dir/1.json": told}
    by_hand(tmp_path / "set" / "a.tar", {**members, "dir/2.flac": flac(seed=2)})
    (tmp_path / "m.csv").write_text("key,speaker\ndir/0,table\n", encoding="utf-8")
    settings = {"manifest": str(tmp_path / "m.csv"), "group_folder": 1, "language_folder": 1}
    index = indexed(tmp_path / "set", **settings).index
    assert column(index, "group") == {"dir/0": "table", "dir/1": "json", "dir/2": "dir"}
    assert column(index, "language") == {"dir/0": "json", "dir/1": "json", "dir/2": "dir"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("key,speaker\nnobody,anna\n", "names none of the members"),
        ("key,speaker\nX.wav,anna\n", "its first is 'X.wav'; the nearest is x, which differs in"),
        ("key,speaker\nx,anna\nx,bert\n", "two speakers"),
        ("key,language\nx,en\nx,fr\n", "two languages"),
        ("who,what\nx,anna\n", "none of the columns"),
        ("key,what\nx,anna\n", "no column that says who speaks"),
        ("", "none of the columns"),
        ("key,speaker\nx,anna,too,many\n", "line 2 has 4 cells, and the header has 2"),
    ],
)
def test_a_manifest_that_says_nothing_is_refused_and_nothing_is_left(tmp_path, text, words):
    by_hand(tmp_path / "set" / "a.tar", {"x.flac": flac()})
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    assert words in refusal(lambda: indexed(tmp_path / "set", manifest=str(tmp_path / "m.csv")))
    assert [path.name for path in (tmp_path / "set").iterdir() if path.is_file()] == ["a.tar"]


def test_a_column_that_no_member_has_is_refused_with_those_that_are_there(tmp_path):
    by_hand(tmp_path / "a.tar", {"x.flac": flac(), "x.json": b'{"speaker_nme": "anna", "text": ""}'})
    message = refusal(lambda: indexed(tmp_path, columns=LabelColumns(group="speaker_name")))
    assert "did you mean speaker_nme?" in message
    assert "text" in message
    assert not (tmp_path / "index.json").exists()


# What is left out


def test_what_cannot_be_trained_on_is_left_out_with_its_cause(tmp_path):
    good, silent = flac(), audio.encode(np.zeros(16_000, np.int16), "flac")
    hole = bytearray(good)
    hole[len(hole) // 2 : len(hole) // 2 + 200] = bytes(200)
    bad_name = "bad\udce9.flac"
    members = [("good.flac", good), ("empty.flac", b""), ("junk.wav", b"junk" * 99), ("hole.flac", bytes(hole))]
    members += [("short.flac", flac(0.1)), ("silent.flac", silent), ("good.flac", flac(seed=1)), ("good.wav", good)]
    members += [(bad_name, good), ("none.wav", sound("wav", 0.0)), ("README.md", b"text")]
    path = by_hand(tmp_path / "a.tar", members)
    adopted = indexed(tmp_path)
    assert list(column(adopted.index, "key")) == ["good"]
    assert read_back(adopted.index) == {"a.tar:good": good}
    with (tmp_path / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = [(row["shard"], row["member"], row["cause"]) for row in table]
    # The first of one key is named, and whether the other is the same.
    assert [row["why"].partition("the tar, and ")[2] for row in table if row["cause"] == "duplicate"] == [
        *("has other bytes", "has the same bytes")
    ]
    causes = [("empty.flac", "empty"), ("junk.wav", "unreadable"), ("hole.flac", "unreadable"), ("short.flac", "short")]
    causes += [("silent.flac", "silent"), ("good.flac", "duplicate"), ("good.wav", "duplicate")]
    causes += [("bad\\udce9.flac", "unreadable"), ("none.wav", "empty")]
    assert rows == [(path.name, name, cause) for name, cause in causes]
    assert adopted.left_out == {"empty": 2, "unreadable": 3, "short": 1, "silent": 1, "duplicate": 2}


def test_what_libsndfile_opens_and_cannot_read_is_left_out_and_ends_nothing(tmp_path):
    path = tmp_path / "gsm.wav"
    soundfile.write(path, noise(1.0), 8_000, format="WAV", subtype="GSM610")
    by_hand(tmp_path / "set" / "a.tar", {"gsm.wav": path.read_bytes(), "good.flac": flac()})
    index = indexed(tmp_path / "set").index
    # The library's way with this codec may change; what may not is that one member ends the work.
    assert "good" in column(index, "key")
    assert len(column(index, "key")) + len(left_out(tmp_path / "set")) == 2


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "cut in a member": lambda data: data[: len(data) // 2],
    "cut in a header": lambda data: data[: data.index(b"2.flac") + 300],
    "a damaged header": lambda data: data.replace(b"2.flac", b"2.flaX", 1),
    "two in one": lambda data: data + data,
    "no tar": lambda data: b"x" * 2000,
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_tar_is_left_out_whole_and_indexed_once_it_is_mended(tmp_path, harm):
    for shard in range(3):
        by_hand(tmp_path / f"{shard}.tar", {f"{n}.flac": flac(seed=10 * shard + n) for n in range(4)})
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(HARMS[harm](whole))
    adopted = indexed(tmp_path)
    assert adopted.index.shards["path"].to_pylist() == ["0.tar", "2.tar"]
    assert adopted.damaged == ("1.tar",)
    assert left_out(tmp_path) == {"1.tar:": "damaged"}
    again = indexed(tmp_path)
    assert (again.state, again.damaged) == ("unchanged", ("1.tar",))
    (tmp_path / "1.tar").write_bytes(whole)
    mended = adopt(str(tmp_path), IndexConfig(), append=True)
    assert mended.index.shards["path"].to_pylist() == ["0.tar", "2.tar", "1.tar"]
    assert not left_out(tmp_path)
    assert len(read_back(mended.index)) == 12


def test_a_tar_without_an_end_mark_is_indexed_with_a_note(tmp_path):
    path = by_hand(tmp_path / "a.tar", {"0.flac": flac(), "1.flac": flac(seed=1)})
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(512 - len(path.read_bytes().rstrip(b"\0")) % 512))
    adopted = indexed(tmp_path)
    assert adopted.notes == {"tars without an end mark, which may be cut short": 1}
    assert len(read_back(adopted.index)) == 2


def test_a_tar_without_audio_is_in_the_index_with_a_note(tmp_path):
    by_hand(tmp_path / "0.tar", {"features.bin": b"x" * 999})
    by_hand(tmp_path / "1.tar", {"x.flac": flac()})
    adopted = indexed(tmp_path)
    assert adopted.index.shards["utterances"].to_pylist() == [0, 1]
    assert adopted.notes == {"tars without audio": 1}
    assert indexed(tmp_path).state == "unchanged"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"x.txt": b"text"}, "there is no audio in 1 tars"),
        ({"x.flac": b"junk"}, "none of the audio members"),
        (None, "it is cut short or damaged"),
    ],
)
def test_a_folder_with_nothing_usable_is_refused_and_nothing_is_left(tmp_path, members, words):
    if members is None:
        (tmp_path / "a.tar").write_bytes(b"junk")
    else:
        by_hand(tmp_path / "a.tar", members)
    assert words in refusal(lambda: indexed(tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tar"]


def test_compressed_tars_are_refused_with_the_way_out(tmp_path):
    path = by_hand(tmp_path / "a.tar", {"x.flac": flac()})
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    message = refusal(lambda: indexed(tmp_path))
    assert "b.tar.gz" in message
    assert "decompress it" in message
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tar")
    assert "gzip" in refusal(lambda: indexed(tmp_path))
    assert not (tmp_path / "index.json").exists()


def test_folders_that_cannot_be_indexed_are_refused_with_the_way_out(tmp_path, shard_set):
    assert "is not a folder" in refusal(lambda: indexed(tmp_path / "absent"))
    assert "pattern=" in refusal(lambda: indexed(tmp_path))
    # A set beside its held-out part must not become one set.
    message = refusal(lambda: indexed(shard_set.parent))
    assert "shard sets, the first" in message
    assert "train" in message


def test_a_pattern_chooses_tars_and_is_kept(tmp_path):
    for name in ("recording.000000.tar", "target.000000.tar", "deep/recording.000001.tar"):
        by_hand(tmp_path / name, {"x.flac": flac(seed=len(name))})
    adopted = indexed(tmp_path, pattern="*recording.*")
    assert adopted.index.shards["path"].to_pylist() == ["deep/recording.000001.tar", "recording.000000.tar"]
    assert indexed(tmp_path).state == "unchanged"


# Versions


@pytest.fixture
def some(tmp_path: Path) -> Path:
    base = tmp_path / "some"
    for shard in (1, 3):
        by_hand(base / f"{shard}.tar", {f"{shard}-{n}.flac": flac(seed=10 * shard + n) for n in range(3)})
    indexed(base)
    return base


def test_indexing_again_says_that_nothing_changed_and_writes_nothing(some):
    before = contents(some)
    adopted = indexed(some)
    assert adopted.state == "unchanged"
    assert adopted.index.fingerprint == Index.load(str(some)).fingerprint
    assert contents(some) == before


def test_indexing_again_refuses_what_changed_and_names_it(some):
    by_hand(some / "2.tar", {"x.flac": flac()})
    message = refusal(lambda: indexed(some))
    assert "2.tar" in message
    assert "--append" in message
    (some / "2.tar").unlink()
    whole = (some / "3.tar").read_bytes()
    (some / "3.tar").write_bytes(whole + bytes(512))
    assert "3.tar of the index" in refusal(lambda: indexed(some))
    (some / "3.tar").unlink()
    message = refusal(lambda: adopt(str(some), IndexConfig(), append=True))
    assert "3.tar" in message
    assert "gone" in message


def test_indexing_again_with_other_settings_is_refused(some, tmp_path):
    message = refusal(lambda: indexed(some, group_folder=2))
    assert "group_folder=0" in message
    assert "remove index.json" in message
    other = tmp_path / "other"
    by_hand(other / "a.tar", {"s/x.flac": flac()})
    indexed(other, group_folder=1, min_s=0.3)
    # The plain command on a set that was indexed with settings is about that set as it is.
    assert indexed(other).state == "unchanged"
    assert indexed(other, group_folder=1, min_s=0.3).state == "unchanged"


def test_an_append_comes_after_the_old_tars_with_the_settings_of_the_first_time(tmp_path):
    by_hand(tmp_path / "b.tar", {"anna/0.flac": flac(), "bad.flac": b"junk"})
    first = indexed(tmp_path, group_folder=1).index
    by_hand(tmp_path / "a.tar", {"bert/1.flac": flac(seed=1), "worse.flac": b"junk"})
    appended = adopt(str(tmp_path), IndexConfig(), append=True)
    index = Index.load(str(tmp_path))
    assert (appended.state, appended.new_shards) == ("appended", 1)
    assert index.shards["path"].to_pylist() == ["b.tar", "a.tar"]
    assert column(index, "group") == {"anna/0": "anna", "bert/1": "bert"}
    assert index.ancestor(first.fingerprint)
    assert index.fingerprint_of(1) == first.fingerprint
    assert left_out(tmp_path) == {"b.tar:bad.flac": "unreadable", "a.tar:worse.flac": "unreadable"}
    assert len(read_back(index)) == 2
    assert adopt(str(tmp_path), IndexConfig(), append=True).state == "unchanged"


def test_an_append_to_no_index_is_refused(tmp_path):
    by_hand(tmp_path / "a.tar", {"x.flac": flac()})
    assert "no shard set" in refusal(lambda: adopt(str(tmp_path), IndexConfig(), append=True))


def test_exclusion_takes_keys_a_shards_key_and_a_file(some, tmp_path):
    (tmp_path / "keys").write_text("1-2\n\n3.tar:3-0\n", encoding="utf-8")
    adopted = exclude_from(str(some), ["1-0,1-1", f"@{tmp_path / 'keys'}"])
    assert adopted.state == "excluded"
    assert Index.load(str(some)).excluded.tolist() == [0, 1, 2, 3]
    assert exclude_from(str(some), ["1-0"]).state == "unchanged"
    for texts in ([""], ["@"], ["@/absent"], ["nobody"]):
        refusal(lambda texts=texts: exclude_from(str(some), texts))


def test_a_killed_append_leaves_the_old_version_and_can_be_run_again(some):
    old = Index.load(str(some)).fingerprint
    for shard in range(4, 9):
        by_hand(some / f"{shard}.tar", {f"{n}.flac": flac(seed=10 * shard + n) for n in range(3)})
    program = (
        "import os, signal, sys\n"
        "from cpcscale.shards.adoption.adopt import adopt\n"
        "from cpcscale.shards.tasks import in_turn\n"
        "from cpcscale.shards.adoption.read_tar import IndexConfig\n"
        "def run(*call, **words):\n"
        "    for number, result in enumerate(in_turn(*call, **words)):\n"
        "        if number == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield result\n"
        "adopt(sys.argv[1], IndexConfig(), append=True, run=run)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(some)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Index.load(str(some)).fingerprint == old
    index = adopt(str(some), IndexConfig(), append=True).index
    assert len(read_back(index)) == 21


def test_a_set_of_a_store_is_indexed_as_one_of_a_disk(tmp_path, s3: ObjectStore):
    base = storage.join(s3.base, tmp_path.name)
    for shard in range(3):
        members = {f"{shard}-{n}.mp3": sound("mp3", 0.6, 22_050, seed=10 * shard + n) for n in range(4)}
        path = by_hand(tmp_path / f"{shard}.tar", {**members, "bad.wav": b"junk"})
        if shard < 2:
            storage.write(storage.join(base, path.name), path.read_bytes())
    far = indexed(base)
    assert far.left_out == {"unreadable": 2}
    assert indexed(base).state == "unchanged"
    storage.write(storage.join(base, "2.tar"), (tmp_path / "2.tar").read_bytes())
    assert "--append" in refusal(lambda: indexed(base))
    adopt(base, IndexConfig(), append=True)
    near, far_index = indexed(tmp_path).index, Index.load(base)
    assert far_index.fingerprint == near.fingerprint
    assert read_back(far_index) == read_back(near)
    assert exclude_from(base, ["2.tar:2-1"]).index.excluded.tolist() == [9]


def test_results_are_written_one_by_one_and_never_all_held(tmp_path):
    for shard in range(6):
        by_hand(tmp_path / f"{shard}.tar", {f"{n}.flac": flac(seed=n) for n in range(2)})
    results: list[weakref.ref[Any]] = []

    def run(function: Any, items: Sequence[Any], *, shared: tuple[Any, ...], **_: str) -> Iterator[Any]:
        for item in items:
            result = function(item, *shared)
            results.append(weakref.ref(result))
            yield result
            del result
            # The last one may still be in the hands of who asked.
            assert sum(kept() is not None for kept in results) <= 1

    adopt(str(tmp_path), IndexConfig(), run=run)
    assert len(results) == 6


# The walk through a tar


def test_a_scan_gives_the_digest_and_size_of_all_bytes_and_the_members_that_tar_lists(tmp_path):
    files = {f"d{n % 3}/{n}.wav": noise(0.05, n) for n in range(40)} | {"x.txt": b"text" * 1000, "e.wav": b""}
    tree = write_tree(tmp_path / "tree", files)
    path = by_tar(tmp_path / "a.tar", tree)
    scan = TarScan(str(path))
    members = list(scan.members((".wav",)))
    listed = subprocess.run(["tar", "-tf", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [member.name for member in members] == [name for name in listed if not name.endswith("/")]
    data = path.read_bytes()
    for member in members:
        expected = (tree / member.name).read_bytes()
        assert data[member.offset : member.offset + member.size] == expected
        assert member.data == (expected if member.suffix == ".wav" else b"")
    assert (scan.size_bytes, scan.fault, scan.end_mark) == (len(data), "", True)
    assert (
        scan.sha256.hex()
        == subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    )


@pytest.mark.parametrize("cut", range(0, 12))
def test_a_tar_that_is_cut_anywhere_but_between_members_is_not_whole(tmp_path, cut):
    path = by_hand(tmp_path / "a.tar", {f"{n}.flac": flac(0.05, n) for n in range(3)})
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: len(data) * cut // 12 + cut % 2])
    scan = TarScan(str(path))
    list(scan.members((".flac",)))
    assert scan.fault
