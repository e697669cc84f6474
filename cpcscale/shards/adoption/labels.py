"""Speaker, language and recording of a member of a tar: from a manifest, lhotse cuts, the JSON beside it, or a folder.

Each field is taken from the first of these sources that has it (shards/adoption/read_tar.py).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pyarrow import csv as arrow_csv

from cpcscale import storage
from cpcscale.errors import UserError, nearest
from cpcscale.shards.adoption.tar_members import TarMember

FIELDS = ("group", "language", "recording")
USUAL_NAMES = {
    "group": ("speaker", "speaker_id", "spk", "spk_id", "client_id", "group"),
    "language": ("language", "lang", "locale"),
    "recording": ("recording", "recording_id"),
    "key": ("key", "path", "file", "filename", "file_name", "audio", "audio_filepath", "name", "id", "utt_id"),
}
_SHAR = re.compile(r"[^/.]+\.(\d+)\.tar")

# Of each field that was found: (value, where it was found).
Labels = dict[str, tuple[str, str]]


@dataclass(kw_only=True)
class LabelColumns:
    """Columns of the JSON or the manifest. Empty: the usual names are tried. `a.b` is key b inside of key a."""

    # The speaker, by whom negatives of scope `group` and held-out speakers are chosen.
    group: str = ""
    # The language.
    language: str = ""
    # The recording that it was cut from, so that pieces of one recording stay in one split.
    recording: str = ""
    # Manifests only: the name or key of the member.
    key: str = ""


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises UserError if there is none."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"it holds a {type(record).__name__}, not an object")
    return record


def labels_of(record: Mapping[str, Any], columns: LabelColumns, source: str) -> Labels:
    """The labels in a JSON object; `source` says where it is from."""
    found: Labels = {}
    for field in FIELDS:
        named = getattr(columns, field)
        for name in [named] if named else USUAL_NAMES[field]:
            if value := _text(_at(record, name)):
                found[field] = value, f"{source} {name}"
                break
    # `cpcscale pack` names the recording `source`, for which others have other uses.
    if "recording" not in found and not columns.recording and {"source", "mean_square"} <= record.keys():
        found["recording"] = _text(record["source"]), f"{source} source"
    return found


def folder_of(key: str, level: int) -> str:
    """The folder at `level` of a member's path: 1 is the outermost, -1 the innermost; empty if there is none."""
    folders = key.split("/")[:-1]
    if level == 0 or abs(level) > len(folders):
        return ""
    return folders[level - 1 if level > 0 else level]


def cuts_beside(shard: str) -> str:
    """The cuts file of a tar in lhotse's Shar format: `cuts.000012.jsonl.gz` for `recording.000012.tar`; else empty."""
    folder, name = posixpath.split(shard)
    number = _SHAR.fullmatch(name)
    return posixpath.join(folder, f"cuts.{number[1]}.jsonl.gz") if number else ""


def read_cuts(url: str, columns: LabelColumns) -> dict[str, Labels]:
    """The labels of each cut of a shard by its id: the speaker and language of its supervisions.

    A cut with several speakers has no speaker. Raises UserError when the file is not gzipped JSON lines.
    """
    found = {}
    try:
        with gzip.open(io.BytesIO(storage.read(url)), "rt", encoding="utf-8") as lines:
            for line in lines:
                cut = json.loads(line)
                supervisions = cut.get("supervisions") or []
                record = {**cut, "recording": (cut.get("recording") or {}).get("id")}
                for name in ("speaker", "language", "recording_id"):
                    values = {one.get(name) for one in supervisions}
                    record[name] = values.pop() if len(values) == 1 else None
                found[str(cut["id"])] = labels_of(record, columns, "cuts")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url} is not a file of lhotse cuts ({' '.join(str(error).split())}): repair it, or take it away to index "
            "without its speakers"
        ) from None
    return found


class Manifest:
    """A CSV or TSV table of labels by name or key of members, in arrays of about the size of the file."""

    def __init__(self, url: str, columns: LabelColumns) -> None:
        """Raises UserError when the table cannot be read, names no members, or gives two groups to a member."""
        header, data, tabs = _header(url)
        key = _chosen(url, "key", columns, header)
        if not key:
            raise UserError(f"{url} has none of the columns {', '.join(USUAL_NAMES['key'])}: name one as columns.key=")
        self.columns = {field: name for field in FIELDS if (name := _chosen(url, field, columns, header))}
        if not self.columns:
            raise UserError(
                f"{url} has no column that says who speaks (it has {', '.join(header)}): name it as columns.group="
            )
        names = list(dict.fromkeys([key, *self.columns.values()]))
        # All columns are read as text. In TSV, quotes are plain characters, as in the sentences of Common Voice.
        parse = arrow_csv.ParseOptions(
            delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
        )
        convert = arrow_csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string()))
        try:
            table = arrow_csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)
        except pa.ArrowException as error:
            raise UserError(f"{url} is not a table that can be read ({' '.join(str(error).split())})") from None
        hashes = np.fromiter((_hash(name.as_py()) for name in table[key]), np.uint64, table.num_rows)
        order = np.argsort(hashes, kind="stable")
        self.url, self.hash = url, hashes[order]
        self.example = str(table[key][0]) if table.num_rows else ""
        table = table.take(pa.array(order))
        self._name = table[key].combine_chunks()
        self._values = {field: table[name].combine_chunks() for field, name in self.columns.items()}
        self._refuse_two_groups()

    def labels(self, member: TarMember) -> Labels:
        """The labels of a member, which the manifest may name by path or file name, with or without suffix."""
        path = member.key + member.suffix
        for name in (path, member.key, posixpath.basename(path), posixpath.basename(member.key)):
            key = _hash(name)
            row = int(np.searchsorted(self.hash, key))
            if row < len(self.hash) and self.hash[row] == key:
                texts = {field: _text(values[row].as_py()) for field, values in self._values.items()}
                return {field: (text, f"manifest {self.columns[field]}") for field, text in texts.items() if text}
        return {}

    def _refuse_two_groups(self) -> None:
        if "group" not in self._values or len(self.hash) < 2:
            return
        group = self._values["group"]
        conflict = (self.hash[1:] == self.hash[:-1]) & pc.not_equal(group[1:], group[:-1]).fill_null(False).to_numpy(
            False
        )
        if conflict.any():
            row = int(np.flatnonzero(conflict)[0])
            raise UserError(
                f"{self.url} names {self._name[row]} for two speakers, {group[row]} and {group[row + 1]}: "
                "a member has one"
            )


def _header(url: str) -> tuple[list[str], bytes, bool]:
    """(names of columns, all bytes, whether columns are separated by tabs) of a table."""
    data = storage.read(url).removeprefix(b"\xef\xbb\xbf")
    try:
        first = data[: data.find(b"\n") + 1 or len(data)].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{url} is not a table in UTF-8 ({error}): write it again") from None
    tabs = "\t" in first
    return next(csv.reader([first], delimiter="\t" if tabs else ","), []), data, tabs


def _chosen(url: str, field: str, columns: LabelColumns, header: Sequence[str]) -> str:
    """The name of the column that holds `field`, or an empty string."""
    named = getattr(columns, field)
    if named and field == "key" and named not in header:
        raise UserError(f"columns.key={named} is no column of {url}{nearest(named, list(header))}")
    return next((name for name in ([named] if named else USUAL_NAMES[field]) if name in header), "")


def _hash(name: str | None) -> int:
    return xxhash.xxh3_64_intdigest((name or "").removeprefix("./").lstrip("/").encode(errors="surrogateescape"))


def _at(record: Any, name: str) -> Any:
    """The value of `name`, or of its parts between dots, one inside the other; a number is an index of a list."""
    if isinstance(record, Mapping):
        if name in record:
            return record[name]
        head, dot, rest = name.partition(".")
        return _at(record[head], rest) if dot and head in record else None
    if isinstance(record, list):
        head, dot, rest = name.partition(".")
        if head.isdecimal() and int(head) < len(record):
            return _at(record[int(head)], rest) if dot else record[int(head)]
    return None


def _text(value: Any) -> str:
    """A text or number as text; empty for other values."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    # JSON may hold halves of surrogate pairs, which no table can hold.
    return str(value).strip().encode(errors="backslashreplace").decode()
