"""Tables of predictions: CSV, JSON lines and Parquet, written row by row."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cpcscale import storage
from cpcscale.errors import UserError

# The cells of a row by column, "" where there is no value.
Row: TypeAlias = "Mapping[str, Any]"
SUFFIXES = (".csv", ".jsonl", ".parquet")
# The columns that are no numbers.
TEXTS = ("file", "category", "reason", "flags", "marks", "model")
_ROW_GROUP = 65_536


def check_place(url: str) -> None:
    """Raises UserError for a file that `write_table` cannot write."""
    if not url.lower().endswith(SUFFIXES):
        raise UserError(f"--out {url} is no kind of table that is written: end its name in {', '.join(SUFFIXES)}")
    local = storage.local_path(url)
    if local is not None and local.is_dir():
        raise UserError(f"--out {url} is a folder: name a file, such as {storage.join(url, 'values.csv')}")


def write_table(url: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Writes the file `url`, local or s3://, as its suffix says; it is there as a whole or not at all."""
    with storage.publishing(url) as aside:
        if url.lower().endswith(".parquet"):
            _write_parquet(aside, columns, rows)
            return
        with aside.open("w", encoding="utf-8", newline="") as file:
            file.writelines(csv_lines(columns, rows) if url.lower().endswith(".csv") else json_lines(rows))


def csv_text(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """The table as CSV."""
    return "".join(csv_lines(columns, rows))


def csv_lines(columns: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    """The header and the rows, as lines of CSV."""
    writer = csv.DictWriter(_Line(), columns, lineterminator="\n")
    yield str(writer.writeheader())
    for row in rows:
        yield str(writer.writerow(row))


def json_lines(rows: Iterable[Row]) -> Iterator[str]:
    """The rows as objects, a line each; null where there is no value."""
    for row in rows:
        yield json.dumps({name: None if cell == "" else cell for name, cell in row.items()}) + "\n"


class _Line:
    """A file for a writer of CSV, which then returns the text of each row."""

    def write(self, text: str) -> str:
        return text


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string() if name in TEXTS else pa.float64()) for name in columns])
    left = iter(rows)
    with pq.ParquetWriter(path, schema) as file:
        while batch := list(itertools.islice(left, _ROW_GROUP)):
            cells = {name: [row[name] for row in batch] for name in columns}
            numbers = {
                name: [None if cell == "" else cell for cell in column]
                for name, column in cells.items()
                if name not in TEXTS
            }
            file.write_table(pa.table(cells | numbers, schema))
