"""Writes an index shard by shard, then its marker; makes new versions of an index.

A version is published by writing its marker. Files of earlier versions are never overwritten, so a run that has opened
an earlier version can keep using it.
"""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpcscale import storage
from cpcscale.errors import UserError, nearest
from cpcscale.shards.index import FORMAT, MARKER, THREADS, Ancestor, Index, RowsFile
from cpcscale.shards.rows import GROUP_ROWS, SHARD_COLUMNS, UTTERANCE_COLUMNS, ShardEntry

_TAR, _ANY_SHARD = ".tar", -1
_PART_GROUPS = 128
_TABLE_ROWS = 16_384


class IndexWriter:
    """Collects the entries of a shard set in order; writes rows to part files, with a few thousand in memory at a time.

    Use it as a context manager: when the block raises before the index is published, the part files are removed. With
    `after`, the new shards are appended to those of that version.
    """

    def __init__(self, base: str, after: Index | None = None) -> None:
        self._base, self._after = base, after
        self._name = uuid.uuid4().hex[:8]
        self._parts: list[RowsFile] = list(after.parts) if after else []
        self._shards: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._count = after.shards.num_rows if after else 0
        self._kept = False
        self._group: list[pa.Table] = []
        self._rows_in_part, self._groups_in_part, self._block = 0, 0, 0
        self._part: contextlib.ExitStack | None = None
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._part:
            part, self._part = self._part, None
            # A part that was not finished is not in the index.
            self._parts.pop()
            part.__exit__(kind, error, trace)
        if error is not None:
            self.discard()

    def add(self, entry: ShardEntry) -> None:
        """Adds the next shard of the set."""
        block = self._rows_in_part // GROUP_ROWS
        if self._group and block != self._block:
            self._write_group()
            if self._groups_in_part == _PART_GROUPS:
                self._end_part()
                block = 0
        self._block = block
        if self._part is None:
            self._begin_part()
        self._group.append(entry.utterances)
        self._rows_in_part += entry.utterances.num_rows
        self._shards.append(entry.row())
        self._count += 1
        # A row takes ten times as much memory in a dict as in a table.
        if len(self._shards) == _TABLE_ROWS:
            self._end_table()

    def publish(self) -> Index:
        """Writes the shard table and the marker, and returns the index."""
        index = self.finish()
        self.keep()
        publish(index)
        return index

    def finish(self) -> Index:
        """Writes the last part file and returns the index, which is not published yet."""
        if self._group:
            self._write_group()
        if self._part:
            self._end_part()
        self._end_table()
        before = self._after
        if before is None:
            return Index(self._base, pa.concat_tables(self._tables).combine_chunks(), tuple(self._parts))
        shards = pa.concat_tables([before.shards, *self._tables]).combine_chunks()
        return Index(self._base, shards, tuple(self._parts), None, before.excluded, _lineage(before))

    def keep(self) -> None:
        """Keeps the part files also when an error follows: a marker that names them may have reached the store."""
        self._kept = True

    def discard(self) -> None:
        """Removes the part files that were written, unless `keep` was called."""
        if self._kept:
            return
        for part in self._parts[len(self._after.parts) if self._after else 0 :]:
            storage.remove(storage.join(self._base, part.path))

    def _begin_part(self) -> None:
        path = f"utterances/part-{len(self._parts):05d}-{self._name}.parquet"
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(storage.publishing(storage.join(self._base, path)))
            self._file = stack.enter_context(pq.ParquetWriter(temporary, UTTERANCE_COLUMNS))
            self._part = stack.pop_all()
        self._parts.append(RowsFile(path, self._count))
        self._rows_in_part = self._groups_in_part = self._block = 0

    def _write_group(self) -> None:
        table = pa.concat_tables(self._group)
        assert self._file is not None
        self._file.write_table(table, row_group_size=max(1, table.num_rows))
        self._group = []
        self._groups_in_part += 1

    def _end_part(self) -> None:
        assert self._part is not None
        part, self._part = self._part, None
        part.close()

    def _end_table(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._shards, SHARD_COLUMNS))
        self._shards = []


def publish(index: Index) -> None:
    """Writes the shard table of this version, then the marker; rows that are in memory are written before."""
    if index.memory is not None:
        with IndexWriter(index.base) as writer:
            for entry in _entries(index):
                writer.add(entry)
            written = writer.finish()
            writer.keep()
            publish(replace(written, excluded=index.excluded, lineage=index.lineage))
        return
    version = index.contents[:16]
    out = io.BytesIO()
    pq.write_table(index.shards, out)
    shards, excluded = f"shards-{version}.parquet", f"excluded-{version}.bin" if len(index.excluded) else None
    storage.write(storage.join(index.base, shards), out.getvalue())
    if excluded:
        storage.write(storage.join(index.base, excluded), index.excluded.astype("<i8").tobytes())
    marker = {
        "format": FORMAT,
        "fingerprint": index.fingerprint,
        "contents": index.contents,
        "shards": index.shards.num_rows,
        "utterances": index.count,
        "excluded": len(index.excluded),
        "hours": round(index.duration_s / 3600, 4),
        "shards_path": shards,
        "excluded_path": excluded,
        "parts": [asdict(part) for part in index.parts],
        "lineage": [asdict(entry) for entry in index.lineage],
    }
    storage.write(storage.join(index.base, MARKER), json.dumps(marker, indent=1).encode() + b"\n")


def exclude(index: Index, keys: Sequence[str]) -> Index:
    """Publishes a version of `index` without the utterances of these keys, and returns it.

    `KEY` means the utterances with this key in all shards, `SHARD:KEY` that of one shard. They keep their places in the
    order, with weight 0, so that a run can take the new version in its middle. Raises UserError for a key that no
    utterance has, and when nothing would be left.
    """
    if index.memory is not None:
        index = Index.load(index.base)
    wanted = _wanted(index, keys)
    names = pa.array(sorted({key for _, key in wanted}), pa.string())
    found, rows = set(), []
    for first, table in _columns(index, ["key"]):
        at = np.flatnonzero(pc.is_in(table["key"], value_set=names).to_numpy())
        shards = index.shard_of(first + at).tolist()
        for row, shard, key in zip(at.tolist(), shards, table["key"].take(at).to_pylist(), strict=True):
            if hits := wanted & {(_ANY_SHARD, key), (shard, key)}:
                found |= hits
                rows.append(first + row)
    missing = sorted(wanted - found)
    if missing:
        raise UserError(_missing(index, missing, len(wanted)))
    excluded = np.union1d(index.excluded, np.array(rows, np.int64))
    if len(excluded) == len(index.excluded):
        return index
    if len(excluded) == index.count:
        raise UserError(f"every utterance of {index.base} would be excluded, and none is left to train on")
    descendant = replace(index, excluded=excluded, lineage=_lineage(index))
    publish(descendant)
    return descendant


def _wanted(index: Index, keys: Sequence[str]) -> set[tuple[int, str]]:
    """(shard, key) for each text; the shard is _ANY_SHARD where the text names none."""
    split = [text.partition(f"{_TAR}:") for text in keys]
    paths = pa.array([f"{shard}{_TAR}" if colon else None for shard, colon, _ in split], pa.string())
    shards = pc.fill_null(pc.index_in(paths, value_set=index.shards["path"], skip_nulls=True), _ANY_SHARD).to_pylist()
    return {
        (shard, text if shard == _ANY_SHARD else key)
        for text, shard, (_, _, key) in zip(keys, shards, split, strict=True)
    }


def _missing(index: Index, missing: Sequence[tuple[int, str]], total: int) -> str:
    shard, key = missing[0]
    first = max(shard, 0)
    where = f"shard of {index.base}" if shard == _ANY_SHARD else f"utterance of {index.url(shard)}"
    hint = nearest(key, index.rows(first).table["key"].to_pylist()) if index.shards.num_rows else ""
    return f"{len(missing)} of {total} keys are unknown; the first, {key!r}, is in no {where}{hint}"


def _columns(index: Index, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yields (number of the first utterance, table of these columns), some thousand rows at a time, in order."""
    for part in index.parts:
        url, first = storage.join(index.base, part.path), int(index.bounds[part.first_shard])
        try:
            with storage.opened(url) as raw, pq.ParquetFile(raw) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=columns, use_threads=THREADS)
                    yield first, table
                    first += table.num_rows
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{url} is not a Parquet table of an index ({error})") from None


def _lineage(index: Index) -> tuple[Ancestor, ...]:
    """The lineage of the next version."""
    return (*index.lineage, Ancestor(index.fingerprint, index.shards.num_rows, len(index.excluded)))


def _entries(index: Index) -> Iterator[ShardEntry]:
    for shard, row in enumerate(index.shards.to_pylist()):
        yield ShardEntry(row["path"], row["sha256"], row["bytes"], index.rows(shard).table)
