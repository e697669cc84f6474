"""Promises of who speaks: told by a table of the user's own, whatever its columns, or by the folders, or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore
from trees import members, noise, write_tree

from cpcscale import audio, config, storage
from cpcscale.cli import main
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack, pack_sources
from cpcscale.shards.packing.manifests import ManifestColumns
from cpcscale.shards.packing.sources import FindConfig, find_audio
from cpcscale.stream import window
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import WindowSpeakers

SOUND = audio.encode(noise(0.3), "wav")
LIBRI = ["train/19/198/19-198-0001.wav", "train/19/227/19-227-0000.wav", "dev/84/121/84-121-0000.wav"]
# As Common Voice ships it: tabs, quotation marks that open nothing, columns of its own.
COMMON_VOICE = """client_id\tpath\tsentence\tlocale
anna\tc1.wav\t"Yes, he said\ten
berta\tc2.wav\tNo\tfr
berta\tc3.wav\t"x" y\tfr
"""


def tree(root: Path, names: list[str], **tables: str) -> Path:
    write_tree(root, dict.fromkeys(names, SOUND))
    for name, text in tables.items():
        (root / name.replace("_", ".")).write_text(text)
    return root


def found(root: Path, **settings: Any) -> dict[str, tuple[str, str]]:
    return {one.name: (one.group, one.language) for one in find_audio(str(root), FindConfig(**settings))}


def refusal(root: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        found(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_table_of_tabs_with_columns_of_its_own_is_read_by_the_users_names(tmp_path):
    root = tree(tmp_path / "cv" / "clips", ["c1.wav", "c2.wav", "c3.wav"])
    (tmp_path / "cv" / "validated.tsv").write_text(COMMON_VOICE)
    columns = ManifestColumns(path="path", speaker="client_id", language="locale")
    got = found(root, manifest=str(tmp_path / "cv" / "validated.tsv"), columns=columns)
    assert got == {"c1.wav": ("anna", "en"), "c2.wav": ("berta", "fr"), "c3.wav": ("berta", "fr")}


def test_a_table_of_tabs_in_the_tree_counts_by_itself(tmp_path):
    root = tree(tmp_path, ["a.wav"], manifest_tsv="speaker\tpath\nanna\ta.wav\n")
    assert found(root) == {"a.wav": ("anna", "")}


@pytest.mark.parametrize("paths", ["to the source", "to itself", "absolute", "spelled otherwise", "a URL"])
def test_paths_of_a_given_table_may_be_relative_to_the_source_or_to_the_table_or_absolute(tmp_path, paths):
    root = tree(tmp_path, ["x/y/a.wav", "x/y/b.wav"])
    above = {
        "to the source": "x/y/",
        "to itself": "y/",
        "absolute": f"{root}/x/y/",
        "spelled otherwise": f"/{root}/x//y/../y/./",
        "a URL": f"{root.as_uri()}/x/y//",
    }[paths]
    (root / "x" / "who.csv").write_text(f"path,speaker\n{above}a.wav,anna\n{above}b.wav,berta\n")
    got = found(root, manifest=str(root / "x" / "who.csv"))
    assert {name: group for name, (group, _) in got.items()} == {"x/y/a.wav": "anna", "x/y/b.wav": "berta"}


def test_a_given_table_counts_alone(tmp_path):
    root = tree(tmp_path / "audio", ["a.wav"], manifest_csv="path,speaker\na.wav,tree\n")
    (tmp_path / "mine.csv").write_text("path,speaker\na.wav,mine\n")
    assert found(root, manifest=str(tmp_path / "mine.csv"))["a.wav"][0] == "mine"


def test_files_without_a_row_in_a_given_table_are_told(tmp_path, caplog):
    root = tree(tmp_path, ["a.wav", "b.wav", "c.wav"], mine_csv="path,speaker\nb.wav,berta\nlost.wav,x\n")
    with caplog.at_level(logging.WARNING):
        got = found(root, manifest=str(root / "mine.csv"))
    assert got["a.wav"] == ("a.wav", "")
    assert "no row for 2 of 3 files" in caplog.text
    assert "1 of its 2 paths name no audio file here; the first: lost.wav" in caplog.text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"path": "file"}, "no column `file` (it has path, client_id, lang): .* columns.path"),
        ({"speaker": "clientid"}, "no column `clientid` .*(did you mean client_id?): .* columns.speaker"),
        ({"speaker": "client_id", "language": "long"}, "no column `long` .*(did you mean lang?): .* columns.language"),
    ],
)
def test_a_column_that_is_not_there_is_one_line_with_the_nearest(tmp_path, columns, words):
    root = tree(tmp_path, ["a.wav"], mine_csv="path,client_id,lang\na.wav,anna,en\n")
    message = refusal(root, manifest=str(root / "mine.csv"), columns=ManifestColumns(**columns))
    parts = words.split(" .*")
    assert all(part in message for part in parts), message
    assert "mine.csv" in message


def test_a_table_that_names_no_file_here_is_refused_with_its_first_path(tmp_path):
    root = tree(tmp_path, ["clips/a.wav"], mine_csv="path,speaker\na.mp3,x\n")
    message = refusal(root, manifest=str(root / "mine.csv"))
    assert "none of the 1 paths" in message
    assert "the first: a.mp3" in message
    assert "there is nothing at" in refusal(root, manifest=str(root / "absent.csv"))


def test_speakers_are_told_from_the_folders_at_the_level_that_is_named(tmp_path):
    root = tree(tmp_path, LIBRI, manifest_csv="path,language\ndev/84/121/84-121-0000.wav,en\n")
    levels = {
        1: {"dev", "train"},
        2: {"19", "84"},
        3: {"121", "198", "227"},
        -1: {"121", "198", "227"},
        -2: {"19", "84"},
    }
    for level, groups in levels.items():
        got = found(root, group_from="folder", folder_level=level)
        assert {group for group, _ in got.values()} == groups
    got = found(root, group_from="folder", folder_level=2)
    assert got == {LIBRI[0]: ("19", ""), LIBRI[1]: ("19", ""), LIBRI[2]: ("84", "en")}


def test_a_level_that_a_path_does_not_have_is_refused_with_the_path(tmp_path):
    root = tree(tmp_path, [*LIBRI, "stray.wav"])
    message = refusal(root, group_from="folder", folder_level=2)
    assert "1 of 4 files lie in no folder of folder_level=2 (-1: the one that" in message
    assert "the first: stray.wav" in message


def test_each_file_may_be_a_speaker_of_its_own_in_spite_of_a_manifest(tmp_path, caplog):
    root = tree(tmp_path, ["a.wav", "b.wav"], manifest_csv="path,speaker,language\na.wav,x,en\nb.wav,x,en\n")
    assert found(root, group_from="file") == {"a.wav": ("a.wav", "en"), "b.wav": ("b.wav", "en")}
    assert not caplog.records


def test_where_speakers_come_from_is_no_part_of_what_a_pack_is(tmp_path):
    """The same speakers found another way are the same pack; other speakers are not."""
    root = tree(tmp_path / "audio", LIBRI)
    (tmp_path / "mine.csv").write_text("file,who\n" + "".join(f"{one},{one.split('/')[1]}\n" for one in LIBRI))
    target = str(tmp_path / "shards")
    first = pack(str(root), target, PackConfig(group_from="folder", folder_level=2))
    mine = PackConfig(manifest=str(tmp_path / "mine.csv"), columns=ManifestColumns(path="file", speaker="who"))
    again = pack(str(root), target, mine)
    assert again.splits["train"].fingerprint == first.splits["train"].fingerprint
    with pytest.raises(UserError, match="other files or settings"):
        pack(str(root), target, PackConfig(group_from="file"))


def test_all_of_it_is_said_on_the_command_line(tmp_path, capsys):
    root = tree(tmp_path / "audio", LIBRI)
    (tmp_path / "mine.csv").write_text("file,who\n" + "".join(f"{one},{one.split('/')[1]}\n" for one in LIBRI))
    overrides = [f"manifest={tmp_path}/mine.csv", "columns={path: file, speaker: who}"]
    spec = config.load(PackConfig, None, overrides)
    assert (spec.columns.path, spec.columns.speaker, spec.columns.language) == ("file", "who", "language")
    assert config.load(PackConfig, None, ["columns.speaker=who"]).columns.speaker == "who"
    for wrong, words in (("group_from=folders", "group_from"), ("columns.speeker=x", "did you mean columns.speaker?")):
        assert main(["pack", str(root), str(tmp_path / "shards"), wrong]) == 2
        assert words in capsys.readouterr().err


def test_unseen_speakers_are_found_by_name_wherever_it_comes_from(tmp_path):
    root = tree(tmp_path / "audio", LIBRI)
    packed = pack(str(root), str(tmp_path / "x"), PackConfig(group_from="folder", folder_level=2, unseen_groups=["84"]))
    assert [key for key, split in members(packed).items() if split == "unseen"] == ["dev/84/121/84-121-0000"]
    packed = pack(str(root), str(tmp_path / "y"), PackConfig(unseen_groups=[LIBRI[0]]))
    assert [key for key, split in members(packed).items() if split == "unseen"] == ["train/19/198/19-198-0001"]


def test_a_table_on_a_store_speaks_for_files_on_a_store(tmp_path, s3: ObjectStore):
    root = storage.join(s3.base, tmp_path.name)
    storage.write(storage.join(root, "audio", "a.wav"), SOUND)
    storage.write(storage.join(root, "who.tsv"), b"path\tspeaker\na.wav\tanna\n")
    [one] = find_audio(storage.join(root, "audio"), FindConfig(manifest=storage.join(root, "who.tsv")))
    assert (one.path, one.group) == (storage.join(root, "audio", "a.wav"), "anna")


def test_two_files_of_one_name_are_refused(tmp_path):
    root = tree(tmp_path / "audio", ["a.wav"])
    with pytest.raises(UserError, match=r"two files have the name 'a\.wav'"):
        pack_sources([*find_audio(str(root))] * 2, str(tmp_path / "shards"), PackConfig())


@pytest.mark.parametrize("keep", [False, True])
def test_a_speaker_is_kept_in_one_shard_where_that_is_asked(tmp_path, keep):
    names = [f"{speaker}/{number}.wav" for speaker in "abcdef" for number in range(4)]
    sound = audio.encode(noise(2.4), "wav")
    root = write_tree(
        tmp_path / "audio", dict.fromkeys([*names, "alone.wav"], sound), {name: name[0] for name in names}
    )
    # About two speakers' speech in a shard, and pieces of long files.
    spec = {"keep_speakers": keep, "codec": "wav", "shard_mb": 0.6, "max_s": 1.2}
    pack(str(root), str(tmp_path / "set"), PackConfig(**spec))
    index = Index.load(str(tmp_path / "set" / "train"))
    shards_of: dict[str, set[int]] = {}
    for shard in range(index.shards.num_rows):
        for group in index.rows(shard).table["group"].to_pylist():
            shards_of.setdefault(group, set()).add(shard)
    assert index.count == 2 * 25 and index.shards.num_rows >= 3
    assert (max(len(shards_of[speaker]) for speaker in "abcdef") == 1) == keep
    speaker_of = WindowSpeakers(index, WindowConfig(seconds=0.1))
    for shard in range(index.shards.num_rows):
        rows, said = index.rows(shard), speaker_of(shard)
        assert len(said) == window.count(speaker_of.spec, rows.samples).sum()
        # A file without a speaker has none to make runs of.
        assert (said < 0).any() == ("alone.wav" in rows.table["recording"].to_pylist())
