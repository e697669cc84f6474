"""The audio files of a tree as one table: 8 to 16 bytes and its name a file, so that 10,000,000 files fit a laptop.

Who speaks comes from manifests (see manifests.py), from the folders, or from the files themselves.
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
from cpcscale.errors import UserError
from cpcscale.shards.packing import manifests
from cpcscale.shards.packing.manifests import ManifestColumns

BATCH_ROWS = 65_536
# What follows a recording's key in the key of a piece.
_PIECE = re.compile(r"(.*)/[0-9]{5,}")


@dataclass(frozen=True)
class AudioFile:
    """One audio file as found: `path` to read it, `name` relative to the source, its speaker or recording."""

    path: str
    name: str
    group: str
    language: str


@dataclass(kw_only=True)
class FindConfig:
    """Who speaks in which file."""

    # A CSV (or .tsv) with a row a file; without it, every manifest.csv or manifest.tsv in the tree counts.
    manifest: str = ""
    # The names of the manifest's columns.
    columns: ManifestColumns = field(default_factory=ManifestColumns)
    # Where a speaker's name comes from: the manifest's column, a folder of the path, or each file is its own.
    group_from: Literal["manifest", "folder", "file"] = "manifest"
    # Which folder: 1 is the top one below the source, -1 the one that the file lies in.
    folder_level: int = -1

    def __post_init__(self) -> None:
        if self.folder_level == 0:
            raise UserError("folder_level=0 names no folder: 1 is the top one below the source, -1 the file's own")


class AudioFiles(Sequence[AudioFile]):
    """Audio files as an Arrow table; a Source is made when it is asked for.

    Columns: `name` and, where it does not follow from `root`, `path`, both in the bytes of the file system; `group`
    (null: the file is its own) and `language`, dictionaries.
    """

    def __init__(self, table: pa.Table, root: str = "") -> None:
        self.table, self.root = table.combine_chunks(), root

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
        """The files that the bool [files] `mask` holds true."""
        return self if mask.all() else AudioFiles(self.table.filter(pa.array(mask)), self.root)

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
        """The files of these numbers."""
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
    """The audio files below `root`, sorted by name, with speaker and language as `config` says.

    By default they come from any `manifest.csv` (path, speaker, language) in the tree, of which the one nearest to a
    file counts. A file without a speaker is a group of its own. Raises UserError when there is no folder, no audio in
    it, or a manifest or folders that do not say what they are asked for.
    """
    config = config or FindConfig()
    if not root or not storage.exists(root):
        raise UserError(f"there is no folder {root!r}: check the path of the audio to pack")
    root = storage.absolute(root).rstrip("/")
    listed = storage.list_files(root)
    beside = [name for name in listed if posixpath.basename(name) in manifests.NAMES]
    batches = [
        pa.array([_bytes(name) for name in part], pa.large_binary())
        for part in _batched(name for name in listed if name.lower().endswith(audio.SUFFIXES))
    ]
    del listed
    names = pa.chunked_array(batches, pa.large_binary()).combine_chunks()
    if not len(names):
        raise UserError(f"no audio below {root}: expected files ending in {', '.join(audio.SUFFIXES)}")
    told = manifests.read(
        root, names, beside, config.manifest, config.columns, speakers=config.group_from == "manifest"
    )
    match config.group_from:
        case "manifest":
            group = told.speaker
        case "folder":
            group = _folders(names, config.folder_level)
        case "file":
            group = pa.nulls(len(names), pa.large_string())
    return AudioFiles(_encoded(pa.table({"name": names, "group": group, "language": told.language})), root)


def utterance_keys(names: Sequence[str] | pa.LargeStringArray, cut: np.ndarray | None = None) -> pa.LargeStringArray:
    """A WebDataset key for each of the file names: without suffix, dots and odd characters replaced, unique.

    The key of a name follows from the name and from whether another one wants the same key. `cut` bool [names]: files
    whose pieces get the keys KEY/00000 and so on, which no other file then gets.
    """
    names = names if isinstance(names, pa.Array) else pa.array(list(names), pa.large_string())
    cut = np.zeros(len(names), bool) if cut is None else cut
    plain = pa.concat_arrays(
        [pa.array([], pa.large_string())]
        + [_plain(names.slice(start, BATCH_ROWS)) for start in range(0, len(names), BATCH_ROWS)]
    )
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in values(plain)), np.uint64, len(plain))
    # Hashes find what may clash, the keys themselves decide.
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
    """The texts (of these rows) one by one, a batch of them as Python objects."""
    for start in range(0, len(texts) if rows is None else len(rows), BATCH_ROWS):
        if rows is None:
            part = texts.slice(start, BATCH_ROWS)
        else:
            part = pc.take(texts, pa.array(rows[start : start + BATCH_ROWS]))
        yield from part.to_pylist()


def shown_name(name: str) -> str:
    """A file's name as text that any table takes: bytes that are not UTF-8 written out."""
    return name.encode(errors="backslashreplace").decode()


def _like_pieces(plain: pa.LargeStringArray, recordings: np.ndarray) -> list[int]:
    """The rows whose key reads as that of a piece of a recording, of whose keys the sorted hashes are given."""
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
    """bool: the numbers that stand there more than once."""
    ordered = np.sort(numbers)
    return np.isin(numbers, ordered[1:][ordered[1:] == ordered[:-1]])


def _folders(names: pa.LargeBinaryArray, level: int) -> pa.ChunkedArray:
    """The folder of this level in each name."""
    parts, missing, first = [], 0, ""
    for start in range(0, len(names), BATCH_ROWS):
        folders: list[str | None] = []
        for name in names.slice(start, BATCH_ROWS).to_pylist():
            above = _text(name).split("/")[:-1]
            there = -len(above) <= level <= len(above)
            folders.append(shown_name(above[level - 1 if level > 0 else level]) if there else None)
            if not there:
                missing, first = missing + 1, first or shown_name(_text(name))
        parts.append(pa.array(folders, pa.large_string()))
    if missing:
        raise UserError(
            f"{missing} of {len(names)} files lie in no folder of folder_level={level}, the first: {first}: give a "
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
    """The table with its few speakers and languages written once."""
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
