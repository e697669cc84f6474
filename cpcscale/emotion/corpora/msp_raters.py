"""The ratings of single workers in MSP-Podcast, in any of the forms that releases have.

labels_detailed.csv has a line for each worker, with the text of labels.txt in a column EmoDetail or (release 1.6, 2.0)
with a column for each value. labels_detailed.json is {file: {worker: {EmoAct: ...}}}. labels.txt: see
msp_label_lines.py.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator

from cpcscale import config
from cpcscale.emotion.corpora.corpus import Rating, merged_ratings, read_text
from cpcscale.emotion.corpora.msp_label_lines import number, rated_files, rating
from cpcscale.errors import UserError
from cpcscale.tables import Table

_LABELS = ("EmoAct", "EmoVal", "EmoDom")
_WORKERS = ("Workers", "Worker", "WorkerID", "WorkerId", "Annotator", "Name")


class UnknownFormError(UserError):
    """A file of single ratings is in no known form; labels do not need it."""


def ratings_of(file: str) -> dict[str, tuple[Rating, ...]]:
    """The ratings of each file name. Raises UnknownFormError if the file is in no known form."""
    by_file: dict[str, list[Rating]] = defaultdict(list)
    numbers: dict[float, float] = {}
    for name, one in _lines(file):
        # A release has over a million ratings, but few distinct workers and values: each is kept in memory once.
        activation, valence, dominance = (numbers.setdefault(value, value) for value in one[1:4])
        by_file[name].append(Rating(sys.intern(one.rater), activation, valence, dominance))
    return {name: merged_ratings(ratings) for name, ratings in by_file.items()}


def _lines(file: str) -> Iterator[tuple[str, Rating]]:
    if file.lower().endswith(".txt"):
        return _of_text(file)
    return _of_csv(file) if file.lower().endswith(".csv") else _of_json(file)


def _of_text(file: str) -> Iterator[tuple[str, Rating]]:
    files, _ = rated_files(read_text(file))
    for name, rated in files.items():
        yield from ((f"{name}.wav", one) for one in rated.ratings)


def _of_csv(file: str) -> Iterator[tuple[str, Rating]]:
    table = Table(file)
    table.require("FileName")
    if "EmoDetail" in table.columns:
        for row in table.rows():
            if one := rating(row["EmoDetail"]):
                yield row["FileName"], one
        return
    worker = next((column for column in _WORKERS if column in table.columns), None)
    if worker is None or not set(_LABELS) <= set(table.columns):
        raise UnknownFormError(
            f"{file} has neither a column EmoDetail nor a worker's ({', '.join(_WORKERS)}) with {', '.join(_LABELS)}"
        )
    for row in table.rows():
        activation, valence, dominance = (row.number(column, unknown=math.nan) for column in _LABELS)
        yield row["FileName"], Rating(row[worker], activation, valence, dominance)


def _of_json(file: str) -> Iterator[tuple[str, Rating]]:
    try:
        tree = config.read_json(read_text(file))
        for name, workers in tree.items():
            for worker, row in workers.items():
                activation, valence, dominance = (number(row.get(column)) for column in _LABELS)
                yield name, Rating(worker, activation, valence, dominance)
    except (json.JSONDecodeError, AttributeError):
        raise UnknownFormError(f"{file} is not {{file: {{worker: {{EmoAct: ...}}}}}}") from None
