"""Promises of the account: audio found is audio taken and audio left out with a cause, and no file is unsaid."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_audio_files import FORMS, coded
from trees import noise

from cpcscale import audio, cli
from cpcscale.errors import UserError
from cpcscale.shards import account
from cpcscale.shards.adoption.adopt import adopt
from cpcscale.shards.adoption.read_tar import IndexConfig
from cpcscale.shards.pack import PackConfig, PackedSets, pack

KINDS = ("good", "cut", "longer", "silent", "clipped", "quiet", "empty", "text", "pointer", "m4a", "notes", "long")


def made(kind: str, seed: int) -> tuple[str, bytes, float | None]:
    """(suffix, bytes, seconds of audio in it) of one file of a hostile tree; None where nobody can know."""
    wave = noise(1.0 + seed % 3, seed)
    data, seconds = audio.encode(wave, "wav"), len(wave) / 16_000
    return {
        "good": (".flac", audio.encode(wave, "flac"), seconds),
        "long": (".wav", audio.encode(noise(7.3, seed), "wav"), 7.3),
        "cut": (".wav", data[: len(data) // 2 + 22], seconds / 2),
        "longer": (".au", coded("au", seconds, seed) * 2, seconds),
        "silent": (".wav", audio.encode(np.zeros_like(wave), "wav"), seconds),
        "clipped": (".wav", audio.encode(np.where(wave > 0, 32767, -32768).astype(np.int16), "wav"), seconds),
        "quiet": (".flac", audio.encode(np.clip(wave, 0, 0), "flac"), seconds),
        "empty": (".mp3", b"", None),
        "text": (".wav", b"no audio at all, only words", None),
        "pointer": (".wav", b"version https://git-lfs.github.com/spec/v1\n", None),
        "m4a": (".m4a", b"\0\0\0\x18ftypM4A " + bytes(400), None),
        "notes": (".txt", b"notes", None),
    }[kind]


def write(root: Path, kinds: list[str]) -> float:
    """Writes a tree of these kinds of files; returns the seconds of audio in it."""
    total = 0.0
    for number, kind in enumerate(kinds):
        suffix, data, seconds = made(kind, number)
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{number:03d}-{kind}{suffix}").write_bytes(data)
        total += seconds or 0.0
    return total


def check(packed: PackedSets, kinds: list[str], seconds: float) -> None:
    found = packed.account
    assert found.found[0] == sum(kind not in ("m4a", "notes") for kind in kinds)
    assert found.found[1] == pytest.approx(seconds, abs=0.01)
    assert found.taken[1] + found.left_out_s == pytest.approx(found.found[1], abs=0.01)
    assert found.unknown == sum(kind in ("empty", "text", "pointer") for kind in kinds)
    assert sum(found.passed_over.values()) == sum(kind in ("m4a", "notes") for kind in kinds)
    rows = packed.quarantine
    assert (
        len(rows)
        == sum(count for count, _ in found.left_out.values())
        == packed.files_left_out + packed.pieces_left_out
    )


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(KINDS), max_size=8))
def test_seconds_in_are_seconds_packed_and_seconds_left_out(kinds, tmp_path_factory):
    kinds = ["good", *kinds]
    root = tmp_path_factory.mktemp("tree")
    seconds = write(root / "audio", kinds)
    config = PackConfig(max_s=2.0, shard_mb=0.1)
    packed = pack(str(root / "audio"), str(root / "shards"), config)
    check(packed, kinds, seconds)
    # A second pack, which has nothing to do, says the same.
    again = pack(str(root / "audio"), str(root / "shards"), config)
    assert again.account.values() == packed.account.values()


def test_a_file_of_which_no_piece_is_usable_is_left_out_as_one(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "good.flac").write_bytes(audio.encode(noise(1.0, 1), "flac"))
    (tmp_path / "audio" / "long.wav").write_bytes(audio.encode(np.zeros(7 * 16_000, np.int16), "wav"))
    packed = pack(str(tmp_path / "audio"), str(tmp_path / "set"), PackConfig(max_s=1.0, min_s=0.1))
    assert [(row["path"], row["piece"], row["cause"]) for row in packed.quarantine] == [("long.wav", "", "silent")]
    assert packed.quarantine[0]["why"].endswith("; and none of the 7 pieces is usable")
    values = packed.account.values()
    assert values["found"] == {"files": 2, "seconds": 8.0}
    assert values["taken"] == {"files": 1, "seconds": 1.0}
    assert values["left_out"]["silent"] == {"count": 1, "seconds": 7.0}


def test_index_says_the_same_of_a_tar_of_the_same_files(tmp_path):
    seconds = write(tmp_path / "audio", list(KINDS))
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
        for path in sorted((tmp_path / "audio").iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            tar.addfile(member, BytesIO(path.read_bytes()))
    adopted = adopt(str(tmp_path / "set"), IndexConfig())
    packed = pack(str(tmp_path / "audio"), str(tmp_path / "shards"), PackConfig(max_s=0))
    assert adopted.account.values() == packed.account.values()
    assert adopted.account.found[1] == pytest.approx(seconds, abs=0.01)
    # Training decodes what is in the index.
    assert adopted.index.count == 2


@pytest.mark.parametrize("form", FORMS)
def test_every_container_that_libsndfile_reads_is_picked_up(form, tmp_path):
    suffixes = {"float": "wav", "adpcm": "wave", "sphere": "sph", "alac": "caf", "vorbis": "oga", "aiff": "aifc"}
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / f"a.{suffixes.get(form, form)}").write_bytes(coded(form, 2.0))
    packed = pack(str(tmp_path / "audio"), str(tmp_path / "shards"), PackConfig())
    assert packed.account.taken == (1, pytest.approx(2.0, abs=0.06))


def test_the_command_ends_with_the_account_and_says_what_to_do_about_other_audio(tmp_path, capsys):
    write(tmp_path / "audio", ["good", "cut", "m4a", "m4a", "notes", "text"])
    command = ["pack", str(tmp_path / "audio"), str(tmp_path / "shards")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "found 3 files of 2.0 s, took 1 files of 1.0 s" in printed
    assert "left out 1.0 s and 1 of unknown length: 1 cut, 1 unreadable" in printed
    assert "passed over 3 files (2 .m4a, 1 .txt)" in printed and "ffmpeg -i OLD.m4a NEW.flac" in printed
    assert cli.main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["account"]
    assert values["left_out"] == {"cut": {"count": 1, "seconds": 1.0}, "unreadable": {"count": 1, "seconds": 0.0}}


def test_a_tree_of_other_audio_alone_says_what_it_is(tmp_path):
    write(tmp_path / "audio", ["m4a", "m4a", "notes"])
    with pytest.raises(UserError, match=r"no audio below .*2 \.m4a, 1 \.txt.*ffmpeg"):
        pack(str(tmp_path / "audio"), str(tmp_path / "shards"), PackConfig())


def test_limits_can_be_set(tmp_path):
    write(tmp_path / "audio", ["good", "clipped"])
    packed = pack(str(tmp_path / "audio"), str(tmp_path / "a"), PackConfig())
    assert packed.account.left_out.keys() == {"clipped"}
    packed = pack(str(tmp_path / "audio"), str(tmp_path / "b"), PackConfig(limits=audio.SoundLimits(clipped=1.0)))
    assert packed.account.left_out == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [(".dvc", "dvc pull"), (".tar", "cpcscale index"), (".parquet", "Hugging Face"), (".mds", "MosaicML")],
)
def test_what_audio_is_kept_in_is_passed_over_with_the_way_to_it(name, words):
    assert words in account.passed_over({".txt": 9, name: 2})
    assert ";" not in account.passed_over({".txt": 9})


def test_many_suffixes_are_counted_and_few_are_named():
    text = account.passed_over({f".{n:02d}": 1 for n in range(20)} | {".mp4": 1})
    assert text.startswith("21 files (1 .mp4, 1 .00, ") and ", and others)" in text
