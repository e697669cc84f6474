"""Makes a shard set of any size with hardly any audio: one small tar under many names, and a complete index.

Every shard has the same utterances, so all full parts of the index are links to one file. In memory, names, tables and
rows are as large as those of a packed set; on disk the shard table is smaller, since its digests are all the same.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from cpcscale import audio
from cpcscale.shards.index import Index, RowsFile
from cpcscale.shards.index_writer import IndexWriter, publish
from cpcscale.shards.rows import GROUP_ROWS, SHARD_COLUMNS, ShardEntry, scan

UTTERANCE_S = 0.1
# Rows that are certain to fill more than one part of an index.
_MORE_THAN_A_PART = 130 * GROUP_ROWS
_LINKS = 1000


def make_scale_set(folder: Path, shards: int, utterances: int) -> Index:
    """Publishes a set of `shards` shards, each with `utterances` utterances of UTTERANCE_S, below `folder`."""
    (folder / "tars").mkdir(parents=True)
    tar = folder / "tars" / "0000.tar"
    _write_tar(tar, utterances)
    entry = scan(tar, "0000.tar")
    index = replace(Index(str(folder), _shard_table(folder, entry, shards)), parts=_parts(folder, entry, shards))
    publish(index)
    return Index.load(str(folder))


def _write_tar(path: Path, utterances: int) -> None:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(utterances):
            wave = (1000 * random.standard_normal(round(UTTERANCE_S * audio.RATE_HZ))).astype(np.int16)
            source = f"recordings/{number % 12:04d}.flac"
            metadata = {"source": source, "group": f"speaker-{number % 12:04d}", "language": "", "samples": len(wave)}
            metadata |= {"rate_hz": audio.RATE_HZ, "mean": 0.0, "mean_square": 0.001}
            key = f"{source.removesuffix('.flac')}_{number:06d}".replace("/", "_")
            for suffix, data in (("wav", audio.encode(wave, "wav")), ("json", json.dumps(metadata).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _shard_table(folder: Path, entry: ShardEntry, shards: int) -> pa.Table:
    """The shard table: each row has its own hash and a path that leads to the one tar."""
    for number in range(1, min(shards, _LINKS)):
        os.link(folder / "tars" / "0000.tar", folder / "tars" / f"{number:04d}.tar")
    for number in range(-(-shards // _LINKS)):
        (folder / f"set-{number:04d}").symlink_to("tars")
    row = entry.row()
    columns = {name: pa.repeat(pa.scalar(row[name], SHARD_COLUMNS.field(name).type), shards) for name in row}
    numbers = (divmod(number, _LINKS) for number in range(shards))
    columns["path"] = pa.array([f"set-{folder:04d}/{link:04d}.tar" for folder, link in numbers])
    hashes = pa.py_buffer(np.random.default_rng(0).bytes(32 * shards))
    columns["sha256"] = pa.Array.from_buffers(pa.binary(32), shards, [None, hashes])
    return pa.table(columns, SHARD_COLUMNS)


def _parts(folder: Path, entry: ShardEntry, shards: int) -> tuple[RowsFile, ...]:
    utterances = entry.utterances.num_rows
    first = _written(folder, entry, min(shards, -(-_MORE_THAN_A_PART // utterances)))
    if len(first) == 1:
        return tuple(first)
    full, each = folder / first[0].path, first[1].first_shard
    (folder / first[1].path).unlink()
    parts = [first[0]]
    for number in range(1, shards // each):
        path = full.with_name(f"full-{number:05d}.parquet")
        os.link(full, path)
        parts.append(RowsFile(path.relative_to(folder).as_posix(), number * each))
    if rest := shards % each:
        parts.append(replace(_written(folder, entry, rest)[0], first_shard=shards - rest))
    return tuple(parts)


def _written(folder: Path, entry: ShardEntry, shards: int) -> list[RowsFile]:
    with IndexWriter(str(folder)) as writer:
        for _ in range(shards):
            writer.add(entry)
        index = writer.finish()
        writer.keep()
    return list(index.parts)
