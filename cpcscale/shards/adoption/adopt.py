"""Indexes tars that were not made by `cpcscale pack`, where they are; nothing but the index is written.

A version is valid until the marker of the next one is written. What cannot be trained on is left out of the index and
listed in `quarantine.csv` beside it, with the cause.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import pyarrow.compute as pc

from cpcscale import audio, config, storage
from cpcscale.errors import UserError, nearest, shown_name
from cpcscale.shards.account import Account
from cpcscale.shards.adoption import labels
from cpcscale.shards.adoption.labels import Manifest
from cpcscale.shards.adoption.read_tar import IndexConfig, LeftOut, TarTask, read_tar
from cpcscale.shards.adoption.tar_members import COMPRESSED, WAY_OUT
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.index_writer import IndexWriter, exclude
from cpcscale.shards.packing import quarantine
from cpcscale.shards.tasks import RunTasks, in_turn
from cpcscale.tables import nearest_name

log = logging.getLogger(__name__)

QUARANTINE, SETTINGS = "quarantine.csv", "index-settings.json"
_COLUMNS = ("shard", "member", "cause", "why", "seconds")
_INDEX_AGAIN = f"remove {MARKER} and index again"
_SIZES_AT_ONCE = 32


@dataclass(frozen=True)
class AdoptedSet:
    """An index and what was done to it: `state` is made, appended, excluded or unchanged.

    `left_out` counts members by cause; `damaged` names tars that are left out whole. For the tars that were read now,
    `origins` counts where groups and languages were found, `notes` counts oddities of members, and `account` says what
    became of the audio.
    """

    index: Index
    state: str
    new_shards: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    damaged: tuple[str, ...] = ()
    origins: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    account: Account = field(default_factory=Account)


class _Tasks(Sequence[TarTask]):
    """One task for each tar, made when it is accessed; `cuts` are the names of possible lhotse cuts files."""

    def __init__(self, base: str, tars: Sequence[str], cuts: frozenset[str], spec: IndexConfig) -> None:
        self._base, self._tars, self._cuts, self._spec = base, tars, cuts, spec

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, at: int) -> TarTask:  # type: ignore[override]
        name = self._tars[at]
        return TarTask(self._base, name, labels.cuts_beside(name, self._cuts), self._spec)


def adopt(base: str, spec: IndexConfig, *, append: bool = False, run: RunTasks = in_turn) -> AdoptedSet:
    """Indexes the tars below `base`; with `append`, publishes a new version with the tars that the index lacks.

    Without `append`, a folder that is indexed is checked: its tars must be those of the index. Raises UserError when
    they are not, for a folder without usable tars, for compressed tars, and for folders that hold shard sets.
    """
    base = storage.absolute(base)
    names = storage.list_files(base)
    if append or MARKER in names:
        index = Index.load(base)
        spec = _as_before(base, names, spec, append)
        tars = _tars(base, names, spec.pattern)
        _refuse_changed(index, names)
        return _append(index, tars, names, spec, run) if append else _verified(index, tars, names)
    tars = _tars(base, names, spec.pattern)
    if not tars:
        raise UserError(f"{base} holds no file named {spec.pattern}: name the folder of the tars, or set pattern=")
    return _read(base, tars, names, spec, None, run)


def exclude_from(base: str, texts: Sequence[str]) -> AdoptedSet:
    """Publishes a version of the index at `base` without some utterances. Raises UserError for an unknown key.

    Each text is KEY or SHARD:KEY, several with commas between, or `@FILE`, a file with one of them in each line.
    """
    keys: list[str] = []
    for text in texts:
        if text.startswith("@"):
            try:
                lines = storage.read(storage.absolute(text[1:])).decode().lstrip("\ufeff").splitlines()
            except UnicodeDecodeError as error:
                raise UserError(f"--exclude {text}: it is not a text in UTF-8 ({error})") from None
            keys += [line for line in lines if line.strip()]
        else:
            keys += [key for key in text.split(",") if key]
    if not keys:
        raise UserError("--exclude names no key: give KEY, SHARD:KEY, several with commas between, or @FILE")
    index = Index.load(storage.absolute(base))
    descendant = exclude(index, keys)
    return AdoptedSet(descendant, "unchanged" if descendant is index else "excluded")


def _tars(base: str, names: Sequence[str], pattern: str) -> list[str]:
    packed = [name for name in names if name.lower().endswith(COMPRESSED)]
    if packed:
        raise UserError(f"{storage.join(base, packed[0])} is compressed: {WAY_OUT}")
    sets = [name for name in names if name.endswith(f"/{MARKER}")]
    if sets:
        raise UserError(
            f"{base} holds {len(sets)} shard sets, the first {sets[0][: -len(MARKER) - 1]}: index each by "
            f"itself, so that held-out sets stay apart, or remove their {MARKER}"
        )
    tars = [name for name in names if name.lower().endswith(".tar") and fnmatchcase(name, pattern)]
    for name in tars:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{shown_name(name)} has no name in UTF-8: rename it") from None
    return tars


def _read(
    base: str, tars: Sequence[str], names: Sequence[str], spec: IndexConfig, after: Index | None, run: RunTasks
) -> AdoptedSet:
    """Reads these tars and publishes an index of them, appended to those of `after` if given."""
    manifest = Manifest(storage.absolute(spec.manifest), spec.columns) if spec.manifest else None
    tasks = _Tasks(base, tars, frozenset(name for name in names if name.endswith((".jsonl.gz", ".jsonl"))), spec)
    left_out, origins, notes = Counter[str](), Counter[str](), Counter[str]()
    damaged: list[LeftOut] = []
    account, taken = Account(), 0
    fields: set[str] = set()
    keys: list[str] = []
    new = 0
    with IndexWriter(base, after) as writer:
        with _quarantine(base, set(tars) if after else None) as write:
            for shard in run(read_tar, tasks, what="indexing", unit="tars", shared=(manifest,)):
                if shard.entry:
                    writer.add(shard.entry)
                    keys = keys or shard.entry.utterances["key"].to_pylist()
                    new += 1
                    table = shard.entry.utterances
                    taken += table.num_rows
                    account.taken = taken, account.taken[1] + (pc.sum(table["samples"]).as_py() or 0) / audio.RATE_HZ
                else:
                    damaged += shard.left_out
                left_out.update(row.cause for row in shard.left_out if row.member)
                for row in shard.left_out:
                    account.leave_out(row.cause, row.seconds)
                account.passed_over += shard.passed_over
                write(shard.left_out)
                origins += shard.origins
                notes += shard.notes
                fields.update(shard.fields)
            _refuse_useless(base, tars, left_out, damaged, origins)
            for text in _unused_labels(spec, manifest, origins, fields, keys):
                # Appended tars may lack labels that the first tars had.
                if after is None:
                    raise UserError(text)
                log.warning("%s", text)
        storage.write(storage.join(base, SETTINGS), json.dumps(config.flat(spec), indent=1).encode() + b"\n")
        index = writer.publish()
    state = "appended" if after else "made"
    account.found = taken + sum(left_out.values()), account.taken[1] + account.left_out_s
    return AdoptedSet(index, state, new, left_out, tuple(row.shard for row in damaged), origins, notes, account)


def _append(index: Index, tars: Sequence[str], names: Sequence[str], spec: IndexConfig, run: RunTasks) -> AdoptedSet:
    known = set(index.shards["path"].to_pylist())
    new = [name for name in tars if name not in known]
    return _read(index.base, new, names, spec, index, run) if new else AdoptedSet(index, "unchanged")


def _verified(index: Index, tars: Sequence[str], names: Sequence[str]) -> AdoptedSet:
    damaged = {row["shard"] for row in _quarantined(index.base) if not row["member"]} if QUARANTINE in names else set()
    known = set(index.shards["path"].to_pylist())
    new = [name for name in tars if name not in known | damaged]
    if new:
        raise UserError(
            f"{len(new)} tars are not in the index of {index.base}, the first {new[0]}: add them with --append"
        )
    return AdoptedSet(index, "unchanged", damaged=tuple(sorted(damaged & set(tars))))


def _refuse_changed(index: Index, names: Sequence[str]) -> None:
    """Raises UserError if a tar of the index is missing or has another size. Reads no tar."""
    paths, sizes = index.shards["path"].to_pylist(), index.shards["bytes"].to_numpy()
    there = set(names)
    gone = [path for path in paths if path not in there]
    if gone:
        raise UserError(
            f"{_first_names(gone)} of the index at {index.base} {_is_or_are(gone)} gone: restore, or {_INDEX_AGAIN}"
        )
    with ThreadPoolExecutor(_SIZES_AT_ONCE) as pool:
        found = pool.map(lambda path: storage.size(storage.join(index.base, path)), paths)
        other = [path for path, size, indexed in zip(paths, found, sizes, strict=True) if size != indexed]
    if other:
        raise UserError(
            f"{_first_names(other)} of the index at {index.base} {_is_or_are(other)} of another size than indexed: "
            f"restore, or {_INDEX_AGAIN}"
        )


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _as_before(base: str, names: Sequence[str], spec: IndexConfig, append: bool) -> IndexConfig:
    """The settings of an indexed folder: those it was indexed with; with `append`, new ones replace them."""
    plain, given = config.flat(IndexConfig()), config.flat(spec)
    before = dict(plain)
    if SETTINGS in names:
        try:
            before |= dict(config.read_json(storage.read(storage.join(base, SETTINGS))))
        except (ValueError, TypeError):
            raise UserError(f"{storage.join(base, SETTINGS)} is not a JSON object: remove it") from None
    changed = [name for name, value in given.items() if value not in (plain[name], before[name])]
    if changed and not append:
        name = changed[0]
        raise UserError(
            f"{base} is indexed already, with {name}={before[name]!r}: to have {given[name]!r} instead, {_INDEX_AGAIN}"
        )
    merged = {name: given[name] if name in changed else before[name] for name in plain}
    return config.load(IndexConfig, None, [f"{name}={json.dumps(value)}" for name, value in merged.items()])


def _refuse_useless(
    base: str, tars: Sequence[str], left_out: Counter[str], damaged: Sequence[LeftOut], origins: Counter[str]
) -> None:
    if origins:
        return
    if damaged:
        raise UserError(f"nothing to index: {damaged[0].shard} cannot be used: {damaged[0].why}; fetch it again")
    if left_out:
        causes = ", ".join(f"{count} {cause}" for cause, count in left_out.most_common())
        raise UserError(f"none of the audio members of {len(tars)} tars can be used: {causes}")
    raise UserError(f"there is no audio in {len(tars)} tars below {base}: expected {', '.join(audio.SUFFIXES)}")


def _unused_labels(
    spec: IndexConfig, manifest: Manifest | None, origins: Counter[str], fields: set[str], keys: Sequence[str]
) -> Iterator[str]:
    """Messages about a manifest or column that the user named and that gave no label to any member.

    `keys` are those of one tar.
    """
    if manifest and not any(": manifest " in origin for origin in origins):
        yield (
            f"{manifest.url} names none of the members, its first is {manifest.example!r}"
            f"{nearest_name(manifest.example, keys)}: name the column with their keys as columns.key="
        )
    for name in ("group", "language"):
        column = getattr(spec.columns, name)
        if column and not any(origin.startswith(f"{name}: ") and origin.endswith(f" {column}") for origin in origins):
            has = f"a JSON here has {', '.join(sorted(fields))}" if fields else "there is no JSON beside the members"
            yield f"columns.{name}={column} is in the labels of no member{nearest(column, sorted(fields))}: {has}"


@contextlib.contextmanager
def _quarantine(base: str, again: set[str] | None) -> Iterator[Callable[[Sequence[LeftOut]], None]]:
    """Yields a function that writes rows of the quarantine table.

    Existing rows of shards other than `again` are kept; with None, the table is started anew.
    """
    with (
        storage.publishing(storage.join(base, QUARANTINE)) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        if again is not None:
            writer.writerows(row for row in _quarantined(base) if row["shard"] not in again)
        yield lambda rows: writer.writerows(vars(row) for row in rows)


def _quarantined(base: str) -> Iterator[dict[str, str]]:
    """The rows of the quarantine table; none if there is no table."""
    with contextlib.suppress(storage.NotFoundError):
        yield from quarantine.rows_of(storage.join(base, QUARANTINE), _COLUMNS)
