"""`cpcscale bench feed`: the speed of the feed against a bare decoder on the same bytes, measured in turns.

The bare decoder is libsndfile through soundfile: it reads the members of the same windows in the same order, from bytes
in memory into one preallocated batch, with as many threads as the feed decodes with. The feed is measured from its
start to its last batch, with its shards on a RAM disk (`memory`), in the node's cache (`warm`), and in an object store
with an empty cache (`store`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from cpcscale import audio, config, storage
from cpcscale.bench import object_store, peers, speech_set
from cpcscale.bench.interleaved import measure_in_turns, median_ratio, median_seconds
from cpcscale.bench.peers.job import PeerJob
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader
from cpcscale.stream.batch import WindowReader
from cpcscale.stream.feed import FeedConfig, FeedSource, ThreadFeed, decode_threads
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

_RAM_DISK = Path("/dev/shm")
_CHUNK_THREADS = 2
_PHASES = ("wait", "fetch", "verify", "decode", "collate")


@dataclass(kw_only=True)
class FeedBenchConfig:
    """The settings of `cpcscale bench feed`."""

    # An existing shard set on local disk; empty: one is made from `audio`.
    shards: str = ""
    # A folder of audio from which the set is made, repeated as often as needed.
    audio: str = "tests/data/speech"
    # Audio format of the made set.
    codec: Literal["flac", "wav", "opus"] = "flac"
    # Hours of speech in the made set.
    hours: float = 4.0
    # Seconds of each utterance in the made set.
    utterance_s: float = 15.0
    # Size of a shard of the made set.
    shard_mb: float = 32.0
    # An s3:// prefix to which the shards are copied and from which they are read; empty: a local SeaweedFS server.
    store: str = ""
    window: WindowConfig = field(default_factory=lambda: WindowConfig(kind="crop", seconds=10.0))
    # Windows in a batch.
    batch: int = 32
    # Equal slices of the epoch; each batch takes windows from all of them.
    lanes: int = 4
    # Seed of the order of the data.
    seed: int = 0
    feed: FeedConfig = field(default_factory=FeedConfig)
    # Measurements of each contender, in turns; the median counts.
    runs: int = 5
    # Epochs in a measurement; the empty cache is always measured over one.
    epochs: int = 1

    def __post_init__(self) -> None:
        config.at_least(1, runs=self.runs, batch=self.batch, lanes=self.lanes, epochs=self.epochs)


@dataclass(frozen=True)
class _Bench:
    """What every measurement needs: the index, the places of the shards, and the windows in order.

    `audio_s` and `used_bytes` are of one epoch, `members` (bytes, start, samples) of all epochs of a measurement.
    """

    config: FeedBenchConfig
    index: Index
    order: RunOrder
    threads: int
    audio_s: float
    used_bytes: int
    members: list[tuple[bytes, int, int]]
    places: dict[str, str]
    cache: Path


def bench_feed(spec: FeedBenchConfig, with_peers: bool = False) -> dict[str, Any]:
    """Measures the feed, and other libraries `with_peers`; returns the figures with the keys of `_figures`."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpcscale-bench-")))
        bench = _prepared(spec, folder, stack)
        contenders: dict[str, Callable[[], dict[str, Any]]] = {
            "decoder": lambda: _bare(bench),
            "memory": lambda: _fed(bench, "memory"),
            "warm": lambda: _fed(bench, "warm"),
            "store": lambda: _fed(bench, "store"),
            "raw": lambda: _raw(bench),
        }
        if with_peers:
            contenders |= {name: _timed(bench, run) for name, run in _peer_runs(bench, folder).items()}
        # Fills the cache.
        _fed(bench, "warm")
        return _figures(bench, measure_in_turns("bench feed", contenders, spec.runs))


def _figures(bench: _Bench, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the runs; ratios are medians of the ratios of neighbouring measurements."""
    rate = {name: [row["audio_s"] / row["wall_s"] for row in each] for name, each in rows.items()}
    median = {name: statistics.median(values) for name, values in rate.items()}

    def against(name: str, other: str) -> float:
        return round(median_ratio(rate[name], rate[other]), 4)

    accounts = {name: _account(bench, rows[name]) for name in ("memory", "warm", "store")}
    raw_audio_s_per_s = median.pop("raw")
    peer_rates = {name: round(median[name], 1) for name in rows if name not in (*accounts, "decoder", "raw")}
    return {
        "codec": bench.config.codec,
        "window": f"{bench.config.window.kind} {bench.config.window.seconds:g} s",
        "decode_threads": bench.threads,
        "audio_s": round(bench.audio_s, 1),
        "runs": bench.config.runs,
        "decoder_audio_s_per_s": round(median["decoder"], 1),
        "audio_s_per_s": {name: round(median[name], 1) for name in accounts},
        "ratio_memory": against("memory", "decoder"),
        "ratio_warm": against("warm", "decoder"),
        "ratio_store": against("store", "decoder"),
        "raw_ranged_audio_s_per_s": round(raw_audio_s_per_s, 1),
        "raw_ranged_mb_per_s": round(bench.used_bytes / bench.audio_s * raw_audio_s_per_s / 1e6, 1),
        "ratio_store_to_raw": against("store", "raw"),
        "first_batch_s": {name: round(_middle(rows[name], "first_s"), 4) for name in accounts},
        "fetched_over_used": round(_middle(rows["store"], "fetched_bytes") / bench.used_bytes, 3),
        "per_core_audio_s_per_s": {name: round(_middle(rows[name], "per_core"), 1) for name in accounts},
        "seconds": accounts,
        "peers": peer_rates,
        "ratio_to_peers": {name: against("warm", name) for name in peer_rates},
    }


def _account(bench: _Bench, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds by phase, summed over the decode threads; `other` is the rest of their wall time."""
    spent = [{name: row["seconds"].get(name, 0.0) for name in _PHASES} for row in rows]
    return median_seconds(spent, [row["wall_s"] * bench.threads for row in rows], "other")


def _middle(rows: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(row[name] for row in rows))


def _prepared(spec: FeedBenchConfig, folder: Path, stack: contextlib.ExitStack) -> _Bench:
    if spec.shards:
        index = Index.load(storage.absolute(spec.shards))
        if not storage.local_path(index.base):
            raise UserError(
                f"shards={spec.shards} is not on local disk: name a local set, and set `store` to the store"
            )
    else:
        note(f"bench feed: making {spec.hours:g} h of {spec.utterance_s:g} s utterances as {spec.codec}")
        index = speech_set.make_speech_set(
            spec.audio,
            folder,
            codec=spec.codec,
            hours=spec.hours,
            utterance_s=spec.utterance_s,
            shard_mb=spec.shard_mb,
        )
    base = spec.store or stack.enter_context(_loopback(folder / "store"))
    places = {"memory": str(_in_memory(index, folder, stack)), "store": base, "warm": base}
    for name in storage.list_files(index.base):
        storage.write(storage.join(base, name), storage.read(storage.join(index.base, name)))
    order = RunOrder(shard_windows(index, spec.window), spec.seed, spec.lanes, spec.batch)
    members = list(_members(index, order, spec))
    audio_s = sum(count for _, _, count in members) / audio.RATE_HZ / spec.epochs
    used = {id(data): len(data) for data, _, _ in members}
    threads = decode_threads(spec.feed.decode_threads, 1)
    cached = folder / "cache"
    return _Bench(spec, index, order, threads, audio_s, sum(used.values()), members, places, cached)


@contextlib.contextmanager
def _loopback(folder: Path) -> Iterator[str]:
    folder.mkdir()
    with object_store.run_object_store(folder) as store:
        before = {name: os.environ.get(name) for name in store.environment}
        os.environ.update(store.environment)
        try:
            yield storage.join(store.base, "bench")
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _in_memory(index: Index, folder: Path, stack: contextlib.ExitStack) -> Path:
    """The shard set copied to a RAM disk; without a RAM disk, to `folder`, where it is in the page cache."""
    where = _RAM_DISK if _RAM_DISK.is_dir() else folder
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where))) / "set"
    shutil.copytree(index.base, copy)
    return copy


def _members(index: Index, order: RunOrder, spec: FeedBenchConfig) -> Iterator[tuple[bytes, int, int]]:
    """(bytes, start, samples) of every window of the epochs, in order; windows of one member share its bytes."""
    shards = ShardReader(index)
    reader = WindowReader(shards, spec.window, spec.seed)
    held: dict[int, bytes] = {}
    for step in range(spec.epochs * order.lanes.steps_per_epoch):
        unfilled = reader.plan(step, *order.rows(step, range(spec.lanes)))
        for slot, place in enumerate(unfilled.member_B):
            if place:
                utterance = int(unfilled.utterance_B[slot])
                if utterance not in held:
                    held[utterance] = bytes(shards.member(*place))
                yield held[utterance], int(unfilled.start_B[slot]), int(unfilled.samples_B[slot])
    shards.close()


def _bare(bench: _Bench) -> dict[str, Any]:
    """The decoder alone: each of n threads takes every n-th window and reads it into its row of a batch."""
    rows = bench.config.batch
    batch = np.zeros((rows, bench.config.window.samples), np.int16)

    def work(first: int) -> None:
        for number in range(first, len(bench.members), bench.threads):
            data, start, count = bench.members[number]
            with soundfile.SoundFile(BytesIO(data)) as file:
                file.seek(start)
                file.read(count, dtype="int16", out=batch[number % rows])

    with ThreadPoolExecutor(bench.threads) as pool:
        began = time.perf_counter()
        list(pool.map(work, range(bench.threads)))
    return {"wall_s": time.perf_counter() - began, "audio_s": bench.audio_s * bench.config.epochs}


def _fed(bench: _Bench, place: str) -> dict[str, Any]:
    """The feed from its start to its last batch; for the store, with an empty cache."""
    epochs = 1 if place == "store" else bench.config.epochs
    kept = bench.cache if place == "warm" else bench.cache.with_name("cold")
    if place == "store":
        shutil.rmtree(kept, ignore_errors=True)
    feed_config = replace(bench.config.feed, cache=replace(bench.config.feed.cache, folder=str(kept)))
    index = replace(bench.index, base=bench.places[place])
    source = FeedSource(index, bench.order, bench.config.window, feed_config)
    before, cpu = storage.counters(), time.process_time()
    began = time.perf_counter()
    feed = ThreadFeed(source, range(bench.config.lanes), 0, threads=bench.threads)
    try:
        feed.next()
        first_s = time.perf_counter() - began
        for _ in range(epochs * bench.order.lanes.steps_per_epoch - 1):
            feed.next()
        wall_s = time.perf_counter() - began
        seconds = feed.seconds()
    finally:
        feed.close()
    spent = time.process_time() - cpu
    fetched = (storage.counters() - before).bytes_read
    audio_s = bench.audio_s * epochs
    times = {"wall_s": wall_s, "first_s": first_s, "seconds": seconds}
    return {**times, "audio_s": audio_s, "fetched_bytes": fetched, "per_core": audio_s / max(spent, 1e-9)}


def _raw(bench: _Bench) -> dict[str, Any]:
    """Reads the shards from the store by range, with as many threads as the cache uses, and discards the bytes."""
    began = time.perf_counter()

    def read(shard: int) -> None:
        for _ in storage.chunks(storage.join(bench.places["store"], bench.index.shards["path"][shard].as_py())):
            pass

    with ThreadPoolExecutor(_CHUNK_THREADS) as pool:
        list(pool.map(read, range(bench.index.shards.num_rows)))
    return {"wall_s": time.perf_counter() - began, "audio_s": bench.audio_s}


def _timed(bench: _Bench, run: Callable[[], float]) -> Callable[[], dict[str, Any]]:
    return lambda: {"wall_s": run(), "audio_s": bench.audio_s}


def _peer_runs(bench: _Bench, folder: Path) -> dict[str, Callable[[], float]]:
    job = PeerJob(
        base=bench.places["memory"],
        shards=bench.index.shards["path"].to_pylist(),
        codec=bench.config.codec,
        samples=bench.config.window.samples,
        batch=bench.config.batch,
        windows=len(bench.members) // bench.config.epochs,
        workers=bench.threads,
        # As many utterances in the shuffle buffer as are in the shards that our lanes have open.
        shuffle=round(bench.config.lanes * bench.index.count / bench.index.shards.num_rows),
        seed=bench.config.seed,
        folder=folder,
    )
    return peers.peer_measurements(job)
