"""The feed under faults: each run ends with the undisturbed batches, or in one line that names the shard.

A real S3 server behind a proxy that fails as told, real processes that are killed, real files that are damaged.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import long
from faulty_store import FaultyStore

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards.cache import CacheConfig
from cpcscale.shards.index import Index
from cpcscale.storage import StorageConfig
from cpcscale.stream.batch import Batch
from cpcscale.stream.feed import Feed, FeedConfig, FeedSource, ThreadFeed
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

SPEC, LANES, STEPS = WindowConfig(kind="tile", seconds=0.25), 3, 14
MODES = ["ranged", "shards"]
_STORED = StorageConfig(request_timeout_s=2, total_timeout_s=15, backoff_base_s=0.01, backoff_cap_s=0.1)


def source_of(base: str | Path, kept: CacheConfig, **feed: int) -> FeedSource:
    index = Index.load(str(base))
    order = RunOrder(shard_windows(index, SPEC), 7, LANES, 2 * LANES)
    return FeedSource(index, order, SPEC, FeedConfig(cache=kept, prefetch=2, **feed))


def feed_of(base: str | Path, kept: CacheConfig) -> ThreadFeed:
    return ThreadFeed(source_of(base, kept), range(LANES), 0, threads=2)


def taken(feed: Feed, disturb: Callable[[int], None] = lambda step: None) -> list[Batch]:
    """All batches; `disturb` is called before each."""
    batches = []
    try:
        for step in range(STEPS):
            disturb(step)
            batches.append(feed.next())
    finally:
        feed.close()
    return batches


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert [batch.step for batch in got] == list(range(STEPS))
    for one, other in zip(got, expected, strict=True):
        assert not one.bad
        for name in ("utterance_B", "number_B", "samples_B", "key_B", "wave_BS"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(shard_set: Path) -> list[Batch]:
    return taken(feed_of(shard_set, CacheConfig()))


@pytest.fixture
def stored(shard_set: Path, faulty_s3: FaultyStore) -> str:
    """The shard set behind the proxy, before any fault."""
    for path in shard_set.rglob("*"):
        if path.is_file():
            storage.write(storage.join(faulty_s3.base, path.relative_to(shard_set).as_posix()), path.read_bytes())
    storage.configure(_STORED)
    return faulty_s3.base


def cache_in(folder: Path, mode: str) -> CacheConfig:
    return CacheConfig(mode=mode, folder=str(folder / "cache"), max_gb=1)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["unavailable", "reset", "reset_in_body", "cut", "short", "flip"])
def test_requests_that_fail_now_and_then_change_nothing(stored, faulty_s3, undisturbed, tmp_path, mode, kind):
    # A third flip of one member's bytes would rightly end the run.
    often = {"times": 2} if kind == "flip" else {"share": 0.2}
    fault = faulty_s3.fail(kind, method="GET", path="shard-", **often)
    assert_same(taken(feed_of(stored, cache_in(tmp_path, mode))), undisturbed)
    assert fault.struck, "the fault was met"


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_hangs_for_some_requests_costs_a_pause(stored, faulty_s3, undisturbed, tmp_path, mode):
    fault = faulty_s3.fail("hang", times=2, method="GET", path="shard-")
    assert_same(taken(feed_of(stored, cache_in(tmp_path, mode))), undisturbed)
    assert fault.struck == 2


@pytest.mark.parametrize(("mode", "seconds"), [("ranged", 3), ("shards", 3), pytest.param("shards", 20, marks=long)])
def test_an_outage_of_the_store_is_a_pause(stored, faulty_s3, undisturbed, tmp_path, mode, seconds):
    # The limits that hold without a config.
    storage.configure(StorageConfig())

    def disturb(step: int) -> None:
        if step == 2:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            faulty_s3.down(seconds)

    assert_same(taken(feed_of(stored, cache_in(tmp_path, mode)), disturb), undisturbed)


@pytest.mark.parametrize("mode", MODES)
def test_a_store_that_stays_away_is_one_line_that_says_so(stored, faulty_s3, tmp_path, mode):
    storage.configure(StorageConfig(connect_timeout_s=1, total_timeout_s=2, backoff_cap_s=0.2))
    feed = feed_of(stored, cache_in(tmp_path, mode))
    faulty_s3.down(60)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    message = refusal(lambda: taken(feed))
    # Of a shard, or of the rows of the index that say where its members lie.
    assert stored in message
    assert "check that the store runs" in message


def harmed(base: str, how: str) -> str:
    """Damages the first shard at `base`, local or stored, and returns its name."""
    name = "shard-000000.tar"
    data = bytearray(storage.read(storage.join(base, name)))
    if how == "flipped":
        row = Index.load(base).rows(0)
        data[int(row.offset[0] + row.size[0] // 2)] ^= 1
    else:
        del data[len(data) // 3 :]
    storage.write(storage.join(base, name), bytes(data))
    return name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_shard_in_the_store_stops_the_run_with_its_name(stored, tmp_path, mode, how):
    name = harmed(stored, how)
    assert name in refusal(lambda: taken(feed_of(stored, cache_in(tmp_path, mode))))


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_local_shard_stops_the_run_with_its_name(shard_set, tmp_path, how):
    target = shutil.copytree(shard_set, tmp_path / "set")
    name = harmed(str(target), how)
    assert name in refusal(lambda: taken(feed_of(target, CacheConfig())))


def whole_shards(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache" / "shards").iterdir() if len(path.name) == 64]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_cache_that_is_damaged_is_filled_again(stored, undisturbed, tmp_path, how):
    kept = cache_in(tmp_path, "shards")
    taken(feed_of(stored, kept))
    for path in whole_shards(tmp_path):
        data = bytearray(path.read_bytes())
        match how:
            case "flipped":
                data[::1000] = bytes(byte ^ 1 for byte in data[::1000])
                path.write_bytes(data)
            case "cut":
                path.write_bytes(data[: len(data) // 2])
            case "gone":
                path.unlink()
    assert_same(taken(feed_of(stored, kept)), undisturbed)


FILLER = """
import sys, time
from cpcscale import storage
from cpcscale.shards.cache import CacheConfig, open_cache
from cpcscale.shards.index import Index

plain = storage.chunks

def slow(url, start=0):
    for chunk in plain(url, start, 20_000):
        yield chunk
        time.sleep(0.2)

storage.chunks = slow
index = Index.load(sys.argv[1])
kept = open_cache(CacheConfig(mode="shards", folder=sys.argv[2], max_gb=1), sys.argv[1], 1, 10**6)
for row in index.shards.to_pylist():
    kept.fill(sys.argv[1] + "/" + row["path"], row["sha256"].hex(), row["bytes"])
"""


@pytest.mark.parametrize("after", [1, 3])
def test_a_process_killed_while_it_fills_the_cache_disturbs_no_other(stored, undisturbed, tmp_path, after):
    kept = cache_in(tmp_path, "shards")
    filler = subprocess.Popen([sys.executable, "-c", FILLER, stored, kept.folder])
    part = tmp_path / "cache" / "shards"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in part.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)

    def disturb(step: int) -> None:
        if step == after:
            filler.kill()
            filler.wait()

    assert_same(taken(feed_of(stored, kept), disturb), undisturbed)


def feeders() -> list[psutil.Process]:
    """The processes of feeder actors below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "Feeder" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


# Two feeders, each two batches ahead: that both are gone is noticed by step 5, and one of the new ones can die at 6.
@pytest.mark.parametrize("kills", [(0,), (1, 2, 6), (3, 9)])
def test_a_killed_feeder_is_replaced_and_its_batches_are_the_same(shard_set, undisturbed, ray_here, kills):
    from cpcscale.cluster.feeders import ActorFeed

    # What was killed is listed until the kernel has taken it down.
    gone = {process.pid for process in feeders()}
    before = len(gone)
    feed = ActorFeed(source_of(shard_set, CacheConfig(), actors=2), range(LANES), 0, StorageConfig())

    def disturb(step: int) -> None:
        if step in kills:
            deadline = time.monotonic() + 60
            while not (alive := [each for each in feeders() if each.pid not in gone]):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(alive[0].pid, signal.SIGKILL)
            gone.add(alive[0].pid)

    assert_same(taken(feed, disturb), undisturbed)
    assert len(gone) == before + len(kills)


def test_feeder_actors_over_a_store_give_the_same_batches(stored, faulty_s3, undisturbed, ray_here, tmp_path):
    from cpcscale.cluster.feeders import ActorFeed

    # Actors take the store's address from the process that started Ray: theirs is without the proxy.
    kept = cache_in(tmp_path, "shards")
    feed = ActorFeed(source_of(stored, kept, actors=2), range(LANES), 0, _STORED)
    assert_same(taken(feed), undisturbed)


def test_a_damaged_shard_stops_feeder_actors_with_its_name(shard_set, tmp_path, ray_here):
    from cpcscale.cluster.feeders import ActorFeed

    target = shutil.copytree(shard_set, tmp_path / "set")
    name = harmed(str(target), "flipped")
    feed = ActorFeed(source_of(target, CacheConfig(), actors=2), range(LANES), 0, StorageConfig())
    assert name in refusal(lambda: taken(feed))
