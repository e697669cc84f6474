"""The index of a shard set: where each utterance is in which tar, and the fingerprint that identifies the data.

A shard set is a folder of plain tars with `shards-*.parquet` (a row for each tar), `utterances/part-*.parquet` (a row
for each utterance, in the order of the shards) and the marker `index.json`, which is written last: without it there is
no set. Loading reads the shard table alone. The rows of a shard are read when they are needed and checked against its
digest, so a set of 240,000,000 utterances opens in seconds.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cpcscale import audio, config, storage
from cpcscale.errors import UserError
from cpcscale.shards.rows import (
    SHARD_COLUMNS,
    UTTERANCE_COLUMNS,
    ShardEntry,
    ShardRows,
    row_groups,
    table_digest,
)

MARKER = "index.json"
FORMAT = 2
# Others name their index so too. What only theirs hold, and their names.
_OTHER_LIBRARIES = {b'"shards": [': "MosaicML streaming", b'"shards":[': "MosaicML streaming", b'"chunks"': "LitData"}
# Parquet is read in the calling thread: one of Arrow's that holds a Python file when the process ends can abort it.
THREADS = False
_OPEN_PARTS = 8
# Shards to hash at a time.
_HASHED_AT_ONCE = 65_536


@dataclass(frozen=True)
class RowsFile:
    """One file of utterance rows: those of shard `first_shard` and after it, up to the first shard of the next file."""

    path: str
    first_shard: int


@dataclass(frozen=True)
class Ancestor:
    """An earlier version of a set: its fingerprint, and its numbers of shards and of excluded utterances."""

    fingerprint: str
    shards: int
    excluded: int


@dataclass(frozen=True)
class Index:
    """A shard set at `base`: `shards` is a table in memory; utterance rows are read from `parts`, or are in `memory`.

    `excluded` int64, sorted: numbers of utterances that keep their place in the order, with weight 0. `lineage`:
    earlier versions, the oldest first.
    """

    base: str
    shards: pa.Table
    parts: tuple[RowsFile, ...] = ()
    memory: pa.Table | None = None
    excluded: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lineage: tuple[Ancestor, ...] = ()

    def __post_init__(self) -> None:
        # Belong to this process and object; set in this way because the dataclass is frozen.
        self.__dict__["_files"], self.__dict__["_lock"] = dict[str, pq.ParquetFile](), threading.Lock()

    @classmethod
    def of(cls, base: str, entries: Sequence[ShardEntry]) -> Index:
        """The index of these tars in this order, with all rows in memory."""
        shards = pa.Table.from_pylist([entry.row() for entry in entries], SHARD_COLUMNS)
        tables = [entry.utterances for entry in entries]
        return cls(base, shards, memory=pa.concat_tables([UTTERANCE_COLUMNS.empty_table(), *tables]))

    @classmethod
    def load(cls, base: str) -> Index:
        """Reads the index of the shard set at `base` (path or s3://).

        Raises UserError when there is none, when it has another format, or when its tables do not match the marker.
        """
        marker = _marker(base)
        try:
            shards, excluded = _read_shards(base, marker["shards_path"]), _read_excluded(base, marker["excluded_path"])
            parts = tuple(RowsFile(str(part["path"]), int(part["first_shard"])) for part in marker["parts"])
            lineage = tuple(Ancestor(**entry) for entry in marker["lineage"])
            index = cls(base, shards, parts, None, excluded, lineage)
            same = (index.contents, index.fingerprint) == (marker["contents"], marker["fingerprint"])
        except UserError:
            raise
        except (KeyError, TypeError, ValueError):
            raise UserError(_damaged(base)) from None
        if not same:
            raise UserError(f"the index tables at {base} do not match their marker: {_WAY_OUT}")
        return index

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hex over the hashes and row digests of all shards in order, and over excluded utterances, if any.

        It does not depend on where the set is, nor on how Parquet stores its tables.
        """
        return self.fingerprint_of(self.shards.num_rows)

    def fingerprint_of(self, shards: int) -> str:
        """The fingerprint of the set's first `shards` shards."""
        named = sha256()
        for first in range(0, shards, _HASHED_AT_ONCE):
            block = self.shards.slice(first, min(_HASHED_AT_ONCE, shards - first))
            pairs = np.concatenate([_bytes_column(block["sha256"]), _bytes_column(block["digest"])], axis=1)
            named.update(pairs.data)
        excluded = self.excluded[self.excluded < self.bounds[shards]]
        if not len(excluded):
            return named.hexdigest()
        return sha256(named.digest() + excluded.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def contents(self) -> str:
        """sha256 in hex over all tables, to detect tables that were changed after the marker was written."""
        rest = [[asdict(part) for part in self.parts], [asdict(entry) for entry in self.lineage]]
        return sha256(
            table_digest(self.shards, SHARD_COLUMNS.names)
            + self.excluded.astype("<i8").tobytes()
            + json.dumps(rest, sort_keys=True).encode()
        ).hexdigest()

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [shards + 1]: the utterances of shard s have numbers bounds[s] to bounds[s + 1] - 1."""
        return np.concatenate([[0], np.cumsum(self.shards["utterances"].to_numpy())]).astype(np.int64)

    @property
    def count(self) -> int:
        """The number of utterances in the set, with excluded ones."""
        return int(self.bounds[-1])

    @property
    def duration_s(self) -> float:
        return float(self.shards["samples"].to_numpy().sum()) / audio.RATE_HZ

    def shard_of(self, utterance: np.ndarray | int) -> np.ndarray:
        """int64: the shard of each utterance number."""
        return np.searchsorted(self.bounds, utterance, side="right") - 1

    def url(self, shard: int) -> str:
        """The path or URL of a shard."""
        return storage.join(self.base, self.shards["path"][shard].as_py())

    def key(self, utterance: int) -> str:
        """The key of an utterance, given by number."""
        shard = int(self.shard_of(utterance))
        return str(self.rows(shard).table["key"][utterance - int(self.bounds[shard])].as_py())

    def rows(self, shard: int) -> ShardRows:
        """The rows of one shard. Thread-safe. Raises UserError when they do not match the digest of the shard."""
        first, last = int(self.bounds[shard]), int(self.bounds[shard + 1])
        table = self._table(shard, first, last)
        rows = ShardRows(shard, first, table, self.excluded)
        entry = self.shards.slice(shard, 1)
        if not rows.matches(entry["digest"][0].as_py(), entry["unnamed"][0].as_py()):
            raise UserError(
                f"the index rows of {self.url(shard)} do not match its entry in the index at {self.base}: {_WAY_OUT}"
            )
        return rows

    def samples_by_part(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first shard, int64 lengths in samples at 16 kHz) of consecutive groups of shards."""
        if self.memory is not None:
            yield 0, self.memory["samples"].to_numpy()
            return
        for part in self.parts:
            with self._reading(part) as file:
                samples = file.read(columns=["samples"], use_threads=THREADS)["samples"].to_numpy()
            yield part.first_shard, samples

    @property
    def samples(self) -> np.ndarray:
        """int64 [utterances]: lengths in samples at 16 kHz. For sets that fit in memory, else use `samples_by_part`."""
        return np.concatenate([np.zeros(0, np.int64), *(samples for _, samples in self.samples_by_part())])

    @cached_property
    def utterances(self) -> pa.Table:
        """All utterance rows, checked. For sets that fit in memory; else use `rows`."""
        tables = [self.rows(shard).table for shard in range(self.shards.num_rows)]
        return pa.concat_tables([UTTERANCE_COLUMNS.empty_table(), *tables])

    def wave_scale(self) -> tuple[float, float]:
        """(offset, gain): (x - offset) * gain has zero mean and unit variance over the whole corpus.

        One pair for a corpus keeps the loudness of each utterance, a cue of arousal, and needs no pass over the audio.
        """
        samples = self.shards["samples"].to_numpy()
        weight = samples / max(1, samples.sum())
        mean = float((self.shards["mean"].to_numpy() * weight).sum())
        square = float((self.shards["mean_square"].to_numpy() * weight).sum())
        deviation = max(square - mean * mean, 0.0) ** 0.5
        return mean, (1.0 / deviation if deviation > 0 else 1.0)

    def ancestor(self, fingerprint: str) -> Ancestor | None:
        """The earlier version of this set with this fingerprint, or None."""
        return next((entry for entry in self.lineage if entry.fingerprint == fingerprint), None)

    def _table(self, shard: int, first: int, last: int) -> pa.Table:
        if self.memory is not None:
            return self.memory.slice(first, last - first)
        number = int(np.searchsorted([part.first_shard for part in self.parts], shard, side="right")) - 1
        part = self.parts[number]
        end = self.parts[number + 1].first_shard if number + 1 < len(self.parts) else self.shards.num_rows
        starts = self.bounds[part.first_shard : end + 1] - self.bounds[part.first_shard]
        groups = row_groups(starts)
        group = int(groups[shard - part.first_shard])
        before = int(starts[np.searchsorted(groups, group)])
        with self._reading(part) as file:
            table = file.read_row_group(group, columns=UTTERANCE_COLUMNS.names, use_threads=THREADS)
        if table.schema.remove_metadata() != UTTERANCE_COLUMNS:
            raise UserError(f"{storage.join(self.base, part.path)} has other columns than an index: {_WAY_OUT}")
        rows = table.slice(first - int(self.bounds[part.first_shard]) - before, last - first)
        # Copied: a slice would keep the whole row group in memory, about thirty times as much.
        return rows.take(np.arange(rows.num_rows))

    @contextlib.contextmanager
    def _reading(self, part: RowsFile) -> Iterator[pq.ParquetFile]:
        """The open file of a part, for one thread at a time. The last few stay open, for each opening is a request."""
        url, files = storage.join(self.base, part.path), self.__dict__["_files"]
        with self.__dict__["_lock"]:
            try:
                file = files.pop(url, None) or pq.ParquetFile(storage.opened(url))
                yield file
                # A file is kept open only when reading succeeded.
                files[url] = file
                while len(files) > _OPEN_PARTS:
                    files.pop(next(iter(files))).close(force=True)
            except UserError:
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                raise UserError(f"{url} is not a Parquet table of an index ({error}): {_WAY_OUT}") from None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and locks cannot go to another process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


_WAY_OUT = "remove index.json and run `cpcscale index` on the folder, or pack the set again"


def _marker(base: str) -> dict[str, Any]:
    try:
        data = storage.read(storage.join(base, MARKER))
    except storage.NotFoundError:
        raise UserError(
            f"no shard set at {base} (it has no {MARKER}): make one with `cpcscale pack AUDIO {base}`, take over tars "
            f"that are there with `cpcscale index {base}`, or name the folder of one split, such as .../train"
        ) from None
    try:
        marker = dict(config.read_json(data))
        version = int(marker["format"])
    except (ValueError, KeyError, TypeError):
        if library := next((name for key, name in _OTHER_LIBRARIES.items() if key in data), ""):
            raise UserError(
                f"{storage.join(base, MARKER)} is the index of {library}, whose shards are not tars: leave it there, "
                "and pack the audio files that the set was made from"
            ) from None
        raise UserError(_damaged(base)) from None
    if version > FORMAT:
        raise UserError(f"{base} has index format {version}, this cpcscale reads up to {FORMAT}: upgrade")
    if version < FORMAT:
        raise UserError(f"{base} has index format {version}, this cpcscale reads {FORMAT}: {_WAY_OUT}")
    return marker


def _damaged(base: str) -> str:
    return f"{storage.join(base, MARKER)} is not the marker of a shard set: {_WAY_OUT}"


def _read_shards(base: str, name: str) -> pa.Table:
    url = storage.join(base, name)
    try:
        with storage.opened(url) as file:
            # Not read_table: its chunks share buffers, and a pickle holds the whole buffer for each of them.
            table = pq.ParquetFile(file).read(use_threads=THREADS)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{url} is not a Parquet table ({error}): {_WAY_OUT}") from None
    if not table.schema.equals(SHARD_COLUMNS) or any(column.null_count for column in table.columns):
        raise UserError(f"{url} has other columns than an index: {_WAY_OUT}")
    return table


def _read_excluded(base: str, name: str | None) -> np.ndarray:
    if name is None:
        return np.zeros(0, np.int64)
    data = storage.read(storage.join(base, name))
    if len(data) % 8:
        raise ValueError(name)
    return np.frombuffer(data, "<i8").astype(np.int64)


def _bytes_column(column: pa.ChunkedArray) -> np.ndarray:
    """uint8 [rows, 32]: a column of hashes."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, 32)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate([np.zeros((0, 32), np.uint8), *chunks])
