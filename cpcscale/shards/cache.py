"""A cache of whole shards on local disk: each node downloads a shard once, and all its processes share the files.

`FOLDER/shards/SHA256` is a whole shard, verified. `FOLDER/shards/SHA256.BYTES.part` is one that is being downloaded,
from its start; what is there may be read, for each utterance has a checksum. The process that downloads it holds a lock
(flock) on it, which the kernel releases when the process dies; another process then continues the download.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from cpcscale import config, machine, storage
from cpcscale.errors import UserError, optional
from cpcscale.storage.locks import lock

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_RANGED = "reading each utterance by itself instead"


@dataclass(kw_only=True)
class CacheConfig:
    """How shards of an object store are cached on a node; local shards are read where they are."""

    # shards: whole shards on local disk. ranged: each utterance by itself. auto: shards if max_gb is enough.
    mode: Literal["auto", "shards", "ranged"] = "auto"
    # The folder of the cache; empty: `cpcscale` in XDG_CACHE_HOME, else in ~/.cache.
    folder: str = ""
    # The largest size of the cache of a node, in GB.
    max_gb: float = 50.0
    # How many shards to fetch ahead for each lane.
    ahead: int = 1

    def __post_init__(self) -> None:
        config.at_least(0, **{"feed.cache.max_gb": self.max_gb, "feed.cache.ahead": self.ahead})

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        default = machine.cache_folder() / "cpcscale"
        return Path(self.folder).expanduser().absolute() if self.folder else default

    @property
    def max_bytes(self) -> int:
        return int(self.max_gb * 1e9)

    def least_bytes(self, lanes: int, largest_bytes: int) -> int:
        """The bytes that a node with this many lanes needs: for each, the shard that it reads and those ahead of it."""
        return lanes * (1 + self.ahead) * largest_bytes


def open_cache(spec: CacheConfig, base: str, lanes: int, largest_bytes: int) -> ShardCache | None:
    """The cache of a node that reads this many lanes; None if utterances are to be read one by one.

    Also None, with a warning, for a folder that cannot be written or has no locks. Raises UserError as
    `keeps_whole_shards` does.
    """
    if keeps_whole_shards(spec, base, lanes, largest_bytes):
        with optional(f"feed.cache.folder={spec.path} cannot be used", _RANGED):
            return ShardCache(spec.path, spec.max_bytes)
    return None


def keeps_whole_shards(spec: CacheConfig, base: str, lanes: int, largest_bytes: int) -> bool:
    """Whether a node that reads this many lanes should keep whole shards of the set at `base`; warns when it cannot.

    Raises UserError with `mode: shards` when the cache is smaller than the lanes need.
    """
    if storage.local_path(base) or spec.mode == "ranged":
        return False
    least = spec.least_bytes(lanes, largest_bytes)
    if spec.max_bytes < least:
        why = (
            f"feed.cache.max_gb={spec.max_gb:g} is less than the {least / 1e9:.3g} GB that {lanes} lanes need on this "
            f"node ({1 + spec.ahead} shards of up to {largest_bytes / 1e6:.0f} MB each)"
        )
        if spec.mode == "shards":
            raise UserError(f"{why}: raise it, lower train.lanes or feed.cache.ahead, or use feed.cache.mode=ranged")
        log.warning("%s: %s", why, _RANGED)
        return False
    return True


class NoRoomError(Exception):
    """Raised when the cache has no room for a shard now; its utterances can be read by range."""


class CachedShard(NamedTuple):
    """A file of the cache: a whole shard, or the part of one that was downloaded so far."""

    path: Path
    whole: bool


class CacheClosedError(Exception):
    """Raised when a download ends because `stop` was called."""


class ShardCache:
    """The cache in `folder`, of at most `max_bytes`. Any number of processes may share it, and may be killed.

    Raises OSError for a folder that cannot be written, or has no locks.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder / "shards", max_bytes
        self._stopped = threading.Event()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Without locks, two processes would download into one file.
        with (self._folder / "lock").open("a") as file:
            if lock(file.fileno(), shared=True) is None:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def find(self, digest: str, size: int) -> CachedShard | None:
        """The file of a shard, whole or as far as it was downloaded; None if there is none."""
        if self.holds(digest, size):
            return CachedShard(self._folder / digest, True)
        part = self._part(digest, size)
        return CachedShard(part, False) if part.exists() else None

    def holds(self, digest: str, size: int) -> bool:
        """Whether the whole shard is here; if so, marks it as used now. The least recently used are removed first."""
        whole = self._folder / digest
        try:
            # A crash of the machine may leave a truncated file of this name.
            if whole.stat().st_size == size:
                os.utime(whole)
                return True
            self.drop(digest)
        except OSError:
            pass
        return False

    def stop(self) -> None:
        """Ends the downloads of this process at their next chunk; they can be continued later."""
        self._stopped.set()

    def drop(self, digest: str) -> None:
        """Removes a shard whose bytes are wrong; it will be downloaded again when it is needed."""
        (self._folder / digest).unlink(missing_ok=True)

    def fill(self, url: str, digest: str, size: int) -> bool:
        """Downloads a shard unless it is here; returns False if another process is downloading it.

        Raises NoRoomError when it does not fit. Raises UserError when the store fails, or when the bytes do not match
        the sha256 twice.
        """
        whole, part = self._folder / digest, self._part(digest, size)
        if self.holds(digest, size):
            return True
        with self._locked_part(part) as descriptor:
            if descriptor is None:
                return False
            if whole.exists():
                part.unlink(missing_ok=True)
                return True
            self._make_room(size, part)
            for _ in range(2):
                if self._fetch(url, descriptor, part, size) == digest:
                    with self._exclusive(), contextlib.suppress(FileNotFoundError):
                        part.rename(whole)
                    return True
                # Again from the start: after a crash of the machine, a part may have holes.
                os.ftruncate(descriptor, 0)
            part.unlink(missing_ok=True)
        raise UserError(
            f"{url} does not match its sha256 after it was fetched twice: the shard changed after it was indexed or "
            "its store is damaged; restore it, or remove it and index again"
        )

    def _fetch(self, url: str, descriptor: int, part: Path, size: int) -> str:
        """Continues the download into the open part; returns the sha256 in hex of the whole."""
        digest, position = sha256(), 0
        while chunk := os.pread(descriptor, _READ_BYTES, position):
            digest.update(chunk)
            position += len(chunk)
        if position >= size:
            return digest.hexdigest()
        os.lseek(descriptor, position, os.SEEK_SET)
        for chunk in storage.chunks(url, position):
            if self._stopped.is_set():
                raise CacheClosedError
            self._write(descriptor, chunk, part)
            digest.update(chunk)
        return digest.hexdigest()

    def _write(self, descriptor: int, chunk: bytes, part: Path) -> None:
        view = memoryview(chunk)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except OSError as error:
                if error.errno not in storage.DISK_FULL:
                    raise
                # Others use the disk too: remove old shards and, if there are none, give up this one.
                if not self._evict(len(view), part):
                    part.unlink(missing_ok=True)
                    raise NoRoomError(f"{self._folder}: {error.strerror}") from None

    @contextlib.contextmanager
    def _locked_part(self, part: Path) -> Iterator[int | None]:
        """Opens and locks the part; None if another process holds the lock."""
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock(descriptor, wait=False):
                yield None
                return
            # Between open and lock another process may have finished: then the open file is no longer the part.
            same = part.exists() and os.path.samestat(part.stat(), os.fstat(descriptor))
            yield descriptor if same else None
        finally:
            os.close(descriptor)

    def _make_room(self, size: int, keep: Path) -> None:
        with self._exclusive():
            over = sum(taken for _, taken, path in self._entries() if path != keep) + size - self._max_bytes
            if over > 0 and not self._evict(over, keep):
                keep.unlink(missing_ok=True)
                raise NoRoomError(f"{self._folder} is full of shards in use: raise feed.cache.max_gb")

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keeps other processes from counting or renaming meanwhile: a listing may miss a file during its rename."""
        with (self._folder / "lock").open("a") as file:
            lock(file.fileno())
            yield

    def _evict(self, least: int, keep: Path) -> bool:
        """Removes the least recently used shards to free `least` bytes; returns whether it could."""
        freed = 0
        for _, taken, path in sorted(self._entries()):
            if freed >= least:
                break
            if path != keep and not _is_locked(path):
                path.unlink(missing_ok=True)
                freed += taken
        return freed >= least

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file of the cache; a part counts with the size of its shard."""
        for path in self._folder.iterdir():
            if path.name == "lock":
                continue
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                parts = path.name.split(".")
                yield state.st_mtime, int(parts[1]) if len(parts) == 3 else state.st_size, path

    def _part(self, digest: str, size: int) -> Path:
        return self._folder / f"{digest}.{size}.part"


def _is_locked(path: Path) -> bool:
    """Whether a process is downloading this part."""
    try:
        with path.open("rb") as file:
            return not lock(file.fileno(), shared=True, wait=False)
    except FileNotFoundError:
        return False
