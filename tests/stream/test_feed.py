"""Promises of the feed: the same batches whatever reads them, bad clips keep their place, and nothing stays behind."""

from __future__ import annotations

import gc
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import xxhash
from object_store import ObjectStore
from trees import noise

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.cache import CacheConfig
from cpcscale.shards.index import Index
from cpcscale.shards.index_writer import exclude, publish
from cpcscale.shards.rows import scan
from cpcscale.stream import window
from cpcscale.stream.batch import Batch, Measures, UnfilledBatch
from cpcscale.stream.epoch_order import EpochOrder
from cpcscale.stream.feed import FeedConfig, FeedSource, ThreadFeed, decode_threads, fixed_batches
from cpcscale.stream.lanes import PADDING, Lanes, lanes_of_rank
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

TILE, CROP = WindowConfig(kind="tile", seconds=0.25), WindowConfig(kind="crop", seconds=0.5)
SEED = 5


class Run(NamedTuple):
    index: Index
    spec: WindowConfig
    order: RunOrder
    cache: CacheConfig

    @property
    def plan(self) -> EpochOrder:
        return self.order.epoch_order

    @property
    def lanes(self) -> Lanes:
        return self.order.lanes


def run_of(
    base: Path | str,
    spec: WindowConfig = TILE,
    lanes: int = 3,
    batch: int = 6,
    cache: CacheConfig = CacheConfig(),  # noqa: B008
) -> Run:
    index = Index.load(str(base))
    return Run(index, spec, RunOrder(shard_windows(index, spec), SEED, lanes, batch), cache)


def feed_of(run: Run, start: int = 0, rank: int = 0, world: int = 1, threads: int = 2, prefetch: int = 3) -> ThreadFeed:
    source = FeedSource(run.index, run.order, run.spec, FeedConfig(prefetch=prefetch, cache=run.cache))
    return ThreadFeed(source, lanes_of_rank(run.lanes.lanes, rank, world), start, threads=threads)


def taken(feed: ThreadFeed, steps: int) -> list[Batch]:
    try:
        return [feed.next() for _ in range(steps)]
    finally:
        feed.close()


def slow_number(run: Run, shard: int, ordinal: int) -> tuple[int, int]:
    """(utterance, window number) of a shard's window, counted one by one."""
    first, last = run.index.bounds[shard : shard + 2].tolist()
    windows = [
        (utterance, number)
        for utterance in range(first, last)
        for number in range(window.count(run.spec, run.index.samples[utterance : utterance + 1])[0])
    ]
    return windows[ordinal]


def slow_batches(run: Run, steps: range, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The same batches by the longest way: each member out of its tar, decoded whole, one window after the other."""
    rows = run.index.utterances.to_pylist()
    for step in steps:
        waves, ids = [], []
        for lane in range(rank, run.lanes.lanes, world):
            epoch, positions = run.lanes.positions(step, lane)
            for position in positions:
                wave, size, key, group = np.zeros(run.spec.samples, np.int16), 0, 0, 0
                utterance = number = PADDING
                if position != PADDING:
                    shard, ordinal = (int(part[0]) for part in run.plan.at(epoch, np.array([position])))
                    utterance, number = slow_number(run, shard, ordinal)
                    row = rows[utterance]
                    hashed = xxhash.xxh3_64_intdigest((row["group"] or row["recording"]).encode())
                    group = int(np.array(hashed, np.uint64).view(np.int64))
                    with tarfile.open(run.index.url(shard)) as tar:
                        whole = audio.to_int16(audio.decode(tar.extractfile(f"{row['key']}.{row['codec']}").read()))
                    place = np.array([utterance]), np.array([number]), SEED, epoch
                    starts, counts = window.span(run.spec, np.array([len(whole)]), *place)
                    size, key = int(counts[0]), int(window.keys(*place)[0])
                    wave[:size] = whole[starts[0] : starts[0] + size]
                    if run.spec.kind == "crop":
                        for place in range(size, len(wave)):
                            wave[place] = wave[place - size]
                waves.append(wave)
                ids.append((size, key, group, utterance, number))
        columns = [np.array(values, np.int64) for values in zip(*ids, strict=True)]
        yield Batch(step, epoch, np.stack(waves), *columns, ())


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.step, one.epoch, one.bad) == (other.step, other.epoch, other.bad)
        for name in ("wave_BS", "samples_B", "key_B", "group_B", "utterance_B", "number_B"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
            assert getattr(one, name).dtype == getattr(other, name).dtype


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (1, 8), (4, 1), (4, 8)])
@pytest.mark.parametrize("spec", [TILE, CROP], ids=["tile", "crop"])
def test_batches_equal_the_slow_way_whatever_threads_and_prefetch(shard_set, spec, threads, prefetch):
    run = run_of(shard_set, spec)
    steps = run.lanes.steps_per_epoch + 2
    assert_equal(taken(feed_of(run, threads=threads, prefetch=prefetch), steps), list(slow_batches(run, range(steps))))


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_gets_its_lanes_of_the_same_global_batch(shard_set, world):
    run = run_of(shard_set)
    whole = taken(feed_of(run), 6)
    ranks = [taken(feed_of(run, rank=rank, world=world), 6) for rank in range(world)]
    for step, batch in enumerate(whole):
        for lane in range(3):
            part = ranks[lane % world][step]
            assert not (part.bad or batch.bad)
            rows = slice(lane // world * 2, lane // world * 2 + 2)
            np.testing.assert_array_equal(part.wave_BS[rows], batch.wave_BS[lane * 2 : lane * 2 + 2])
            np.testing.assert_array_equal(part.utterance_B[rows], batch.utterance_B[lane * 2 : lane * 2 + 2])
    assert_equal(ranks[1], list(slow_batches(run, range(6), 1, world)))


def test_starting_at_a_step_equals_reading_up_to_it(shard_set):
    run = run_of(shard_set)
    steps = 2 * run.lanes.steps_per_epoch + 3
    undisturbed = taken(feed_of(run), steps)
    for start in (1, 2, run.lanes.steps_per_epoch - 1, run.lanes.steps_per_epoch, run.lanes.steps_per_epoch + 1):
        assert_equal(taken(feed_of(run, start), steps - start), undisturbed[start:])


def test_an_epoch_holds_all_of_the_audio_and_the_last_batch_is_padded(shard_set):
    run = run_of(shard_set, WindowConfig(kind="tile", seconds=2.0), lanes=5, batch=10)
    batches = taken(feed_of(run), run.lanes.steps_per_epoch)
    assert sum(batch.audio_s for batch in batches) == pytest.approx(run.index.duration_s)
    padding = [int((batch.utterance_B == PADDING).sum()) for batch in batches]
    assert padding == [0] * (len(batches) - 1) + [len(batches) * 10 - run.lanes.windows]
    rows = batches[-1].utterance_B == PADDING
    assert rows.any()
    for name in ("wave_BS", "samples_B", "key_B"):
        assert not getattr(batches[-1], name)[rows].any()
    assert (batches[-1].number_B[rows] == PADDING).all()


@pytest.fixture
def stored(shard_set: Path, tmp_path: Path, s3: ObjectStore) -> str:
    """The shard set on a store."""
    base = storage.join(s3.base, tmp_path.name)
    for path in shard_set.rglob("*"):
        if path.is_file():
            storage.write(storage.join(base, path.relative_to(shard_set).as_posix()), path.read_bytes())
    return base


@pytest.mark.parametrize("mode", ["ranged", "shards", "auto"])
def test_a_feed_from_a_store_gives_the_same_batches(shard_set, stored, tmp_path, mode):
    kept = CacheConfig(mode=mode, folder=str(tmp_path / "cache"), max_gb=0.5)
    expected = taken(feed_of(run_of(shard_set)), 16)
    # Twice: from a cold cache and from a warm one.
    for _ in range(2):
        assert_equal(taken(feed_of(run_of(stored, cache=kept), threads=4), 16), expected)
    whole = [path for path in (tmp_path / "cache").rglob("*") if len(path.name) == 64]
    assert bool(whole) == (mode != "ranged")
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_cache_too_small_for_the_lanes_means_ranged_reads_or_a_refusal_before_the_start(shard_set, stored, tmp_path):
    kept = CacheConfig(folder=str(tmp_path / "cache"), max_gb=0.0001)
    assert_equal(taken(feed_of(run_of(stored, cache=kept)), 3), taken(feed_of(run_of(shard_set)), 3))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"feed\.cache\.max_gb=0\.0001 is less than .* 3 lanes need"):
        feed_of(run_of(stored, cache=CacheConfig(mode="shards", folder=str(tmp_path / "cache"), max_gb=0.0001)))


def test_excluded_utterances_keep_their_place_with_weight_0_and_the_rest_is_the_same(shard_set, tmp_path):
    target = Path(shutil.copytree(shard_set, tmp_path / "set"))
    whole = run_of(target)
    gone = [3, 8]
    exclude(whole.index, [whole.index.key(utterance) for utterance in gone])
    left = run_of(target)
    assert left.index.fingerprint != whole.index.fingerprint
    steps = whole.lanes.steps_per_epoch
    met = 0
    for got, expected in zip(taken(feed_of(left), steps), taken(feed_of(whole), steps), strict=True):
        np.testing.assert_array_equal(got.utterance_B, expected.utterance_B)
        np.testing.assert_array_equal(got.key_B, expected.key_B)
        out = np.isin(got.utterance_B, gone)
        met += out.sum()
        assert not got.samples_B[out].any()
        assert not got.wave_BS[out].any()
        assert not got.bad
        np.testing.assert_array_equal(got.wave_BS[~out], expected.wave_BS[~out])
    assert met == window.count(TILE, whole.index.samples[gone]).sum()


def with_members_replaced(source: Path, target: Path, replaced: dict[str, bytes]) -> Index:
    """The set at `source` made again at `target` with other audio bytes in these members, and an index that fits."""
    shutil.copytree(source, target)
    for path in target.glob("*.tar"):
        with tarfile.open(source / path.name) as old, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as new:
            for member in old:
                (target / "member").write_bytes(replaced.get(member.name) or old.extractfile(member).read())
                new.add(target / "member", arcname=member.name)
    index = Index.of(str(target), [scan(path, path.name) for path in sorted(target.glob("*.tar"))])
    publish(index)
    return index


def test_a_member_that_does_not_decode_keeps_its_place_with_weight_0_and_is_reported(shard_set, tmp_path):
    good = run_of(shard_set)
    rows = good.index.utterances.to_pylist()
    # One that is no audio, one cut off in its header, and one that ends before its metadata says.
    bad = {4: b"not audio" * 50, 9: audio.encode(noise(1), "opus")[:200], 15: audio.encode(noise(0.3), "flac")}
    index = with_members_replaced(
        shard_set, tmp_path / "set", {f"{rows[n]['key']}.flac": data for n, data in bad.items()}
    )
    run = run_of(index.base)
    steps = run.lanes.steps_per_epoch
    reported = {}
    for got, expected in zip(taken(feed_of(run), steps), taken(feed_of(good), steps), strict=True):
        np.testing.assert_array_equal(got.utterance_B, expected.utterance_B)
        np.testing.assert_array_equal(got.number_B, expected.number_B)
        np.testing.assert_array_equal(got.key_B, expected.key_B)
        reported |= {(window.utterance, window.number): window for window in got.bad}
        lost = [(u, n) in reported for u, n in zip(got.utterance_B.tolist(), got.number_B.tolist(), strict=True)]
        touched = np.isin(got.utterance_B, list(bad))
        assert not got.samples_B[lost].any()
        assert not got.wave_BS[lost].any()
        np.testing.assert_array_equal(got.wave_BS[~touched], expected.wave_BS[~touched])
        np.testing.assert_array_equal(got.samples_B[~touched], expected.samples_B[~touched])
    counts = window.count(TILE, run.index.samples)
    every = {(n, number) for n in (4, 9) for number in range(counts[n])}
    # Of the short one the first window is whole, and stays.
    assert set(reported) == every | {(15, number) for number in range(1, counts[15])}
    for (utterance, _), bad_window in reported.items():
        assert bad_window.cause == ("cut" if utterance == 15 else "unreadable")
        assert bad_window.why and "\n" not in bad_window.why and "0x" not in bad_window.why
        assert bad_window.key == rows[utterance]["key"]
        assert run.index.url(int(run.index.shard_of(utterance))).endswith(bad_window.shard)


def test_bytes_that_changed_stop_the_feed_with_the_shards_name_and_give_no_batch(shard_set, tmp_path):
    target = Path(shutil.copytree(shard_set, tmp_path / "set"))
    run = run_of(target)
    row = run.index.utterances.to_pylist()[0]
    shard = target / run.index.shards["path"].to_pylist()[0]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 255
    shard.write_bytes(data)
    feed = feed_of(run)
    with pytest.raises(UserError, match=shard.name) as caught:
        for _ in range(run.lanes.steps_per_epoch):
            assert 0 not in feed.next().utterance_B
    assert "\n" not in str(caught.value)
    feed.close()


def decoding() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "plan", "fill", "fetch"))
    ]


def batches_in_memory() -> int:
    """Those that were handed out and are held, and those made ahead."""
    gc.collect()
    return sum(isinstance(thing, Batch | UnfilledBatch) for thing in gc.get_objects())


def test_closing_ends_the_threads_and_frees_the_batches_made_ahead(shard_set):
    assert not decoding()
    before = batches_in_memory()
    feed = feed_of(run_of(shard_set), threads=3, prefetch=8)
    batch = feed.next()
    assert 1 <= len(decoding()) <= 4
    feed.close()
    feed.close()
    assert not decoding()
    assert batches_in_memory() == before + 1
    assert len(batch.wave_BS) == 6
    unused = feed_of(run_of(shard_set))
    unused.close()
    assert not decoding()


def test_no_more_than_the_prefetch_is_made_ahead(shard_set):
    before = batches_in_memory()
    feed = feed_of(run_of(shard_set), prefetch=2)
    for _ in range(4):
        feed.next()
    deadline = time.monotonic() + 60
    while batches_in_memory() - before < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert batches_in_memory() - before == 2
    feed.close()


def test_the_fixed_windows_of_validation_are_those_of_epoch_0(shard_set):
    run = run_of(shard_set)
    rows = np.array([3, 1, 4, 1, 5])
    batches = list(fixed_batches(FeedSource(run.index, run.order, run.spec, FeedConfig()), rows, 2))
    assert [len(batch.utterance_B) for batch in batches] == [2, 2, 1]
    places = [slow_number(run, *(int(part[0]) for part in run.plan.at(0, rows[n : n + 1]))) for n in range(len(rows))]
    utterance, number = np.array(places).T
    np.testing.assert_array_equal(np.concatenate([batch.utterance_B for batch in batches]), utterance)
    np.testing.assert_array_equal(np.concatenate([batch.number_B for batch in batches]), number)


@pytest.mark.parametrize("kind", ["tile", "crop"])
def test_measures_are_of_the_real_samples_of_each_window_and_those_of_tiles_are_taken_once(shard_set, kind):
    measured = []

    def measure(wave_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        measured.append(len(wave_S))
        hop_TH = wave_S[: len(wave_S) // 160 * 160].reshape(-1, 160).astype(np.float32)
        return np.stack([hop_TH.mean(1), hop_TH.max(1)], axis=1), np.array([wave_S.astype(np.float32).sum()])

    run = run_of(shard_set, {"tile": TILE, "crop": CROP}[kind])
    source = FeedSource(run.index, run.order, run.spec, FeedConfig(), Measures(measure, 160, 2, 1))
    feed = ThreadFeed(source, range(run.lanes.lanes), 0, threads=1)
    for batch in taken(feed, 2 * run.lanes.steps_per_epoch):
        for row, count in enumerate(batch.samples_B.tolist()):
            frame_TF, window_F = measure(batch.wave_BS[row, :count])
            np.testing.assert_array_equal(batch.frame_BTF[row, : len(frame_TF)], frame_TF)
            assert np.isnan(batch.frame_BTF[row, len(frame_TF) :]).all()
            np.testing.assert_array_equal(batch.window_BF[row], window_F if count else [np.nan])
            measured.pop()
    assert (len(measured) == run.plan.total) == (kind == "tile")


def test_threads_are_as_configured_or_half_of_the_ranks_share():
    assert decode_threads(7, 100) == 7
    assert decode_threads(0, 10_000) == 1
    assert decode_threads(0, 1) >= 1
