"""The audio files of a folder tree as one table of 8 to 16 bytes and the name for each file: 10,000,000 fit a laptop.

Speakers come from manifests (see manifests.py) or from folders, or each file is a speaker.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cpcscale import audio, storage
from cpcscale.errors import UserError, shown_name
from cpcscale.shards import account
from cpcscale.shards.packing import manifests
from cpcscale.shards.packing.manifests import ManifestColumns
from cpcscale.tables import nfc

BATCH_ROWS = 65_536
# The key of a piece: that of its recording, and a number.
_PIECE = re.compile(r"(.*)/[0-9]{5,}")


@dataclass(frozen=True)
class AudioFile:
    """One audio file: `path` to read it, `name` relative to the source; `group` is its speaker, else its name."""

    path: str
    name: str
    group: str
    language: str


@dataclass(kw_only=True)
class FindConfig:
    """Where the speaker and language of each file are found."""

    # A table with a row for each file: CSV, TSV or JSON lines. Empty: every manifest.csv or manifest.tsv in the tree is
    # used.
    manifest: str = ""
    # The names of the manifest's columns.
    columns: ManifestColumns = field(default_factory=ManifestColumns)
    # Where speakers come from. manifest: its column. folder: a folder of the path. file: each file is a speaker.
    group_from: Literal["manifest", "folder", "file"] = "manifest"
    # Which folder, for group_from: folder. 1 is the top one below the source, -1 the one that the file is in.
    folder_level: int = -1

    def __post_init__(self) -> None:
        if self.folder_level == 0:
            raise UserError("folder_level=0 names no folder: 1 is the top one below the source, -1 the file's own")


class AudioFiles(Sequence[AudioFile]):
    """Audio files as an Arrow table; each AudioFile is made when it is accessed.

    Columns: `name` and, if it is not `root`/`name`, `path`, both as bytes of the file system; `group` (null: the file
    is its own group) and `language`, dictionary-encoded.
    """

    def __init__(self, table: pa.Table, root: str = "", passed_over: Counter[str] | None = None) -> None:
        self.table, self.root = table.combine_chunks(), root
        # Files of the tree that are not audio, by suffix.
        self.passed_over = passed_over or Counter()

    @classmethod
    def of(cls, sources: Iterable[AudioFile]) -> AudioFiles:
        """The table of these files."""
        batches = []
        columns: dict[str, list[Any]]
        for part in _batched(sources):
            columns = {"name": [_bytes(one.name) for one in part], "path": [_bytes(one.path) for one in part]}
            columns["group"] = [None if one.group == one.name else shown_name(one.group) for one in part]
            columns["language"] = [one.language for one in part]
            batches.append(pa.RecordBatch.from_pydict(columns, _LISTED))
        return cls(_encoded(pa.Table.from_batches(batches, _LISTED)))

    def only(self, mask: np.ndarray) -> AudioFiles:
        """The files for which the bool [files] `mask` is true."""
        return self if mask.all() else AudioFiles(self.table.filter(pa.array(mask)), self.root, self.passed_over)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, at: int) -> AudioFile: ...

    @overload
    def __getitem__(self, at: slice) -> list[AudioFile]: ...

    def __getitem__(self, at: int | slice) -> AudioFile | list[AudioFile]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self._rows(start, stop)[::step] if step > 0 else [self[one] for one in range(start, stop, step)]
        at += len(self) if at < 0 else 0
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._rows(at, at + 1)[0]

    def __iter__(self) -> Iterator[AudioFile]:
        for start in range(0, len(self), BATCH_ROWS):
            yield from self._rows(start, start + BATCH_ROWS)

    def at(self, rows: np.ndarray) -> list[AudioFile]:
        """The files with these numbers."""
        return self._sources(self.table.take(pa.array(rows)))

    def _rows(self, start: int, stop: int) -> list[AudioFile]:
        return self._sources(self.table.slice(start, max(0, stop - start)))

    def _sources(self, part: pa.Table) -> list[AudioFile]:
        names = [_text(name) for name in part["name"].to_pylist()]
        listed = "path" in part.column_names
        paths = map(_text, part["path"].to_pylist()) if listed else (storage.join(self.root, name) for name in names)
        rows = zip(paths, names, part["group"].to_pylist(), part["language"].to_pylist(), strict=True)
        return [
            AudioFile(path, name, name if group is None else group, language) for path, name, group, language in rows
        ]


def find_audio(root: str, config: FindConfig | None = None) -> AudioFiles:
    """The audio files below `root`, sorted by name, with speaker and language found as `config` says.

    By default these come from any `manifest.csv` (path, speaker, language) in the tree; the one nearest to a file
    counts. A file without a speaker is its own group. Raises UserError if there is no folder or no audio in it, and for
    manifests or folders that do not fit `config`.
    """
    config = config or FindConfig()
    if not root or not storage.exists(root):
        raise UserError(f"there is no folder {root!r}: check the path of the audio to pack")
    root = storage.absolute(root)
    listed = storage.list_files(root)
    beside = [name for name in listed if posixpath.basename(name).lower() in manifests.NAMES]
    batches = [
        pa.array([_bytes(name) for name in part], pa.large_binary())
        for part in _batched(name for name in listed if name.lower().endswith(audio.SUFFIXES))
    ]
    passed_over = Counter(
        account.suffix(name)
        for name in listed
        if not name.lower().endswith(audio.SUFFIXES) and posixpath.basename(name) not in manifests.NAMES
    )
    del listed
    names = pa.chunked_array(batches, pa.large_binary()).combine_chunks()
    if not len(names):
        over = f"; passed over {account.passed_over(passed_over)}" if passed_over else ""
        raise UserError(f"no audio below {root}: expected files ending in {', '.join(audio.SUFFIXES)}{over}")
    labels = manifests.read(
        root, names, beside, config.manifest, config.columns, speakers=config.group_from == "manifest"
    )
    match config.group_from:
        case "manifest":
            group = labels.speaker
        case "folder":
            group = _folders(names, config.folder_level)
        case "file":
            group = pa.nulls(len(names), pa.large_string())
    return AudioFiles(
        _encoded(pa.table({"name": names, "group": group, "language": labels.language})), root, passed_over
    )


def utterance_keys(names: Sequence[str] | pa.LargeStringArray, cut: np.ndarray | None = None) -> pa.LargeStringArray:
    """A unique WebDataset key for each file name: without suffix, and with dots and special characters replaced.

    Where names would get the same key, a hash of the name is appended. `cut` bool [names] says which files are cut into
    pieces with the keys KEY/00000 and so on, which no other file may have.

    >>> utterance_keys(["anna/take 1.wav", "ben/take.2.flac"]).to_pylist()
    ['anna/take_1', 'ben/take_2']
    """
    names = names if isinstance(names, pa.Array) else pa.array(list(names), pa.large_string())
    cut = np.zeros(len(names), bool) if cut is None else cut
    plain = pa.concat_arrays(
        [pa.array([], pa.large_string())]
        + [_plain(names.slice(start, BATCH_ROWS)) for start in range(0, len(names), BATCH_ROWS)]
    )
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in values(plain)), np.uint64, len(plain))
    # Equal hashes show which keys may be equal; then the keys are compared.
    suspects = np.flatnonzero(_repeated(hashes))
    wanted = Counter(plain[int(row)].as_py() for row in suspects)
    clashing = [int(row) for row in suspects if wanted[plain[int(row)].as_py()] > 1]
    if cut.any():
        clashing += _like_pieces(plain, np.unique(hashes[cut]))
    if not clashing:
        return plain
    rows = np.unique(np.array(clashing, np.int64))
    changed = [
        f"{plain[int(row)].as_py()}-{hashlib.sha256(names[int(row)].as_py().encode()).hexdigest()[:16]}" for row in rows
    ]
    mask = np.zeros(len(names), bool)
    mask[rows] = True
    return pc.replace_with_mask(plain, pa.array(mask), pa.array(changed, pa.large_string()))


def values(texts: pa.LargeStringArray, rows: np.ndarray | None = None) -> Iterator[str]:
    """Yields the texts (of these rows) one by one; only a batch at a time is in memory as Python objects."""
    for start in range(0, len(texts) if rows is None else len(rows), BATCH_ROWS):
        if rows is None:
            part = texts.slice(start, BATCH_ROWS)
        else:
            part = pc.take(texts, pa.array(rows[start : start + BATCH_ROWS]))
        yield from part.to_pylist()


def _like_pieces(plain: pa.LargeStringArray, recordings: np.ndarray) -> list[int]:
    """The rows whose key looks like that of a piece of a recording; `recordings` are sorted hashes of keys."""
    rows = []
    for row in np.flatnonzero(pc.match_substring_regex(plain, r"/[0-9]{5,}$").to_numpy(zero_copy_only=False)):
        match = _PIECE.fullmatch(plain[int(row)].as_py())
        if match and np.isin(np.uint64(xxhash.xxh3_64_intdigest(match[1].encode())), recordings):
            rows.append(int(row))
    return rows


def _plain(names: pa.LargeStringArray) -> pa.LargeStringArray:
    stems = pc.replace_substring_regex(names, r"(?s)^/*(.*)\.[^.]*$", r"\1")
    return pc.replace_substring_regex(stems, "[^A-Za-z0-9_/-]", "_")


def _repeated(numbers: np.ndarray) -> np.ndarray:
    """bool: which numbers occur more than once."""
    ordered = np.sort(numbers)
    return np.isin(numbers, ordered[1:][ordered[1:] == ordered[:-1]])


def _folders(names: pa.LargeBinaryArray, level: int) -> pa.ChunkedArray:
    """The folder at this level of each name. Raises UserError if a name has none."""
    parts, missing, first = [], 0, ""
    for start in range(0, len(names), BATCH_ROWS):
        folders: list[str | None] = []
        for name in names.slice(start, BATCH_ROWS).to_pylist():
            above = _text(name).split("/")[:-1]
            there = -len(above) <= level <= len(above)
            folders.append(nfc(shown_name(above[level - 1 if level > 0 else level])) if there else None)
            if not there:
                missing, first = missing + 1, first or shown_name(_text(name))
        parts.append(pa.array(folders, pa.large_string()))
    if missing:
        raise UserError(
            f"{missing} of {len(names)} files lie in no folder of folder_level={level} (-1: the one that a file is "
            f"in), the first: {first}: give a "
            "level that every path has, or move the files"
        )
    return pa.chunked_array(parts, pa.large_string())


_LISTED = pa.schema(
    [
        ("name", pa.large_binary()),
        ("path", pa.large_binary()),
        ("group", pa.large_string()),
        ("language", pa.large_string()),
    ]
)


def _encoded(table: pa.Table) -> pa.Table:
    """The table with speakers and languages dictionary-encoded, so that each is stored once."""
    for column in ("group", "language"):
        at = table.column_names.index(column)
        table = table.set_column(at, column, table[column].combine_chunks().dictionary_encode())
    return table


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
