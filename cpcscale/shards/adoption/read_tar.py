"""Reads one tar, not made by `cpcscale pack`, into the rows of an index. The tar is never written to.

Group, language and recording of a member come from the manifest, else from the lhotse cuts of the tar, else from the
JSON beside the member, else (group and language) from a folder of its path. A member without a group is its own group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from cpcscale import audio, config, storage
from cpcscale.errors import UserError, shown_name
from cpcscale.shards.adoption import labels
from cpcscale.shards.adoption.labels import LabelColumns, Labels, Manifest
from cpcscale.shards.adoption.tar_members import TarMember, TarScan
from cpcscale.shards.rows import UTTERANCE_COLUMNS, ShardEntry

# First bytes of formats whose header states the exact number of samples. An MP3 states an estimate, if any.
_EXACT = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"NIST_1A")
_MP3_IN_WAV = b"\x55\x00"
_FIELDS = 30


@dataclass(kw_only=True)
class IndexConfig:
    """How tars that were not made by `cpcscale pack` are indexed."""

    # Which tars to index: a shell pattern for their paths below the folder.
    pattern: str = "*.tar"
    columns: LabelColumns = field(default_factory=LabelColumns)
    # A CSV or TSV table of groups and languages by name or key of members.
    manifest: str = ""
    # Which folder of a member's path is its group: 1 the outermost, -1 the innermost, 0 none.
    group_folder: int = 0
    # Which folder of a member's path is its language, in the same way.
    language_folder: int = 0
    # The language of members that have no other label of language.
    language: str = ""
    # Members shorter than this, in seconds, are left out.
    min_s: float = 0.2
    # Share of members to decode (chosen by key), to measure loudness and to find what does not decode. The others are
    # taken by their header, with the average loudness of their shard.
    level_share: float = 1.0
    # What the audio may be like; a member that is not is left out.
    limits: audio.SoundLimits = field(default_factory=audio.SoundLimits, metadata=config.ADDED)

    def __post_init__(self) -> None:
        config.at_least(0, min_s=self.min_s, level_share=self.level_share)
        if self.level_share > 1:
            raise UserError(f"level_share={self.level_share} is above 1, which is every member")


@dataclass(frozen=True)
class TarTask:
    """One tar to index, by any process. `cuts` is the name of its lhotse cuts file, or empty."""

    base: str
    name: str
    cuts: str
    config: IndexConfig


@dataclass(frozen=True)
class LeftOut:
    """A member that is left out of the index, or a whole shard if `member` is empty."""

    shard: str
    member: str
    cause: str
    why: str
    seconds: float | None = None


@dataclass(frozen=True)
class ReadTar:
    """The entry of one tar (None if it is damaged) and what was left out of it.

    `origins` counts where groups and languages were found, `notes` counts oddities of members; `fields` are the keys of
    one of its JSON files; `passed_over` counts the suffixes of members that are neither.
    """

    name: str
    entry: ShardEntry | None
    left_out: tuple[LeftOut, ...]
    origins: Counter[str]
    notes: Counter[str]
    fields: tuple[str, ...] = ()
    passed_over: Counter[str] = field(default_factory=Counter)


def read_tar(task: TarTask, manifest: Manifest | None) -> ReadTar:
    """Reads one tar from start to end. Raises UserError if it is compressed or cannot be read."""
    scan = TarScan(storage.join(task.base, task.name))
    shard = _Shard(task, manifest)
    for member in scan.members((*audio.SUFFIXES, ".json")):
        shard.add(member)
    if scan.fault:
        damaged = LeftOut(task.name, "", "damaged", scan.fault)
        return ReadTar(task.name, None, (damaged,), Counter(), Counter())
    if not scan.end_mark:
        shard.notes["tars without an end mark, which may be cut short"] += 1
    if not shard.rows and not shard.left_out:
        shard.notes["tars without audio"] += 1
    entry = ShardEntry(task.name, scan.sha256, scan.size_bytes, shard.table())
    left_out = tuple(shard.left_out)
    return ReadTar(task.name, entry, left_out, shard.origins, shard.notes, shard.fields, shard.passed_over)


class _Shard:
    """Collects the rows of the audio in a tar and the labels of its JSON, which may come in any order."""

    def __init__(self, task: TarTask, manifest: Manifest | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[LeftOut] = []
        self.origins: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.fields: tuple[str, ...] = ()
        self.passed_over: Counter[str] = Counter()
        self._task, self._manifest = task, manifest
        self._cuts = labels.read_cuts(storage.join(task.base, task.cuts), task.config.columns) if task.cuts else {}
        self._json: dict[str, Labels] = {}
        self._names: list[Labels] = []
        # The name and checksum of the member with each key.
        self._keys: dict[str, tuple[str, int]] = {}

    def add(self, member: TarMember) -> None:
        """Adds the next member of the tar."""
        if any(part.startswith(".") and part.strip(".") for part in member.key.split("/")):
            # As in a folder. On a Mac, `tar` writes ._NAME beside each NAME.
            self.passed_over["hidden"] += 1
        elif member.suffix in audio.SUFFIXES:
            try:
                self.rows.append(self._row(member))
                self._names.append(self._manifest.labels(member) if self._manifest else {})
            except audio.AudioError as error:
                name = shown_name(member.name)
                self.left_out.append(LeftOut(self._task.name, name, error.cause, str(error), error.seconds))
        elif member.suffix == ".json" and not member.kind:
            try:
                record = labels.json_object(member.data)
                self._json[member.key] = labels.labels_of(record, self._task.config.columns, "JSON")
                self.fields = self.fields or tuple(list(record)[:_FIELDS])
            except UserError:
                self.notes["JSON files that cannot be read"] += 1
        elif not member.kind:
            self.passed_over[member.suffix or "no suffix"] += 1

    def table(self) -> pa.Table:
        """The rows in tar order, with labels; members that were not decoded get the average loudness of the shard."""
        for row, from_manifest in zip(self.rows, self._names, strict=True):
            row |= self._labels(row, from_manifest)
        samples = np.array([row["samples"] for row in self.rows], np.float64)
        for name in ("mean", "mean_square"):
            level = np.array([row[name] for row in self.rows])
            known = np.isfinite(level)
            average = float(np.average(level[known], weights=samples[known])) if known.any() else 0.0
            for row, value in zip(self.rows, np.where(known, level, average).tolist(), strict=True):
                row[name] = value
        return pa.Table.from_pylist(self.rows, UTTERANCE_COLUMNS)

    def _row(self, member: TarMember) -> dict[str, Any]:
        if member.kind:
            raise audio.AudioError("link", f"it is a {member.kind} in the tar, without data")
        try:
            member.name.encode()
        except UnicodeEncodeError:
            raise audio.AudioError("unreadable", "its name is not UTF-8") from None
        checksum = xxhash.xxh3_64_intdigest(member.data)
        if member.key in self._keys:
            first, other = self._keys[member.key]
            same = "the same" if checksum == other else "other"
            raise audio.AudioError(
                "duplicate", f"{first} has the same key {member.key}, comes first in the tar, and has {same} bytes"
            )
        decode, spec = not self.rows or self._is_decoded(member.key), self._task.config
        row = measure_member(member.data, spec.min_s, decode, spec.limits)
        self._keys[member.key] = member.name, checksum
        named = {"key": member.key, "codec": member.suffix[1:], "offset": member.offset, "size": member.size}
        return {**named, "checksum": checksum, **row}

    def _is_decoded(self, key: str) -> bool:
        return xxhash.xxh3_64_intdigest(f"level/{key}".encode()) < self._task.config.level_share * 2**64

    def _labels(self, row: dict[str, Any], from_manifest: Labels) -> dict[str, str]:
        spec, key = self._task.config, row["key"]
        folder = {"group": spec.group_folder, "language": spec.language_folder}
        from_path: Labels = {
            name: (text, f"folder {level}") for name, level in folder.items() if (text := labels.folder_of(key, level))
        }
        # WebDataset's key ends at the first dot of the file name: KEY.json may stand beside KEY.left.flac.
        stem = key[: key.rfind("/") + 1] + key[key.rfind("/") + 1 :].partition(".")[0]
        from_json = self._json.get(key) or self._json.get(stem) or {}
        found = from_path | from_json | self._cuts.get(key, {}) | from_manifest
        # Many sets number the members of each shard alike, and the name of the tar must not be in the fingerprint.
        recording = found.get("recording", (f"{key}@{row['checksum']:016x}", ""))[0]
        group, by_group = found.get("group", (recording, "its recording"))
        language, by_language = found.get("language", (spec.language, "config" if spec.language else "nothing"))
        self.origins[f"group: {by_group}"] += 1
        self.origins[f"language: {by_language}"] += 1
        return {"group": group, "language": language, "recording": recording}


def measure_member(data: bytes, min_s: float, decode: bool, limits: audio.SoundLimits | None = None) -> dict[str, Any]:
    """`samples` (at 16 kHz), `rate_hz`, `mean` and `mean_square` of a member; the means are NaN without `decode`.

    Raises AudioError if it must be left out.
    """
    limits = limits or audio.SoundLimits()
    exact = _states_length(data)
    if decode or not exact:
        info, decoded = audio.decode_checked(data, limits)
        wave, level = audio.check_sound(decoded, limits)
        audio.check_slices(data, wave)
        samples = len(wave)
        mean, square = level.mean, level.mean_square
    else:
        info = audio.read_header(data, limits)
        audio.check_stream(data, info)
        samples, mean, square = info.length, float("nan"), float("nan")
    if samples < min_s * audio.RATE_HZ:
        seconds = samples / audio.RATE_HZ
        raise audio.AudioError("short", f"{seconds:.3f} s is below min_s", seconds)
    return {"samples": samples, "rate_hz": info.rate_hz, "mean": mean, "mean_square": square}


def _states_length(data: bytes) -> bool:
    if not data.startswith(_EXACT):
        return False
    form = data.find(b"fmt ", 12, 4096) + 8
    return not (data.startswith(b"RIFF") and data[form : form + 2] == _MP3_IN_WAV)
