"""Promises of reading members: the packed bytes or a refusal that names the shard, never other bytes."""

from __future__ import annotations

import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_store import ObjectStore

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards.cache import ShardCache
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


def upload(folder: Path, base: str, kept: int | None = None) -> None:
    """The shard set at `folder` put at `base`, its tars cut to `kept` bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            storage.write(storage.join(base, name), data[:kept] if path.suffix == ".tar" else data)


def packed_members(index: Index) -> list[bytes]:
    """The bytes that tar finds under each key, in index order."""
    found = []
    for shard in range(index.shards.num_rows):
        for row in index.rows(shard).table.to_pylist():
            with tarfile.open(index.url(shard)) as tar:
                member = tar.extractfile(f"{row['key']}.{row['codec']}")
                assert member is not None
                found.append(member.read())
    return found


def member(reader: ShardReader, utterance: int) -> bytes:
    """The member of this utterance number, as the feed asks for it."""
    rows = reader.rows(int(reader.index.shard_of(utterance)))
    row = utterance - rows.first
    return reader.member(rows, row, reader.start_read(rows, row))


def url_of(index: Index, utterance: int) -> str:
    return index.url(int(index.shard_of(utterance)))


def refusal(reader: ShardReader, utterance: int) -> str:
    with pytest.raises(UserError) as caught:
        member(reader, utterance)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_is_the_bytes_that_tar_finds_under_its_key(shard_set):
    index = Index.load(str(shard_set))
    reader = ShardReader(index)
    expected = packed_members(index)
    assert [member(reader, n) for n in range(len(expected))] == expected


def test_threads_may_share_a_reader(shard_set):
    index = Index.load(str(shard_set))
    reader, expected = ShardReader(index), packed_members(index)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda n: member(reader, n), list(range(len(expected))) * 10))
    assert got == expected * 10


def test_a_member_of_a_store_is_the_same_bytes(shard_set, tmp_path, s3: ObjectStore):
    base = storage.join(s3.base, tmp_path.name)
    upload(shard_set, base)
    index = Index.load(base)
    reader, expected = ShardReader(index), packed_members(Index.load(str(shard_set)))
    assert [member(reader, n) for n in range(len(expected))] == expected
    assert url_of(index, 0) == storage.join(base, "shard-000000.tar")


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_in_a_tar_is_refused_with_the_shards_name(copied, place):
    index = Index.load(str(copied))
    expected = packed_members(index)
    row = index.utterances.to_pylist()[7]
    shard = Path(url_of(index, 7))
    data = bytearray(shard.read_bytes())
    data[row["offset"] + {"first": 0, "middle": row["size"] // 2, "last": row["size"] - 1}[place]] ^= 1
    shard.write_bytes(data)
    reader = ShardReader(index)
    message = refusal(reader, 7)
    assert str(shard) in message
    assert "checksum" in message
    assert str(row["offset"]) in message
    # The shard's other members are still good, and stay readable.
    assert [member(reader, n) for n in range(len(expected)) if n != 7] == expected[:7] + expected[8:]


@pytest.mark.parametrize("kept", [0, 600, 20_000])
def test_a_cut_tar_is_refused_with_the_shards_name(copied, kept):
    index = Index.load(str(copied))
    shard = copied / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:kept])
    reader = ShardReader(index)
    utterances = [n for n in range(index.count) if url_of(index, n) == str(shard)]
    lost = [n for n in utterances if kept < index.utterances["offset"][n].as_py() + index.utterances["size"][n].as_py()]
    assert lost
    for utterance in lost:
        assert str(shard) in refusal(reader, utterance)


def test_a_tar_that_is_gone_is_refused_with_the_shards_name(copied):
    index = Index.load(str(copied))
    (copied / "shard-000000.tar").unlink()
    assert "shard-000000.tar" in refusal(ShardReader(index), 0)


def test_a_cut_tar_in_a_store_is_refused_with_the_shards_name(shard_set, tmp_path, s3: ObjectStore):
    base = storage.join(s3.base, tmp_path.name)
    upload(shard_set, base, kept=600)
    index = Index.load(base)
    for utterance in (0, 10):
        assert url_of(index, utterance) in refusal(ShardReader(index), utterance)


def test_a_cache_that_cannot_be_written_is_said_and_its_members_are_read_by_range(
    shard_set, tmp_path, s3: ObjectStore, caplog
):
    base = storage.join(s3.base, tmp_path.name)
    upload(shard_set, base)
    index, expected = Index.load(base), packed_members(Index.load(str(shard_set)))
    kept = ShardCache(tmp_path / "cache", 10**9)
    # The folder goes under the run, as when a user cleans up.
    shutil.rmtree(tmp_path / "cache")
    reader = ShardReader(index, kept)
    reader.prefetch(range(index.shards.num_rows))
    assert [member(reader, n) for n in range(len(expected))] == expected
    reader.close()
    assert "caching failed, reading members one by one" in caplog.text
    assert not reader._download_started and not reader._queued


def test_a_shard_that_was_put_back_is_read_again(copied):
    index = Index.load(str(copied))
    expected = packed_members(index)
    shard = copied / "shard-000000.tar"
    whole = shard.read_bytes()
    reader = ShardReader(index)
    shard.write_bytes(bytes(len(whole)))
    refusal(reader, 0)
    # By rename: the file that the reader had open is another one now.
    (copied / "restored").write_bytes(whole)
    (copied / "restored").replace(shard)
    assert member(reader, 0) == expected[0]
