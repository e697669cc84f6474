"""Promises of packing: nothing lost, the same bytes anywhere, plain tars, and nothing half-written left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import xxhash
from object_store import ObjectStore
from trees import backwards, contents, corpus, hidden, members, noise, promised, threads, write_tree

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing import write_tars
from cpcscale.shards.packing.write_tars import pack_task
from cpcscale.shards.reader import ShardReader
from cpcscale.shards.rows import scan

SETTINGS: dict[str, Any] = {
    "shard_mb": 0.12,
    "heldout_share": 0.2,
    "heldout_by": "utterance",
    "unseen_groups": ["s3"],
}
SMALL = PackConfig(**SETTINGS)


def tars(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".tar")}


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "audio")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "shards"
    pack(str(source), str(folder), SMALL)
    return folder


@pytest.fixture(scope="module", params=audio.CODECS)
def shard_rows(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Each tar of the corpus packed with a codec, and its index rows. One key is too long for a plain tar header."""
    folder = tmp_path_factory.mktemp(request.param)
    corpus = write_tree(Path(shutil.copytree(source, folder / "audio")), {f"{'deep/' * 24}{'x' * 120}.wav": noise(0.6)})
    packed = pack(str(corpus), str(folder / "shards"), replace(SMALL, codec=request.param))
    found = []
    for index in packed.splits.values():
        names, counts = index.shards["path"].to_pylist(), index.shards["utterances"].to_pylist()
        assert sorted(names) == sorted(path.name for path in Path(index.base).glob("*.tar"))
        rows = iter(index.utterances.to_pylist())
        found += [
            (Path(index.base, name), list(islice(rows, count))) for name, count in zip(names, counts, strict=True)
        ]
    return found


def test_webdataset_reads_of_every_shard_what_the_index_says(shard_rows):
    for path, rows in shard_rows:
        for sample, row in zip(webdataset.WebDataset(str(path), shardshuffle=False), rows, strict=True):
            data, meta = sample[row["codec"]], json.loads(sample["json"])
            assert (sample["__key__"], meta["key"], meta["source"]) == (row["key"], row["key"], row["recording"])
            assert (len(data), xxhash.xxh3_64_intdigest(data)) == (row["size"], row["checksum"])
            for name in ("samples", "rate_hz", "group", "language", "mean", "mean_square"):
                assert meta[name] == row[name]
            wave = audio.to_int16(audio.decode(data))
            assert len(wave) == row["samples"]
            if row["codec"] != "opus":
                original = path.parents[2] / "audio" / row["recording"]
                np.testing.assert_array_equal(wave, audio.to_int16(audio.decode(str(original))))


def test_tar_reads_of_every_shard_what_the_index_says(shard_rows, tmp_path):
    for number, (path, rows) in enumerate(shard_rows):
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.splitlines()
        assert listed == [f"{row['key']}.{suffix}" for row in rows for suffix in (row["codec"], "json")]
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run(["tar", "-xf", path, "-C", folder], check=True)
        for row in rows:
            data = (folder / f"{row['key']}.{row['codec']}").read_bytes()
            assert (len(data), xxhash.xxh3_64_intdigest(data)) == (row["size"], row["checksum"])
            assert path.read_bytes()[row["offset"] :].startswith(data)


def test_webdatasets_own_writer_makes_the_same_bytes_of_the_same_members(shard_rows, tmp_path):
    again = tmp_path / "again.tar"
    for path, rows in shard_rows:
        samples = webdataset.WebDataset(str(path), shardshuffle=False)
        with webdataset.TarWriter(str(again), user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for sample, row in zip(samples, rows, strict=True):
                # It sorts what it writes at once by suffix; a packed tar has the audio first.
                for suffix in (row["codec"], "json"):
                    tar.write({"__key__": row["key"], suffix: sample[suffix]})
        assert again.read_bytes() == path.read_bytes()


def test_packing_loads_no_torch(run_python):
    text = "import sys, cpcscale.cluster.tasks, cpcscale.shards.pack; print('torch' in sys.modules)"
    assert run_python(text) == (0, ["False"])


def test_packing_makes_several_shards_of_the_asked_size(undisturbed):
    sizes = [path.stat().st_size for path in (undisturbed / "train").glob("*.tar")]
    assert len(sizes) >= 3
    # Noise does not compress, and small members pay for tar's blocks: about twice the target, never many times.
    assert min(sizes) > 0.03e6
    assert max(sizes) < 0.5e6


@pytest.mark.parametrize(("codec", "run"), [("wav", backwards), ("flac", threads), ("opus", threads)])
def test_the_same_input_gives_the_same_bytes_in_another_folder_and_order(source, tmp_path, codec, run):
    spec = replace(SMALL, codec=codec)
    first = pack(str(source), str(tmp_path / "first"), spec)
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere" / "moved"))
    second = pack(str(moved), str(tmp_path / "second"), spec, run)
    assert promised(tmp_path / "first") == promised(tmp_path / "second")
    assert [i.fingerprint for i in first.splits.values()] == [i.fingerprint for i in second.splits.values()]


def test_another_seed_gives_another_order_of_the_same_utterances(source, tmp_path):
    plain = PackConfig(shard_mb=0.12)
    packed = [pack(str(source), str(tmp_path / str(seed)), replace(plain, seed=seed)) for seed in (0, 1)]
    first, second = (list(members(one)) for one in packed)
    assert first != second
    assert sorted(first) == sorted(second)
    names = sorted(first)
    assert first != names
    assert second != names


class Stopped(BaseException):
    """The process ends here."""


def stopping(function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> Iterator[Any]:
    """A map that ends after two tasks of pass 2."""
    for number, item in enumerate(items):
        if function is pack_task and number == 2:
            raise Stopped
        yield function(item)


def test_a_stopped_pack_goes_on_and_ends_with_the_same_bytes(source, undisturbed, tmp_path, monkeypatch):
    target = tmp_path / "shards"
    with pytest.raises(Stopped):
        pack(str(source), str(target), SMALL, stopping)
    assert len(tars(target)) == 2
    assert not list(target.rglob("index.json"))
    assert not list(target.rglob("part-*"))
    written = {path: path.stat().st_mtime_ns for path in target.rglob("*.tar")}
    read = []
    monkeypatch.setattr(write_tars, "scan", lambda path, name: (read.append(name), scan(path, name))[1])
    pack(str(source), str(target), SMALL)
    assert promised(target) == promised(undisturbed)
    assert not hidden(target)
    # What is done is neither made nor read again.
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(read) == len(tars(target)) - 2


def test_a_pack_that_ran_out_of_room_is_one_line_and_goes_on(source, undisturbed, tmp_path, run_python):
    target = tmp_path / "shards"
    text = f"""
import resource
from cpcscale.shards.pack import PackConfig, pack
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
pack({str(source)!r}, {str(target)!r}, PackConfig(**{SETTINGS!r}))
"""
    status, lines = run_python(text)
    assert status == 1
    assert lines[-1].startswith("cpcscale.errors.UserError: no room to write")
    assert not list(target.rglob("*.t*"))
    pack(str(source), str(target), SMALL)
    assert promised(target) == promised(undisturbed)


@pytest.mark.parametrize("markers", [True, False])
def test_a_lost_shard_is_packed_again_and_the_set_is_the_same(source, undisturbed, tmp_path, markers):
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    (target / "train" / "shard-000001.tar").unlink()
    if markers:
        for name in ("train/index.json", "heldout/index.json"):
            (target / name).unlink()
    pack(str(source), str(target), SMALL)
    assert promised(target) == promised(undisturbed)


def test_results_come_one_by_one_and_none_is_kept(source, tmp_path):
    made: list[weakref.ref[Any]] = []

    def watched(function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for item in items:
            result = function(item)
            made.append(weakref.ref(result))
            yield result
            del result
            assert sum(one() is not None for one in made) <= 1

    pack(str(source), str(tmp_path), SMALL, watched)
    assert len(made) > 5


def test_a_second_pack_into_the_same_folder_packs_nothing(source, undisturbed, tmp_path):
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    ran = []

    def recording(function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> list[Any]:
        ran.append(function)
        return [function(item) for item in items]

    again = pack(str(source), str(target), SMALL, recording)
    assert pack_task not in ran
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    first = pack(str(source), str(tmp_path / "fresh"), SMALL)
    assert members(again) == members(first)
    assert again.quarantine == first.quarantine


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"codec": "wav"}, {"heldout_share": 0.3}, {"min_s": 0.3}, {"max_s": 1.0}]
)
def test_another_pack_into_the_same_folder_is_refused_and_the_first_stays(source, undisturbed, tmp_path, change):
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    assert "another folder" in refusal(lambda: pack(str(source), str(target), replace(SMALL, **change)))
    assert contents(target) == contents(undisturbed)


@pytest.mark.parametrize("change", ["added", "longer", "language"])
def test_a_changed_source_is_refused_not_overlooked(source, undisturbed, tmp_path, change):
    moved = Path(shutil.copytree(source, tmp_path / "audio"))
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    match change:
        case "added":
            write_tree(moved, {"s0/new.wav": noise(1, seed=99)})
        case "longer":  # by too little to change which shard holds what
            wave = audio.to_int16(audio.decode(str(moved / "s0/1.wav")))
            write_tree(moved, {"s0/1.wav": np.append(wave, wave[:16])})
        case "language":
            table = (moved / "manifest.csv").read_text()
            (moved / "manifest.csv").write_text(table.replace(",en", ",fr"))
    assert "other files or settings" in refusal(lambda: pack(str(moved), str(target), SMALL))


def test_tars_of_no_known_pack_are_refused_and_stay(source, undisturbed, tmp_path):
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    (target / "assignment.json").unlink()
    before = contents(target)
    for spec in (SMALL, replace(SMALL, seed=1)):
        assert "are not of a pack" in refusal(lambda spec=spec: pack(str(source), str(target), spec))
    assert contents(target) == before


def test_a_tar_put_in_place_of_another_is_refused(source, undisturbed, tmp_path):
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    (target / "train" / "index.json").unlink()
    shutil.copy(target / "train" / "shard-000001.tar", target / "train" / "shard-000000.tar")
    assert "shard-000000.tar is not of this pack" in refusal(lambda: pack(str(source), str(target), SMALL))


def test_a_cut_tar_is_named_and_packed_again_when_removed(source, undisturbed, tmp_path):
    target = Path(shutil.copytree(undisturbed, tmp_path / "shards"))
    (target / "train" / "index.json").unlink()
    shard = target / "train" / "shard-000000.tar"
    whole = shard.read_bytes()
    for length in (len(whole) // 2, 700, 0):
        shard.write_bytes(whole[:length])
        assert "shard-000000.tar" in refusal(lambda: pack(str(source), str(target), SMALL))
    shard.unlink()
    pack(str(source), str(target), SMALL)
    assert promised(target) == promised(undisturbed)


def test_packing_from_and_to_a_store_gives_what_packing_on_disk_gives(source, undisturbed, tmp_path, s3: ObjectStore):
    away, target = storage.join(s3.base, tmp_path.name, "audio"), storage.join(s3.base, tmp_path.name, "shards")
    for path in (path for path in source.rglob("*") if path.is_file()):
        storage.write(storage.join(away, path.relative_to(source).as_posix()), path.read_bytes())
    pack(away, target, SMALL, threads)
    expected = promised(undisturbed)
    assert promised(target) == expected
    notes = storage.join(target, ".packing")
    assert not storage.exists(notes) or not storage.list_files(notes)
    # A shard and the marker are lost; the next run brings them back.
    for name in ("train/shard-000001.tar", "train/index.json"):
        storage.remove(storage.join(target, name))
    packed = pack(away, target, SMALL)
    assert promised(target) == expected
    assert packed.splits["train"].fingerprint == Index.load(str(undisturbed / "train")).fingerprint
    reader = ShardReader(Index.load(storage.join(target, "train")))
    local = ShardReader(Index.load(str(undisturbed / "train")))
    rows = local.index.rows(0)
    assert [reader.member(rows, n) for n in range(5)] == [local.member(rows, n) for n in range(5)]
