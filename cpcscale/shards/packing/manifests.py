"""Manifests: tables of the speaker and language of each file, of any size (see tables.py for their form)."""

from __future__ import annotations

import contextlib
import logging
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpcscale import storage, tables
from cpcscale.errors import UserError, nearest, shown_name
from cpcscale.tables import Table, identity, nearest_name, nfc

log = logging.getLogger(__name__)

NAMES = ("manifest.csv", "manifest.tsv")
_BATCH_ROWS = 65_536
_ROWS = pa.schema([("path", pa.large_binary()), ("speaker", pa.large_string()), ("language", pa.large_string())])


@dataclass(kw_only=True)
class ManifestColumns:
    """The names of the columns of a manifest."""

    # The path of the audio file, relative to the source or to the manifest; else file, file_name or audio_filepath.
    path: str = "path"
    # The speaker; a manifest may lack this column.
    speaker: str = "speaker"
    # The language; a manifest may lack this column.
    language: str = "language"


@dataclass(frozen=True)
class ManifestLabels:
    """The labels of each file: `speaker` (null if unknown) and `language` (empty if unknown)."""

    speaker: pa.ChunkedArray
    language: pa.ChunkedArray


@dataclass(frozen=True)
class _Table:
    """One manifest: its address, and the first row of each path, with paths relative to the source."""

    url: str
    rows: pa.Table


def read(
    root: str,
    names: pa.LargeBinaryArray,
    beside: Sequence[str],
    given: str,
    columns: ManifestColumns,
    *,
    speakers: bool,
) -> ManifestLabels:
    """Speaker and language of each of the files `names` below `root`.

    They come from the manifest `given`, else from those in the tree (`beside`), of which the nearest above a file
    counts. Paths are compared by `nfc`. With `speakers` false, manifests need no column of speakers. Raises UserError
    for a malformed manifest.
    """
    names = _normalised(names)
    if given:
        found = [_given(root, names, storage.absolute(given), columns, speakers)]
    else:
        deepest_first = sorted(beside, key=lambda name: -name.count("/"))
        found = [_beside(root, name, columns, speakers) for name in deepest_first]
    rows = pa.concat_tables([_ROWS.empty_table(), *(table.rows for table in found)]).combine_chunks()
    known = pc.is_in(rows["path"], value_set=names)
    for table in found:
        _warn_of_missing_files(table, known.slice(0, table.rows.num_rows), names)
        known = known.slice(table.rows.num_rows)
    at = pc.index_in(names, value_set=rows["path"])
    speaker, language = (pc.take(rows[name], at) for name in ("speaker", "language"))
    speaker = pc.if_else(pc.equal(speaker, ""), pa.scalar(None, pa.large_string()), speaker)
    return ManifestLabels(speaker, pc.fill_null(language, ""))


def _beside(root: str, name: str, columns: ManifestColumns, speakers: bool) -> _Table:
    """A manifest in the tree; its paths are relative to its folder."""
    return _table(storage.join(root, name), root, posixpath.dirname(name), columns, speakers)


def _given(root: str, names: pa.LargeBinaryArray, url: str, columns: ManifestColumns, speakers: bool) -> _Table:
    """The manifest of the user; its paths are relative to the source, or to its own folder if that is in the source."""
    table = _table(url, root, "", columns, speakers)
    known = pc.is_in(table.rows["path"], value_set=names)
    folder = posixpath.dirname(url)
    if folder.startswith(f"{root}/") and not pc.any(known).as_py():
        table = _table(url, root, folder[len(root) + 1 :], columns, speakers)
        known = pc.is_in(table.rows["path"], value_set=names)
    if table.rows.num_rows and not pc.any(known).as_py():
        raise UserError(
            f"none of the {table.rows.num_rows} paths in {url} names an audio file below {root}, the first: "
            f"{_with_nearest(table.rows['path'][0], names)}: name the folder that they are relative to as the source, "
            "or another column with columns.path"
        )
    labelled = pc.is_in(names, value_set=table.rows["path"])
    unlabelled = len(names) - (pc.sum(labelled).as_py() or 0)
    if unlabelled and speakers:
        first = _shown(names[pc.index(labelled, False).as_py()])
        log.warning(
            "%s has no row for %d of %d files, so each of these counts as a speaker; the first: %s",
            url,
            unlabelled,
            len(names),
            first,
        )
    return table


def _table(url: str, root: str, folder: str, columns: ManifestColumns, speakers: bool) -> _Table:
    batches = list(_batches(url, root, folder, columns, speakers))
    rows = pa.Table.from_batches(batches, _ROWS).combine_chunks()
    first = pc.index_in(rows["path"], value_set=rows["path"]).to_numpy()
    again = first != np.arange(len(first))
    if again.any():
        _refuse_two_values(url, rows, first)
        rows = rows.filter(pa.array(~again)).combine_chunks()
    return _Table(url, rows)


def _batches(url: str, root: str, folder: str, columns: ManifestColumns, speakers: bool) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest, with paths relative to the root."""
    table = Table(url)
    places = _places(table, columns, speakers)
    for paths, speaker, language in table.batches(places):
        cells = (
            [_relative(nfc(path), root, folder).encode("utf-8", "surrogateescape") for path in paths],
            list(map(identity, speaker)),
            language,
        )
        yield pa.RecordBatch.from_arrays(
            [pa.array(column, kind) for column, kind in zip(cells, _ROWS.types, strict=True)], schema=_ROWS
        )


def _places(table: Table, columns: ManifestColumns, speakers: bool) -> tuple[str, str, str]:
    """The names of the three columns; the column of paths, and columns that the user named, must be there."""
    usual, header = ManifestColumns(), list(table.columns)
    path = columns.path
    if path == usual.path:
        path = next(filter(table.has, tables.PATHS), path)
    for key, name, needed in (
        ("path", path, True),
        ("speaker", columns.speaker, speakers and columns.speaker != usual.speaker),
        ("language", columns.language, columns.language != usual.language),
    ):
        if needed and not table.has(name):
            has = f"it has {', '.join(header)}" if header else "it is empty"
            raise UserError(
                f"{table.url} has no column `{name}` ({has}){nearest(name, header)}: add it, name another with "
                f"columns.{key}, or rename the file"
            )
    if speakers and not table.has(columns.speaker):
        hint = nearest(columns.speaker, header)
        log.warning("%s has no column `%s`%s: each file counts as a speaker", table.url, columns.speaker, hint)
    if {"start", "end"} <= {*header} or {"offset", "duration"} <= {*header}:
        log.warning("%s has parts of files, of which only speakers are used: files are packed whole", table.url)
    return path, columns.speaker, columns.language


def _relative(path: str, root: str, folder: str) -> str:
    """A path of a manifest, relative to the root; the manifest may also have absolute paths."""
    if path.startswith("/") or "://" in path:
        with contextlib.suppress(UserError):  # What is no place names no file below the root.
            path = storage.absolute(path)
        joined = path.removeprefix(f"{nfc(root)}/")
    else:
        joined = f"{folder}/{path}" if folder else path
    plain = joined[:1] not in "./" and not joined.endswith("/") and "/." not in joined and "//" not in joined
    return joined if plain else posixpath.normpath(joined)


def _normalised(names: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """The names in the spelling of `nfc`."""
    data = names.buffers()[2]
    if data is None or data.size == 0 or np.frombuffer(data, np.uint8).max() < 128:
        return names
    parts = (
        pa.array([nfc(_text(name)).encode("utf-8", "surrogateescape") for name in part.to_pylist()], names.type)
        for part in (names.slice(start, _BATCH_ROWS) for start in range(0, len(names), _BATCH_ROWS))
    )
    return pa.concat_arrays(list(parts))


def _refuse_two_values(url: str, rows: pa.Table, first: np.ndarray) -> None:
    for column in ("speaker", "language"):
        other = pc.not_equal(rows[column], pc.take(rows[column], pa.array(first)))
        at = pc.index(other, True).as_py()
        if at >= 0:
            raise UserError(
                f"{url} names {_shown(rows['path'][at])} for two {column}s, {rows[column][int(first[at])].as_py()!r} "
                f"and {rows[column][at].as_py()!r}: a file has one"
            )


def _warn_of_missing_files(table: _Table, known: pa.ChunkedArray, names: pa.LargeBinaryArray) -> None:
    rows = len(known)
    missing = rows - (pc.sum(known).as_py() or 0)
    if missing:
        first = _with_nearest(table.rows["path"][pc.index(known, False).as_py()], names)
        log.warning("%s: %d of its %d paths name no audio file here; the first: %s", table.url, missing, rows, first)


def _with_nearest(path: pa.Scalar, names: pa.LargeBinaryArray) -> str:
    """The path, and the name of a file that is most like it."""
    name = _text(path.as_py())
    return shown_name(name) + nearest_name(name, (_text(one.as_py()) for one in names))


def _shown(path: pa.Scalar) -> str:
    return shown_name(_text(path.as_py()))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
