"""One shard: its members decoded, encoded again at 16 kHz, and published as a whole tar."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.index import ShardEntry, scan
from cpcscale.shards.sources import Source


@dataclass(frozen=True)
class ShardTask:
    """One shard of pass 2: self-contained, so it can run in any process."""

    target: str
    name: str
    codec: str
    min_samples: int
    members: tuple[tuple[str, Source], ...]


def pack_shard(task: ShardTask) -> tuple[ShardEntry | None, list[dict[str, str]]]:
    """Pass 2, one shard: its index entry (None when every member was left out) and its quarantine rows.

    A shard that is already published is read, not written again.
    """
    url = storage.join(task.target, task.name)
    if storage.exists(url):
        return _already_packed(task, url)
    quarantine: list[dict[str, str]] = []
    # An exception, so that nothing is published when no member is left.
    with contextlib.suppress(_NothingLeft), storage.publishing(url) as aside:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
            for key, source in task.members:
                try:
                    data, meta = _utterance(source, key, task)
                except audio.AudioError as error:
                    quarantine.append(left_out(source, error.cause, str(error)))
                    continue
                _add(tar, f"{key}.{task.codec}", data)
                _add(tar, f"{key}.json", json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
        if len(quarantine) == len(task.members):
            raise _NothingLeft
        return scan(aside, task.name), quarantine
    return None, quarantine


class _NothingLeft(Exception):
    """Every member of a shard was left out."""


def _utterance(source: Source, key: str, task: ShardTask) -> tuple[bytes, dict[str, Any]]:
    local = storage.local_path(source.path)
    wave = audio.to_int16(audio.decode(str(local) if local else storage.read(source.path)))
    if len(wave) < task.min_samples:
        raise audio.AudioError("short", f"{len(wave) / audio.RATE_HZ:.3f} s is below min_s")
    if not np.any(wave):
        raise audio.AudioError("silent", "every sample is zero")
    data = audio.encode(wave, task.codec)
    # Of what training will hear: opus takes away what it thinks inaudible.
    heard = audio.to_int16(audio.decode(data)) if task.codec == "opus" else wave
    level = heard.astype(np.float64) / 32768
    meta = {
        "key": key,
        "source": source.name,
        "group": source.group,
        "language": source.language,
        "samples": len(heard),
        "rate_hz": audio.RATE_HZ,
        "mean": float(level.mean()),
        "mean_square": float(np.square(level).mean()),
    }
    return data, meta


def _already_packed(task: ShardTask, url: str) -> tuple[ShardEntry, list[dict[str, str]]]:
    local = storage.local_path(url)
    if local:
        entry = scan(local, task.name)
    else:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / task.name
            copy.write_bytes(storage.read(url))
            entry = scan(copy, task.name)
    present = {(row["key"], row["codec"]) for row in entry.utterances}
    strange = {key for key, _ in present - {(key, task.codec) for key, _ in task.members}}
    quarantine = []
    for key, source in task.members:
        if (key, task.codec) not in present:
            try:
                _utterance(source, key, task)
                strange.add(key)
            except audio.AudioError as error:
                quarantine.append(left_out(source, error.cause, str(error)))
    if strange:
        raise UserError(
            f"{url} is not of this pack, which differs at {min(strange)}: remove it, or name another folder"
        )
    return entry, quarantine


def left_out(source: Source, cause: str, why: str) -> dict[str, str]:
    """The row of the quarantine table for a file."""
    return {"path": source.name.encode(errors="backslashreplace").decode(), "cause": cause, "why": why}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
