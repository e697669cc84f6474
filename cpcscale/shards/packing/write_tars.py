"""Pass 2 of packing, one task: decodes files once, encodes them at 16 kHz, and publishes whole tars.

One piece is in memory at a time; encoded pieces wait in an unnamed temporary file until the shards are written in their
order. If a header states more than decodes, the missing pieces are listed in the quarantine table. libsndfile never
decodes more than the header states.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from cpcscale import audio, storage
from cpcscale.audio import RATE_HZ
from cpcscale.errors import UserError
from cpcscale.shards.packing import fetch
from cpcscale.shards.packing.headers import left_out
from cpcscale.shards.packing.pieces import PackedFile, PackTask, Piece, cut, layout
from cpcscale.shards.rows import ShardEntry, scan

# In place of a piece: all of a file.
_WHOLE = -1


@dataclass(frozen=True)
class TaskResult:
    """The result of a task: the entries of its shards that are not empty, in order, and its quarantine rows."""

    entries: tuple[ShardEntry, ...]
    left_out: list[dict[str, str]]


@dataclass(frozen=True)
class _Spooled:
    """An encoded piece in the temporary file, and its metadata for the JSON beside it."""

    start: int
    size: int
    meta: dict[str, Any]


def pack_task(task: PackTask) -> TaskResult:
    """Packs the shards of the task and notes what it made.

    If the pack was started before, the result of a finished task is read from its note, and existing shards are not
    written again. Raises UserError for a shard that is not of this pack, and when the disk or store fails.
    """
    if task.resumed and (noted := _noted(task)):
        return noted
    shards = layout(task)
    there = _present(task, shards) if task.resumed else {}
    short = {number for number, entry in there.items() if entry.utterances.num_rows < len(shards[number])}
    if len(there) == len(shards) and not short:
        return TaskResult(tuple(there[number] for number in range(len(shards))), [])
    wanted = {piece for number, pieces in enumerate(shards) if number not in there for piece in pieces}
    rows: dict[Piece, dict[str, str]] = {}
    entries: dict[int, ShardEntry] = dict(there)
    with _temporary(task) as spool:
        spooled = _encode(task, wanted, rows, spool)
        for number in short:
            _refuse_missing(task, number, shards[number], there[number], rows)
        for number, pieces in enumerate(shards):
            members = [piece for piece in pieces if piece in spooled]
            if members:
                entries[number] = _write(task, number, [spooled[piece] for piece in members], spool)
    ordered = [rows[piece] for piece in sorted(rows)]
    result = TaskResult(tuple(entries[number] for number in sorted(entries)), ordered)
    _note(task, result)
    return result


def _encode(
    task: PackTask, wanted: set[Piece], rows: dict[Piece, dict[str, str]], spool: IO[bytes]
) -> dict[Piece, _Spooled]:
    """Encodes the usable ones of the wanted pieces into `spool`; adds a row to `rows` for each piece left out."""
    spooled = {}
    for number, member in enumerate(task.members):
        for piece, wave, level in _usable(task, number, rows):
            if (number, piece) in wanted:
                data, meta = _utterance(member, piece, wave, level, task.codec)
                spooled[number, piece] = _Spooled(spool.tell(), len(data), meta)
                spool.write(data)
    spool.flush()
    return spooled


def _usable(
    task: PackTask, number: int, rows: dict[Piece, dict[str, str]]
) -> Iterator[tuple[int, np.ndarray, audio.Level]]:
    """Yields (number, int16 signal, level) of each usable piece of a file; adds a row to `rows` for each other."""
    member = task.members[number]
    piece = decoded = 0

    def leave_out(piece: int, cause: str, why: str) -> None:
        seconds = (member.start(piece + 1) - member.start(piece)) / RATE_HZ
        name = f"{piece:05d}" if member.pieces > 1 else ""
        rows[number, piece] = left_out(member.source, audio.AudioError(cause, why, seconds), name)

    try:
        with fetch.opened(member.source.path, fetch.STREAM_BYTES if member.pieces > 1 else 0) as file:
            info = audio.read_header(file, task.limits)
            slack = audio.slack_samples(info)
            _check_stream(file, info, member)
            for part in cut(audio.decode_blocks(file), member):
                decoded += len(part)
                if decoded + slack < member.start(piece + 1):
                    break
                try:
                    if len(part) < task.min_samples:
                        raise audio.AudioError("short", f"{len(part) / RATE_HZ:.3f} s is below min_s")
                    yield piece, *audio.check_sound(part, task.limits)
                except audio.AudioError as error:
                    leave_out(piece, error.cause, str(error))
                piece += 1
        cause = "cut"
        why = f"the header promises {member.samples / RATE_HZ:.3f} s and {decoded / RATE_HZ:.3f} s decode"
    except audio.AudioError as error:
        cause, why = error.cause, str(error)
    for lost in range(piece, member.pieces):
        leave_out(lost, cause, why)
    if member.pieces > 1 and all((number, lost) in rows for lost in range(member.pieces)):
        # A header may promise hours of which nothing decodes: one row, and not a file that counts as taken.
        first, *_ = (rows.pop((number, lost)) for lost in range(member.pieces))
        none = f"{first['why']}; and none of the {member.pieces} pieces is usable"
        all_of_it = audio.AudioError(first["cause"], none, member.samples / RATE_HZ)
        rows[number, _WHOLE] = left_out(member.source, all_of_it)


def _check_stream(file: audio.Source, info: audio.AudioInfo, member: PackedFile) -> None:
    """As audio.check_stream, but the pieces of a recording before the place where it was cut are kept."""
    try:
        audio.check_stream(file, info)
    except audio.AudioError as error:
        if error.cause != "cut" or member.pieces == 1:
            raise


def _utterance(
    member: PackedFile, piece: int, wave: np.ndarray, level: audio.Level, codec: str
) -> tuple[bytes, dict[str, Any]]:
    data, samples = audio.encode(wave, codec), len(wave)
    if codec == "opus":
        # Measured on the audio that training will decode: opus removes what it considers inaudible.
        trained = audio.to_int16(audio.decode(data))
        samples, level = len(trained), audio.measure(trained)
    meta = {
        "key": member.piece_key(piece),
        "source": member.source.name,
        "group": member.source.group,
        "language": member.source.language,
        "samples": samples,
        "rate_hz": RATE_HZ,
        "mean": level.mean,
        "mean_square": level.mean_square,
    }
    # `start` is the place in the recording, in samples at 16 kHz.
    return data, {**meta, "start": member.start(piece)} if member.pieces > 1 else meta


def _write(task: PackTask, number: int, members: list[_Spooled], spool: IO[bytes]) -> ShardEntry:
    """Writes and publishes one shard; returns its entry."""
    name = task.shard_name(number)
    with storage.publishing(storage.join(task.target, name)) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for one in members:
                spool.seek(one.start)
                _add(tar, f"{one.meta['key']}.{task.codec}", spool, one.size)
                text = json.dumps(one.meta, sort_keys=True, ensure_ascii=False).encode()
                _add(tar, f"{one.meta['key']}.json", io.BytesIO(text), len(text))
        return scan(temporary, name)


def _add(tar: tarfile.TarFile, name: str, data: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, data)


def _present(task: PackTask, shards: list[list[Piece]]) -> dict[int, ShardEntry]:
    """The entries of existing shards of the task, read from their tars. UserError for one with other members."""
    entries = {}
    for number, pieces in enumerate(shards):
        url = storage.join(task.target, task.shard_name(number))
        if storage.exists(url):
            entry = _scanned(url, task.shard_name(number))
            strange = _members(entry) - {(task.members[at].piece_key(piece), task.codec) for at, piece in pieces}
            if strange:
                raise UserError(_not_of_this_pack(url, min(strange)[0]))
            entries[number] = entry
    return entries


def _refuse_missing(
    task: PackTask, number: int, pieces: list[Piece], entry: ShardEntry, rows: dict[Piece, dict[str, str]]
) -> None:
    """Raises UserError for a shard that lacks a member which is not left out."""
    there = {key for key, _ in _members(entry)}
    for at, piece in pieces:
        key = task.members[at].piece_key(piece)
        if key not in there and not rows.keys() & {(at, piece), (at, _WHOLE)}:
            raise UserError(_not_of_this_pack(storage.join(task.target, task.shard_name(number)), key))


def _not_of_this_pack(url: str, key: str) -> str:
    return f"{url} is not of this pack, which differs at {key}: remove it, or name another folder"


def _members(entry: ShardEntry) -> set[tuple[str, str]]:
    table = entry.utterances
    return set(zip(table["key"].to_pylist(), table["codec"].to_pylist(), strict=True))


def _scanned(url: str, name: str) -> ShardEntry:
    local = storage.local_path(url)
    if local:
        return scan(local, name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        with copy.open("wb") as file:
            for chunk in storage.chunks(url):
                file.write(chunk)
        return scan(copy, name)


def _note(task: PackTask, result: TaskResult) -> None:
    shards = [
        {
            "path": entry.path,
            "sha256": entry.sha256.hex(),
            "bytes": entry.size_bytes,
            "utterances": entry.utterances.to_pylist(),
        }
        for entry in result.entries
    ]
    # Another pack of the same set may end now and remove the notes, which only save work.
    with contextlib.suppress(storage.NotFoundError):
        text = json.dumps({"shards": shards, "left_out": result.left_out}).encode()
        storage.write(task.note, sha256(text).hexdigest().encode() + b"\n" + text)


def _noted(task: PackTask) -> TaskResult | None:
    """The result of an earlier run of the task, from its note, if that is whole and its tars have the noted sizes."""
    try:
        digest, _, text = storage.read(task.note).partition(b"\n")
        if digest != sha256(text).hexdigest().encode():
            return None
        note = json.loads(text)
        entries = []
        for one in note["shards"]:
            if storage.size(storage.join(task.target, one["path"])) != one["bytes"]:
                return None
            named = bytes.fromhex(one["sha256"])
            entries.append(ShardEntry.of(one["path"], named, one["bytes"], one["utterances"]))
        return TaskResult(tuple(entries), note["left_out"])
    except storage.NotFoundError:
        return None


@contextlib.contextmanager
def _temporary(task: PackTask) -> Iterator[IO[bytes]]:
    """Yields an unnamed temporary file: in the folder of the shards, or in the temporary folder for a store."""
    folder = storage.local_path(task.target)
    if folder:
        with storage.undoing_folders(task.target):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        if error.errno not in storage.DISK_FULL:
            raise
        raise UserError(
            f"no room to write {task.target} in {folder or tempfile.gettempdir()} ({error.strerror}): free some "
            "space and run again"
        ) from None
