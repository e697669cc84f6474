"""A plain table with columns path, speaker, activation, valence, dominance, and optional others (see tables.py).

Optional columns: utterance (its id), language, gender, partition (train, dev, test1, test2, test3), recording, session,
style (improvised, scripted) and category (emotion class). `start` and `end` make a row a part of its file, in seconds
or as pandas writes times; audformat's tables have them, and `file` for `path`. Paths are relative to the folder of the
table. The label scale is `corpus.scale`; nothing is dropped. A table with synthesiser settings (columns `set_...`) is
of synthetic speech, so its results are marked MADE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

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
_PART = ("start", "end")
# Other names for parts of files, whose units are not known.
_PART_LIKE = ("start_time", "end_time", "start_s", "end_s", "begin", "onset", "offset")


def read(settings: CorpusConfig) -> Corpus:
    """The corpus of a table, or of a folder with `manifest.csv` or a single table.

    Raises UserError for a missing file or column, a cell that is not understood, or what `checked` refuses.
    """
    file = table_file(require_path(settings))
    table = Table(file)
    path = path_column(table)
    table.require(path, *_REQUIRED)
    _check_parts(table)
    folder = folder_of(file)
    place = (lambda path: storage.join(folder, path)) if settings.shards else _finder(folder)
    utterances = tuple(_utterance(row, path, place) for row in table.rows())
    made = any(column.startswith("set_") for column in table.columns)
    known = {"", path, *_REQUIRED, *_OPTIONAL, *_PART}
    unused = [column for column in table.columns if column not in known and not column.startswith("set_")]
    notes = (f"columns that are not used: {', '.join(unused)}",) if unused else ()
    name = settings.name or stem(folder).replace("_", "-")
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


def _check_parts(table: Table) -> None:
    parts = [name for name in _PART if name in table.columns]
    like = [name for name in _PART_LIKE if name in table.columns]
    if len(parts) == 1 or (like and not parts):
        raise TableError(
            f"{table.url} has a column {(parts or like)[0]}: name the part of the file that a row is by start and end, "
            "in seconds, or rename the column if rows are whole files"
        )


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


def _utterance(row: Row, column: str, place: Callable[[str], str]) -> Utterance:
    path = row[column]
    if not path:
        raise row.error(column, "is no path, and every row needs one")
    partition = vocabulary.partition(row["partition"])
    if partition is None:
        raise row.error("partition", f"is not one of {', '.join(vocabulary.PARTITIONS)}")
    activation, valence, dominance = (row.number(name) for name in PRIMITIVES)
    segment = _segment(row)
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


def _segment(row: Row) -> tuple[float, float] | None:
    """(start, end) in seconds, the end infinite if it is not given; None for a whole file."""
    whole = is_unknown(row["end"])
    if whole and is_unknown(row["start"]):
        return None
    times = []
    for column in _PART:
        try:
            times.append(math.inf if whole and column == "end" else seconds(row[column]))
        except ValueError as error:
            raise row.error(column, f"{error}") from None
    start, end = times
    if start >= end:
        raise row.error("end", f"is not after start={row['start']}")
    return None if (start, end) == (0.0, math.inf) else (start, end)
