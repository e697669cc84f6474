"""The audio that a person names, in parts of one task each: files, folders, patterns, lists and shard sets."""

from __future__ import annotations

import glob
import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpcscale import audio, storage
from cpcscale.emotion.audio.prefetch import read_ahead
from cpcscale.errors import UserError
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.packing import fetch
from cpcscale.shards.reader import ShardReader
from cpcscale.shards.tasks import RunTasks

# A part of files ends after ten minutes of audio, or so many files.
_PART_SAMPLES, _PART_FILES = 600 * audio.RATE_HZ, 500
_MEASURED_TOGETHER, _AHEAD = 64, 8


@dataclass(frozen=True)
class Part:
    """What one task predicts, from number `first` of all inputs on: files, or the utterances of one shard of a set.

    `names` are those that the table has, of files as they were named, `paths` their places for any process.
    """

    number: int
    first: int
    count: int
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    base: str = ""
    shard: int = 0


@dataclass(frozen=True)
class Inputs:
    """The parts in order, the shard sets by the folders that name them, and a digest that changes with the audio.

    The digest is over the fingerprints of sets, and the names, sizes and times (of objects: etags) of files. `excluded`
    counts utterances that the index of a set leaves out.
    """

    parts: tuple[Part, ...]
    sets: dict[str, Index]
    digest: str
    excluded: int

    @property
    def count(self) -> int:
        """How many files and utterances there are."""
        return sum(part.count for part in self.parts)


def find_inputs(sources: Sequence[str], run: RunTasks) -> Inputs:
    """What is named by `sources`, as `listed_files` takes them. `run` reads the headers of files."""
    names = list(listed_files(sources))
    files = [name for name in names if not is_set(name)]
    # Processes of a cluster run in other folders.
    places = list(map(storage.absolute, files))
    groups = [places[at : at + _MEASURED_TOGETHER] for at in range(0, len(places), _MEASURED_TOGETHER)]
    read = run(_measure_all, groups, what="reading headers", unit="groups") if groups else ()
    measured = iter([each for group in read for each in group])
    parts: list[Part] = []
    sets: dict[str, Index] = {}
    digest, excluded, samples = hashlib.sha256(), 0, 0
    waiting: list[str] = []

    def end_part() -> None:
        nonlocal samples
        if waiting:
            paths = tuple(map(storage.absolute, waiting))
            parts.append(Part(len(parts), _next(parts), len(waiting), tuple(waiting), paths))
        waiting.clear()
        samples = 0

    for name in names:
        if is_set(name):
            end_part()
            base = posixpath.dirname(name) or "."
            index = sets[base] = sets.get(base) or Index.load(storage.absolute(base))
            excluded += len(index.excluded)
            digest.update(f"set {base}\0{index.fingerprint}\n".encode())
            for shard in range(index.shards.num_rows):
                low, high = index.bounds[shard], index.bounds[shard + 1]
                count = int(high - low) - int(((index.excluded >= low) & (index.excluded < high)).sum())
                parts.append(Part(len(parts), _next(parts), count, base=base, shard=shard))
            continue
        length, stamp = next(measured)
        digest.update(f"file {name}\0{stamp}\n".encode(errors="surrogateescape"))
        waiting.append(name)
        samples += length
        if samples >= _PART_SAMPLES or len(waiting) == _PART_FILES:
            end_part()
    end_part()
    return Inputs(tuple(parts), sets, digest.hexdigest(), excluded)


def read_part(part: Part, index: Index | None) -> Iterator[tuple[str, str, bytes | None]]:
    """(name in the table, path, bytes) of each input of a part; the bytes are None where the file is to be read.

    An utterance of a set has the name TAR:KEY.
    """
    if index is None:
        yield from ((name, path, None) for name, path in zip(part.names, part.paths, strict=True))
        return
    reader = ShardReader(index, keep=1)
    try:
        rows = reader.rows(part.shard)
        kept = [row for row, excluded in enumerate(rows.excluded.tolist()) if not excluded]
        tar = storage.join(part.base, index.shards["path"][part.shard].as_py())
        data = read_ahead(lambda row: bytes(reader.member(rows, row)), kept, _AHEAD)
        for row, found in zip(kept, data, strict=True):
            name = f"{tar}:{rows.table['key'][row].as_py()}"
            yield name, name, found
    finally:
        reader.close()


def listed_files(sources: Sequence[str]) -> Iterator[str]:
    """The audio files that a person names: files, folders (all audio below), patterns, @LIST with a file a line.

    A shard set has the name of its index.json. Raises UserError for a folder without audio, a pattern that fits nothing
    and a list that is not there.
    """
    for source in sources:
        if source.startswith("@"):
            yield from listed_files(_lines(source[1:]))
        elif glob.has_magic(source) and storage.local_path(source) is not None and not Path(source).exists():
            root = Path(Path(source).anchor)
            try:
                found = sorted(map(str, root.glob(str(Path(source).relative_to(root)))))
            except ValueError as error:
                raise UserError(f"{source} is no pattern ({error})") from None
            if not found:
                raise UserError(f"no file fits the pattern {source}")
            yield from listed_files(found)
        elif source.lower().endswith(audio.SUFFIXES) or _is_file(source):
            yield source
        elif below := _below(source):
            yield from (storage.join(source, name) for name in below)
        else:
            raise UserError(
                f"no audio at {source}: expected files ending in {', '.join(audio.SUFFIXES)}, or a shard set"
            )


def _below(folder: str) -> list[str]:
    """The audio files below a folder that are in no shard set, and the markers of the shard sets, in order."""
    names = storage.list_files(folder)
    tars = [name for name in names if name.endswith(".tar")]
    marked = [name.removesuffix(MARKER) for name in names if posixpath.basename(name) == MARKER]
    sets = tuple(place for place in marked if any(tar.startswith(place) for tar in tars))
    return [
        name
        for name in names
        if (posixpath.basename(name) == MARKER and name.removesuffix(MARKER) in sets)
        or (name.lower().endswith(audio.SUFFIXES) and not name.startswith(sets))
    ]


def _next(parts: Sequence[Part]) -> int:
    return parts[-1].first + parts[-1].count if parts else 0


def is_set(name: str) -> bool:
    """Whether `listed_files` names a shard set by this, not a file of audio."""
    return posixpath.basename(name) == MARKER


def _is_file(source: str) -> bool:
    local = storage.local_path(source)
    return local is not None and local.is_file()


def _lines(path: str) -> list[str]:
    """The names in a list; a list in a list is refused, for it may be the same one."""
    try:
        lines = [line.strip() for line in storage.read(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is no list of files in UTF-8: write one name a line") from None
    if inner := next((line for line in lines if line.startswith("@")), ""):
        raise UserError(f"{path} names another list, {inner}: give both to the command")
    if not any(lines):
        raise UserError(f"{path} names no file: write one name a line")
    return [line for line in lines if line]


def _measure_all(names: Sequence[str]) -> list[tuple[int, str]]:
    return list(read_ahead(_measure, names, _MEASURED_TOGETHER))


def _times(local: Path) -> str:
    """When the file was written, and when it was changed in any way, such as who may read it."""
    found = local.stat()
    return f"{found.st_mtime_ns} {found.st_ctime_ns}"


def _measure(name: str) -> tuple[int, str]:
    """(samples by the header, what changes with the file); (0, ...) where it cannot be read, which its row will say."""
    stamp = ""
    try:
        size, etag = storage.stat(name)
        local = storage.local_path(name)
        stamp = f"{size} {_times(local) if local else etag}"
        with fetch.opened(name, fetch.HEADER_BYTES) as source:
            return audio.read_header(source).length, stamp
    except (UserError, OSError):
        return 0, stamp
