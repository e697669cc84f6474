"""The index of a shard set: which utterance lies where in which tar, and the fingerprint that names the data.

A shard set is a folder of plain WebDataset tars with `shards.parquet`, `utterances.parquet` and, written last, the
marker `index.json`. Without the marker there is no set.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cpcscale import audio, storage
from cpcscale.errors import UserError

MARKER = "index.json"
FORMAT = 1

SHARD_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("utterances", pa.int64()),
    ]
)
# `mean` and `mean_square` are of the samples in [-1, 1): the corpus gain follows from the index alone.
UTTERANCE_COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("checksum", pa.uint64()),
        ("codec", pa.string()),
        ("samples", pa.int64()),
        ("rate_hz", pa.int32()),
        ("group", pa.string()),
        ("language", pa.string()),
        ("mean", pa.float64()),
        ("mean_square", pa.float64()),
    ]
)
_TABLES = {"shards.parquet": SHARD_COLUMNS, "utterances.parquet": UTTERANCE_COLUMNS}
# The columns that name the data, in the order they are hashed. What follows from the audio bytes stays out.
_NAMING = ("key", "offset", "size", "checksum", "codec", "samples", "rate_hz", "group", "language")


@dataclass(frozen=True)
class ShardEntry:
    """One tar as it stands in the index: its row, and the rows of its utterances (`shard` not yet set)."""

    path: str
    sha256: str
    size_bytes: int
    utterances: list[dict[str, Any]]


@dataclass(frozen=True)
class Index:
    """A shard set in memory, by column: `shards` and `utterances` are Arrow tables, utterances in shard order."""

    base: str
    shards: pa.Table
    utterances: pa.Table

    @classmethod
    def of(cls, base: str, entries: Sequence[ShardEntry]) -> Index:
        """The index of these tars in this order, none of them read again."""
        shards = [
            {"path": entry.path, "sha256": entry.sha256, "bytes": entry.size_bytes, "utterances": len(entry.utterances)}
            for entry in entries
        ]
        rows = [{"shard": number, **row} for number, entry in enumerate(entries) for row in entry.utterances]
        return cls(base, pa.Table.from_pylist(shards, SHARD_COLUMNS), pa.Table.from_pylist(rows, UTTERANCE_COLUMNS))

    @classmethod
    def load(cls, base: str) -> Index:
        """The published index of the shard set at `base` (path or s3://).

        Raises UserError when there is none, when its format is newer, or when its tables do not match the marker.
        """
        try:
            data = storage.read(storage.join(base, MARKER))
        except storage.NotFoundError:
            raise UserError(
                f"no shard set at {base} (it has no {MARKER}): make one with `cpcscale pack AUDIO {base}`, or name the "
                "folder of one split, such as .../train"
            ) from None
        try:
            marker = json.loads(data)
            version, contents, fingerprint = int(marker["format"]), marker.get("contents"), marker.get("fingerprint")
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{storage.join(base, MARKER)} is not the marker of a shard set: pack the set again"
            ) from None
        if version > FORMAT:
            raise UserError(f"{base} has index format {version}, this cpcscale reads up to {FORMAT}: upgrade")
        index = cls(base, *(_read_table(base, *table) for table in _TABLES.items()))
        # The contents first: a fingerprint cannot be made of what is not a hash.
        if index.contents != contents or index.fingerprint != fingerprint:
            raise UserError(f"the index tables at {base} do not match their marker: pack the set again")
        return index

    def publish(self) -> None:
        """Writes the tables, then the marker, at `base`."""
        for name, table in zip(_TABLES, (self.shards, self.utterances), strict=True):
            out = io.BytesIO()
            pq.write_table(table, out)
            storage.write(storage.join(self.base, name), out.getvalue())
        marker = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "contents": self.contents,
            "shards": self.shards.num_rows,
            "utterances": self.utterances.num_rows,
            "hours": round(self.duration_s / 3600, 4),
            "groups": len(self.utterances["group"].unique()),
        }
        storage.write(storage.join(self.base, MARKER), json.dumps(marker, indent=1).encode() + b"\n")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the ordered (shard sha256, digest of its utterance columns): never over urls or Parquet bytes."""
        whole = hashlib.sha256()
        for number, sha256 in enumerate(self.shards["sha256"].to_pylist()):
            first, last = self.bounds[number], self.bounds[number + 1]
            whole.update(bytes.fromhex(sha256))
            whole.update(_digest(self.utterances.slice(first, last - first), _NAMING))
        return whole.hexdigest()

    @cached_property
    def contents(self) -> str:
        """sha256 over every column of both tables: tells tables that were changed since they were published."""
        return hashlib.sha256(
            _digest(self.shards, SHARD_COLUMNS.names) + _digest(self.utterances, UTTERANCE_COLUMNS.names)
        ).hexdigest()

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [shards + 1]: the utterances of shard s are rows bounds[s] to bounds[s + 1]."""
        return np.concatenate([[0], np.cumsum(self.shards["utterances"].to_numpy())]).astype(np.int64)

    @cached_property
    def samples(self) -> np.ndarray:
        """int64 [utterances]: the length of each utterance at 16 kHz."""
        return self.utterances["samples"].to_numpy()

    @property
    def duration_s(self) -> float:
        return float(self.samples.sum()) / audio.RATE_HZ

    def wave_scale(self) -> tuple[float, float]:
        """(offset, gain) that bring the whole corpus to zero mean and unit variance: (x - offset) * gain.

        One pair for a corpus keeps the loudness of an utterance, a cue of arousal, and can stream (PAPER.md).
        """
        weight = self.samples / max(1, self.samples.sum())
        mean = float((self.utterances["mean"].to_numpy() * weight).sum())
        square = float((self.utterances["mean_square"].to_numpy() * weight).sum())
        deviation = max(square - mean * mean, 0.0) ** 0.5
        return mean, (1.0 / deviation if deviation > 0 else 1.0)


def scan(path: Path, name: str) -> ShardEntry:
    """The index entry of one tar on local disk: its hash and, from the JSON beside each audio member, its utterances.

    Raises UserError naming the tar when it is cut short or a member lacks its metadata.
    """
    rows: list[tuple[str, str, int, int, int]] = []
    metadata: dict[str, dict[str, Any]] = {}
    with path.open("rb") as raw:
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        raw.seek(0)
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    reader = tar.extractfile(member)
                    data = reader.read() if reader else b""
                    if suffix == "json":
                        metadata[key] = json.loads(data)
                    elif f".{suffix}" in audio.SUFFIXES:
                        rows.append((key, suffix, member.offset_data, len(data), xxhash.xxh3_64_intdigest(data)))
        except tarfile.TarError as error:
            raise UserError(f"{name} is not a whole tar ({error}): remove it and pack again") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{name} has metadata that is not JSON ({error}): it was not written by cpcscale pack"
            ) from None
    try:
        utterances = [_row(metadata[row[0]], *row) for row in rows]
    except KeyError as error:
        raise UserError(f"{name} lacks metadata {error} for a member: it was not written by cpcscale pack") from None
    return ShardEntry(name, sha256, path.stat().st_size, utterances)


def _row(meta: dict[str, Any], key: str, codec: str, offset: int, size: int, checksum: int) -> dict[str, Any]:
    kept = {name: meta[name] for name in ("samples", "rate_hz", "group", "language", "mean", "mean_square")}
    return {"key": key, "codec": codec, "offset": offset, "size": size, "checksum": checksum, **kept}


def _read_table(base: str, name: str, columns: pa.Schema) -> pa.Table:
    data = storage.read(storage.join(base, name))
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{storage.join(base, name)} is not a Parquet table ({why}): pack the set again") from None
    if not table.schema.equals(columns) or any(column.null_count for column in table.columns):
        raise UserError(f"{storage.join(base, name)} has other columns than an index: pack the set again")
    return table


def _digest(table: pa.Table, names: Sequence[str]) -> bytes:
    digest = hashlib.sha256(table.num_rows.to_bytes(8, "little"))
    for name in names:
        column = table[name]
        if pa.types.is_string(column.type):
            texts = [text.encode() for text in column.to_pylist()]
            digest.update(np.array([len(text) for text in texts], "<i8").tobytes() + b"".join(texts))
        else:
            digest.update(column.to_numpy().astype("<f8" if pa.types.is_floating(column.type) else "<u8").tobytes())
    return digest.digest()
