"""The end of pass 1: assigns each file to a split, task and shard. The assignment is written before any shard is made.

The same files, lengths, seed and settings give the same assignment, whatever the order of the files. It is stored in
columns: each file takes its name, its key and about 50 bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpcscale import audio, config, storage
from cpcscale.errors import UserError
from cpcscale.shards.packing import splits
from cpcscale.shards.packing.pieces import PackedFile, PackTask, piece_counts
from cpcscale.shards.packing.sources import BATCH_ROWS, AudioFiles, FindConfig, utterance_keys
from cpcscale.shards.packing.splits import SPLITS
from cpcscale.shards.rows import table_digest

HEAD, TABLE, NOTES = "assignment.json", "assignment.parquet", ".packing"
_BYTES_A_SECOND = {"wav": 32_000, "flac": 21_700, "opus": 3_600}
# `shard` is the first of the `shards` that the task of the file fills.
_COLUMNS = pa.schema(
    [
        ("split", pa.string()),
        ("task", pa.int32()),
        ("shard", pa.int32()),
        ("shards", pa.int32()),
        ("key", pa.string()),
        ("name", pa.string()),
        ("group", pa.string()),
        ("language", pa.string()),
        ("samples", pa.int64()),
        ("pieces", pa.int32()),
    ]
)


@dataclass(kw_only=True)
class PackConfig(FindConfig):
    """How audio files become shards."""

    # Codec of the utterances: wav decodes fastest, opus is smallest.
    codec: Literal["flac", "wav", "opus"] = "flac"
    # Target size of one shard in MB.
    shard_mb: float = 64.0
    # Seed of the held-out split and of the order of recordings.
    seed: int = 0
    # Share to hold out as the set `heldout`: of the utterances of each speaker, or of the speakers.
    heldout_share: float = 0.0
    # utterance: the held-out speakers also occur in training. group: they do not.
    heldout_by: Literal["utterance", "group"] = "group"
    # Speakers to hold out with all their files, as the set `unseen`.
    unseen_groups: list[str] = field(default_factory=list)
    # Files shorter than this, in seconds, are left out and listed in the quarantine table.
    min_s: float = 0.2
    # Files longer than this, in seconds, are cut into pieces of nearly equal length; 0: never.
    max_s: float = 60.0
    # Where files are cut: the number of shards over which a task shuffles the pieces.
    group_shards: int = 4
    # Whether all files of a speaker go into one shard, which may then be larger than shard_mb; for order.run.
    keep_speakers: bool = field(default=False, metadata=config.ADDED)
    # What the audio may be like; a file or piece that is not is left out and listed in the quarantine table.
    limits: audio.SoundLimits = field(default_factory=audio.SoundLimits, metadata=config.ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        config.at_least(0, heldout_share=self.heldout_share, min_s=self.min_s, max_s=self.max_s)
        config.at_least(0.1, shard_mb=self.shard_mb)
        config.at_least(1, group_shards=self.group_shards)
        if self.heldout_share >= 1:
            raise UserError(f"heldout_share={self.heldout_share} leaves nothing to train on: give a share below 1")
        if 0 < self.max_s < max(1.0, 2 * self.min_s):
            raise UserError(
                f"max_s={self.max_s} would cut pieces shorter than min_s={self.min_s} or a second: give at least "
                f"{max(1.0, 2 * self.min_s)}, or 0 to cut nothing"
            )


class Assignment(Sequence[PackTask]):
    """The tasks of pass 2, each made when it is accessed, and the table that they are made of.

    `rows` int64: numbers of files in the order of the assignment; task t has rows[starts[t]:starts[t + 1]].
    """

    def __init__(self, target: str, config: PackConfig, files: AudioFiles, samples: np.ndarray) -> None:
        names = files.table["name"].combine_chunks().cast(pa.large_string())
        self._target, self._config, self._files, self._samples = target, config, files, samples
        self._pieces = piece_counts(samples, round(config.max_s * audio.RATE_HZ))
        self._keys = utterance_keys(names, self._pieces > 1)
        split = splits.split(files, names, config.seed, config.heldout_share, config.heldout_by, config.unseen_groups)
        ranked = splits.ranked(config.seed, "order", self._keys)
        _refuse_one_name_twice(self._keys, ranked, names)
        speaker = splits.speakers(files, names) if config.keep_speakers else None
        if speaker is not None:
            # Speakers in the order of their first files, and within a speaker as before.
            _, first, which = np.unique(speaker[ranked], return_index=True, return_inverse=True)
            ranked = ranked[np.argsort(first[which], kind="stable")]
        parts = [
            _tasks_of(ranked[split[ranked] == number], samples, self._pieces, config, speaker) for number in range(3)
        ]
        self.rows = np.concatenate([part.rows for part in parts])
        counts = np.concatenate([np.diff(part.starts) for part in parts])
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._split = np.repeat(np.arange(3), [len(part.shards) for part in parts])
        self._shards = np.concatenate([part.shards for part in parts])
        self._first = np.concatenate([np.cumsum(part.shards) - part.shards for part in parts])
        self.resumed = False
        self._head: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> PackTask:  # type: ignore[override]
        if not 0 <= at < len(self):
            raise IndexError(at)
        rows = self.rows[self.starts[at] : self.starts[at + 1]]
        keys, sources = pc.take(self._keys, pa.array(rows)).to_pylist(), self._files.at(rows)
        return PackTask(
            target=storage.join(self._target, self.split(at)),
            note=storage.join(self.notes, f"{at:06d}.json"),
            first_shard=int(self._first[at]),
            shards=int(self._shards[at]),
            codec=self._config.codec,
            min_samples=round(self._config.min_s * audio.RATE_HZ),
            seed=self._config.seed,
            resumed=self.resumed,
            limits=self._config.limits,
            members=tuple(
                PackedFile(key, source, int(self._samples[row]), int(self._pieces[row]))
                for key, source, row in zip(keys, sources, rows, strict=True)
            ),
        )

    def split(self, task: int) -> str:
        """The name of the split of a task."""
        return SPLITS[self._split[task]]

    @property
    def splits(self) -> list[str]:
        """The names of the splits that are not empty."""
        return [SPLITS[number] for number in np.unique(self._split)]

    @property
    def notes(self) -> str:
        """The hidden folder where each task notes what it made, so that a stopped pack can be continued."""
        return storage.join(self._target, NOTES, self.head["digest"][:16])

    @property
    def head(self) -> dict[str, Any]:
        """The content of assignment.json: the settings of the table, and a digest over them and its rows."""
        if self._head is None:
            found = {one.name for one in fields(FindConfig)}
            settings = {name: value for name, value in config.identity(self._config).items() if name not in found}
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for batch in self._batches():
                digest.update(table_digest(pa.Table.from_batches([batch]), _COLUMNS.names))
            self._head = {"format": 2, "pack": settings, "files": len(self.rows), "digest": digest.hexdigest()}
        return self._head

    def write(self) -> None:
        """Writes the table and then the head, from which a stopped pack can be continued.

        If the same head is there already, sets `resumed`. Raises UserError if the target holds another pack, or tars
        that are not of a pack.
        """
        head, url = self.head, storage.join(self._target, HEAD)
        if storage.exists(url):
            try:
                known = dict(config.read_json(storage.read(url))).get("digest")
            except (ValueError, TypeError):
                known = None
            if known != head["digest"]:
                raise UserError(
                    f"{self._target} holds a pack of other files or settings: name another folder, or remove it first"
                )
            self.resumed = True
            return
        for base in (storage.join(self._target, split) for split in self.splits):
            if storage.exists(base) and any(name.endswith(".tar") for name in storage.list_files(base)):
                raise UserError(f"{base} holds tars that are not of a pack: name another folder, or remove it first")
        with (
            storage.publishing(storage.join(self._target, TABLE)) as temporary,
            pq.ParquetWriter(temporary, _COLUMNS) as table,
        ):
            for batch in self._batches():
                table.write_batch(batch)
        storage.write(url, json.dumps(head, indent=1, ensure_ascii=False).encode() + b"\n")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        table = self._files.table
        for start in range(0, len(self.rows), BATCH_ROWS):
            rows = self.rows[start : start + BATCH_ROWS]
            at = np.searchsorted(self.starts, np.arange(start, start + len(rows)), side="right") - 1
            taken = table.take(pa.array(rows))
            name = taken["name"].combine_chunks().cast(pa.string())
            group = pc.fill_null(taken["group"].combine_chunks().dictionary_decode().cast(pa.string()), name)
            language = taken["language"].combine_chunks().dictionary_decode().cast(pa.string())
            key = pc.take(self._keys, pa.array(rows)).cast(pa.string())
            split = pc.take(pa.array(SPLITS), pa.array(self._split[at]))
            numbers = (at, self._first[at], self._shards[at], self._samples[rows], self._pieces[rows])
            task, shard, shards, samples, pieces = (pa.array(column) for column in numbers)
            columns = [split, task, shard, shards, key, name, group, language, samples, pieces]
            yield pa.RecordBatch.from_arrays(
                [column.cast(kind) for column, kind in zip(columns, _COLUMNS.types, strict=True)], schema=_COLUMNS
            )


@dataclass(frozen=True)
class _Tasks:
    """The tasks of one split: its rows in order, where each task starts among them, and how many shards each fills."""

    rows: np.ndarray
    starts: np.ndarray
    shards: np.ndarray


def _tasks_of(
    rows: np.ndarray, samples: np.ndarray, pieces: np.ndarray, config: PackConfig, speaker: np.ndarray | None
) -> _Tasks:
    """Divides the files of one split, in order, into tasks of similar duration; given speakers, between these alone."""
    if not len(rows):
        return _Tasks(rows, np.zeros(1, np.int64), np.zeros(0, np.int64))
    shard_samples = config.shard_mb * 1e6 / _BYTES_A_SECOND[config.codec] * audio.RATE_HZ
    lengths, counts = samples[rows], pieces[rows]
    whole = speaker is not None or bool((counts == 1).all())
    total = int(lengths.sum())
    groups = max(1, round(total / (shard_samples if whole else shard_samples * config.group_shards)))
    before = np.cumsum(lengths) - lengths
    if speaker is not None:
        begins = np.flatnonzero(np.diff(speaker[rows], prepend=-1))
        before = np.repeat(before[begins], np.diff(np.append(begins, len(rows))))
    # The group of a file is before * groups // total, which may not fit 64 bits; the edges of groups do.
    edges = np.fromiter((-(-max(1, total) * group // groups) for group in range(groups)), np.int64, groups)
    starts = np.unique(np.searchsorted(edges, before, side="right") - 1, return_index=True)[1]
    ends = np.append(starts, len(rows))
    if whole:
        return _Tasks(rows, ends, np.ones(len(starts), np.int64))
    size = np.add.reduceat(lengths, starts)
    longest = np.maximum.reduceat(-(-lengths // counts), starts)
    # Few enough that no shard is empty, however pieces are shuffled: a shard is not shorter than the longest piece.
    most = np.maximum(1, size // np.maximum(1, longest))
    return _Tasks(rows, ends, np.clip(np.rint(size / shard_samples).astype(np.int64), 1, most))


def _refuse_one_name_twice(keys: pa.LargeStringArray, ranked: np.ndarray, names: pa.LargeStringArray) -> None:
    """Raises UserError for two equal names: keys are unique if names are, and equal keys are neighbours in `ranked`."""
    for start in range(0, len(ranked) - 1, BATCH_ROWS):
        rows = ranked[start : start + BATCH_ROWS + 1]
        same = pc.equal(pc.take(keys, pa.array(rows[1:])), pc.take(keys, pa.array(rows[:-1])))
        at = pc.index(same, True).as_py()
        if at >= 0:
            raise UserError(f"two files have the name {names[int(rows[at])].as_py()!r}: give each a different name")
