"""Checks that a shard set is what its index says, one tar at a time; reads every byte and reports all problems."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.adoption.tar_members import TarMember, TarScan
from cpcscale.shards.index import Index
from cpcscale.shards.rows import UTTERANCE_COLUMNS, ShardEntry, ShardRows

# Durations are counted in classes of 1/32 octave (2 %), from 1/64 s up to three days.
OCTAVE, LEAST_S, CLASSES = 32, 1 / 64, 24 * 32
_MOST_SHOWN = 5


@dataclass(frozen=True)
class ShardAudit:
    """What one tar holds, and what is wrong with it: `problems` has a line for each of the first of `problem_count`.

    `decoded` counts members that were decoded (`decoded_samples` at 16 kHz), `unindexed` audio members that the index
    lacks. For each utterance from number `first` on: `content` and `recording` uint64 are hashes, `samples` int64 the
    length at 16 kHz, `counts` bool is false if it is excluded. `durations` int64 [CLASSES] counts utterances.
    `by_language` and `by_group` are tables of names and samples; `own_groups` are the samples of utterances whose group
    is their recording.
    """

    shard: int
    problems: tuple[str, ...]
    problem_count: int
    decoded: int
    decoded_samples: int
    unindexed: int
    first: int
    content: np.ndarray
    recording: np.ndarray
    samples: np.ndarray
    counts: np.ndarray
    durations: np.ndarray
    by_language: pa.Table
    by_group: pa.Table
    own_groups: int


def audit_shard(index: Index, shard: int, share: float, seed: int) -> ShardAudit:
    """Checks one tar of the set against the index, and decodes a keyed `share` of its utterances."""
    check = _Check(index, shard, share, seed)
    entry = {name: index.shards[name][shard].as_py() for name in index.shards.column_names}
    try:
        rows = index.rows(shard)
    except UserError as error:
        check.report(str(error))
        rows = ShardRows(shard, int(index.bounds[shard]), UTTERANCE_COLUMNS.empty_table(), index.excluded)
    else:
        own = ShardEntry(entry["path"], entry["sha256"], entry["bytes"], rows.table).row()
        for name in ("utterances", "samples", "mean", "mean_square"):
            # Another processor may sum floats in another order.
            if abs(own[name] - entry[name]) > 1e-12 + 1e-9 * abs(entry[name]):
                check.report(f"its rows give {name}={own[name]}, its entry {entry[name]}")
    scan = TarScan(index.url(shard))
    try:
        check.members(scan, rows)
    except storage.NotFoundError:
        check.report("the shard is missing")
    except UserError as error:
        check.report(str(error))
    else:
        if scan.fault:
            check.report(scan.fault)
        if scan.size_bytes != entry["bytes"]:
            check.report(f"it has {scan.size_bytes} bytes, the index says {entry['bytes']}")
        elif scan.sha256 != entry["sha256"]:
            check.report(f"its sha256 is {scan.sha256.hex()[:12]}..., the index says {entry['sha256'].hex()[:12]}...")
    return check.result(rows)


@dataclass
class _Check:
    """Collects what the checks of one tar find."""

    index: Index
    shard: int
    share: float
    seed: int
    problems: list[str] = field(default_factory=list)
    count: int = 0
    decoded: int = 0
    decoded_samples: int = 0
    unindexed: int = 0

    def report(self, problem: str) -> None:
        self.count += 1
        if self.count <= _MOST_SHOWN:
            path = self.index.shards["path"][self.shard].as_py()
            self.problems.append(f"{path}: {problem}")

    def members(self, scan: TarScan, rows: ShardRows) -> None:
        """Reads the tar and compares every audio member with its row."""
        keys, codecs = rows.table["key"].to_pylist(), rows.table["codec"].to_pylist()
        at = {offset: row for row, offset in enumerate(rows.offset.tolist())}
        for member in scan.members(audio.SUFFIXES):
            if member.suffix not in audio.SUFFIXES:
                continue
            row = at.pop(member.offset, None)
            if row is None:
                self.unindexed += 1
            elif (member.key, member.suffix) != (keys[row], f".{codecs[row]}"):
                self.report(f"{member.name} is at byte {member.offset}, the index says {keys[row]}.{codecs[row]}")
            else:
                self._member(member, rows, row)
        if at:
            first = keys[min(at.values())]
            self.report(f"{len(at)} of {len(keys)} members are not in the tar, the first {first}")

    def _member(self, member: TarMember, rows: ShardRows, row: int) -> None:
        if member.size != rows.size[row]:
            self.report(f"{member.key} has {member.size} bytes, the index says {rows.size[row]}")
        elif xxhash.xxh3_64_intdigest(member.data) != rows.checksum[row]:
            self.report(f"{member.key} fails its checksum")
        elif xxhash.xxh3_64_intdigest(f"{self.seed}/{self.shard}/{member.key}".encode()) < self.share * 2**64:
            self.decoded += 1
            try:
                _, wave = audio.decode_checked(member.data)
                self.decoded_samples += len(wave)
                if len(wave) != rows.samples[row]:
                    self.report(f"{member.key} decodes to {len(wave)} samples, the index says {rows.samples[row]}")
                    return
                audio.check_slices(member.data, audio.check_sound(wave, audio.SoundLimits())[0])
            except audio.AudioError as error:
                self.report(f"{member.key} cannot be trained on ({error.cause}): {error}")

    def result(self, rows: ShardRows) -> ShardAudit:
        if self.count > _MOST_SHOWN:
            path = self.index.shards["path"][self.shard].as_py()
            self.problems.append(f"{path}: and {self.count - _MOST_SHOWN} problems more")
        own = pc.equal(rows.table["group"], rows.table["recording"]).to_numpy()
        named = rows.table.filter(pa.array(~own))
        return ShardAudit(
            shard=self.shard,
            problems=tuple(self.problems),
            problem_count=self.count,
            decoded=self.decoded,
            decoded_samples=self.decoded_samples,
            unindexed=self.unindexed,
            first=rows.first,
            content=_content(rows),
            recording=hashes(rows.table["recording"]),
            samples=rows.samples,
            counts=~rows.excluded,
            durations=np.bincount(duration_class(rows.samples), minlength=CLASSES),
            by_language=_summed(rows.table, "language"),
            by_group=_summed(named, "group"),
            own_groups=int(rows.samples[own].sum()),
        )


def duration_class(samples: np.ndarray) -> np.ndarray:
    """int64: the class of duration of each length in samples at 16 kHz."""
    octaves = np.log2(np.maximum(samples, 1) / (audio.RATE_HZ * LEAST_S))
    return np.clip(np.floor(octaves * OCTAVE), 0, CLASSES - 1).astype(np.int64)


def class_edges_s() -> np.ndarray:
    """float64 [CLASSES + 1]: the edges of the classes of duration, in seconds."""
    return LEAST_S * 2.0 ** (np.arange(CLASSES + 1) / OCTAVE)


def hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """uint64 [rows]: xxh3 of each text."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts.cast(pa.binary()).to_pylist()), np.uint64, len(texts))


def _content(rows: ShardRows) -> np.ndarray:
    """uint64 [utterances]: a hash of the bytes of each, from its checksum and size."""
    with np.errstate(over="ignore"):
        return rows.checksum ^ (rows.size.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _summed(table: pa.Table, name: str) -> pa.Table:
    """Table (name, samples): total samples for each value of the column `name`."""
    return table.group_by(name).aggregate([("samples", "sum")]).rename_columns([name, "samples"])
