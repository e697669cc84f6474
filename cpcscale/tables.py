"""Tables that users give: CSV, TSV and JSON lines, read strictly by one rule, and what single cells mean.

A table is UTF-8 text, perhaps gzipped, with any line ends. Its columns are separated by tabs if its first line has one,
else by commas or semicolons, whichever that line has more of. In tables of tabs quotation marks are plain characters,
unless the first line begins with one. A table that begins with { is JSON lines: one object on each line. Lines without
any text are skipped. A row that does not fit the header is refused with its line, and so is a cell that is not
understood: nothing is guessed or left out.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, cast

from cpcscale import storage
from cpcscale.errors import UserError, nearest, shown_name

# The usual names of the column that names the audio file: audformat, Hugging Face and NeMo have the others.
PATHS = ("path", "file", "file_name", "filename", "audio_filepath")
# A batch whose objects fit the processor's cache is read twice as fast as one of 65,536 rows.
_BATCH_ROWS = 1024
# Most names that are compared letter by letter with one that was not found.
_MOST_COMPARED = 65_536
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_NUMBERS = re.compile(r"0*([0-9]+)")
_LINE_END = re.compile(r"\r\n?|\n")
_UNKNOWN = frozenset(
    ("", "unknown", "unk", "none", "null", "nil", "nan", "nat", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "-", "?")
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"(\d+)\.0*", re.ASCII)
# As pandas writes a time: 0 days 00:00:04.500000, or without the days or the rest.
_TIME = re.compile(r"(?:(\d+) days? ?)?(?:(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?))?", re.ASCII)


class TableError(UserError):
    """Raised for a table that does not keep the rules, with its line where there is one."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row: `row[column]` is a cell as text without spaces around it, "" if the table has no such column."""

    place: str
    cells: Mapping[str, Any]

    def __getitem__(self, column: str) -> str:
        return _text(self.cells.get(column), self.place, column)

    def number(self, column: str, unknown: float | None = None) -> float:
        """The cell as a finite number; `unknown`, if given, for a cell that says so, such as NaN."""
        text = self[column]
        if unknown is not None and is_unknown(text):
            return unknown
        try:
            return number(text)
        except ValueError as error:
            raise self.error(column, f"{error}; drop the row or give the number") from None

    def error(self, column: str, why: str) -> TableError:
        """The error for a cell, with its place; `why` follows its value."""
        return TableError(f"{self.place}, column {column}: {self[column]!r} {why}")


class Table:
    """A table whose first line has been read; `columns` are its names, of JSON lines the keys of all lines.

    Raises TableError, also while rows are read, for text that does not keep the rules of this module.
    """

    def __init__(self, url: str, data: bytes | None = None, names: Sequence[Any] = ()) -> None:
        """The table at `url`; with `data`, of that text, which `url` then only names. `names`: of its rows, if any."""
        self.url, self._data, self._names = url, data, names
        with _lines(url, data) as lines:
            first = next((line for line in lines if line.strip()), "")
        self._json = first.lstrip().startswith(("{", "["))
        self._delimiter = "\t" if "\t" in first else max(",;", key=first.count)
        self._quotes = self._delimiter != "\t" or first.startswith('"')
        if self._json:
            found = {name: None for _, record in json_lines(url) for name in record}
            self.columns = tuple(found)
        else:
            with _lines(url, data) as lines:
                self.columns = self._header(self._reader(lines))

    def require(self, *columns: str) -> None:
        """Raises TableError if the table lacks one of these columns."""
        if missing := [column for column in columns if column not in self.columns]:
            raise TableError(
                f"{self.url} has no column {', '.join(missing)}{nearest(missing[0], list(self.columns))}: it needs "
                f"{', '.join(columns)}, and has {', '.join(self.columns) or 'none'}"
            )

    def rows(self) -> Iterator[Row]:
        """The rows, one by one."""
        places = (f"{self.url} row {name}" for name in self._names)
        for lines, rows in self._batches():
            for line, row in zip(lines, rows, strict=True):
                cells: Mapping[str, Any] = row if self._json else dict(zip(self.columns, row, strict=True))
                yield Row(next(places, f"{self.url} line {line}"), cells)

    def batches(self, columns: Sequence[str]) -> Iterator[list[list[str]]]:
        """The cells of these columns, as lists of some rows; "" where the table has no such column.

        In JSON lines, `a.b` is the key b inside of key a.
        """
        for lines, rows in self._batches():
            yield [self._column(name, lines, rows) for name in columns]

    def has(self, column: str) -> bool:
        """Whether there is such a column; in JSON lines it may lie inside of another."""
        return column in self.columns or (self._json and column.partition(".")[0] in self.columns)

    def _column(self, name: str, lines: Sequence[int], rows: Sequence[Any]) -> list[str]:
        if not self.has(name):
            return [""] * len(rows)
        if not self._json:
            return list(map(str.strip, map(itemgetter(self.columns.index(name)), rows)))
        return [
            _text(value_at(row, name), f"{self.url} line {line}", name) for line, row in zip(lines, rows, strict=True)
        ]

    def _batches(self) -> Iterator[tuple[Sequence[int], list[Any]]]:
        """Batches of (the lines at which rows start, the rows): lists of cells, or objects of JSON."""
        if self._json:
            records = json_lines(self.url)
            while found := list(itertools.islice(records, _BATCH_ROWS)):
                yield [line for line, _ in found], [record for _, record in found]
            return
        with _lines(self.url, self._data) as lines:
            reader = self._reader(lines)
            try:
                self._header(reader)
                first = reader.line_num + 1
                while rows := list(itertools.islice(reader, _BATCH_ROWS)):
                    last = reader.line_num
                    numbers: Sequence[int] = range(first, last + 1)
                    if len(numbers) != len(rows):
                        numbers = _starts(first, rows)
                    yield self._fitting(numbers, rows)
                    first = last + 1
            except csv.Error as error:
                raise TableError(f"{self.url} line {reader.line_num} is not a row of a table: {error}") from None

    def _reader(self, lines: Iterable[str]) -> Any:
        form: dict[str, Any] = {"delimiter": self._delimiter, "skipinitialspace": True, "strict": True}
        return csv.reader(lines, quoting=csv.QUOTE_MINIMAL if self._quotes else csv.QUOTE_NONE, **form)

    def _header(self, reader: Any) -> tuple[str, ...]:
        try:
            cells: list[str] = next((row for row in reader if any(map(str.strip, row))), [])
        except csv.Error as error:
            raise TableError(f"{self.url} line {reader.line_num} is not the header of a table: {error}") from None
        columns = tuple(nfc(cell.strip()) for cell in cells)
        for column in columns:
            # Index columns of spreadsheets and data frames have no name.
            if column and columns.count(column) > 1:
                raise TableError(f"{self.url} line {reader.line_num} has two columns `{column}`: rename or remove one")
        return columns

    def _fitting(self, lines: Sequence[int], rows: list[list[str]]) -> tuple[Sequence[int], list[list[str]]]:
        """The rows without those that have no text. Raises TableError for one with more or fewer cells than columns."""
        width = len(self.columns)
        if set(map(len, rows)) == {width} and all(map(any, rows)):
            return lines, rows
        kept = [(line, row) for line, row in zip(lines, rows, strict=True) if any(map(str.strip, row))]
        for line, row in kept:
            if len(row) != width:
                raise TableError(
                    f"{self.url} line {line} has {len(row)} cells, and the header has {width}: write decimals with a "
                    "point, put quotation marks round a cell that holds a separator, and leave no cell out"
                )
        return [line for line, _ in kept], [row for _, row in kept]


def json_lines(url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSON lines file. Raises TableError for what is not a JSON object."""
    with _lines(url) as lines:
        for number_, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line, object_pairs_hook=_object)
                except (ValueError, RecursionError) as error:
                    raise TableError(
                        f"{url} line {number_} is not JSON ({error}): write one object on each line"
                    ) from None
                if not isinstance(record, dict):
                    kind = type(record).__name__
                    raise TableError(
                        f"{url} line {number_} holds a {kind}, not an object: write one object on each line"
                    )
                yield number_, record


def value_at(record: Any, name: str) -> Any:
    """The value of `name`, or of its parts between dots, one inside the other; a number is an index of a list."""
    if isinstance(record, Mapping):
        if name in record:
            return record[name]
        head, dot, rest = name.partition(".")
        return value_at(record[head], rest) if dot and head in record else None
    if isinstance(record, list):
        head, dot, rest = name.partition(".")
        if head.isdecimal() and int(head) < len(record):
            return value_at(record[int(head)], rest) if dot else record[int(head)]
    return None


def nfc(text: str) -> str:
    """The text in one spelling of its accents (Unicode NFC), by which names are compared."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def is_unknown(text: str) -> bool:
    """Whether a cell says that its value is not known: empty, unknown, NaN, None, NULL, N/A and so on."""
    return text.strip().lower() in _UNKNOWN


@lru_cache(maxsize=65_536)
def identity(text: str) -> str:
    """The name of a speaker, recording or session in one spelling; "" if it is not known.

    Spreadsheets and data frames make 1.0 of 1, and NaN or None of an empty cell.

    >>> identity("1.0"), identity("1"), identity(" anna "), identity("N/A")
    ('1', '1', 'anna', '')
    """
    name = nfc(text.strip())
    whole = _WHOLE.fullmatch(name)
    return "" if is_unknown(name) else whole[1] if whole else name


def number(text: str) -> float:
    """A finite decimal number. Raises ValueError for anything else, also for 3,5 and 3_5 and words such as nan.

    >>> number("-2.5e1")
    -25.0
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        comma = ": decimals have a point" if "," in text and _NUMBER.fullmatch(text.replace(",", ".")) else ""
        raise ValueError(f"is not a number{comma}")
    return value


def seconds(text: str) -> float:
    """A time in seconds: a number, or as pandas writes it. Raises ValueError for anything else, or below 0.

    >>> seconds("4.5"), seconds("0 days 00:00:04.500000")
    (4.5, 4.5)
    """
    found = _TIME.fullmatch(text) if text else None
    if found:
        days, hours, minutes, rest = (float(part or 0) for part in found.groups())
        return days * 86_400 + hours * 3600 + minutes * 60 + rest
    try:
        value = number(text)
    except ValueError:
        value = -1.0
    if value < 0:
        raise ValueError("is not a time in seconds, such as 4.5, or 0 days 00:00:04.500000")
    return value


def nearest_name(name: str, names: Iterable[str]) -> str:
    """`; the nearest is X, which differs in ...` for the name of a file that is most like `name`, or ""."""
    loose, found = _loose(name), None
    some: list[str] = []
    numbers = _NUMBERS.findall(name)
    for at, other in enumerate(names):
        if _loose(other) == loose:
            found = other
            break
        # Another number is another recording, not another spelling.
        if at < _MOST_COMPARED and _NUMBERS.findall(other) == numbers:
            some.append(other)
    if found is None:
        import difflib

        close = difflib.get_close_matches(name, some, n=1, cutoff=0.75)
        if not close:
            return ""
        found = close[0]
    plain, other = nfc(name), nfc(found)
    differs = "spelling"
    for part, of in (
        ("upper and lower case", str.casefold),
        ("zeros before a number", lambda text: _NUMBERS.sub(r"\1", text)),
        ("its suffix", lambda text: text.rpartition(".")[0]),
        ("its folder", lambda text: text.replace("\\", "/").rpartition("/")[2]),
        ("its folder and suffix", lambda text: text.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]),
    ):
        if of(plain) and of(plain) == of(other):
            differs = part
            break
    return f"; the nearest is {shown_name(found)}, which differs in {differs}"


def _loose(name: str) -> str:
    """What is left of a file's name where nothing but letters and digits counts."""
    stem = nfc(name).replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isalnum, (stem.rpartition(".")[0] or stem).casefold()))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key is there twice")
    return record


def _text(value: Any, place: str, column: str) -> str:
    """A cell as text. Raises TableError for a list or an object."""
    if isinstance(value, str):
        # JSON may hold halves of surrogate pairs, which no table can hold.
        return shown_name(value.strip())
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise TableError(f"{place}, column {column} holds a {type(value).__name__}, not a text or a number")
    return str(value)


def _starts(first: int, rows: Iterable[Sequence[str]]) -> list[int]:
    """The lines at which these rows start, the first at `first`; between quotation marks, a row may have several."""
    lengths = (1 + len(_LINE_END.findall("\0".join(row))) for row in rows)
    return list(itertools.accumulate(lengths, initial=first))[:-1]


@contextlib.contextmanager
def _lines(url: str, data: bytes | None = None) -> Iterator[Iterator[str]]:
    """The lines of a text in UTF-8, with their ends, without byte order marks at its start."""
    try:
        with storage.opened(url) if data is None else io.BytesIO(data) as file:
            packed = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
            plain = gzip.GzipFile(fileobj=packed) if packed.peek(2)[:2] == _GZIP else packed
            text = io.TextIOWrapper(cast(io.BufferedReader, plain), encoding="utf-8", newline="")
            yield itertools.chain([next(text, "").lstrip("\ufeff")], text)
    except UnicodeDecodeError:
        if storage.read(url, 0, len(_PARQUET)) == _PARQUET:
            way_out = "write it as CSV, as `pandas.read_parquet(OLD).to_csv(NEW)` does"
            raise TableError(f"{url} is a Parquet file, which is not read as a table: {way_out}") from None
        raise TableError(f"{url}{_bad_line(url)} is not a table in UTF-8: save it again as CSV in UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TableError(f"{url} cannot be unpacked ({error}): pack or fetch it again") from None


def _bad_line(url: str) -> str:
    """` line N` for the first line of a file that is not UTF-8; "" for one that is packed."""
    data = storage.read(url)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if not data.startswith(_GZIP):
            return f" line {1 + len(_LINE_END.findall(data[: error.start].decode()))}"
    return ""
