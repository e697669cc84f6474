"""Whole shards on local disk: one download a shard and node, shared by every process of the node through files.

`FOLDER/shards/SHA256` is a shard that was verified whole. `FOLDER/shards/SHA256.BYTES.part` is one that is being filled
from its start: what stands in it may be read, each member being verified by its own checksum. Who fills a part holds
its flock, which the kernel gives up when the process dies, and the next one goes on where the dead one was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from cpcscale import config, storage
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_BYTES = 1 << 20


@dataclass(kw_only=True)
class CacheConfig:
    """How shards of an object store reach a node; local shards are read where they lie."""

    # shards: whole shards on local disk; ranged: each member by itself; auto: shards where max_gb is enough.
    mode: Literal["auto", "shards", "ranged"] = "auto"
    # Empty: `cpcscale` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).
    folder: str = ""
    # The most that the cache of a node takes of its disk.
    max_gb: float = 50.0
    # Shards fetched ahead of each lane.
    ahead: int = 1

    def __post_init__(self) -> None:
        config.at_least(0, **{"feed.cache.max_gb": self.max_gb, "feed.cache.ahead": self.ahead})

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cpcscale"
        return Path(self.folder).expanduser().absolute() if self.folder else default

    @property
    def max_bytes(self) -> int:
        return int(self.max_gb * 1e9)

    def least_bytes(self, lanes: int, largest_bytes: int) -> int:
        """The least a node with this many open lanes needs: each holds the shard it reads and those ahead of it."""
        return lanes * (1 + self.ahead) * largest_bytes


def open_cache(spec: CacheConfig, base: str, lanes: int, largest_bytes: int) -> ShardCache | None:
    """The cache of a node that serves this many lanes; None where members are read one by one.

    Raises UserError as `keeps_whole_shards` does, and for a folder that cannot be made.
    """
    return ShardCache(spec.path, spec.max_bytes) if keeps_whole_shards(spec, base, lanes, largest_bytes) else None


def keeps_whole_shards(spec: CacheConfig, base: str, lanes: int, largest_bytes: int) -> bool:
    """Whether a node that serves this many lanes is to keep whole shards of the set at `base`.

    Raises UserError when `mode: shards` is asked for and the cache is smaller than the lanes need.
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
        log.warning("%s: reading each member by itself instead", why)
        return False
    return True


class NoRoomError(Exception):
    """The cache cannot hold a shard now: read its members by range."""


class CachedShard(NamedTuple):
    """A file of the cache: a whole shard, or the part of one."""

    path: Path
    whole: bool


class CacheClosedError(Exception):
    """The download of a shard was ended on purpose."""


class ShardCache:
    """The cache in `folder`, of at most `max_bytes`. Any number of processes may use one folder, and die."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder / "shards", max_bytes
        self._stopped = threading.Event()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"feed.cache.folder={folder} cannot be made ({error.strerror}): name another folder"
            ) from None

    def find(self, digest: str, size: int) -> CachedShard | None:
        """Where the bytes of a shard stand, as far as they are filled; None when there are none."""
        if self.holds(digest, size):
            return CachedShard(self._folder / digest, True)
        part = self._part(digest, size)
        return CachedShard(part, False) if part.exists() else None

    def holds(self, digest: str, size: int) -> bool:
        """Whether the shard is here whole; it then counts as used now: the least recently used goes first."""
        whole = self._folder / digest
        try:
            # A crash of the machine may leave a file of this name that is short.
            if whole.stat().st_size == size:
                os.utime(whole)
                return True
            self.drop(digest)
        except OSError:
            pass
        return False

    def stop(self) -> None:
        """Ends the downloads of this process at their next chunk; what came stays for the next start."""
        self._stopped.set()

    def drop(self, digest: str) -> None:
        """Forgets a shard whose bytes turned out wrong; it is fetched again when it is next wanted."""
        (self._folder / digest).unlink(missing_ok=True)

    def fill(self, url: str, digest: str, size: int) -> bool:
        """Downloads a shard unless it is here; False when another process is at it.

        Raises NoRoomError when it does not fit, and UserError naming the shard when what the store gives does not
        match its sha256 twice, or cannot be had.
        """
        whole, part = self._folder / digest, self._part(digest, size)
        if self.holds(digest, size):
            return True
        with self._filling(part) as descriptor:
            if descriptor is None:
                return False
            if whole.exists():
                part.unlink(missing_ok=True)
                return True
            self._make_room(size, part)
            for _ in range(2):
                if self._fetch(url, descriptor, part, size) == digest:
                    with self._counting(), contextlib.suppress(FileNotFoundError):
                        part.rename(whole)
                    return True
                # From its start: a part that a crash of the machine left may have holes.
                os.ftruncate(descriptor, 0)
            part.unlink(missing_ok=True)
        raise UserError(
            f"{url} does not match its sha256 after it was fetched twice: the shard changed after it was indexed or "
            "its store is damaged; restore it, or remove it and index again"
        )

    def _fetch(self, url: str, descriptor: int, part: Path, size: int) -> str:
        """Fills the open part from where it stands and returns the sha256 of all of it."""
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
                if error.errno not in _FULL:
                    raise
                # Others use the disk too: give up old shards, and when there are none, this one.
                if not self._evict(len(view), part):
                    part.unlink(missing_ok=True)
                    raise NoRoomError(f"{self._folder}: {error.strerror}") from None

    @contextlib.contextmanager
    def _filling(self, part: Path) -> Iterator[int | None]:
        """The part opened and locked, or None when another process holds it."""
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Between open and lock the one before may have finished: then this is no longer the file of that name.
            same = part.exists() and os.path.samestat(part.stat(), os.fstat(descriptor))
            yield descriptor if same else None
        finally:
            os.close(descriptor)

    def _make_room(self, size: int, keep: Path) -> None:
        with self._counting():
            over = sum(taken for _, taken, path in self._entries() if path != keep) + size - self._max_bytes
            if over > 0 and not self._evict(over, keep):
                keep.unlink(missing_ok=True)
                raise NoRoomError(f"{self._folder} is full of shards in use: raise feed.cache.max_gb")

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """No other process counts or renames meanwhile: a listing may miss what is renamed under it."""
        with (self._folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self, least: int, keep: Path) -> bool:
        """Removes the least recently used shards until `least` bytes are free again; whether that many were."""
        freed = 0
        for _, taken, path in sorted(self._entries()):
            if freed >= least:
                break
            if path != keep and not _is_locked(path):
                path.unlink(missing_ok=True)
                freed += taken
        return freed >= least

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of what is in the cache; a part counts as the whole that it will be."""
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
    """Whether a process is filling this part."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
