"""Speaker, language and recording of a member of a tar: from a manifest, lhotse cuts, the JSON beside it, or a folder.

Each field is taken from the first of these sources that has it (shards/adoption/read_tar.py).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cpcscale import config
from cpcscale.errors import UserError, nearest, shown_name
from cpcscale.shards.adoption.tar_members import TarMember
from cpcscale.tables import Table, identity, json_lines, nfc, value_at

FIELDS = ("group", "language", "recording")
USUAL_NAMES = {
    "group": ("speaker", "speaker_id", "spk", "spk_id", "client_id", "group"),
    "language": ("language", "lang", "locale"),
    "recording": ("recording", "recording_id"),
    "key": ("key", "path", "file", "filename", "file_name", "audio", "audio_filepath", "name", "id", "utt_id"),
}
# What `cpcscale pack` writes beside a member: its names are taken as they are.
_PACKED = {"source", "mean_square"}
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
        record = config.read_json(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"it holds a {type(record).__name__}, not an object")
    return record


def labels_of(record: Mapping[str, Any], columns: LabelColumns, source: str) -> Labels:
    """The labels in a JSON object; `source` says where it is from."""
    found: Labels = {}
    packed = record.keys() >= _PACKED
    for field in FIELDS:
        named = getattr(columns, field)
        for name in [named] if named else USUAL_NAMES[field]:
            text = _text(value_at(record, name))
            if value := text if packed else _label(field, text):
                found[field] = value, f"{source} {name}"
                break
    # `cpcscale pack` names the recording `source`, for which others have other uses.
    if "recording" not in found and not columns.recording and packed:
        found["recording"] = _text(record["source"]), f"{source} source"
    return found


def folder_of(key: str, level: int) -> str:
    """The folder at `level` of a member's path: 1 is the outermost, -1 the innermost; empty if there is none."""
    folders = key.split("/")[:-1]
    if level == 0 or abs(level) > len(folders):
        return ""
    return nfc(folders[level - 1 if level > 0 else level])


def cuts_beside(shard: str, names: Collection[str]) -> str:
    """The cuts file among `names` of a tar in lhotse's Shar format; else empty.

    It is `cuts.000012.jsonl.gz`, or without .gz, for `recording.000012.tar`.
    """
    folder, name = posixpath.split(shard)
    if number := _SHAR.fullmatch(name):
        packed = posixpath.join(folder, f"cuts.{number[1]}.jsonl.gz")
        return next((beside for beside in (packed, packed.removesuffix(".gz")) if beside in names), "")
    return ""


def read_cuts(url: str, columns: LabelColumns) -> dict[str, Labels]:
    """The labels of each cut of a shard by its id: the speaker and language of its supervisions.

    The supervisions of a mixed cut are those of its tracks. A cut with several speakers has no speaker. Raises
    UserError when the file is not JSON lines of cuts.
    """
    found = {}
    for line, cut in json_lines(url):
        try:
            tracks = [cut, *(track["cut"] for track in cut.get("tracks") or [])]
            supervisions = [one for track in tracks for one in track.get("supervisions") or []]
            record = {**cut, "recording": (cut.get("recording") or {}).get("id")}
            for name in ("speaker", "language", "recording_id"):
                values = {one.get(name) for one in supervisions}
                record[name] = values.pop() if len(values) == 1 else None
            found[str(cut["id"])] = labels_of(record, columns, "cuts")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{url} line {line} is no lhotse cut ({error!r}): repair the file, or take it away to index without "
                "its speakers"
            ) from None
    return found


class Manifest:
    """A table of labels by name or key of members, in arrays of about the size of the file."""

    def __init__(self, url: str, columns: LabelColumns) -> None:
        """Raises UserError when the table cannot be read, names no members, or gives two groups to a member."""
        table = Table(url)
        key = _chosen(table, "key", columns)
        if not key:
            raise UserError(f"{url} has none of the columns {', '.join(USUAL_NAMES['key'])}: name one as columns.key=")
        self.columns = {field: name for field in FIELDS if (name := _chosen(table, field, columns))}
        if not self.columns:
            raise UserError(
                f"{url} has no column that says who speaks (it has {', '.join(table.columns)}): name it as "
                "columns.group="
            )
        hashes = [np.empty(0, np.uint64)]
        parts: dict[str, list[pa.Array]] = {field: [_texts([])] for field in ("key", *self.columns)}
        for keys, *cells in table.batches([key, *self.columns.values()]):
            hashes.append(_hashes(keys))
            parts["key"].append(_texts(keys))
            for field, texts in zip(self.columns, cells, strict=True):
                parts[field].append(_texts(texts if field == "language" else list(map(identity, texts))))
        unsorted = np.concatenate(hashes)
        order = np.argsort(unsorted, kind="stable")
        self.url, self.hash = url, unsorted[order]
        values = {field: pa.concat_arrays(arrays) for field, arrays in parts.items()}
        names = values.pop("key")
        self.example = str(names[0]) if len(names) else ""
        self._values = {field: array.take(pa.array(order)) for field, array in values.items()}
        self._refuse_two_values(names, order)

    def labels(self, member: TarMember) -> Labels:
        """The labels of a member, which the manifest may name by path or file name, with or without suffix."""
        path = member.key + member.suffix
        for name in (path, member.key, posixpath.basename(path), posixpath.basename(member.key)):
            key = _hash(name)
            row = int(np.searchsorted(self.hash, key))
            if row < len(self.hash) and self.hash[row] == key:
                texts = {field: values[row].as_py() for field, values in self._values.items()}
                return {field: (text, f"manifest {self.columns[field]}") for field, text in texts.items() if text}
        return {}

    def _refuse_two_values(self, names: pa.LargeStringArray, order: np.ndarray) -> None:
        same = self.hash[1:] == self.hash[:-1]
        if not same.any():
            return
        for field, what in (("group", "speakers"), ("language", "languages")):
            if (values := self._values.get(field)) is None:
                continue
            rows = np.flatnonzero(same & pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False))
            if len(rows):
                row = int(rows[0])
                raise UserError(
                    f"{self.url} names {names[int(order[row])]} for two {what}, {values[row]} and {values[row + 1]}: "
                    "a member has one"
                )


def _chosen(table: Table, field: str, columns: LabelColumns) -> str:
    """The name of the column that holds `field`, or an empty string."""
    named = getattr(columns, field)
    if named and field == "key" and not table.has(named):
        raise UserError(f"columns.key={named} is no column of {table.url}{nearest(named, list(table.columns))}")
    return next((name for name in ([named] if named else USUAL_NAMES[field]) if table.has(name)), "")


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(nfc(name).removeprefix("./").lstrip("/").encode(errors="surrogateescape"))


def _hashes(names: list[str]) -> np.ndarray:
    """The `_hash` of each name."""
    text = "\n".join(["", *names])
    plain = text.isascii() and "\n/" not in text and "\n./" not in text
    hashes = map(xxhash.xxh3_64_intdigest, map(str.encode, names)) if plain else map(_hash, names)
    return np.fromiter(hashes, np.uint64, len(names))


def _texts(texts: list[str]) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


def _label(field: str, text: str) -> str:
    return text if field == "language" else identity(text)


def _text(value: Any) -> str:
    """A text or number as text; empty for other values."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    # JSON may hold halves of surrogate pairs, which no table can hold.
    return shown_name(str(value).strip())
