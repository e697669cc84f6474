"""Promises of finding audio: every file, a key for each name, and speakers from manifests that are what they say."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from trees import noise, write_tree

from cpcscale import audio
from cpcscale.errors import UserError
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing.sources import AudioFile, find_audio, utterance_keys

SOUND = audio.encode(noise(0.1), "wav")


def found(root: Path, files: Mapping[str, str | bytes]) -> dict[str, AudioFile]:
    """What is found in a tree of these texts and sounds, by name."""
    write_tree(root, {name: data.encode() if isinstance(data, str) else data for name, data in files.items()})
    return {source.name: source for source in find_audio(str(root))}


def refusal(root: Path, files: Mapping[str, str | bytes]) -> str:
    with pytest.raises(UserError) as caught:
        found(root, files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ODD_NAMES = ["a.wav", "a.flac", "a.b.wav", "a_b.wav", "a b.wav", "A.WAV", "ünïcode.wav", "語.wav", "音.wav", "x/a.wav"]
ODD_NAMES += ["x.y/a.wav", "x_y/a.wav", "quote'\".wav", "100%.wav", "[1].wav", "#.wav", "-rf.wav", f"{'long' * 40}.wav"]
ODD_NAMES += ["line\nbreak.wav", "tab\t.wav", "=1+1.wav"]


def test_every_odd_name_has_a_key_of_its_own_that_webdataset_reads(tmp_path):
    root = write_tree(tmp_path / "audio", {name: noise(0.5, seed) for seed, name in enumerate(ODD_NAMES)})
    packed = pack(str(root), str(tmp_path / "shards"), PackConfig())
    keys = packed.splits["train"].utterances["key"].to_pylist()
    assert len(set(keys)) == len(ODD_NAMES)
    assert not packed.quarantine
    got = {}
    for sample in webdataset.WebDataset(str(tmp_path / "shards/train/shard-000000.tar"), shardshuffle=False):
        got[json.loads(sample["json"])["source"]] = audio.to_int16(audio.decode(sample["flac"]))
    assert sorted(got) == sorted(ODD_NAMES)
    for seed, name in enumerate(ODD_NAMES):
        np.testing.assert_array_equal(got[name], noise(0.5, seed))


@given(st.lists(st.text("ab._-/é語\n", min_size=1, max_size=6), unique=True, min_size=1, max_size=30))
def test_keys_are_unique_and_are_what_webdataset_takes_for_a_key(stems):
    names = [f"{stem}.wav" for stem in stems]
    keys = utterance_keys(names).to_pylist()
    assert len(keys) == len(set(keys)) == len(names)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_/-]*", key)
        assert not key.startswith("/")


def test_a_key_does_not_change_when_other_files_are_added():
    few = ["a/x.wav", "a.b.wav", "a_b.wav", "語.wav", "音.wav"]
    more = [*few, "z.wav", "a/y.wav", "a-b.wav", "声.wav"]
    assert utterance_keys(more).to_pylist()[: len(few)] == utterance_keys(few).to_pylist()


def test_every_file_with_an_audio_suffix_is_found_and_no_other(tmp_path):
    files = {"a.wav": SOUND, "deep/er/B.FLAC": SOUND, "c.Opus": SOUND, "x.txt": "x", "wav": SOUND, ".hidden.wav": SOUND}
    got = found(tmp_path, {**files, ".git/d.wav": SOUND})
    assert sorted(got) == ["a.wav", "c.Opus", "deep/er/B.FLAC"]
    assert Path(got["a.wav"].path) == tmp_path / "a.wav"
    # Without a manifest each file is a group of its own, so that no speaker is invented.
    assert got["deep/er/B.FLAC"].group == "deep/er/B.FLAC"


def test_audio_in_linked_folders_is_found(tmp_path):
    write_tree(tmp_path / "elsewhere", {"x.wav": SOUND})
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "corpus").symlink_to(tmp_path / "elsewhere")
    assert sorted(found(tmp_path / "root", {})) == ["corpus/x.wav"]


def test_a_manifest_gives_speaker_and_language_to_the_files_below_it_and_the_nearest_counts(tmp_path):
    files = dict.fromkeys(("a.wav", "k/b.wav", "k/y/c.wav", "z/d.wav", "z/e.wav"), SOUND)
    # Below `k`, whose manifest sorts before the root's by name.
    root = "path,speaker,language\na.wav,root,en\nk/b.wav,root,en\nk/y/c.wav,root,en\n./z/d.wav,root,en\n"
    tables = {"manifest.csv": root, "k/manifest.csv": "language,path,speaker\nfr,b.wav,near\nfr,y/c.wav,near\n"}
    got = found(tmp_path, {**files, **tables, "k/y/manifest.csv": "path,speaker\nc.wav,nearest\n"})
    assert {name: (source.group, source.language) for name, source in got.items()} == {
        "a.wav": ("root", "en"),
        "k/b.wav": ("near", "fr"),
        "k/y/c.wav": ("nearest", ""),
        "z/d.wav": ("root", "en"),
        "z/e.wav": ("z/e.wav", ""),
    }


@pytest.mark.parametrize(
    "table",
    [
        "\ufeffpath,speaker,language\na.wav,anna,en\n",
        "path,speaker,language\r\na.wav,anna,en\r\n",
        'path,speaker,language\n"a.wav", anna ,en\n\n',
        "speaker,more,path,language\nanna,x,a.wav,en\n",
        "\ufeff\ufeffpath,speaker,language\ra.wav,anna,en\r",
        'path, speaker, language\na.wav, "anna", en\n',
        "path;speaker;language\na.wav;anna;en\n;;\n",
        "path\tspeaker\tlanguage\na.wav\tanna\ten\n",
        '{"audio_filepath": "a.wav", "duration": 0.1, "speaker": "anna", "language": "en"}\n',
        '{"file_name": "./a.wav", "speaker": "anna", "language": "en", "tags": ["x"]}\n\n',
        "file,speaker,language\na.wav,anna,en\n",
    ],
    ids=[
        *("bom", "crlf", "spaces and quotes", "other columns", "two boms and cr", "space after comma", "semicolons"),
        *("tabs", "NeMo", "Hugging Face", "audformat"),
    ],
)
def test_a_manifest_as_spreadsheets_write_it_is_read(tmp_path, table):
    got = found(tmp_path, {"a.wav": SOUND, "manifest.csv": table})
    assert (got["a.wav"].group, got["a.wav"].language) == ("anna", "en")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("clip,speaker\na.wav,anna\n", "no column `path` (it has clip, speaker)"),
        ("clip,speaker\n", "no column `path`"),
        ("path|speaker\na.wav|anna\n", "no column `path`"),
        ("", "no column `path` (it is empty)"),
        ("path,speaker\na.wav,anna,more\n", "line 2 has 3 cells, and the header has 2"),
        (b"\xff\xfep\x00", "line 1 is not a table in UTF-8"),
        (b"path,speaker\r\na.wav,anna\r\nb.wav,M\xfcller\r\n", "line 3 is not a table in UTF-8"),
        ("path,speaker\na.wav,anna\n./a.wav,berta\n", "for two speakers, 'anna' and 'berta'"),
        ("path,language\na.wav,en\na.wav,fr\n", "for two languages, 'en' and 'fr'"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_one_line_with_its_place(tmp_path, table, expected):
    message = refusal(tmp_path, {"a.wav": SOUND, "x/manifest.csv": table, "x/a.wav": SOUND})
    assert expected in message
    assert "x/manifest.csv" in message


def test_rows_that_name_no_file_are_one_warning_with_their_count_and_the_first(tmp_path, caplog):
    table = "path,speaker\na.wav,anna\nlost.wav,anna\n,anna\n../b.wav,anna\n"
    with caplog.at_level(logging.WARNING):
        found(tmp_path, {"a.wav": SOUND, "manifest.csv": table})
    assert len(caplog.records) == 1
    assert "3 of its 4 paths name no audio file here; the first: lost.wav" in caplog.text


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_a_name_matches_in_whichever_form_its_accents_are_written(tmp_path, caplog, on_disk, in_table):
    names = ["Mu\u0308ller/a\u0301.wav", "b.wav"]
    files = {unicodedata.normalize(on_disk, name): SOUND for name in names}
    rows = "".join(unicodedata.normalize(in_table, f"{name},{name[0]}\n") for name in names)
    got = found(
        tmp_path / unicodedata.normalize(on_disk, "u\u0308"), {**files, "manifest.csv": f"path,speaker\n{rows}"}
    )
    assert {name: source.group for name, source in got.items()} == dict(zip(files, "Mb", strict=True))
    assert not caplog.records


def test_a_name_that_matches_nothing_is_shown_with_the_nearest(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found(tmp_path, {"x/a.wav": SOUND, "b.wav": SOUND, "manifest.csv": "path,speaker\nx/a.WAV,anna\nb.wav,b\n"})
    assert "the first: x/a.WAV; the nearest is x/a.wav, which differs in upper and lower case" in caplog.text


def test_speakers_have_one_spelling_and_those_that_are_not_known_are_none(tmp_path):
    speakers = ["1", "1.0", " 1", "None", "NULL", "N/A", "nan", "Mu\u0308ller", "M\u00fcller"]
    rows = "".join(f"{at}.wav,{speaker}\n" for at, speaker in enumerate(speakers))
    got = found(tmp_path, {f"{at}.wav": SOUND for at in range(9)} | {"manifest.csv": "path,speaker\n" + rows})
    groups = [got[f"{at}.wav"].group for at in range(9)]
    assert groups == ["1", "1", "1", "3.wav", "4.wav", "5.wav", "6.wav", "M\u00fcller", "M\u00fcller"]


def test_parts_of_files_in_a_manifest_tell_speakers_and_are_said_to_be_packed_whole(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        got = found(tmp_path, {"a.wav": SOUND, "manifest.csv": "file,start,end,speaker\na.wav,0,1,x\na.wav,1,2,x\n"})
    assert got["a.wav"].group == "x"
    assert "files are packed whole" in caplog.text


def test_a_manifest_without_a_speaker_column_is_a_warning_with_the_nearest_name(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        got = found(tmp_path, {"a.wav": SOUND, "manifest.csv": "path,Speaker\na.wav,anna\n"})
    assert got["a.wav"].group == "a.wav"
    assert "no column `speaker` (did you mean Speaker?)" in caplog.text


def test_a_source_that_is_not_a_folder_of_audio_is_one_line(tmp_path):
    assert "no audio below" in refusal(tmp_path, {"a.txt": "x"})
    (tmp_path / "x.wav").write_bytes(SOUND)
    for path, words in (("absent", "no folder"), ("x.wav", "not a folder")):
        with pytest.raises(UserError, match=words):
            find_audio(str(tmp_path / path))
    # An unset shell variable must not pack the folder one happens to stand in.
    with pytest.raises(UserError, match="no folder ''"):
        find_audio("")
