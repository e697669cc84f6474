"""`cpcscale bench plan`: time and memory to order the data of a shard set of any size, and the size of a position."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cpcscale.bench.fresh_process import peak_mib, run_in_fresh_process
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.shards.index_writer import IndexWriter, publish
from cpcscale.shards.rows import SHARD_COLUMNS, UTTERANCE_COLUMNS, ShardEntry
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train.checkpoint import RunPosition

_A_SHARD = 240
_PER_STEP = 8
_ROWS_AT_ONCE = 1_000


def bench_plan(shards: int, lanes: int, rows: int) -> dict[str, Any]:
    """Orders a synthetic set of `shards` shards over `lanes` lanes, and counts the windows of one of `rows` utterances.

    Returns `seconds` (from the shard table on disk to every lane's first windows), `peak_mib` of that process,
    `position_kib` (a checkpoint's position), `resume_seconds` (all lanes' windows at a late step), `lost_share`
    (share of an epoch's windows that no step uses), and for counting `count_rows`, `count_seconds`, `count_peak_mib`.
    """
    if min(shards, lanes, rows) < 1:
        raise UserError(f"--shards {shards}, --lanes {lanes}, --rows {rows}: give at least 1 of each")
    if shards < lanes:
        raise UserError(f"--shards {shards} is fewer than --lanes {lanes}: every lane needs windows")
    with tempfile.TemporaryDirectory() as folder:
        _make_shard_table(Path(folder, "set"), shards)
        planned = run_in_fresh_process(_plan, str(Path(folder, "set")), lanes)
        _make_rows(Path(folder, "rows"), rows)
        counted = run_in_fresh_process(_count, str(Path(folder, "rows")))
    return {"shards": shards, "lanes": lanes, **planned, **counted}


def _plan(base: str, lanes: int) -> dict[str, Any]:
    began = time.perf_counter()
    index = Index.load(base)
    # Crops: one window for each utterance. Tiles need a counting pass, which is measured by itself.
    windows = shard_windows(index, WindowConfig(kind="crop", seconds=10.0))
    order = RunOrder(windows, 0, lanes, lanes * _PER_STEP)
    order.rows(0, range(lanes))
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    far = order.lanes.steps_per_epoch * 3 // 2
    order.rows(far, range(lanes))
    resumed = time.perf_counter() - began
    position = RunPosition(far, index.fingerprint, {}, [[0, 0, len(windows)]], order.cursors(far))
    owned = sum(last - first for first, last in map(order.lanes.bounds, range(lanes)))
    return {
        "windows": order.epoch_order.total,
        "seconds": round(seconds, 3),
        "peak_mib": peak_mib(),
        "resume_seconds": round(resumed, 3),
        "position_kib": round(len(json.dumps(asdict(position))) / 1024, 1),
        "lost_share": 1 - owned / order.epoch_order.total,
    }


def _count(base: str) -> dict[str, Any]:
    index = Index.load(base)
    began = time.perf_counter()
    windows = shard_windows(index, WindowConfig(kind="tile", seconds=1.28))
    seconds = time.perf_counter() - began
    return {
        "count_rows": index.count,
        "count_windows": int(windows.sum()),
        "count_seconds": round(seconds, 3),
        "count_peak_mib": peak_mib(),
    }


def _make_shard_table(folder: Path, shards: int) -> None:
    """Writes a set that has only a shard table: ordering reads nothing else."""
    random = np.random.default_rng(0)
    columns = {
        "path": pa.array([f"shard-{number:07d}.tar" for number in range(shards)]),
        "sha256": _hashes(random, shards),
        "bytes": pa.array(random.integers(50_000_000, 70_000_000, shards)),
        "utterances": pa.array(random.integers(_A_SHARD - 40, _A_SHARD + 40, shards)),
        "digest": _hashes(random, shards),
        "unnamed": pa.array(random.integers(0, 2**63, shards, np.uint64)),
        "samples": pa.array(random.integers(40_000_000, 60_000_000, shards)),
        "mean": pa.array(np.zeros(shards)),
        "mean_square": pa.array(np.full(shards, 0.01)),
    }
    publish(Index(str(folder), pa.table(columns, SHARD_COLUMNS)))


def _hashes(random: np.random.Generator, count: int) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(32), count, [None, pa.py_buffer(random.bytes(32 * count))])


def _make_rows(folder: Path, rows: int) -> None:
    """Writes a set of `rows` utterances of 1 to 20 s without tars: counting reads only their lengths."""
    random = np.random.default_rng(0)
    with IndexWriter(str(folder)) as writer:
        for first in range(0, rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, rows - first)
            same = {
                name: pa.repeat(_plain(kind), count)
                for name, kind in zip(UTTERANCE_COLUMNS.names, UTTERANCE_COLUMNS.types, strict=True)
            }
            same["samples"] = pa.array(random.integers(16_000, 320_000, count))
            writer.add(ShardEntry(f"shard-{first:09d}.tar", bytes(32), 1, pa.table(same, UTTERANCE_COLUMNS)))
        writer.publish()


def _plain(kind: pa.DataType) -> pa.Scalar:
    return pa.scalar("k" if pa.types.is_string(kind) else 1, kind)
