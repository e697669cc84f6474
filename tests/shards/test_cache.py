"""Promises of the cache: one download a shard and node, never other bytes, whatever dies or runs full."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards import cache
from cpcscale.shards.cache import CacheConfig, NoRoomError, ShardCache

SIZE = 3_000_000


class Remote:
    """Files that stand for shards in a store: their bytes, digests, and how often their content was asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, list[str]()
        folder.mkdir()
        chunks = storage.chunks

        def counting(url: str, start: int = 0, chunk_bytes: int = 100_000) -> Iterator[bytes]:
            self.asked.append(f"{Path(url).name}@{start}")
            yield from chunks(url, start, chunk_bytes)

        monkeypatch.setattr(storage, "chunks", counting)

    def shard(self, number: int, size: int = SIZE) -> tuple[str, str, int]:
        """(url, sha256, bytes) of a made shard."""
        data = np.random.default_rng(number).bytes(size)
        path = self.folder / f"{number}.tar"
        path.write_bytes(data)
        return str(path), hashlib.sha256(data).hexdigest(), size


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    return Remote(tmp_path / "store", monkeypatch)


def held(folder: Path) -> list[str]:
    """The names of the whole shards in a cache."""
    return sorted(path.name for path in (folder / "shards").iterdir() if len(path.name) == 64)


def test_a_filled_shard_is_the_stores_bytes_and_is_not_fetched_twice(remote, tmp_path):
    url, digest, size = remote.shard(0)
    kept = ShardCache(tmp_path / "cache", 10 * SIZE)
    assert not kept.holds(digest, size)
    assert kept.find(digest, size) is None
    assert kept.fill(url, digest, size)
    assert kept.fill(url, digest, size)
    assert remote.asked == ["0.tar@0"]
    assert kept.holds(digest, size)
    assert kept.find(digest, size).path.read_bytes() == Path(url).read_bytes()
    assert {path.name for path in (tmp_path / "cache" / "shards").iterdir()} == {digest, "lock"}


def test_one_of_many_threads_and_caches_downloads_and_the_others_do_not_wait(remote, tmp_path):
    url, digest, size = remote.shard(0)
    caches = [ShardCache(tmp_path / "cache", 10 * SIZE) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda kept: kept.fill(url, digest, size), caches))
    assert remote.asked == ["0.tar@0"]
    assert any(done)
    assert held(tmp_path / "cache") == [digest]


FILL = """
import sys, time
from pathlib import Path
from cpcscale import storage
from cpcscale.shards.cache import ShardCache

plain = storage.chunks

def slow(url, start=0):
    for chunk in plain(url, start, 100_000):
        yield chunk
        time.sleep(float(sys.argv[5]))

storage.chunks = slow
print(ShardCache(Path(sys.argv[1]), 10**9).fill(sys.argv[2], sys.argv[3], int(sys.argv[4])), flush=True)
"""


def filling(folder: Path, url: str, digest: str, size: int, pause_s: float) -> subprocess.Popen[str]:
    """A process that fills a shard slowly."""
    arguments = [str(folder), url, digest, str(size), str(pause_s)]
    return subprocess.Popen([sys.executable, "-c", FILL, *arguments], stdout=subprocess.PIPE, text=True)


def until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def part_bytes(folder: Path) -> int:
    parts = list((folder / "shards").glob("*.part")) if (folder / "shards").exists() else []
    return parts[0].stat().st_size if parts else 0


def test_what_a_process_filled_before_it_was_killed_is_not_fetched_again(remote, tmp_path):
    url, digest, size = remote.shard(0)
    process = filling(tmp_path / "cache", url, digest, size, 0.05)
    until(lambda: part_bytes(tmp_path / "cache") >= 300_000)
    kept = ShardCache(tmp_path / "cache", 10 * SIZE)
    assert not kept.fill(url, digest, size), "a live process holds it"
    # What stands in the part may be read, and is what the store has.
    part = kept.find(digest, size).path.read_bytes()
    assert Path(url).read_bytes().startswith(part)
    assert len(part) >= 300_000
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert kept.fill(url, digest, size)
    [asked] = remote.asked
    assert int(asked.partition("@")[2]) >= 300_000
    assert held(tmp_path / "cache") == [digest]


def test_a_part_with_other_bytes_is_fetched_again_from_its_start(remote, tmp_path):
    url, digest, size = remote.shard(0)
    kept = ShardCache(tmp_path / "cache", 10 * SIZE)
    (tmp_path / "cache" / "shards" / f"{digest}.{size}.part").write_bytes(bytes(500_000))
    assert kept.fill(url, digest, size)
    assert remote.asked == ["0.tar@500000", "0.tar@0"]
    assert kept.find(digest, size).path.read_bytes() == Path(url).read_bytes()


@pytest.mark.parametrize("harm", ["flipped", "cut", "longer"])
def test_a_shard_that_does_not_match_its_hash_is_never_kept_and_named(remote, tmp_path, harm):
    url, digest, size = remote.shard(0)
    data = bytearray(Path(url).read_bytes())
    match harm:
        case "flipped":
            data[size // 2] ^= 1
        case "cut":
            data = data[: size // 2]
        case "longer":
            data += b"x"
    Path(url).write_bytes(data)
    kept = ShardCache(tmp_path / "cache", 10 * SIZE)
    with pytest.raises(UserError, match=r"0\.tar does not match its sha256 after it was fetched twice"):
        kept.fill(url, digest, size)
    assert held(tmp_path / "cache") == []
    assert not part_bytes(tmp_path / "cache")


def test_the_least_recently_used_shards_make_room(remote, tmp_path):
    shards = [remote.shard(number) for number in range(4)]
    kept = ShardCache(tmp_path / "cache", 3 * SIZE)
    for number, shard in enumerate(shards[:3]):
        kept.fill(*shard)
        os.utime(tmp_path / "cache" / "shards" / shard[1], (number, number))
    kept.find(*shards[0][1:])  # used again: now the second is the oldest
    kept.fill(*shards[3])
    assert held(tmp_path / "cache") == sorted(shard[1] for shard in (shards[0], shards[2], shards[3]))


def test_the_cache_never_outgrows_its_bound_even_while_several_fill(remote, tmp_path):
    shards = [remote.shard(number) for number in range(12)]
    kept = ShardCache(tmp_path / "cache", 4 * SIZE)
    most, stop = [0], threading.Event()

    def watch() -> None:
        before: dict[int, int] = {}
        while not stop.is_set():
            # By inode: a shard that is renamed meanwhile may be met under both names.
            sizes = {}
            for path in (tmp_path / "cache" / "shards").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    sizes[state.st_ino] = state.st_size
            # A listing takes a while: only shards that stood before and after were there together.
            most[0] = max(most[0], sum(min(size, sizes[inode]) for inode, size in before.items() if inode in sizes))
            before = sizes

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda shard: kept.fill(*shard), shards * 2))
    stop.set()
    watcher.join()
    assert SIZE < most[0] <= 4 * SIZE
    assert len(held(tmp_path / "cache")) <= 4


def test_a_shard_that_an_open_reader_holds_stays_readable_when_it_is_evicted(remote, tmp_path):
    first, second = remote.shard(0), remote.shard(1)
    kept = ShardCache(tmp_path / "cache", SIZE)
    kept.fill(*first)
    with kept.find(*first[1:]).path.open("rb") as file:
        kept.fill(*second)
        assert held(tmp_path / "cache") == [second[1]]
        assert hashlib.sha256(file.read()).hexdigest() == first[1]


def test_a_shard_larger_than_the_cache_has_no_room_and_leaves_nothing(remote, tmp_path):
    kept = ShardCache(tmp_path / "cache", SIZE - 1)
    with pytest.raises(NoRoomError):
        kept.fill(*remote.shard(0))
    assert not part_bytes(tmp_path / "cache")


def test_a_shard_that_is_being_filled_is_not_evicted_under_its_filler(remote, tmp_path):
    first, second = remote.shard(0), remote.shard(1)
    process = filling(tmp_path / "cache", *first, 0.02)
    until(lambda: part_bytes(tmp_path / "cache") >= 300_000)
    with pytest.raises(NoRoomError):
        ShardCache(tmp_path / "cache", SIZE).fill(*second)
    assert process.communicate()[0] == "True\n"
    assert held(tmp_path / "cache") == [first[1]]


def test_a_disk_that_runs_full_gives_up_old_shards_then_the_new_one(remote, tmp_path, monkeypatch):
    kept = ShardCache(tmp_path / "cache", 10 * SIZE)
    for number in range(2):
        kept.fill(*remote.shard(number))
    plain, room = os.write, [SIZE // 2]

    def full(descriptor: int, data: memoryview) -> int:
        """A disk with some room, and what removed shards give back."""
        free = room[0] + (2 - len(held(tmp_path / "cache"))) * SIZE
        if len(data) > free:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(data)
        return plain(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    url, digest, size = remote.shard(2)
    assert kept.fill(url, digest, size)
    assert len(held(tmp_path / "cache")) == 2, "one old shard went"
    room[0] = -10 * SIZE
    with pytest.raises(NoRoomError, match="No space left"):
        kept.fill(*remote.shard(3))
    assert not part_bytes(tmp_path / "cache")


def test_a_node_without_room_for_its_lanes_reads_by_range_or_refuses(tmp_path, caplog):
    folder = str(tmp_path / "cache")
    enough = CacheConfig(folder=folder, max_gb=0.016)
    assert enough.least_bytes(4, 2_000_000) == 16_000_000
    assert cache.open_cache(enough, "s3://b/set", 4, 2_000_000) is not None
    small = CacheConfig(folder=folder, max_gb=0.015)
    assert cache.open_cache(small, "s3://b/set", 4, 2_000_000) is None
    assert "4 lanes need" in caplog.text
    with pytest.raises(UserError, match=r"feed\.cache\.max_gb=0\.015 is less than the 0\.016 GB that 4 lanes need"):
        cache.open_cache(CacheConfig(mode="shards", folder=folder, max_gb=0.015), "s3://b/set", 4, 2_000_000)
    assert cache.open_cache(enough, str(tmp_path), 4, 2_000_000) is None, "what is on this disk is read where it lies"
    assert cache.open_cache(CacheConfig(mode="ranged", folder=folder), "s3://b/set", 4, 2_000_000) is None


@pytest.mark.parametrize("why", ["no folder can be made", "no locks"])
def test_a_folder_that_cannot_be_used_is_one_warning_and_utterances_are_read_one_by_one(
    why, tmp_path, monkeypatch, caplog
):
    if why == "no locks":
        monkeypatch.setattr(fcntl, "flock", without_locks)
    else:
        (tmp_path / "file").touch()
    spec = CacheConfig(folder=str(tmp_path / "file"), max_gb=1)
    for _ in range(2):
        assert cache.open_cache(spec, "s3://b/set", 4, 2_000_000) is None
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"feed.cache.folder={tmp_path}/file cannot be used (")
    assert line.endswith("reading each utterance by itself instead")


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
