"""Promises of packing what cannot be packed: no file is lost unsaid, and a pack that fails leaves nothing behind."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from trees import backwards, contents, corpus, members, noise, threads, write_tree

from cpcscale import audio
from cpcscale.cli import main
from cpcscale.errors import UserError
from cpcscale.shards import index_writer as publishing
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack, pack_sources
from cpcscale.shards.packing.sources import find_audio


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD = {
    "bad/text.wav": (b"this is not audio", "unreadable"),
    "bad/cut.flac": (audio.encode(noise(1), "flac")[:9000], "unreadable"),
    "bad/nothing.flac": (b"", "empty"),
    "bad/empty.wav": (audio.encode(np.zeros(0, np.int16), "wav"), "empty"),
    "bad/silent.wav": (np.zeros(16_000, np.int16), "silent"),
    "bad/short.wav": (noise(0.1), "short"),
}


@pytest.mark.parametrize("run", [backwards, threads])
def test_no_utterance_is_lost_and_each_one_left_out_has_its_cause(tmp_path, run):
    root = corpus(tmp_path / "audio", speakers=2)
    write_tree(root, {name: data for name, (data, _) in BAD.items()})
    (root / "bad" / "broken.wav").symlink_to("nowhere")
    found = find_audio(str(root))
    packed = pack(str(root), str(tmp_path / "shards"), PackConfig(shard_mb=0.12, heldout_share=0.3), run)
    assert len(found) == 12 + len(BAD) + 1
    assert len(members(packed)) + len(packed.quarantine) == len(found)
    expected = {name: cause for name, (_, cause) in BAD.items()} | {"bad/broken.wav": "pointer"}
    assert {row["path"]: row["cause"] for row in packed.quarantine} == expected
    with (tmp_path / "shards" / "quarantine.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == packed.quarantine
    assert all(row["why"] and "\n" not in row["why"] for row in packed.quarantine)
    assert (
        pack(str(root), str(tmp_path / "shards"), PackConfig(shard_mb=0.12, heldout_share=0.3)).quarantine
        == packed.quarantine
    )


def test_a_file_whose_name_is_not_utf_8_is_quarantined_and_the_others_are_packed(tmp_path):
    root = corpus(tmp_path / "audio", speakers=1)
    (root / os.fsdecode(b"caf\xe9.wav")).write_bytes(audio.encode(noise(1), "wav"))
    packed = pack(str(root), str(tmp_path / "shards"), PackConfig())
    assert len(members(packed)) == 6
    assert [(row["path"], row["cause"]) for row in packed.quarantine] == [("caf\\udce9.wav", "unreadable")]


@pytest.mark.parametrize("case", ["unreadable", "silent", "silent in part", "no such speaker", "all held out", "text"])
def test_a_failed_pack_leaves_nothing_behind_and_is_one_line(tmp_path, case):
    files: dict[str, Any] = {f"{n}.wav": noise(1, n) for n in range(4)}
    spec = PackConfig(heldout_share=0.5, heldout_by="utterance")
    speakers = dict.fromkeys(files, "only")
    match case:
        case "unreadable":
            files = dict.fromkeys(files, b"no audio")
        case "silent":
            files = dict.fromkeys(files, np.zeros(16_000, np.int16))
        case "silent in part":
            files = {"0.wav": noise(1), "1.wav": np.zeros(16_000, np.int16)}
            speakers = {"0.wav": "heard", "1.wav": "silent"}
            spec = PackConfig(unseen_groups=["heard"])
        case "no such speaker":
            spec = PackConfig(unseen_groups=["onlyy"])
        case "all held out":
            spec = PackConfig(unseen_groups=["only"])
        case "text":
            files, speakers = {"readme.txt": b"x"}, None
    root = write_tree(tmp_path / "audio", files, speakers)
    before = contents(tmp_path)
    message = refusal(lambda: pack(str(root), str(tmp_path / "new" / "deep" / "shards"), spec))
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()
    if case == "no such speaker":
        assert "did you mean only?" in message
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "notes").write_text("x")
    refusal(lambda: pack(str(root), str(tmp_path / "mine"), spec))
    assert [path.name for path in sorted((tmp_path / "mine").rglob("*"))] == ["train", "notes"]


def test_an_index_that_is_published_stays_whole_when_the_next_one_fails(tmp_path, monkeypatch):
    root, target = corpus(tmp_path / "audio", speakers=2), tmp_path / "shards"
    spec = PackConfig(shard_mb=0.12, heldout_share=0.3, heldout_by="utterance")
    published: list[str] = []
    publish = publishing.publish

    def failing(index: Index) -> None:
        if published:
            raise UserError("the store is away")
        publish(index)
        published.append(index.base)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish", failing)
        assert refusal(lambda: pack(str(root), str(target), spec)) == "the store is away"
    first = Index.load(published[0]).utterances
    packed = pack(str(root), str(target), spec)
    assert packed.splits["train"].utterances == first
    assert len(members(packed)) == 12


def test_a_target_that_cannot_be_written_is_one_line(tmp_path):
    source = corpus(tmp_path / "audio", speakers=1)
    (tmp_path / "file").write_bytes(b"x")
    refusal(lambda: pack(str(source), str(tmp_path / "file" / "shards"), PackConfig()))


def test_an_explicit_list_of_no_files_is_refused(tmp_path):
    assert "none of the 0 files" in refusal(lambda: pack_sources([], str(tmp_path / "x"), PackConfig()))


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("absent", [], "no folder"),
        ("", [], "no folder"),
        ("empty", [], "no audio below"),
        ("s3://nowhere:hunter2@bucket/x", [], "holds credentials"),
        ("http://host/x", [], "not supported"),
        ("empty", ["codek=flac"], "did you mean codec?"),
        ("empty", ["codec=mp3"], "codec"),
        ("empty", ["shard_mb=large"], "shard_mb"),
        ("empty", ["heldout_share=2"], "heldout_share=2"),
    ],
)
def test_the_command_ends_a_users_mistake_in_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, source, overrides, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["pack", source, "new/shards", *overrides]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert words in output.err
    assert "hunter2" not in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
