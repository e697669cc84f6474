"""The rows of an index: their columns, their digests, and how the members of a tar become rows."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cpcscale import audio, config
from cpcscale.errors import UserError

# A row for each shard. `digest` is sha256 over the NAMING columns of its utterances, `unnamed` xxh3 over the others.
# `samples`, `mean` and `mean_square` are sums and averages over the shard, from which the gain of a corpus follows.
SHARD_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.binary(32)),
        ("bytes", pa.int64()),
        ("utterances", pa.int64()),
        ("digest", pa.binary(32)),
        ("unnamed", pa.uint64()),
        ("samples", pa.int64()),
        ("mean", pa.float64()),
        ("mean_square", pa.float64()),
    ]
)
# A row for each utterance. `offset` and `size` say where its bytes are in the tar, `checksum` is their xxh3. `samples`
# is the length at 16 kHz, `rate_hz` the rate of the file; `mean` and `mean_square` are those of samples in [-1, 1);
# `recording` is what the utterance was cut from.
UTTERANCE_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("checksum", pa.uint64()),
        ("codec", pa.string()),
        ("samples", pa.int64()),
        ("rate_hz", pa.int32()),
        ("group", pa.string()),
        ("language", pa.string()),
        ("recording", pa.string()),
        ("mean", pa.float64()),
        ("mean_square", pa.float64()),
    ]
)
# The columns that identify the data, in the order they are hashed, without those that follow from the audio.
NAMING = ("key", "offset", "size", "checksum", "codec", "samples", "rate_hz", "group", "language")
UNNAMED = tuple(name for name in UTTERANCE_COLUMNS.names if name not in NAMING)
# A row group of a part file holds the shards whose first row is in one block of this many rows.
GROUP_ROWS = 8192


@dataclass(frozen=True)
class ShardEntry:
    """One tar of an index: its path relative to the set, hash and size, and the table of its utterances."""

    path: str
    sha256: bytes
    size_bytes: int
    utterances: pa.Table

    @classmethod
    def of(cls, path: str, sha256: bytes, size_bytes: int, rows: Sequence[dict[str, Any]]) -> ShardEntry:
        """The entry of a tar with these utterance rows, as dicts of UTTERANCE_COLUMNS."""
        return cls(path, sha256, size_bytes, pa.Table.from_pylist(list(rows), UTTERANCE_COLUMNS))

    def row(self) -> dict[str, Any]:
        """The row of this tar in the shard table."""
        samples = self.utterances["samples"].to_numpy()
        total = int(samples.sum())
        weight = samples / max(1, total)
        averages = {name: float((self.utterances[name].to_numpy() * weight).sum()) for name in ("mean", "mean_square")}
        return {
            "path": self.path,
            "sha256": self.sha256,
            "bytes": self.size_bytes,
            "utterances": self.utterances.num_rows,
            "digest": table_digest(self.utterances, NAMING),
            "unnamed": _unnamed(self.utterances),
            "samples": total,
            **averages,
        }


@dataclass(frozen=True)
class ShardRows:
    """The utterances of one shard: `table` in the order of the tar; the first one has number `first` in the set."""

    shard: int
    first: int
    table: pa.Table
    all_excluded: np.ndarray

    def matches(self, digest: bytes, unnamed: int) -> bool:
        """Whether the rows have the digests of the shard's entry."""
        # A null would be hashed like an empty text.
        if any(column.null_count for column in self.table.columns):
            return False
        return table_digest(self.table, NAMING) == digest and _unnamed(self.table) == unnamed

    @cached_property
    def offset(self) -> np.ndarray:
        return self.table["offset"].to_numpy()

    @cached_property
    def size(self) -> np.ndarray:
        return self.table["size"].to_numpy()

    @cached_property
    def checksum(self) -> np.ndarray:
        return self.table["checksum"].to_numpy()

    @cached_property
    def samples(self) -> np.ndarray:
        return self.table["samples"].to_numpy()

    @cached_property
    def group(self) -> np.ndarray:
        """int64 [utterances of the shard]: a hash of the group of each, or of its recording where it has no group."""
        named = pc.if_else(pc.equal(self.table["group"], ""), self.table["recording"], self.table["group"])
        encoded = named.combine_chunks().dictionary_encode()
        hashes = [xxhash.xxh3_64_intdigest(name.encode()) for name in encoded.dictionary.to_pylist()]
        return np.array(hashes, np.uint64).view(np.int64)[encoded.indices.to_numpy()]

    @cached_property
    def excluded(self) -> np.ndarray:
        """bool [utterances of the shard]: which utterances are excluded."""
        low, high = np.searchsorted(self.all_excluded, [self.first, self.first + self.table.num_rows])
        mask = np.zeros(self.table.num_rows, bool)
        mask[self.all_excluded[low:high] - self.first] = True
        return mask


def row_groups(starts: np.ndarray) -> np.ndarray:
    """int64 [shards]: the row group of each shard of a part file; shard s has rows starts[s] to starts[s + 1] - 1.

    A group holds the shards whose first row is in one block of GROUP_ROWS rows; blocks without any are skipped.
    """
    block = starts[:-1] // GROUP_ROWS
    return np.unique(block, return_inverse=True)[1].reshape(-1)


def scan(path: Path, name: str) -> ShardEntry:
    """The index entry of a tar that `cpcscale pack` wrote, from the JSON beside each audio member.

    Raises UserError naming the tar when it is cut short or a member lacks its metadata.
    """
    rows: list[tuple[str, str, int, int, int]] = []
    metadata: dict[str, dict[str, Any]] = {}
    with path.open("rb") as raw:
        digest = file_digest(raw, "sha256").digest()
        raw.seek(0)
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    reader = tar.extractfile(member)
                    data = reader.read() if reader else b""
                    if suffix == "json":
                        metadata[key] = config.read_json(data)
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
    return ShardEntry.of(name, digest, path.stat().st_size, utterances)


def _row(meta: dict[str, Any], key: str, codec: str, offset: int, size: int, checksum: int) -> dict[str, Any]:
    kept = {name: meta[name] for name in ("samples", "rate_hz", "group", "language", "mean", "mean_square")}
    named = {"key": key, "codec": codec, "offset": offset, "size": size, "checksum": checksum}
    return {**named, "recording": meta["source"], **kept}


def table_digest(table: pa.Table, names: Sequence[str]) -> bytes:
    """sha256 over these columns, in a form that does not depend on versions of Arrow or Parquet."""
    digest = sha256()
    for piece in _canonical(table, names):
        digest.update(piece)
    return digest.digest()


def _unnamed(table: pa.Table) -> int:
    digest = xxhash.xxh3_64()
    for piece in _canonical(table, UNNAMED):
        digest.update(piece)
    return digest.intdigest()


def _canonical(table: pa.Table, names: Sequence[str]) -> Iterator[Any]:
    """The bytes to hash: the number of rows, then each column; texts as lengths and bytes, numbers as 8 bytes each."""
    yield table.num_rows.to_bytes(8, "little")
    for name in names:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type):
            yield from _text(column)
        elif pa.types.is_fixed_size_binary(column.type):
            width = column.type.byte_width
            yield memoryview(column.buffers()[1])[column.offset * width : (column.offset + len(column)) * width]
        else:
            kind = "<f8" if pa.types.is_floating(column.type) else "<u8"
            yield np.ascontiguousarray(column.to_numpy(zero_copy_only=False).astype(kind, copy=False))


def _text(column: pa.StringArray) -> list[Any]:
    if not len(column):
        return []
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    data = column.buffers()[2]
    texts = memoryview(data)[offsets[0] : offsets[-1]] if data else b""
    return [np.diff(offsets).astype("<i8"), texts]
