"""Promises of the feed: the same batches whatever reads them, bad clips keep their place, and nothing stays behind."""

from __future__ import annotations

import gc
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from object_store import ObjectStore
from trees import noise

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.index import Index, scan
from cpcscale.stream import window
from cpcscale.stream.feed import Batch, ThreadFeed, WindowReader, decode_threads, fixed_batches, planned
from cpcscale.stream.lane import PADDING, Lanes, served
from cpcscale.stream.plan import Plan
from cpcscale.stream.window import WindowConfig

TILE, CROP = WindowConfig(kind="tile", seconds=0.25), WindowConfig(kind="crop", seconds=0.5)
SEED = 5


class Run(NamedTuple):
    index: Index
    spec: WindowConfig
    plan: Plan
    lanes: Lanes


def run_of(base: Path | str, spec: WindowConfig = TILE, lanes: int = 3, batch: int = 6) -> Run:
    index = Index.load(str(base))
    plan = Plan(window.count(spec, index.samples), index.bounds, SEED)
    return Run(index, spec, plan, Lanes(plan.total, lanes, batch))


def feed_of(run: Run, start: int = 0, rank: int = 0, world: int = 1, threads: int = 2, prefetch: int = 3) -> ThreadFeed:
    reader, lanes = WindowReader(run.index, run.spec, SEED), served(run.lanes.lanes, rank, world)
    return ThreadFeed(reader, run.plan, run.lanes, lanes, start, threads=threads, prefetch=prefetch)


def taken(feed: ThreadFeed, steps: int) -> list[Batch]:
    try:
        return [feed.next() for _ in range(steps)]
    finally:
        feed.close()


def slow_batches(run: Run, steps: range, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The same batches by the longest way: each member out of its tar, decoded whole, one window after the other."""
    rows = run.index.utterances.to_pylist()
    paths = run.index.shards["path"].to_pylist()
    for step in steps:
        waves, sizes, keys, ids = [], [], [], []
        for lane in range(rank, run.lanes.lanes, world):
            epoch, positions = run.lanes.positions(step, lane)
            for position in positions:
                wave, size, key, utterance, number = np.zeros(run.spec.samples, np.int16), 0, 0, PADDING, PADDING
                if position != PADDING:
                    utterance, number = (int(part[0]) for part in run.plan.at(epoch, np.array([position])))
                    row = rows[utterance]
                    with tarfile.open(Path(run.index.base) / paths[row["shard"]]) as tar:
                        whole = audio.to_int16(audio.decode(tar.extractfile(f"{row['key']}.{row['codec']}").read()))
                    place = np.array([utterance]), np.array([number]), SEED, epoch
                    starts, counts = window.place(run.spec, np.array([len(whole)]), *place)
                    size, key = int(counts[0]), int(window.keys(*place)[0])
                    wave[:size] = whole[starts[0] : starts[0] + size]
                waves, sizes, keys = [*waves, wave], [*sizes, size], [*keys, key]
                ids.append((utterance, number))
        columns = [np.array(values, np.int64) for values in (sizes, keys, *zip(*ids, strict=True))]
        yield Batch(step, epoch, np.stack(waves), *columns, ())


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.step, one.epoch, one.bad) == (other.step, other.epoch, other.bad)
        for name in ("wave_BS", "samples_B", "key_B", "utterance_B", "number_B"):
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


def test_a_feed_from_a_store_gives_the_same_batches(shard_set, tmp_path, s3: ObjectStore):
    base = storage.join(s3.base, tmp_path.name)
    for path in shard_set.iterdir():
        storage.write(storage.join(base, path.name), path.read_bytes())
    assert_equal(taken(feed_of(run_of(base), threads=4), 6), taken(feed_of(run_of(shard_set)), 6))


def with_members_replaced(source: Path, target: Path, replaced: dict[str, bytes]) -> Index:
    """The set at `source` made again at `target` with other audio bytes in these members, and an index that fits."""
    shutil.copytree(source, target)
    for path in target.glob("*.tar"):
        with tarfile.open(source / path.name) as old, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as new:
            for member in old:
                (target / "member").write_bytes(replaced.get(member.name) or old.extractfile(member).read())
                new.add(target / "member", arcname=member.name)
    index = Index.of(str(target), [scan(path, path.name) for path in sorted(target.glob("*.tar"))])
    index.publish()
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
        reported |= {(window.utterance, window.number): window.cause for window in got.bad}
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
    assert all(cause and "\n" not in cause and "0x" not in cause for cause in reported.values())


def test_bytes_that_changed_stop_the_feed_with_the_shards_name_and_give_no_batch(shard_set, tmp_path):
    target = Path(shutil.copytree(shard_set, tmp_path / "set"))
    run = run_of(target)
    row = run.index.utterances.to_pylist()[0]
    shard = target / run.index.shards["path"].to_pylist()[row["shard"]]
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
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def batches_in_memory() -> int:
    gc.collect()
    return sum(isinstance(thing, Batch) for thing in gc.get_objects())


def test_closing_ends_the_threads_and_frees_the_batches_made_ahead(shard_set):
    assert not decoding()
    before = batches_in_memory()
    feed = feed_of(run_of(shard_set), threads=3, prefetch=8)
    batch = feed.next()
    assert 1 <= len(decoding()) <= 3
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
    # The pool is drained when it closes: what then exists was made for steps that nobody asked for.
    feed._pool.shutdown(wait=True)
    assert batches_in_memory() - before == 2 * 3
    feed.close()


def test_the_fixed_windows_of_validation_are_those_of_epoch_0(shard_set):
    run = run_of(shard_set)
    rows = np.array([3, 1, 4, 1, 5])
    batches = list(fixed_batches(WindowReader(run.index, run.spec, SEED), run.plan, rows, 2))
    assert [len(batch.utterance_B) for batch in batches] == [2, 2, 1]
    utterance, number = planned(run.plan, 0, rows)
    np.testing.assert_array_equal(np.concatenate([batch.utterance_B for batch in batches]), utterance)
    np.testing.assert_array_equal(np.concatenate([batch.number_B for batch in batches]), number)


def test_threads_are_as_configured_or_half_of_the_ranks_share():
    assert decode_threads(7, 100) == 7
    assert decode_threads(0, 10_000) == 1
    assert decode_threads(0, 1) >= 1
