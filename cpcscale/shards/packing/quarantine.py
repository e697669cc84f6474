"""The quarantine table of a pack: what is left out, and the cause. Written row by row, so that it may be long."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import cast

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards.account import Account

NAME = "quarantine.csv"
# `piece` is the number of a piece of a recording, empty for a whole file; `seconds` are empty where they are unknown.
_COLUMNS = ("path", "piece", "cause", "seconds", "why")


class Quarantine:
    """Collects rows in a temporary file, to be published at the end. Use it as a context manager."""

    def __init__(self) -> None:
        self.files = self.pieces = 0
        self.account = Account()
        self.first: dict[str, str] | None = None
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115
        self._rows = csv.DictWriter(self._file, _COLUMNS, lineterminator="\n")
        self._rows.writeheader()

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Sequence[dict[str, str]]) -> None:
        self.first = self.first or next(iter(rows), None)
        pieces = sum(1 for row in rows if row["piece"])
        self.files, self.pieces = self.files + len(rows) - pieces, self.pieces + pieces
        self._rows.writerows(rows)
        for row in rows:
            self.account.leave_out(row["cause"], float(row["seconds"]) if row["seconds"] else None)

    def publish(self, target: str) -> None:
        """Writes the table into the folder of the pack."""
        self._file.seek(0)
        with (
            storage.publishing(storage.join(target, NAME)) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as out,
        ):
            shutil.copyfileobj(self._file, out)


def read(target: str) -> Iterator[dict[str, str]]:
    """The rows of the table of a pack. Raises UserError if it is missing or malformed."""
    return rows_of(storage.join(target, NAME), _COLUMNS)


def rows_of(url: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a quarantine table with these columns. Raises UserError if it is missing or malformed."""
    try:
        with storage.opened(url) as file:
            buffered = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
            for row in csv.DictReader(io.TextIOWrapper(buffered, encoding="utf-8", newline="")):
                # Tables of earlier releases have no seconds.
                if not row.keys() >= {*columns} - {"seconds"} or None in (*row, *row.values()):
                    raise ValueError("other columns")
                float(row.get("seconds") or 0)
                yield row
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{url} is not a quarantine table ({error}): remove it, and pack or index again") from None
