"""Promises of the account of `corpus describe`: every file of a folder is taken, left out or passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_corpora import put_crema_d, put_iemocap, put_msp_podcast, put_ravdess, put_tone
from shards.test_account import KINDS, write

from cpcscale import cli, storage
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.scores.describe import describe

HEAD = "path,start,end,speaker,activation,valence,dominance"


def account(folder: Path) -> dict:
    values = describe(open_corpus(CorpusConfig(path=str(folder))), str(folder))["account"]
    found, taken, left_out = values["found"], values["taken"], values["left_out"]
    assert found["files"] == taken["files"] + sum(row["count"] for row in left_out.values())
    left_s = sum(row["seconds"] for row in left_out.values())
    assert found["seconds"] == pytest.approx(taken["seconds"] + left_s, abs=0.01)
    return values


def seconds_of(folder: Path) -> float:
    return sum(soundfile.info(str(path)).duration for path in folder.rglob("*.wav"))


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(KINDS), max_size=7), unnamed=st.integers(0, 3))
def test_seconds_found_are_those_taken_and_those_left_out_on_any_tree(kinds, unnamed, tmp_path_factory):
    kinds = ["good", *kinds]
    root = tmp_path_factory.mktemp("tree")
    total = write(root, kinds)
    files = sorted(path.name for path in root.iterdir() if "m4a" not in path.name and "notes" not in path.name)
    named = files[: max(1, len(files) - unnamed)]
    rows = [f"{name},,,s,3,3,3" for name in named]
    (root / "manifest.csv").write_text("\n".join([HEAD, *rows, ""]))
    values = account(root)
    assert values["found"]["files"] == len(files)
    assert values["found"]["seconds"] == pytest.approx(total, abs=0.02)
    assert values["of_unknown_length"] == sum(kind in ("empty", "text", "pointer") for kind in kinds)
    assert sum(values["passed_over"].values()) == sum(kind == "m4a" for kind in kinds)
    assert values["left_out"].get("in no row", {"count": 0})["count"] == len(files) - len(named)
    every = set(storage.list_files(str(root)))
    assert len(every) == len(files) + sum(values["passed_over"].values()) + 1 + kinds.count("notes")


def test_parts_of_files_count_once_and_what_is_between_them_is_left_out(tmp_path):
    put_tone(tmp_path / "a.wav", (0, 0, 0), 0)
    length = seconds_of(tmp_path)
    rows = ["a.wav,0,0.1,s,3,3,3", "a.wav,0.05,0.2,s,3,3,3", "a.wav,0.25,,s,3,3,3"]
    (tmp_path / "manifest.csv").write_text("\n".join([HEAD, *rows, ""]))
    values = account(tmp_path)
    assert values["found"] == {"files": 1, "seconds": pytest.approx(length, abs=0.001)}
    assert values["left_out"] == {"in no row": {"count": 0, "seconds": pytest.approx(0.05, abs=0.001)}}


@pytest.mark.parametrize("put", [put_ravdess, put_crema_d, put_iemocap, put_msp_podcast])
def test_what_an_adapter_drops_has_its_reason(put, tmp_path):
    put(tmp_path)
    for path in sorted(tmp_path.rglob("*.wav"))[:2]:
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    values = account(tmp_path)
    assert values["found"]["seconds"] == pytest.approx(seconds_of(tmp_path), abs=0.01)
    calm = {"no stand-in label for calm"} if put is put_ravdess else set()
    # IEMOCAP's audio lies in one place, so files elsewhere are in no row.
    again = "in no row" if put is put_iemocap else "a second copy of its file"
    assert values["left_out"].keys() - calm == {again}


def test_the_command_ends_with_the_account(tmp_path, capsys):
    put_crema_d(tmp_path)
    (tmp_path / "AudioWAV" / "v.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    assert cli.main(["corpus", "describe", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("found 12 files of ") and ", took 12 files of " in lines[-2]
    assert lines[-1].startswith("passed over 1 files (1 .m4a); libsndfile does not decode .m4a: convert it")
    assert cli.main(["corpus", "describe", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["account"]["passed_over"] == {".m4a": 1}
