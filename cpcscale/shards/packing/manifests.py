"""Manifests: tables of the speaker and language of each file, of any size; CSV, or TSV if the name ends in .tsv."""

from __future__ import annotations

import csv
import io
import logging
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpcscale import storage
from cpcscale.errors import UserError, nearest

log = logging.getLogger(__name__)

NAMES = ("manifest.csv", "manifest.tsv")
_BATCH_ROWS = 65_536
_ROWS = pa.schema([("path", pa.large_binary()), ("speaker", pa.large_string()), ("language", pa.large_string())])


@dataclass(kw_only=True)
class ManifestColumns:
    """The names of the columns of a manifest."""

    # The path of the audio file, relative to the source or to the manifest.
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
    counts. With `speakers` false, manifests need no column of speakers. Raises UserError for a malformed manifest.
    """
    if given:
        tables = [_given(root, names, storage.absolute(given), columns, speakers)]
    else:
        deepest_first = sorted(beside, key=lambda name: -name.count("/"))
        tables = [_beside(root, name, columns, speakers) for name in deepest_first]
    rows = pa.concat_tables([_ROWS.empty_table(), *(table.rows for table in tables)]).combine_chunks()
    known = pc.is_in(rows["path"], value_set=names)
    for table in tables:
        _warn_of_missing_files(table, known.slice(0, table.rows.num_rows))
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
            f"{_shown(table.rows['path'][0])}: name the folder that they are relative to as the source, or another "
            "column with columns.path"
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
        _refuse_two_speakers(url, rows, first)
        rows = rows.filter(pa.array(~again)).combine_chunks()
    return _Table(url, rows)


def _batches(url: str, root: str, folder: str, columns: ManifestColumns, speakers: bool) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest, with paths relative to the root."""
    # In TSV, such as Common Voice's, quotation marks are plain characters.
    tabs = url.lower().endswith(".tsv")
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    try:
        with storage.opened(url) as file:
            buffered = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
            reader = csv.reader(io.TextIOWrapper(buffered, encoding="utf-8-sig", newline=""), **form)
            places = _places(url, next(reader, []), columns, speakers)
            batch: list[tuple[bytes, str, str]] = []
            for row in filter(None, reader):
                path, speaker, language = (row[at].strip() if at is not None and at < len(row) else "" for at in places)
                batch.append((_relative(path, root, folder).encode("utf-8", "surrogateescape"), speaker, language))
                if len(batch) == _BATCH_ROWS:
                    yield _batch(batch)
                    batch = []
            yield _batch(batch)
    except (UnicodeDecodeError, csv.Error) as error:
        kind = "TSV" if tabs else "CSV"
        raise UserError(f"{url} is not a {kind} table in UTF-8 ({error}): write it again, or rename the file") from None


def _batch(rows: Sequence[tuple[bytes, str, str]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    return pa.RecordBatch.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, _ROWS.types, strict=True)], schema=_ROWS
    )


def _places(
    url: str, header: list[str], columns: ManifestColumns, speakers: bool
) -> tuple[int | None, int | None, int | None]:
    """The indices of the three columns; the column of paths, and columns that the user named, must be there."""
    for key, name, needed in (
        ("path", columns.path, True),
        ("speaker", columns.speaker, speakers and columns.speaker != ManifestColumns().speaker),
        ("language", columns.language, columns.language != ManifestColumns().language),
    ):
        if needed and name not in header:
            has = f"it has {', '.join(header)}" if header else "it is empty"
            raise UserError(
                f"{url} has no column `{name}` ({has}){nearest(name, header)}: add it, name another with "
                f"columns.{key}, or rename the file"
            )
    if speakers and columns.speaker not in header:
        hint = nearest(columns.speaker, header)
        log.warning("%s has no column `%s`%s: each file counts as a speaker", url, columns.speaker, hint)
    path, speaker, language = (
        header.index(name) if name in header else None for name in (columns.path, columns.speaker, columns.language)
    )
    return path, speaker, language


def _relative(path: str, root: str, folder: str) -> str:
    """A path of a manifest, relative to the root; the manifest may also have absolute paths."""
    if path.startswith(f"{root}/"):
        return posixpath.normpath(path[len(root) + 1 :])
    return posixpath.normpath(posixpath.join(folder, path))


def _refuse_two_speakers(url: str, rows: pa.Table, first: np.ndarray) -> None:
    other = pc.not_equal(rows["speaker"], pc.take(rows["speaker"], pa.array(first)))
    at = pc.index(other, True).as_py()
    if at >= 0:
        raise UserError(
            f"{url} names {_shown(rows['path'][at])} for two speakers, {rows['speaker'][int(first[at])].as_py()!r} and "
            f"{rows['speaker'][at].as_py()!r}: a file has one"
        )


def _warn_of_missing_files(table: _Table, known: pa.ChunkedArray) -> None:
    rows = len(known)
    missing = rows - (pc.sum(known).as_py() or 0)
    if missing:
        first = _shown(table.rows["path"][pc.index(known, False).as_py()])
        log.warning("%s: %d of its %d paths name no audio file here; the first: %s", table.url, missing, rows, first)


def _shown(path: pa.Scalar) -> str:
    return str(path.as_py().decode("utf-8", "backslashreplace"))
