"""A plain table with columns path, speaker, activation, valence, dominance, and optional others (see tables.py).

Optional columns: utterance (its id), language, gender, partition (train, dev, test1, test2, test3), recording, session,
style (improvised, scripted) and category (emotion class). `start` and `end` make a row a part of its file, in seconds
or as pandas writes times, as in audformat's tables, which have `file` for `path`; so do `offset` and `duration`, as in
NeMo's manifests. Paths are relative to the folder of the table. The label scale is `corpus.scale`; nothing is dropped.
A table with synthesiser settings (columns `set_...`) is of synthetic speech, so its results are marked MADE.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cpcscale import storage
from cpcscale.emotion.corpora import vocabulary
from cpcscale.emotion.corpora.corpus import (
    Corpus,
    CorpusConfig,
    Utterance,
    checked,
    folder_of,
    is_file,
    require_path,
    stem,
)
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError
from cpcscale.tables import PATHS, Row, Table, TableError, identity, is_unknown, nfc, seconds

MANIFEST = "manifest.csv"
_REQUIRED = ("speaker", *PRIMITIVES)
_OPTIONAL = ("utterance", "language", "gender", "partition", "recording", "session", "style", "category")
# The columns of a part of a file: from and to, or NeMo's from and length.
_PART, _PART_BY_LENGTH = ("start", "end"), ("offset", "duration")
# Other names for parts of files, whose units are not known.
_PART_LIKE = ("start_time", "end_time", "start_s", "end_s", "begin", "onset", "offset")


def read(settings: CorpusConfig) -> Corpus:
    """The corpus of a table, or of a folder with `manifest.csv` or a single table.

    Raises UserError for a missing file or column, a cell that is not understood, or what `checked` refuses.
    """
    file = table_file(require_path(settings))
    return _of_table(Table(file), folder_of(file), settings.name or stem(folder_of(file)).replace("_", "-"), settings)


def read_columns(columns: Mapping[str, Sequence[Any]], settings: CorpusConfig, names: Sequence[Any] = ()) -> Corpus:
    """The corpus of a table in memory, from the cells of its columns; paths are relative to the current folder.

    `names` are those of its rows, such as the index of a data frame; without them, rows are counted from 0. Raises
    UserError as `read`.
    """
    if single := [name for name, cells in columns.items() if isinstance(cells, str) or not hasattr(cells, "__len__")]:
        raise UserError(f"column {single[0]} of the table is one value: pass a list with a cell for each row")
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{name} {len(cells)}" for name, cells in columns.items())
        raise UserError(f"the columns of the table have different lengths: {lengths}")
    text = io.StringIO()
    # A cell in quotation marks is a cell, whatever is in it.
    rows = csv.writer(text, quoting=csv.QUOTE_ALL)
    rows.writerow(columns)
    named: list[Any] = []
    for number, cells in enumerate(zip(*columns.values(), strict=True)):
        # One without any text, as the table passes it over.
        if any(cell is not None and str(cell).strip() for cell in cells):
            rows.writerow(cells)
            named.append(names[number] if len(names) else number)
    table = Table("the table", text.getvalue().encode(errors="backslashreplace"), named)
    return _of_table(table, storage.absolute("."), settings.name or "table", settings)


def _of_table(table: Table, folder: str, name: str, settings: CorpusConfig) -> Corpus:
    path = path_column(table)
    table.require(path, *_REQUIRED)
    part = _part_columns(table)
    place = (lambda path: storage.join(folder, path)) if settings.shards else _finder(folder)
    utterances = tuple(_utterance(row, path, part, place) for row in table.rows())
    made = any(column.startswith("set_") for column in table.columns)
    known = {"", path, *_REQUIRED, *_OPTIONAL, *part}
    unused = [column for column in table.columns if column not in known and not column.startswith("set_")]
    notes = (f"columns that are not used: {', '.join(unused)}",) if unused else ()
    scale = settings.scale[0], settings.scale[1]
    return checked(Corpus(name, ("MADE",) if made else (), scale, utterances, notes=notes), settings)


def has_ratings(folder: str, name: str) -> bool:
    """Whether this file of the folder is a table with the columns of ratings."""
    try:
        return {*_REQUIRED} <= {*Table(storage.join(folder, name)).columns}
    except TableError:
        return False


def path_column(table: Table) -> str:
    """The column that names the audio file; `path` if the table has none."""
    return next((name for name in PATHS if name in table.columns), PATHS[0])


def table_file(path: str) -> str:
    """The table at `path`: the file itself, or the folder's `manifest.csv` or only CSV, else TSV or JSON lines.

    Raises UserError for none.
    """
    if is_file(path):
        return path
    names = tables_of(storage.list_files(path))
    if MANIFEST in names:
        return storage.join(path, MANIFEST)
    if len(names) != 1:
        found = f"{len(names)} tables ({', '.join(names)})" if names else "no CSV, TSV or JSON lines file"
        raise UserError(f"{path} holds {found}: put the table there as {MANIFEST}, or pass corpus.path=FILE.csv")
    return storage.join(path, names[0])


def tables_of(files: Sequence[str]) -> list[str]:
    """The CSV files of a folder, else its TSV files, else its JSON lines files; not those in folders below."""
    names: list[str] = []
    for suffix in (".csv", ".tsv", ".jsonl"):
        names = names or [name for name in files if "/" not in name and name.lower().endswith(suffix)]
    return names


def _part_columns(table: Table) -> tuple[str, str] | tuple[()]:
    """The columns that name the part of a file that a row is; empty if rows are whole files."""
    for part in (_PART, _PART_BY_LENGTH):
        if {*part} <= {*table.columns}:
            return part
    if like := [name for name in (*_PART, *_PART_LIKE) if name in table.columns]:
        raise TableError(
            f"{table.url} has a column {like[0]}: name the part of the file that a row is by start and end, or by "
            "offset and duration, in seconds, or rename the column if rows are whole files"
        )
    return ()


def _finder(folder: str) -> Callable[[str], str]:
    """A function from a path of the table to the file; the name of a file need only be equal in Unicode NFC."""

    @lru_cache(maxsize=1)
    def listed() -> Mapping[str, str]:
        return {nfc(name): name for name in storage.list_files(folder)}

    def find(path: str) -> str:
        url = storage.absolute(path if "://" in path or path.startswith("/") else storage.join(folder, path))
        below = nfc(url).removeprefix(f"{nfc(folder)}/")
        if url.isascii() or below == nfc(url) or (storage.local_path(url) is not None and is_file(url)):
            return url
        name = listed().get(below)
        return storage.join(folder, name) if name else url

    return find


def _utterance(row: Row, column: str, part: tuple[str, str] | tuple[()], place: Callable[[str], str]) -> Utterance:
    path = row[column]
    if not path:
        raise row.error(column, "is no path, and every row needs one")
    partition = vocabulary.partition(row["partition"])
    if partition is None:
        raise row.error("partition", f"is not one of {', '.join(vocabulary.PARTITIONS)}")
    activation, valence, dominance = (row.number(name) for name in PRIMITIVES)
    segment = _segment(row, *part) if part else None
    key = nfc(path.rpartition(".")[0] or path)
    if segment:
        key += f" {segment[0]}-{segment[1]}"
    return Utterance(
        key=key if is_unknown(row["utterance"]) else nfc(row["utterance"]),
        path=place(path),
        speaker=identity(row["speaker"]),
        labels=(activation, valence, dominance),
        language=row["language"],
        gender=vocabulary.gender(row["gender"]),
        partition=partition,
        recording=identity(row["recording"]),
        session=identity(row["session"]),
        style="" if is_unknown(row["style"]) else row["style"].lower(),
        category="" if is_unknown(row["category"]) else vocabulary.category(row["category"]),
        segment=segment,
    )


def _segment(row: Row, first: str, second: str) -> tuple[float, float] | None:
    """(start, end) in seconds, the end infinite if it is not given; None for a whole file."""
    open_end, by_length = is_unknown(row[second]), (first, second) == _PART_BY_LENGTH
    if is_unknown(row[first]) and (open_end or by_length):
        start = 0.0
    else:
        start = _seconds(row, first)
    end = math.inf if open_end else _seconds(row, second) + (start if by_length else 0.0)
    if start >= end:
        raise row.error(second, "is not above 0" if by_length else f"is not after start={row[first]}")
    return None if (start, end) == (0.0, math.inf) else (start, end)


def _seconds(row: Row, column: str) -> float:
    try:
        return seconds(row[column])
    except ValueError as error:
        raise row.error(column, f"{error}") from None
