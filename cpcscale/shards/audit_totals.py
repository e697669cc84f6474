"""Sums up the audits of all tars of a set, in memory that does not grow with the set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpcscale import audio
from cpcscale.shards.audit import CLASSES, OCTAVE, ShardAudit, class_edges_s
from cpcscale.shards.index import Index

_PAIR = np.dtype([("hash", "<u8"), ("value", "<i8")])
# Rows of one bucket: a few hundred MB while it is sorted.
_BUCKET_ROWS = 1 << 24
_COMPACT_ROWS = 1 << 20
_MOST_PROBLEMS, _MOST_NAMES, _MOST_DUPLICATES, _MOST_COPIES = 1000, 20, 5, 4
_HOUR_SAMPLES = 3600 * audio.RATE_HZ
# Classes of duration to merge into one of those shown, four to an octave.
_MERGED = OCTAVE // 4
_SIZE_CLASSES = 30


class HashBuckets:
    """(hash, number) pairs of a set of any size, in files that are each small enough to sort in memory."""

    def __init__(self, folder: Path, expected: int) -> None:
        folder.mkdir()
        self._paths = [folder / str(number) for number in range(1 + expected // _BUCKET_ROWS)]

    def add(self, hashes: np.ndarray, values: np.ndarray) -> None:
        """Adds pairs: `hashes` uint64 and `values` int64, of equal length."""
        rows = np.empty(len(hashes), _PAIR)
        rows["hash"], rows["value"] = hashes, values
        bucket = hashes % np.uint64(len(self._paths))
        for number in np.unique(bucket).tolist():
            with self._paths[number].open("ab") as file:
                file.write(rows[bucket == number].tobytes())

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields, for each bucket, (where each hash begins, numbers sorted by hash); equal hashes are in one bucket."""
        for path in self._paths:
            if path.exists():
                rows = np.fromfile(path, _PAIR)
                order = np.argsort(rows["hash"], kind="stable")
                ordered = rows["hash"][order]
                begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
                yield begins, rows["value"][order]


class SamplesByName:
    """Total samples by name, for any number of names."""

    def __init__(self, name: str) -> None:
        self._name, self._rows = name, 0
        self._tables = [pa.table({name: pa.array([], pa.string()), "samples": pa.array([], pa.int64())})]

    def add(self, table: pa.Table) -> None:
        """Adds a table of names and samples."""
        self._tables.append(table)
        self._rows += table.num_rows
        if self._rows > _COMPACT_ROWS:
            self._tables, self._rows = [self.table()], 0

    def table(self) -> pa.Table:
        """Table (name, samples), the largest first."""
        summed = pa.concat_tables(self._tables).group_by(self._name).aggregate([("samples", "sum")])
        return summed.rename_columns([self._name, "samples"]).sort_by([("samples", "descending")])


class AuditTotals:
    """The sums over the audits of all tars of a set. `folder` is for data that is not kept in memory."""

    def __init__(self, index: Index, folder: Path) -> None:
        self._index = index
        self._recordings = HashBuckets(folder / "recordings", index.count)
        self._contents = HashBuckets(folder / "contents", index.count)
        self._problems: list[str] = []
        self._problem_count = self._unindexed = self._decoded = self._decoded_samples = 0
        self._own_groups = self._excluded = self._excluded_samples = 0
        self._durations = np.zeros(CLASSES, np.int64)
        self._least, self._most = np.iinfo(np.int64).max, 0
        self._languages, self._groups = SamplesByName("language"), SamplesByName("group")

    def add(self, done: ShardAudit, recording: np.ndarray, windows: np.ndarray) -> None:
        """Adds the audit of the next tar, and the hashes (uint64) of its recordings with their numbers of `windows`."""
        self._problems += done.problems[: max(0, _MOST_PROBLEMS - len(self._problems))]
        self._problem_count += done.problem_count
        self._unindexed += done.unindexed
        self._decoded += done.decoded
        self._decoded_samples += done.decoded_samples
        self._own_groups += done.own_groups
        self._excluded += int((~done.counts).sum())
        self._excluded_samples += int(done.samples[~done.counts].sum())
        self._durations += done.durations
        self._least = min(self._least, int(done.samples.min(initial=self._least)))
        self._most = max(self._most, int(done.samples.max(initial=0)))
        self._languages.add(done.by_language)
        self._groups.add(done.by_group)
        self._contents.add(done.content[done.counts], (done.first + np.flatnonzero(done.counts)).astype(np.int64))
        self._recordings.add(recording, windows)

    @cached_property
    def windows_by_recording(self) -> tuple[int, int, int]:
        """(number of recordings, number of windows, sum of n (n - 1) over recordings with n windows)."""
        count = total = same = 0
        for begins, windows in self._recordings:
            by_recording = np.add.reduceat(windows, begins)
            count += len(begins)
            total += int(by_recording.sum())
            same += int((by_recording * (by_recording - 1)).sum())
        return count, total, same

    def result(self, names: Sequence[str]) -> dict[str, Any]:
        """The sums as plain values; `names` are the files in the folder of the set."""
        index, groups, languages = self._index, self._groups.table(), self._languages.table()
        known = set(index.shards["path"].to_pylist())
        beside = [name for name in names if name.endswith(".tar") and name not in known]
        named = int(groups["samples"].to_numpy().sum())
        return {
            "shards": index.base,
            "ok": not self._problem_count,
            "fingerprint": index.fingerprint,
            "parent": index.lineage[-1].fingerprint if index.lineage else None,
            "problem_count": self._problem_count,
            "problems": self._problems,
            "tars": index.shards.num_rows,
            "tars_not_indexed": len(beside),
            "bytes": int(index.shards["bytes"].to_numpy().sum()),
            "utterances": index.count,
            "hours": index.duration_s / 3600,
            "decoded": self._decoded,
            "decoded_hours": self._decoded_samples / _HOUR_SAMPLES,
            "members_not_indexed": self._unindexed,
            "excluded": self._excluded,
            "excluded_hours": self._excluded_samples / _HOUR_SAMPLES,
            "duration_s": self._duration_s(),
            "durations": self._histogram(),
            "shard_bytes": self._sizes(),
            "recordings": self.windows_by_recording[0],
            "languages": pc.sum(pc.not_equal(languages["language"], "")).as_py() or 0,
            "hours_by_language": _first_names(languages),
            "groups": groups.num_rows,
            "hours_by_group": _first_names(groups),
            "hours_of_groups": named / _HOUR_SAMPLES,
            "hours_without_group": self._own_groups / _HOUR_SAMPLES,
            "duplicates": self._duplicates(),
        }

    def _duration_s(self) -> dict[str, float] | None:
        """Shortest, median (to 2 %) and longest duration in seconds; None for a set without utterances."""
        if not self._durations.sum():
            return None
        median = int(np.searchsorted(np.cumsum(self._durations), self._durations.sum() / 2))
        edges = class_edges_s()
        return {
            "least": self._least / audio.RATE_HZ,
            "median": float((edges[median] * edges[median + 1]) ** 0.5),
            "most": self._most / audio.RATE_HZ,
        }

    def _histogram(self) -> dict[str, list[Any]]:
        """The number of utterances in each class of duration, from the first to the last class that has any."""
        merged = self._durations.reshape(-1, _MERGED).sum(axis=1)
        there = np.flatnonzero(merged)
        first, last = (int(there[0]), int(there[-1]) + 1) if len(there) else (0, 0)
        edges = class_edges_s()[::_MERGED][first : last + 1]
        return {"edges_s": edges.round(4).tolist(), "utterances": merged[first:last].tolist()}

    def _sizes(self) -> dict[str, list[Any]]:
        """The number of tars in each class of size, from 0 bytes to the largest."""
        sizes = self._index.shards["bytes"].to_numpy()
        if not len(sizes):
            return {"edges": [], "tars": []}
        tars, edges = np.histogram(sizes, bins=_SIZE_CLASSES, range=(0, max(1, int(sizes.max()))))
        return {"edges": edges.round().astype(np.int64).tolist(), "tars": tars.tolist()}

    def _duplicates(self) -> dict[str, Any]:
        """Utterances that have the same bytes as an earlier one, by checksum and size, without excluded ones."""
        contents = copies = 0
        firsts: list[list[int]] = []
        for begins, utterances in self._contents:
            counts = np.diff(np.append(begins, len(utterances)))
            repeated = np.flatnonzero(counts > 1)
            contents += len(repeated)
            copies += int((counts[repeated] - 1).sum())
            firsts += [
                utterances[begins[at] : begins[at] + min(int(counts[at]), _MOST_COPIES)].tolist()
                for at in repeated[np.argsort(utterances[begins[repeated]])][:_MOST_DUPLICATES].tolist()
            ]
        named = [[self._named(utterance) for utterance in group] for group in sorted(firsts)[:_MOST_DUPLICATES]]
        return {"utterances": copies, "contents": contents, "first": named}

    def _named(self, utterance: int) -> str:
        shard = int(self._index.shard_of(utterance))
        return f"{self._index.shards['path'][shard].as_py()}:{self._index.key(utterance)}"


def _first_names(table: pa.Table) -> dict[str, float]:
    """Hours by name, of the names that have the most."""
    first = table.slice(0, _MOST_NAMES)
    names, samples = (column.to_pylist() for column in first.columns)
    return {name: total / _HOUR_SAMPLES for name, total in zip(names, samples, strict=True)}
