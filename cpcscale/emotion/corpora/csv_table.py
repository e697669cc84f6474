"""A plain CSV with columns path, speaker, activation, valence, dominance, and optional others.

Optional columns: utterance (its id), language, gender, partition (train, dev, test1, test2, test3), recording, session,
style (improvised, scripted) and category (emotion class). Paths are relative to the folder of the CSV. A speaker that
is empty or `Unknown` is unknown. The label scale is `corpus.scale`; nothing is dropped. A table with synthesiser
settings (columns `set_...`) is of synthetic speech, so its results are marked MADE.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from cpcscale import storage
from cpcscale.emotion.corpora import vocabulary
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance, checked, folder_of, require_path, stem
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError

REQUIRED = ("path", "speaker", *PRIMITIVES)
MANIFEST = "manifest.csv"


def read(settings: CorpusConfig) -> Corpus:
    """The corpus of a CSV file, or of a folder with `manifest.csv` or a single CSV.

    Raises UserError for a missing file or column, a label that is not a number, an unknown partition, or what `checked`
    refuses.
    """
    file = table_file(require_path(settings))
    columns, rows = read_rows(file, REQUIRED)
    folder = folder_of(file)
    marks = ("MADE",) if any(column.startswith("set_") for column in columns) else ()
    name = settings.name or stem(folder).replace("_", "-")
    utterances = tuple(_utterance(file, folder, line, row) for line, row in rows)
    return checked(Corpus(name, marks, (settings.scale[0], settings.scale[1]), utterances), settings)


def recognises(folder: str, files: Sequence[str]) -> bool:
    """Whether the folder has a `manifest.csv` with ratings; it takes precedence over the names of the audio files."""
    if MANIFEST not in files:
        return False
    columns, _ = read_rows(storage.join(folder, MANIFEST), ())
    return set(REQUIRED) <= set(columns)


def table_file(path: str) -> str:
    """The CSV at `path`: the file itself, or the folder's `manifest.csv` or only CSV. Raises UserError for none."""
    if path.endswith(".csv"):
        return path
    names = [name for name in storage.list_files(path) if name.endswith(".csv") and "/" not in name]
    if MANIFEST in names:
        return storage.join(path, MANIFEST)
    if len(names) != 1:
        found = f"{len(names)} CSV files ({', '.join(names)})" if names else "no CSV file"
        raise UserError(f"{path} holds {found}: put the table there as {MANIFEST}, or pass corpus.path=FILE.csv")
    return storage.join(path, names[0])


def read_rows(file: str, required: tuple[str, ...]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(columns, [(line number, row)]) of a CSV. Raises UserError for a `required` column that is missing."""
    try:
        text = storage.read(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as CSV in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        columns = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num} is not CSV: {error}") from None
    missing = [column for column in required if column not in columns]
    if missing:
        raise UserError(
            f"{file} has no column {', '.join(missing)}: a table needs {', '.join(required)}, and this one has "
            f"{', '.join(columns) or 'none'}"
        )
    return columns, rows


def _utterance(file: str, folder: str, line: int, row: dict[str, str]) -> Utterance:
    path = row["path"].strip()
    if not path:
        raise UserError(f"{file} line {line}: path is empty, and every row needs one")
    texts = {name: row.get(name, "").strip() for name in ("utterance", "language", "recording", "session", "style")}
    partition = vocabulary.partition(row.get("partition", ""))
    if partition is None:
        raise UserError(
            f"{file} line {line}: partition={row['partition']!r} is not one of {', '.join(vocabulary.PARTITIONS)}"
        )
    activation, valence, dominance = (_number(file, line, column, row[column]) for column in PRIMITIVES)
    return Utterance(
        key=texts["utterance"] or path.rpartition(".")[0] or path,
        path=path if "://" in path or path.startswith("/") else storage.join(folder, path),
        speaker=vocabulary.speaker(row["speaker"]),
        labels=(activation, valence, dominance),
        language=texts["language"],
        gender=vocabulary.gender(row.get("gender", "")),
        partition=partition,
        recording=texts["recording"],
        session=texts["session"],
        style=texts["style"].lower(),
        category=vocabulary.category(row.get("category", "")),
    )


def _number(file: str, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{file} line {line}: {column}={text!r} is not a number; drop the row or give the rating")
    return value
