"""Reads the encoded bytes of utterances and verifies them: from a local shard, the cache, or a range of the store."""

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

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_DOWNLOADS, _RANGED_READERS = 2, 16
# If another process downloads a shard, try again after this long, for it may have died.
_RETRY_AFTER_S = 2.0
# If a download will reach an utterance within this time, wait for it instead of fetching the utterance by itself.
_SOON_S, _POLL_S = 1.0, 0.005
# The assumed speed of a download before one was measured, and how long to measure one.
_ASSUMED_BYTES_PER_S, _MEASURABLE_AFTER_S = 50e6, 0.2


class OpenShard:
    """An open shard from which ranges are read. Thread-safe; closed with its last reference.

    `whole` is for a finished file of the cache, which is never written to again: it is memory-mapped, so reads are not
    copied. Other files are read by calls, because when a file is truncated, a mapping would crash the process.
    """

    def __init__(self, path: Path, *, whole: bool) -> None:
        self._file = FileIO(str(path), "rb")
        size = os.fstat(self._file.fileno()).st_size
        self._view = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)) if whole and size else None
        if self._view:
            # The mapping has its own descriptor.
            self._file.close()

    @property
    def size_bytes(self) -> int:
        """The size of the file so far."""
        return len(self._view) if self._view else os.fstat(self._file.fileno()).st_size

    def read(self, first: int, size: int) -> bytes | memoryview:
        """The bytes [first, first + size), or fewer if the file ends before."""
        return self._view[first : first + size] if self._view else os.pread(self._file.fileno(), size, first)


class ShardReader:
    """Reads the bytes of utterances of a shard set. Thread-safe.

    `keep` shards stay open, with their index rows in memory: give as many as are read in turn.
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
        # When each shard may be downloaded (again): never while a thread downloads it.
        self._not_before: dict[int, float] = {}
        # The shards that wait for a thread, in order; when each download started; the speed of the last one.
        self._queued: dict[int, None] = {}
        self._download_started: dict[int, float] = {}
        self._bytes_per_s = _ASSUMED_BYTES_PER_S
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="fill")
        self._ranged = ThreadPoolExecutor(_RANGED_READERS, thread_name_prefix="fetch")

    def rows(self, shard: int) -> ShardRows:
        """The index rows of a shard, kept in memory while it is in use."""
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
        """Starts to fetch the rows of these shards and, into the cache, the shards, in this order. Does not wait."""
        if not self._local:
            # Rows take a request or two; fetched now, nobody has to wait for them later.
            for shard in shards:
                if shard not in self._rows:
                    self._ranged.submit(self._prefetch_rows, shard)
        if self._cache is None:
            return
        now = time.monotonic()
        for shard in shards:
            # Called first, for it also marks the shard as in use.
            here = self._cache.holds(self._digest(shard), self._size(shard))
            if not here and now >= self._not_before.get(shard, 0.0):
                self._not_before[shard] = math.inf
                with self._lock:
                    self._queued[shard] = None
                self._downloads.submit(self._download, shard)

    def start_read(self, rows: ShardRows, row: int) -> Future[bytes] | None:
        """Starts a ranged read of an utterance that is not on this node; None if it is, or will be soon."""
        end = int(rows.offset[row] + rows.size[row])
        if self._local or self._local_file(rows, end) or self._will_arrive_soon(rows.shard, end):
            return None
        return self._ranged.submit(self._from_store, rows, row)

    def member(self, rows: ShardRows, row: int, started: Future[bytes] | None = None) -> bytes | memoryview:
        """The encoded bytes of an utterance, verified; `started` is what `start_read` returned for it.

        Bytes that fail their checksum are fetched again from the store. If they still fail, UserError names the shard:
        data that changed must stop a run.
        """
        for attempt in range(_ATTEMPTS):
            data = self._bytes(rows, row, started if attempt == 0 else None, fresh=attempt > 0)
            self.account.mark("fetch")
            whole = xxhash.xxh3_64_intdigest(data) == rows.checksum[row]
            self.account.mark("verify")
            if whole:
                return data
            # The shard may have been replaced meanwhile: open it again.
            self._forget(rows.shard, drop=attempt == 0)
        first = int(rows.offset[row])
        raise UserError(
            f"{self.index.url(rows.shard)}: bytes {first}..{first + int(rows.size[row])} fail their checksum "
            f"{_ATTEMPTS} times: the shard changed after it was indexed or its store is damaged; restore it, or remove "
            "it and index again"
        )

    def close(self) -> None:
        """Ends the threads; unfinished downloads stay in the cache, to be continued. Safe to call twice."""
        if self._cache:
            self._cache.stop()
        for pool in (self._downloads, self._ranged):
            pool.shutdown(wait=True, cancel_futures=True)

    def _bytes(self, rows: ShardRows, row: int, started: Future[bytes] | None, fresh: bool) -> bytes | memoryview:
        if started:
            return started.result()
        first, size = int(rows.offset[row]), int(rows.size[row])
        if not fresh or self._local:
            file = self._local_file(rows, first + size) or self._wait_for_download(rows, first + size)
            if file:
                try:
                    data = file.read(first, size)
                except OSError as error:
                    # Counts as missing bytes: read again, and in the end an error.
                    log.warning("%s cannot be read: %s", self.index.url(rows.shard), error)
                    data = b""
                if len(data) == size or self._local:
                    return data
        return self._from_store(rows, row)

    def _from_store(self, rows: ShardRows, row: int) -> bytes:
        first = int(rows.offset[row])
        return storage.read(self.index.url(rows.shard), first, first + int(rows.size[row]))

    def _local_file(self, rows: ShardRows, end: int) -> OpenShard | None:
        """The open file of the shard on this node if it holds the first `end` bytes, else None."""
        shard = rows.shard
        with self._lock:
            file = self._files.get(shard)
            if file:
                self._files.move_to_end(shard)
        if file and (self._local or file.size_bytes >= end):
            return file
        file = self._open(shard)
        if file is None or (not self._local and file.size_bytes < end):
            return None
        with self._lock:
            self._files[shard] = file
            while len(self._files) > self._keep:
                self._files.popitem(last=False)
        return file

    def _will_arrive_soon(self, shard: int, end: int) -> bool:
        """Whether a download of this process will soon reach byte `end` of the shard, so that it is worth waiting for.

        A ranged read takes many times the work of the same bytes in a whole shard, for the store and this machine.
        """
        now = time.monotonic()
        with self._lock:
            started_at, ahead_bytes = self._download_started.get(shard), 0
            if started_at is None:
                if shard not in self._queued:
                    return False
                for other in self._queued:
                    if other == shard:
                        break
                    ahead_bytes += self._size(other)
        file = self._open(shard)
        filled = file.size_bytes if file else 0
        rate = self._bytes_per_s
        if started_at is not None and now - started_at > _MEASURABLE_AFTER_S:
            rate = filled / (now - started_at)
        return end - filled + ahead_bytes / _DOWNLOADS < rate * _SOON_S

    def _wait_for_download(self, rows: ShardRows, end: int) -> OpenShard | None:
        """Waits until a download of this process reaches byte `end`; None if that is not soon."""
        while self._will_arrive_soon(rows.shard, end):
            time.sleep(_POLL_S)
            if file := self._local_file(rows, end):
                return file
        return self._local_file(rows, end)

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
        # An error will come again, and be raised, when the rows are needed.
        with contextlib.suppress(UserError):
            self.rows(shard)

    def _download(self, shard: int) -> None:
        """Downloads one shard. A failure here does not stop the run: utterances are then read by range."""
        assert self._cache is not None
        wait_s, started_at = 0.0, time.monotonic()
        with self._lock:
            self._queued.pop(shard, None)
            self._download_started[shard] = started_at
        try:
            if self._cache.fill(self.index.url(shard), self._digest(shard), self._size(shard)):
                self._bytes_per_s = self._size(shard) / (time.monotonic() - started_at)
            else:
                wait_s = _RETRY_AFTER_S
        except NoRoomError as error:
            log.warning("no room to cache %s (%s): reading its members one by one", self.index.url(shard), error)
            wait_s = 60 * _RETRY_AFTER_S
        except (UserError, OSError) as error:
            log.warning("caching failed, reading members one by one: %s", error)
            wait_s = 5 * _RETRY_AFTER_S
        except CacheClosedError:
            pass
        finally:
            with self._lock:
                self._download_started.pop(shard, None)
            self._not_before[shard] = time.monotonic() + wait_s

    def _digest(self, shard: int) -> str:
        return self.index.shards["sha256"][shard].as_py().hex()

    def _size(self, shard: int) -> int:
        return int(self.index.shards["bytes"][shard].as_py())


def _allow_open_files(count: int) -> None:
    """Raises the limit of open files of this process by `count`, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = max(soft, 1024 + count)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
