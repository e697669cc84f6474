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
from cpcscale.shards.index import Index
from cpcscale.shards.read import ShardReader


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


def packed_members(index: Index) -> list[bytes]:
    """The bytes that tar finds under each key, in index order."""
    found = []
    for row in index.utterances.to_pylist():
        with tarfile.open(Path(index.base) / index.shards["path"].to_pylist()[row["shard"]]) as tar:
            member = tar.extractfile(f"{row['key']}.{row['codec']}")
            assert member is not None
            found.append(member.read())
    return found


def refusal(reader: ShardReader, utterance: int) -> str:
    with pytest.raises(UserError) as caught:
        reader.member(utterance)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_is_the_bytes_that_tar_finds_under_its_key(shard_set):
    index = Index.load(str(shard_set))
    reader = ShardReader(index)
    expected = packed_members(index)
    assert [reader.member(n) for n in range(len(expected))] == expected


def test_threads_may_share_a_reader(shard_set):
    index = Index.load(str(shard_set))
    reader, expected = ShardReader(index), packed_members(index)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(reader.member, list(range(len(expected))) * 10))
    assert got == expected * 10


def test_a_member_of_a_store_is_the_same_bytes(shard_set, tmp_path, s3: ObjectStore):
    base = storage.join(s3.base, tmp_path.name)
    for path in shard_set.iterdir():
        storage.write(storage.join(base, path.name), path.read_bytes())
    index = Index.load(base)
    reader, expected = ShardReader(index), packed_members(Index.load(str(shard_set)))
    assert [reader.member(n) for n in range(len(expected))] == expected
    assert reader.shard_path(0) == storage.join(base, "shard-000000.tar")


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_in_a_tar_is_refused_with_the_shards_name(copied, place):
    index = Index.load(str(copied))
    expected = packed_members(index)
    row = index.utterances.to_pylist()[7]
    shard = copied / index.shards["path"].to_pylist()[row["shard"]]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + {"first": 0, "middle": row["size"] // 2, "last": row["size"] - 1}[place]] ^= 1
    shard.write_bytes(data)
    reader = ShardReader(index)
    message = refusal(reader, 7)
    assert str(shard) in message
    assert "checksum" in message
    assert str(row["offset"]) in message
    # The shard's other members are still good, and stay readable.
    assert [reader.member(n) for n in range(len(expected)) if n != 7] == expected[:7] + expected[8:]


@pytest.mark.parametrize("kept", [0, 600, 20_000])
def test_a_cut_tar_is_refused_with_the_shards_name(copied, kept):
    index = Index.load(str(copied))
    shard = copied / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:kept])
    reader = ShardReader(index)
    utterances = [n for n in range(len(index.samples)) if reader.shard_path(n) == str(shard)]
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
    for path in shard_set.iterdir():
        data = path.read_bytes()
        storage.write(storage.join(base, path.name), data[:600] if path.suffix == ".tar" else data)
    reader = ShardReader(Index.load(base))
    for utterance in (0, 10):
        assert reader.shard_path(utterance) in refusal(reader, utterance)
