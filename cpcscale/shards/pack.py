"""Audio files to a shard set, in two passes that any `map` may run in parallel.

Pass 1 probes every file, splits off what is held out and assigns the rest to shards; the assignment is written before
anything else. Pass 2 packs each shard by itself and publishes it whole, so a stopped pack goes on where it was. The
same files, seed and codec give the same tars.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import xxhash

from cpcscale import audio, config, storage
from cpcscale.errors import UserError, nearest
from cpcscale.shards.index import Index, ShardEntry, scan

log = logging.getLogger(__name__)

ASSIGNMENT = "assignment.json"
TRAIN, HELDOUT, UNSEEN = "train", "heldout", "unseen"
_BYTES_A_SECOND = {"wav": 32_000, "flac": 21_700, "opus": 3_600}
_PROBE_CHUNK = 64

Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


@dataclass(kw_only=True)
class PackConfig:
    """How audio files become shards."""

    # flac is the default; wav feeds fastest, opus is smallest.
    codec: Literal["flac", "wav", "opus"] = "flac"
    # Target size of one shard.
    shard_mb: float = 64.0
    # Keys the held-out split and the shuffle over recordings.
    seed: int = 0
    # Share split off as `heldout`: of each speaker's utterances, or of the speakers.
    heldout_share: float = 0.0
    heldout_by: Literal["utterance", "group"] = "group"
    # Speakers left out whole, as the set `unseen`.
    unseen_groups: list[str] = field(default_factory=list)
    # Files shorter than this go to the quarantine table.
    min_s: float = 0.2

    def __post_init__(self) -> None:
        config.at_least(0, heldout_share=self.heldout_share, min_s=self.min_s)
        config.at_least(0.1, shard_mb=self.shard_mb)
        if self.heldout_share >= 1:
            raise UserError(f"heldout_share={self.heldout_share} leaves nothing to train on: give a share below 1")


@dataclass(frozen=True)
class Source:
    """One audio file as found: `path` to read it, `name` relative to the source, its speaker or recording."""

    path: str
    name: str
    group: str
    language: str


@dataclass(frozen=True)
class ShardTask:
    """One shard of pass 2: self-contained, so it can run in any process."""

    target: str
    name: str
    codec: str
    min_samples: int
    members: tuple[tuple[str, Source], ...]


@dataclass(frozen=True)
class Packed:
    """What a pack made: the index of each split, and the files left out with their cause."""

    splits: dict[str, Index]
    quarantine: list[dict[str, str]]


def serial_map(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The plain, in-process `map` of both passes."""
    return [function(item) for item in items]


def pack(source: str, target: str, config: PackConfig, run: Map = serial_map) -> Packed:
    """Packs the audio tree at `source` into shard sets `target/train`, `/heldout` and `/unseen`.

    Runs again without work when the same pack is complete. Raises UserError for a source without audio, an unknown
    speaker in `unseen_groups`, or a target that holds another pack.
    """
    return pack_sources(find_sources(source), target, config, run)


def pack_sources(sources: Sequence[Source], target: str, config: PackConfig, run: Map = serial_map) -> Packed:
    """`pack` of an explicit list of files."""
    chunks = [sources[start : start + _PROBE_CHUNK] for start in range(0, len(sources), _PROBE_CHUNK)]
    probed = [row for rows in run(probe_sources, chunks) for row in rows]
    usable = [(source, samples) for source, samples, _ in probed if samples is not None]
    if not usable:
        raise UserError(f"none of the {len(sources)} files is audio that can be read; the first: {probed[0][2]}")
    tasks = assign(usable, target, config)
    _write_assignment(target, config, tasks)

    results = run(pack_shard, [task for split in tasks.values() for task in split])
    quarantine = [_left_out(source, "unreadable", why) for source, samples, why in probed if samples is None]
    quarantine += [row for _, rows in results for row in rows]
    splits, done = {}, iter(results)
    for split, split_tasks in tasks.items():
        entries = [entry for entry, _ in (next(done) for _ in split_tasks) if entry is not None]
        splits[split] = Index.of(storage.join(target, split), entries)
    if not splits[TRAIN].utterances.num_rows:
        raise UserError(f"nothing is left to train on; the first file left out: {quarantine[0]}")
    storage.write(storage.join(target, "quarantine.csv"), _csv(quarantine))
    for index in splits.values():
        index.publish()
    return Packed(splits, quarantine)


def find_sources(root: str) -> list[Source]:
    """The audio files below `root`, with speaker and language from any `manifest.csv` (path, speaker, language) there.

    A file without a speaker is a group of its own. Raises UserError when there is no folder or no audio in it.
    """
    root = storage.absolute(root)
    if not storage.exists(root):
        raise UserError(f"there is no folder {root}: check the path of the audio to pack")
    names = storage.list_files(root)
    known: dict[str, dict[str, str]] = {}
    for name in names:
        if name.rpartition("/")[2] == "manifest.csv":
            known |= _manifest(storage.join(root, name), name.removesuffix("manifest.csv"))
    found = []
    for name in names:
        if name.lower().endswith(audio.SUFFIXES):
            row = known.get(name, {})
            group = row.get("speaker") or name
            found.append(Source(storage.join(root, name), name, group, row.get("language") or ""))
    if not found:
        raise UserError(f"no audio below {root}: expected files ending in {', '.join(audio.SUFFIXES)}")
    return found


def probe_sources(sources: Sequence[Source]) -> list[tuple[Source, int | None, str]]:
    """Pass 1, one chunk: (source, samples at 16 kHz or None when unreadable, why)."""
    rows: list[tuple[Source, int | None, str]] = []
    for source in sources:
        try:
            local = storage.local_path(source.path)
            info = audio.probe(str(local) if local else storage.read(source.path))
            rows.append((source, round(info.duration_s * audio.RATE_HZ), ""))
        except audio.AudioError as error:
            rows.append((source, None, str(error)))
    return rows


def assign(usable: Sequence[tuple[Source, int]], target: str, config: PackConfig) -> dict[str, list[ShardTask]]:
    """Pass 1, its end: the shards of each split with their members, by duration, shuffled over recordings."""
    keys = _keys([source for source, _ in usable])
    splits: dict[str, list[tuple[str, Source, int]]] = {TRAIN: [], HELDOUT: [], UNSEEN: []}
    where = _split([source for source, _ in usable], config)
    for (source, samples), split in zip(usable, where, strict=True):
        splits[split].append((keys[source.name], source, samples))
    if not splits[TRAIN]:
        raise UserError(
            "every utterance is held out and none is left to train on: lower heldout_share or unseen_groups"
        )
    shard_samples = config.shard_mb * 1e6 / _BYTES_A_SECOND[config.codec] * audio.RATE_HZ
    tasks = {}
    for split, members in splits.items():
        if members:
            members.sort(key=lambda member: (_keyed(config.seed, "order", member[0]), member[0]))
            tasks[split] = _cut(members, shard_samples, storage.join(target, split), config)
    return tasks


def pack_shard(task: ShardTask) -> tuple[ShardEntry | None, list[dict[str, str]]]:
    """Pass 2, one shard: its index entry (None when every member was left out) and its quarantine rows.

    A shard that is already published is read, not written again.
    """
    url = storage.join(task.target, task.name)
    if storage.exists(url):
        return _already_packed(task, url)
    quarantine: list[dict[str, str]] = []
    members = 0
    with storage.publishing(url) as aside:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
            for key, source in task.members:
                try:
                    data, meta = _utterance(source, key, task)
                except audio.AudioError as error:
                    quarantine.append(_left_out(source, error.cause, str(error)))
                    continue
                _add(tar, f"{key}.{task.codec}", data)
                _add(tar, f"{key}.json", json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
                members += 1
        entry = scan(aside, task.name)
    if not members:
        storage.remove(url)
        return None, quarantine
    return entry, quarantine


def _utterance(source: Source, key: str, task: ShardTask) -> tuple[bytes, dict[str, Any]]:
    local = storage.local_path(source.path)
    wave = audio.to_int16(audio.decode(str(local) if local else storage.read(source.path)))
    if len(wave) < task.min_samples:
        raise audio.AudioError("short", f"{len(wave) / audio.RATE_HZ:.3f} s is below min_s")
    if not np.any(wave):
        raise audio.AudioError("silent", "every sample is zero")
    level = wave.astype(np.float64) / 32768
    meta = {
        "key": key,
        "source": source.name,
        "group": source.group,
        "language": source.language,
        "samples": len(wave),
        "rate_hz": audio.RATE_HZ,
        "mean": float(level.mean()),
        "mean_square": float(np.square(level).mean()),
    }
    return audio.encode(wave, task.codec), meta


def _already_packed(task: ShardTask, url: str) -> tuple[ShardEntry, list[dict[str, str]]]:
    local = storage.local_path(url)
    if local:
        entry = scan(local, task.name)
    else:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / task.name
            copy.write_bytes(storage.read(url))
            entry = scan(copy, task.name)
    present = {row["key"] for row in entry.utterances}
    quarantine = []
    for key, source in task.members:
        if key not in present:
            try:
                _utterance(source, key, task)
            except audio.AudioError as error:
                quarantine.append(_left_out(source, error.cause, str(error)))
    return entry, quarantine


def _cut(
    members: Sequence[tuple[str, Source, int]], shard_samples: float, target: str, config: PackConfig
) -> list[ShardTask]:
    total = sum(samples for _, _, samples in members)
    shards = max(1, round(total / shard_samples))
    groups: list[list[tuple[str, Source]]] = [[] for _ in range(shards)]
    before = 0
    for key, source, samples in members:
        groups[min(shards - 1, before * shards // max(1, total))].append((key, source))
        before += samples
    least = round(config.min_s * audio.RATE_HZ)
    filled = [tuple(group) for group in groups if group]
    return [ShardTask(target, f"shard-{n:06d}.tar", config.codec, least, group) for n, group in enumerate(filled)]


def _split(sources: Sequence[Source], config: PackConfig) -> list[str]:
    """The split of each source: whole speakers first, then a keyed share of what is left."""
    groups = sorted({source.group for source in sources})
    for name in config.unseen_groups:
        if name not in groups:
            raise UserError(f"unseen_groups names {name!r}, which no file has as its speaker{nearest(name, groups)}")
    left = [group for group in groups if group not in config.unseen_groups]
    split = {source.name: UNSEEN if source.group in config.unseen_groups else TRAIN for source in sources}
    by_group: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        if split[source.name] == TRAIN:
            by_group[source.group].append(source.name)
    if config.heldout_by == "group":
        for group in _share(left, config):
            split |= dict.fromkeys(by_group[group], HELDOUT)
    else:
        for names in by_group.values():
            split |= dict.fromkeys(_share(names, config), HELDOUT)
    return [split[source.name] for source in sources]


def _share(names: Iterable[str], config: PackConfig) -> list[str]:
    """The keyed `heldout_share` of `names`; at least one where a share is asked for and two or more are there."""
    ordered = sorted(names, key=lambda name: (_keyed(config.seed, "heldout", name), name))
    count = round(config.heldout_share * len(ordered))
    if config.heldout_share > 0 and len(ordered) > 1:
        count = max(1, count)
    return ordered[:count]


def _keyed(seed: int, purpose: str, name: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/{purpose}/{name}".encode())


def _keys(sources: Sequence[Source]) -> dict[str, str]:
    """A WebDataset key for each file: its relative path without suffix, dots and odd characters replaced, unique."""
    keys = {source.name: re.sub(r"[^A-Za-z0-9_/-]", "_", source.name.rpartition(".")[0]) for source in sources}
    seen: dict[str, int] = defaultdict(int)
    for key in keys.values():
        seen[key] += 1
    return {
        name: key if seen[key] == 1 else f"{key}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, key in keys.items()
    }


def _manifest(url: str, folder: str) -> dict[str, dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(storage.read(url).decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{url} is not a CSV table: {error}") from None
    if rows and "path" not in rows[0]:
        raise UserError(f"{url} has no column `path` (it has {', '.join(rows[0])}): add it, or rename the file")
    return {f"{folder}{row['path']}": row for row in rows}


def _write_assignment(target: str, config: PackConfig, tasks: dict[str, list[ShardTask]]) -> None:
    """The restart state, written before any shard; refuses a target that was assigned otherwise."""
    members = {
        split: {task.name: [[key, source.name, source.group] for key, source in task.members] for task in split_tasks}
        for split, split_tasks in tasks.items()
    }
    state: dict[str, Any] = {"pack": asdict(config), "splits": members}
    state["digest"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    url = storage.join(target, ASSIGNMENT)
    if storage.exists(url):
        if json.loads(storage.read(url))["digest"] != state["digest"]:
            raise UserError(
                f"{target} holds a pack of other files or settings: name another folder, or remove it first"
            )
        return
    storage.write(url, json.dumps(state, indent=0, ensure_ascii=False).encode())


def _left_out(source: Source, cause: str, why: str) -> dict[str, str]:
    return {"path": source.name, "cause": cause, "why": why}


def _csv(rows: Sequence[dict[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["path", "cause", "why"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
