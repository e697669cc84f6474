"""Audio files to a shard set, in two passes that any `map` may run in parallel.

Pass 1 probes every file, splits off what is held out and assigns the rest to shards; the assignment is written before
anything else. Pass 2 packs each shard by itself and publishes it whole, so a stopped pack goes on where it was. The
same files, seed and codec give the same tars. A pack that leaves nothing to train on leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import xxhash

from cpcscale import audio, config, storage
from cpcscale.errors import UserError, nearest
from cpcscale.shards.index import Index
from cpcscale.shards.sources import Source, find_sources, utterance_keys
from cpcscale.shards.write import ShardTask, left_out, pack_shard

ASSIGNMENT, QUARANTINE = "assignment.json", "quarantine.csv"
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
class Probed:
    """What pass 1 saw of a file: its length at 16 kHz, or None with the cause it is left out for."""

    source: Source
    samples: int | None
    cause: str = ""
    why: str = ""


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
    """`pack` of an explicit list of files, whose names are all different."""
    chunks = [sources[start : start + _PROBE_CHUNK] for start in range(0, len(sources), _PROBE_CHUNK)]
    probed = [row for rows in run(probe_sources, chunks) for row in rows]
    usable = [(row.source, row.samples) for row in probed if row.samples is not None]
    quarantine = [left_out(row.source, row.cause, row.why) for row in probed if row.samples is None]
    if not usable:
        example = f"; the first: {quarantine[0]['why']}" if quarantine else ""
        raise UserError(f"none of the {len(sources)} files is audio that can be read{example}")
    tasks = assign(usable, target, config)
    with contextlib.ExitStack() as stack:
        for split in tasks:
            stack.enter_context(storage.undoing_folders(storage.join(target, split)))
        known = _write_assignment(target, config, tasks, dict(usable))
        complete = _complete(target, tasks) if known else None
        return complete or _pack_shards(target, tasks, quarantine, run)


def _pack_shards(target: str, tasks: dict[str, list[ShardTask]], quarantine: list[dict[str, str]], run: Map) -> Packed:
    results = run(pack_shard, [task for split in tasks.values() for task in split])
    quarantine = quarantine + [row for _, rows in results for row in rows]
    splits, done = {}, iter(results)
    for split, split_tasks in tasks.items():
        entries = [entry for entry, _ in (next(done) for _ in split_tasks) if entry is not None]
        splits[split] = Index.of(storage.join(target, split), entries)
    if not splits[TRAIN].utterances.num_rows:
        for index in splits.values():
            for path in index.shards["path"].to_pylist():
                storage.remove(storage.join(index.base, path))
        storage.remove(storage.join(target, ASSIGNMENT))
        first = quarantine[0]
        raise UserError(
            f"nothing is left to train on: {len(quarantine)} files are left out, the first, {first['path']}, because "
            f"it is {first['cause']} ({first['why']})"
        )
    storage.write(storage.join(target, QUARANTINE), _csv(quarantine))
    for index in splits.values():
        index.publish()
    return Packed(splits, quarantine)


def probe_sources(sources: Sequence[Source]) -> list[Probed]:
    """Pass 1, one chunk."""
    rows = []
    for source in sources:
        try:
            # The name goes into tars and tables, all of them UTF-8.
            source.name.encode()
            local = storage.local_path(source.path)
            info = audio.probe(str(local) if local else storage.read(source.path))
            rows.append(Probed(source, round(info.duration_s * audio.RATE_HZ)))
        except UnicodeEncodeError:
            rows.append(Probed(source, None, "unreadable", "its name is not UTF-8: rename it"))
        except audio.AudioError as error:
            rows.append(Probed(source, None, error.cause, str(error)))
    return rows


def assign(usable: Sequence[tuple[Source, int]], target: str, config: PackConfig) -> dict[str, list[ShardTask]]:
    """Pass 1, its end: the shards of each split with their members, by duration, shuffled over recordings."""
    keys = utterance_keys([source.name for source, _ in usable])
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


def _complete(target: str, tasks: dict[str, list[ShardTask]]) -> Packed | None:
    """The pack as it stands when every index is published and every tar is there; no tar is read."""
    splits = {}
    try:
        for split in tasks:
            base = storage.join(target, split)
            splits[split] = Index.load(base)
            if not {*splits[split].shards["path"].to_pylist()} <= {*storage.list_files(base)}:
                return None
        table = storage.read(storage.join(target, QUARANTINE)).decode()
    except UserError:
        return None
    return Packed(splits, list(csv.DictReader(io.StringIO(table, newline=""))))


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


def _write_assignment(
    target: str, config: PackConfig, tasks: dict[str, list[ShardTask]], samples: dict[Source, int]
) -> bool:
    """The restart state, written before any shard; refuses a target with another. Whether it was there already."""
    columns = ("key", "name", "group", "language", "samples")
    members = {
        split: {
            task.name: [
                [key, source.name, source.group, source.language, samples[source]] for key, source in task.members
            ]
            for task in split_tasks
        }
        for split, split_tasks in tasks.items()
    }
    state: dict[str, Any] = {"pack": asdict(config), "columns": columns, "splits": members}
    state["digest"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    url = storage.join(target, ASSIGNMENT)
    if storage.exists(url):
        if json.loads(storage.read(url)).get("digest") != state["digest"]:
            raise UserError(
                f"{target} holds a pack of other files or settings: name another folder, or remove it first"
            )
        return True
    for base in (storage.join(target, split) for split in tasks):
        if storage.exists(base) and any(name.endswith(".tar") for name in storage.list_files(base)):
            raise UserError(f"{base} holds tars of no pack that is known here: name another folder, or remove it first")
    storage.write(url, json.dumps(state, indent=0, ensure_ascii=False).encode())
    return False


def _csv(rows: Sequence[dict[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["path", "cause", "why"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
