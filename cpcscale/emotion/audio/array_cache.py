"""A cache of decoded audio and features on local disk, keyed by what they were made from.

`FOLDER/KIND/NAME.safetensors` is a pack: many arrays of one kind by their keys, each with a checksum, written whole and
never changed. Packs, because a hundred thousand small files are slow to list and to open. Each addition makes new
packs; nothing is written twice. Arrays are memory-mapped, and stay readable when their pack is evicted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from safetensors.numpy import save_file

from cpcscale import config, storage
from cpcscale.errors import optional
from cpcscale.shards.cache import CacheConfig
from cpcscale.storage.locks import lock

log = logging.getLogger(__name__)

# The most that a killed process loses, and that a writer keeps in memory.
_PACK_BYTES = 256 * 2**20
_PACK, _TABLE = ".safetensors", ".json"
# The array types that can be cached, by their names in safetensors.
_TYPES = {
    name: np.dtype(code)
    for name, code in {"I16": "<i2", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}.items()
}


@dataclass(kw_only=True)
class AudioCacheConfig:
    """Where this node keeps decoded labelled audio and the features of frozen encoders on its disk."""

    # the folder; empty: `cpcscale` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)
    path: str = ""
    # size limit in GB; the least recently used packs are removed first. A run that needs more works, with a warning
    limit_gb: float = 50.0
    # false: use a temporary folder that is removed when the process ends
    enabled: bool = True

    def __post_init__(self) -> None:
        config.at_least(0, **{"audio_cache.limit_gb": self.limit_gb})

    @property
    def folder(self) -> Path:
        """The folder of this cache, beside the cache of shards."""
        return CacheConfig(folder=self.path).path / "emotion"


def cache_kind(name: str, *of: str) -> str:
    """The folder name of a kind of arrays: `name`, for people, and a digest of `name` and `of`.

    `of` must hold all that decides the values of the arrays.
    """
    digest = sha256(json.dumps([name, *of]).encode()).hexdigest()[:32]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:40]}-{digest}"


class _Place(NamedTuple):
    """Where an array lies in a memory-mapped pack."""

    path: Path
    mapped: mmap.mmap
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    checksum: str


class CachedArrays:
    """The cached arrays of one kind by key, memory-mapped: only arrays that are read take memory."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._verified: set[str] = set()
        self._mended: dict[str, np.ndarray] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array; does not read it."""
        return self._places[key].shape

    def read(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array, read-only, with its checksum verified on the first read.

        If the checksum differs, the pack is removed and the array is what `make` returns.
        """
        if key in self._mended:
            return self._mended[key]
        place = self._places[key]
        array = np.ndarray(place.shape, place.dtype, place.mapped, place.start)
        if key not in self._verified:
            if _checksum(array) != place.checksum:
                _discard(place.path, "an array does not match its checksum")
                array = self._mended[key] = make()
                array.setflags(write=False)
            self._verified.add(key)
        return array

    def keep_only(self, keys: Collection[str]) -> None:
        """Forgets packs that hold none of these keys, and marks the others as used now."""
        used = {self._places[key].path for key in keys if key in self._places}
        self._places = {key: place for key, place in self._places.items() if place.path in used}
        for path in used:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    def add(self, path: Path, aside: Path | None = None) -> None:
        """Maps the pack at `path`, or at `aside` if it is not moved to `path` yet.

        A pack that is gone is ignored; one that is cut or corrupt is removed.
        """
        try:
            self._places |= _places(path, aside or path)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _discard(path, f"not a whole pack ({type(error).__name__})")


class ArrayCache:
    """A cache folder of at most `limit_gb`. Any number of processes may share it, and may be killed at any time."""

    def __init__(self, settings: AudioCacheConfig) -> None:
        self.settings = settings
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = self._writable(settings.folder) if settings.enabled else self._own()
        self._limit_bytes = int(settings.limit_gb * 1e9)
        self._ours: set[Path] = set()
        self._warned = False

    def arrays(self, kind: str) -> CachedArrays:
        """All cached arrays of a kind."""
        cached = CachedArrays()
        for path in sorted((self._folder / kind).glob(f"*{_PACK}")):
            cached.add(path)
        return cached

    @contextlib.contextmanager
    def writer(self, kind: str) -> Iterator[ArrayWriter]:
        """A block that adds arrays of a kind. Other processes that want to wait, and then find what this one added.

        If the block raises, full packs stay, and the rest is lost.
        """
        folder = self._writable(self._folder / kind)
        # The kernel ends the lock of a process that dies.
        with (folder / "lock").open("a") as file:
            held = lock(file.fileno(), wait=False)
            if held is False:
                log.info("%s: another process is filling it, waiting", folder)
                held = lock(file.fileno())
            # Left by a process that was killed. Without locks, another one may still be writing them.
            for path in folder.glob(".*.tmp") if held else ():
                path.unlink(missing_ok=True)
            writer = ArrayWriter(self, folder, self.arrays(kind))
            yield writer
            writer.publish()

    def load_table(self, name: str) -> dict[str, list[str]]:
        """A table that was saved; empty if there is none or it is corrupt."""
        path = self._table_path(name)
        try:
            rows = config.read_json(path.read_bytes())
            os.utime(path)
        except (FileNotFoundError, ValueError):
            return {}
        return rows if isinstance(rows, dict) else {}

    def save_table(self, name: str, rows: Mapping[str, list[str]]) -> None:
        """Saves a table for `load_table`; of two processes that save at once, one wins."""
        with optional(f"the audio cache {self._folder} takes no table", "it is made again at the next start"):
            storage.write(str(self._table_path(name)), json.dumps(rows).encode())

    def publish(self, arrays: dict[str, np.ndarray], folder: Path, cached: CachedArrays) -> None:
        """Writes a pack, maps it into `cached`, and evicts packs over the limit."""
        path = folder / f"{uuid.uuid4().hex}{_PACK}"
        checksums = {key: _checksum(array) for key, array in arrays.items()}
        size = sum(array.nbytes for array in arrays.values())
        # Other programs fill this disk too.
        self._evict(size - shutil.disk_usage(self._folder).free)
        with storage.publishing(str(path)) as aside:
            save_file(arrays, aside, checksums)
            aside.chmod(0o644)
            # Mapped before the move: once in place, another process may evict it.
            cached.add(path, aside)
        self._ours.add(path)
        self._evict(sum(taken for _, taken, _ in self._entries()) - self._limit_bytes)

    def _writable(self, folder: Path) -> Path:
        """The folder, made if it is missing; a temporary one in its place, with a warning, if it cannot be written."""
        with optional(
            f"the audio cache cannot be made or written in {folder}",
            "using a temporary folder; to keep what is made, name another one as audio_cache.path",
        ):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").open("a").close()
            return folder
        other = self._own() / folder.name
        other.mkdir(exist_ok=True)
        return other

    def _own(self) -> Path:
        """The folder that is removed with this cache."""
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="cpcscale-")
        return Path(self._temporary.name)

    def _evict(self, over: int) -> None:
        """Removes the least recently used packs until `over` bytes are freed, or none is left."""
        for _, taken, path in sorted(self._entries()) if over > 0 else ():
            path.unlink(missing_ok=True)
            if path in self._ours and not self._warned:
                self._warned = True
                log.warning(
                    "%s: this run needs more than audio_cache.limit_gb=%g or the free disk, so part is computed again "
                    "at the next start: raise the limit, or set another audio_cache.path",
                    *(self._folder, self.settings.limit_gb),
                )
            over -= taken
            if over <= 0:
                return

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each file in the cache."""
        for path in self._folder.glob("*/*"):
            if path.suffix in (_PACK, _TABLE) and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    yield state.st_mtime_ns, state.st_size, path

    def _table_path(self, name: str) -> Path:
        return self._folder / "tables" / f"{sha256(name.encode()).hexdigest()[:32]}{_TABLE}"


class ArrayWriter:
    """Collects arrays of a kind into packs. `arrays` are those already in packs, also by this writer."""

    def __init__(self, cache: ArrayCache, folder: Path, cached: CachedArrays) -> None:
        self.arrays = cached
        self._cache, self._folder = cache, folder
        self._arrays: dict[str, np.ndarray] = {}
        self._bytes = 0

    def add(self, key: str, array: np.ndarray) -> None:
        """Adds a copy of an array, unless its key is cached."""
        assert array.dtype in _TYPES.values(), f"the cache has no type for {array.dtype}"
        if key in self._arrays or key in self.arrays:
            return
        self._arrays[key] = np.array(array, order="C")
        self._bytes += array.nbytes
        if self._bytes >= _PACK_BYTES:
            self.publish()

    def publish(self) -> None:
        """Writes the collected arrays as a pack."""
        if self._arrays:
            self._cache.publish(self._arrays, self._folder, self.arrays)
        self._arrays, self._bytes = {}, 0


def _places(path: Path, actual: Path) -> dict[str, _Place]:
    """The arrays of a pack, a safetensors file: length of the header, the header as JSON, the arrays.

    Mapped here, because the library copies each array that it returns. Raises ValueError, KeyError, TypeError or
    AttributeError for a file that is not a whole pack.
    """
    with actual.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    first = 8 + int.from_bytes(mapped[:8], "little")
    header = config.read_json(mapped[8:first])
    checksums, places, last = header.pop("__metadata__"), {}, first
    for key, row in header.items():
        dtype, shape, (start, stop) = _TYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
        if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
            raise ValueError("an array of another size than its header says")
        places[key] = _Place(path, mapped, dtype, shape, first + start, checksums[key])
        last = max(last, first + stop)
    if last != len(mapped):
        raise ValueError("a file of another size than its header says")
    return places


def _checksum(array: np.ndarray) -> str:
    return str(xxhash.xxh3_64_hexdigest(array.reshape(-1).view(np.uint8).data))


def _discard(path: Path, why: str) -> None:
    log.warning("%s: %s; the pack is removed, and its arrays are made again", path, why)
    path.unlink(missing_ok=True)
