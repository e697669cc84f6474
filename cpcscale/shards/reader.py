"""Verified audio bytes of an utterance, from a local shard, the node's cache, or a ranged read of the store."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import xxhash

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards.cache import CacheClosedError, NoRoomError, ShardCache
from cpcscale.shards.index import Index
from cpcscale.shards.rows import ShardRows
from cpcscale.time_by_name import TimeByName


class OpenShard:
    """An open file of which members are read by range. Safe between threads; closed by its last reference.

    `whole`: a finished file of the cache, which nobody ever writes to again: it is mapped, and its members are not
    copied. What a user may replace or cut is read by calls, which fail where a mapping would end the process.
    """

    def __init__(self, path: Path, *, whole: bool) -> None:
        self._file = FileIO(str(path), "rb")
        size = os.fstat(self._file.fileno()).st_size
        self._view = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)) if whole and size else None
        if self._view:
            # The mapping has a descriptor of its own.
            self._file.close()

    @property
    def size_bytes(self) -> int:
        """The bytes that stand so far."""
        return len(self._view) if self._view else os.fstat(self._file.fileno()).st_size

    def read(self, first: int, size: int) -> bytes | memoryview:
        """The bytes [first, first + size), fewer where the file ends before."""
        return self._view[first : first + size] if self._view else os.pread(self._file.fileno(), size, first)


log = logging.getLogger(__name__)

_ATTEMPTS = 3
_FILLERS, _RANGED_READERS = 2, 16
# Another process fills a shard that we want: look again after this long, it may have died.
_AGAIN_S = 2.0
# A member that a fill reaches within this time is waited for and not fetched by itself.
_NEAR_S, _POLL_S = 1.0, 0.005
# How fast one fill is taken to be before any was, and how long it takes to tell.
_GUESS_BYTES_PER_S, _TELLING_S = 50e6, 0.2


class ShardReader:
    """Reads members of a shard set. Safe to share between threads.

    `keep` shards stay open, with their index rows in memory: as many as are read in turn.
    """

    def __init__(
        self, index: Index, cache: ShardCache | None = None, *, keep: int = 64, account: TimeByName | None = None
    ) -> None:
        self.index, self.account = index, account or TimeByName()
        _allow_open_files(2 * keep)
        self._cache, self._keep = cache, keep
        self._local = storage.local_path(index.base) is not None
        self._lock = threading.Lock()
        self._rows: OrderedDict[int, ShardRows] = OrderedDict()
        self._files: OrderedDict[int, OpenShard] = OrderedDict()
        # When a shard may be fetched (again): never while a thread is at it.
        self._not_before: dict[int, float] = {}
        # The shards that wait for a thread, in order; those that one is at, since when; how fast the last one came.
        self._queued: dict[int, None] = {}
        self._filling: dict[int, float] = {}
        self._bytes_per_s = _GUESS_BYTES_PER_S
        self._fillers = ThreadPoolExecutor(_FILLERS, thread_name_prefix="fill")
        self._ranged = ThreadPoolExecutor(_RANGED_READERS, thread_name_prefix="fetch")

    def rows(self, shard: int) -> ShardRows:
        """The index rows of a shard, kept while it is in use."""
        with self._lock:
            if shard in self._rows:
                self._rows.move_to_end(shard)
                return self._rows[shard]
        rows = self.index.rows(shard)
        with self._lock:
            self._rows[shard] = rows
            while len(self._rows) > self._keep:
                self._rows.popitem(last=False)
        return rows

    def prefetch(self, shards: Sequence[int]) -> None:
        """These shards will be read, in this order: their rows and, into the cache, they are fetched. Never waits."""
        if not self._local:
            # A row group is a request or two, which nobody need wait for later.
            for shard in shards:
                if shard not in self._rows:
                    self._ranged.submit(self._prefetch_rows, shard)
        if self._cache is None:
            return
        now = time.monotonic()
        for shard in shards:
            # Asked first, for it also marks the shard as in use.
            here = self._cache.holds(self._digest(shard), self._size(shard))
            if not here and now >= self._not_before.get(shard, 0.0):
                self._not_before[shard] = math.inf
                with self._lock:
                    self._queued[shard] = None
                self._fillers.submit(self._fill, shard)

    def start_read(self, rows: ShardRows, row: int) -> Future[bytes] | None:
        """Starts a ranged read of a member that is not on this node; None when it is, or is about to be."""
        end = int(rows.offset[row] + rows.size[row])
        if self._local or self._held(rows, end) or self._is_near(rows.shard, end):
            return None
        return self._ranged.submit(self._from_store, rows, row)

    def member(self, rows: ShardRows, row: int, started: Future[bytes] | None = None) -> bytes | memoryview:
        """The bytes of an audio member, equal to what was indexed; `started` is what `start_read` returned for it.

        Bytes that fail their checksum are fetched again, past the cache; when they keep failing, UserError names the
        shard, since data that changed must stop a run and never silently change what it learns.
        """
        for attempt in range(_ATTEMPTS):
            data = self._bytes(rows, row, started if attempt == 0 else None, fresh=attempt > 0)
            self.account.mark("fetch")
            whole = xxhash.xxh3_64_intdigest(data) == rows.checksum[row]
            self.account.mark("verify")
            if whole:
                return data
            # A shard that was put in its place meanwhile is another file.
            self._forget(rows.shard, drop=attempt == 0)
        first = int(rows.offset[row])
        raise UserError(
            f"{self.index.url(rows.shard)}: bytes {first}..{first + int(rows.size[row])} fail their checksum "
            f"{_ATTEMPTS} times: the shard changed after it was indexed or its store is damaged; restore it, or remove "
            "it and index again"
        )

    def close(self) -> None:
        """Ends the threads; what they fill stays as far as it came. Safe to call twice."""
        if self._cache:
            self._cache.stop()
        for pool in (self._fillers, self._ranged):
            pool.shutdown(wait=True, cancel_futures=True)

    def _bytes(self, rows: ShardRows, row: int, started: Future[bytes] | None, fresh: bool) -> bytes | memoryview:
        if started:
            return started.result()
        first, size = int(rows.offset[row]), int(rows.size[row])
        if not fresh or self._local:
            held = self._held(rows, first + size) or self._wait_for_fill(rows, first + size)
            if held:
                try:
                    data = held.read(first, size)
                except OSError as error:
                    # As bytes that are not there: tried again, and in the end the run's end.
                    log.warning("%s cannot be read: %s", self.index.url(rows.shard), error)
                    data = b""
                if len(data) == size or self._local:
                    return data
        return self._from_store(rows, row)

    def _from_store(self, rows: ShardRows, row: int) -> bytes:
        first = int(rows.offset[row])
        return storage.read(self.index.url(rows.shard), first, first + int(rows.size[row]))

    def _held(self, rows: ShardRows, end: int) -> OpenShard | None:
        """The shard's file on this node when it holds its first `end` bytes."""
        shard = rows.shard
        with self._lock:
            held = self._files.get(shard)
            if held:
                self._files.move_to_end(shard)
        if held and (self._local or held.size_bytes >= end):
            return held
        held = self._open(shard)
        if held is None or (not self._local and held.size_bytes < end):
            return None
        with self._lock:
            self._files[shard] = held
            while len(self._files) > self._keep:
                self._files.popitem(last=False)
        return held

    def _is_near(self, shard: int, end: int) -> bool:
        """Whether a fill of this process will soon be at byte `end` of the shard: then no one need fetch it twice.

        A ranged read costs a store and this machine many times what the same bytes cost in a whole shard.
        """
        now = time.monotonic()
        with self._lock:
            began, ahead_bytes = self._filling.get(shard), 0
            if began is None:
                if shard not in self._queued:
                    return False
                for other in self._queued:
                    if other == shard:
                        break
                    ahead_bytes += self._size(other)
        held = self._open(shard)
        filled = held.size_bytes if held else 0
        rate = self._bytes_per_s
        if began is not None and now - began > _TELLING_S:
            rate = filled / (now - began)
        return end - filled + ahead_bytes / _FILLERS < rate * _NEAR_S

    def _wait_for_fill(self, rows: ShardRows, end: int) -> OpenShard | None:
        """The shard's file once a fill of this process is at byte `end`; None when that is not near."""
        while self._is_near(rows.shard, end):
            time.sleep(_POLL_S)
            if held := self._held(rows, end):
                return held
        return self._held(rows, end)

    def _open(self, shard: int) -> OpenShard | None:
        if self._local:
            path = storage.local_path(self.index.url(shard))
            assert path
            try:
                return OpenShard(path, whole=False)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror}): restore the shard, or index the folder without it"
                ) from None
        if self._cache is None:
            return None
        with contextlib.suppress(OSError):
            found = self._cache.find(self._digest(shard), self._size(shard))
            return OpenShard(found.path, whole=found.whole) if found else None
        return None

    def _forget(self, shard: int, *, drop: bool) -> None:
        if self._cache and drop:
            self._cache.drop(self._digest(shard))
        with self._lock:
            self._files.pop(shard, None)

    def _prefetch_rows(self, shard: int) -> None:
        # What cannot be had is met again, and said, by who needs it.
        with contextlib.suppress(UserError):
            self.rows(shard)

    def _fill(self, shard: int) -> None:
        """One download. What goes wrong here is not the run's end: the members are read by range, which says it."""
        assert self._cache is not None
        wait_s, began = 0.0, time.monotonic()
        with self._lock:
            self._queued.pop(shard, None)
            self._filling[shard] = began
        try:
            if self._cache.fill(self.index.url(shard), self._digest(shard), self._size(shard)):
                self._bytes_per_s = self._size(shard) / (time.monotonic() - began)
            else:
                wait_s = _AGAIN_S
        except NoRoomError as error:
            log.warning("no room to cache %s (%s): reading its members one by one", self.index.url(shard), error)
            wait_s = 60 * _AGAIN_S
        except (UserError, OSError) as error:
            log.warning("caching failed, reading members one by one: %s", error)
            wait_s = 5 * _AGAIN_S
        except CacheClosedError:
            pass
        finally:
            with self._lock:
                self._filling.pop(shard, None)
            self._not_before[shard] = time.monotonic() + wait_s

    def _digest(self, shard: int) -> str:
        return self.index.shards["sha256"][shard].as_py().hex()

    def _size(self, shard: int) -> int:
        return int(self.index.shards["bytes"][shard].as_py())


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, as far as it may, by so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = max(soft, 1024 + count)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
