"""Files and object stores: whole and ranged reads, atomic writes, listing. Paths are local or s3://.

A write is seen whole or not at all: a local file is written under another name and renamed, an object is one put. A
request that fails for a moment is retried within the limits of `StorageConfig`; a failure that stays is a UserError of
one line. Names are str, not Path, because Path collapses the double slash of s3://.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path

import fsspec

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.storage import local_files, ranged, refusals, s3_requests
from cpcscale.storage.s3_requests import StorageConfig, TrafficCounts
from cpcscale.storage.urls import absolute, local_path
from cpcscale.storage.urls import join as join
from cpcscale.storage.urls import shown as shown

# Errors of a disk that has no room left.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Large transfers are made in parts of this size; a failed request repeats one part.
_PART_BYTES = 8 * 2**20
_IN_PARTS = {"chunksize": _PART_BYTES, "max_concurrency": 4}

_settings = StorageConfig()


class NotFoundError(UserError):
    """Raised for a path or object that does not exist."""


def configure(settings: StorageConfig) -> None:
    """Sets the limits of all store requests that this process starts from now on, over new connections."""
    global _settings
    _settings = settings
    _filesystem.cache_clear()


def in_job_folder(path: str | Path) -> bool:
    """Whether a path lies where Ray unpacks the `--working-dir` of a job, which Ray removes after the job."""
    return "_ray_pkg_" in absolute(str(path))


def counters() -> TrafficCounts:
    """What this process has sent to and received from object stores so far; local files are not counted."""
    return s3_requests.TRAFFIC.now()


def clock_s(url: str) -> float | None:
    """Seconds by which this machine's clock was ahead of that of the store of `url` in its last reply to this process.

    None for a local path, and for a store that does not say the time.
    """
    filesystem, _ = _open(url)
    return None if local_path(url) else filesystem._call_s3.clock_s


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file, by default all. Raises NotFoundError, or UserError when the store fails."""
    filesystem, path = _open(url)
    if start is not None and stop is not None and 0 <= stop <= start:
        return b""  # Asked for an empty range, a store sends the whole object.
    # One request for a whole object: all bytes are of one version, and its size need not be known.
    whole = {} if local_path(url) else {"max_concurrency": 1}
    with _failures(url):
        return filesystem.cat_file(path, start=start, end=stop, **whole)


def size(url: str) -> int:
    """The size of a file in bytes. Raises NotFoundError when there is no such file, or it is a folder."""
    return stat(url)[0]


def stat(url: str) -> tuple[int, str]:
    """(bytes, etag) of a file; the etag of a local file is empty. Raises NotFoundError as `size` does."""
    filesystem, path = _open(url)
    local = local_path(url)
    with _failures(url):
        info = {} if local else filesystem.info(path)
        if local.is_dir() if local else info["type"] == "directory":
            raise NotFoundError(f"{url} is a folder, not a file: check the path")
        return (local.stat().st_size, "") if local else (int(info["size"]), str(info.get("ETag", "")))


def opened(url: str) -> io.RawIOBase | io.BufferedReader:
    """Opens a file for reading and seeking; the caller closes it. In a store, each read is one ranged request.

    Raises NotFoundError at once. A read raises UserError when the object was replaced since it was opened, so bytes of
    two versions are never mixed.
    """
    if local := local_path(url):
        with _failures(url):
            return local.open("rb")
    count, etag = stat(url)
    filesystem, path = _open(url)
    bucket, key, _ = filesystem.split_path(path)

    def request(start: int, stop: int) -> Future[bytes]:
        reply = filesystem._call_s3.get(bucket, key, start, stop, etag)
        return asyncio.run_coroutine_threadsafe(reply, filesystem.loop)

    return ranged.RangedFile(count, request, partial(_failures, url))


def chunks(url: str, start: int = 0, chunk_bytes: int = _PART_BYTES) -> Iterator[bytes]:
    """The bytes of a file from `start` on, `chunk_bytes` at a time; from a store, the next chunk is requested ahead.

    A failed request repeats one chunk, not the file. Raises UserError when the file ends before `start`, and when an
    object is replaced while it is read.
    """
    with _failures(url), opened(url) as file:
        count = file.seek(0, os.SEEK_END)
        if start > count:
            raise UserError(f"{url} has {count} bytes, not the {start} read before: it was replaced, start again")
        file.seek(start)
        if isinstance(file, ranged.RangedFile):
            yield from file.chunks(chunk_bytes)
        else:
            yield from iter(partial(file.read, chunk_bytes), b"")


def write(url: str, data: bytes) -> None:
    """Writes `data` to `url` and replaces what was there; readers see the old bytes or the new, never a part."""
    filesystem, path = _open(url)
    with _failures(url):
        if local_path(url):
            with publishing(url) as temporary:
                temporary.write_bytes(data)
        else:
            s3_requests.upload(lambda: filesystem.pipe_file(path, data, **_IN_PARTS))


def create(url: str, data: bytes) -> bool:
    """Writes `data` to `url` if there is nothing yet; returns whether it did. Of many that try, exactly one succeeds.

    When the store's reply was lost and the request is retried, equal bytes at `url` count as written by this call: so
    each contender must write different data. Raises UserError where it cannot be: a file system without hard links, a
    store without conditional writes.
    """
    filesystem, path = _open(url)
    with _failures(url):
        try:
            if target := local_path(url):
                with _temporary_path(url, target.parent) as temporary:
                    temporary.write_bytes(data)
                    local_files.flush(temporary)
                    local_files.link(temporary, target)
            else:  # One request: a store need not check the condition when it joins parts.
                filesystem.pipe_file(path, data, chunksize=len(data) + 1, mode="create")
        except OSError as error:
            if s3_requests.already_there(error):
                return False
            if {501, "NotImplemented"} & {*refusals.status_and_code(error)}:
                lacks = "the store has no conditional writes (If-None-Match)"
                raise UserError(f"{url} cannot be created: {lacks}: {local_files.ELSEWHERE}") from None
            raise
    return True


@contextlib.contextmanager
def publishing(url: str) -> Iterator[Path]:
    """Yields a new local path to write to; when the block ends without an error, the file becomes `url`.

    The path is beside `url`, or in the temporary folder for a store. When the block raises, the file is removed and
    nothing is published. Raises UserError for a place that cannot be written to, and when the disk is full.
    """
    filesystem, path = _open(url)
    target = local_path(url)
    with _temporary_path(url, target.parent if target else Path(tempfile.gettempdir())) as temporary:
        yield temporary
        with _failures(url):
            if target:
                local_files.flush(temporary)
                temporary.replace(target)
            else:
                s3_requests.upload(lambda: filesystem.put_file(str(temporary), path, **_IN_PARTS))


@contextlib.contextmanager
def undoing_folders(url: str) -> Iterator[None]:
    """When the block raises, removes the folder `url` and its parents if the block made them and they are empty."""
    folder = local_path(url)
    missing = [level for level in (folder, *folder.parents) if not level.exists()] if folder else []
    try:
        yield
    except BaseException:
        for level in missing:
            with contextlib.suppress(OSError):
                level.rmdir()
        raise


def exists(url: str) -> bool:
    """Whether there is a file, folder or object prefix at `url`."""
    filesystem, path = _open(url)
    with _failures(url):
        if local_path(url):
            return bool(filesystem.exists(path))
        try:  # s3fs.exists() returns False for a store that cannot be reached.
            return bool(filesystem.info(path))
        except FileNotFoundError as error:
            if refusals.status_and_code(error)[1] == "NoSuchBucket":
                raise
            return False


def list_files(url: str) -> list[str]:
    """The files below a folder or prefix, relative to it and sorted; hidden and temporary names are left out.

    Linked folders are entered. Raises NotFoundError when there is no such folder, UserError when one cannot be read.
    """
    filesystem, path = _open(url)
    local = local_path(url)
    with _failures(url):
        if local:
            if not local.is_dir():
                raise NotFoundError(f"{url} is not a folder: check the path")
            return sorted(os.path.relpath(name, local) for name in local_files.walk(str(local)))
        root = path.removeprefix("s3://")
        found = filesystem.find(root, detail=True).items()
        below = {name[len(root) + 1 :]: info["size"] for name, info in found if name.startswith(f"{root}/")}
        if not below and not filesystem.isdir(root):
            raise NotFoundError(f"{url} is not a folder: check the path")
        # An empty object whose key ends with a slash is how some tools make a folder.
        names = [name for name, count in below.items() if count or not f"/{name}".endswith("/")]
        seen = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
        for name in seen:
            if (read_as := absolute(f"{path}/{name}")) != f"{path}/{name}":
                raise UserError(f"{url} holds the key {name!r}, which is read as {read_as}: rename that object")
        return seen


def remove(url: str) -> None:
    """Removes a file or a whole folder; does nothing when it is not there."""
    filesystem, path = _open(url)
    with _failures(url), contextlib.suppress(FileNotFoundError):
        if local_path(url):
            filesystem.rm(path, recursive=True)
            return
        # One by one: s3fs reads [ ] * ? in a name as wildcards when it removes recursively, and removes other objects.
        for name in filesystem.find(path):
            filesystem.rm_file(name)


@contextlib.contextmanager
def _temporary_path(url: str, folder: Path) -> Iterator[Path]:
    """Yields a new path in `folder`, which is made if missing, for what will be `url`; removed after the block."""
    temporary = folder / f".{Path(url).name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _failures(url):
            folder.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"no room to write {url} in {folder} ({error.strerror}): free some space and run again"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@lru_cache(maxsize=8)
def _filesystem(scheme: str, process: int, endpoint: str) -> fsspec.AbstractFileSystem:
    # One for each process, because its event loop does not survive a fork, and for each AWS_ENDPOINT_URL.
    if scheme == "file":
        return fsspec.filesystem(scheme)
    # Imported here: it takes half a second, which a process with local files need not wait for.
    from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]
    from s3fs import S3FileSystem

    # s3fs, botocore and aiohttp each retry by themselves, outside of our limits and counters: all are turned off.
    config_kwargs = {
        "connect_timeout": _settings.connect_timeout_s,
        "read_timeout": _settings.request_timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": 64,
        "http_session_cls": s3_requests.counting_session(AIOHTTPSession),
    }
    # No cached listings, for other processes write too; no cached instance, which would keep earlier limits.
    filesystem = S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config_kwargs)
    filesystem.retries = 1
    filesystem._call_s3 = s3_requests.Requests(filesystem, _errors()[1], _settings)
    return filesystem


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    place = absolute(url)
    scheme = "s3" if place.startswith("s3://") else "file"
    return _filesystem(scheme, os.getpid(), os.environ.get("AWS_ENDPOINT_URL", "")), place


@contextlib.contextmanager
def _failures(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except s3_requests.GaveUpError as error:
        check = "check that the store runs, and AWS_ENDPOINT_URL (a pretraining waits longer: storage.total_timeout_s)"
        why = config.redact(" ".join(str(error).split()))
        raise UserError(f"{url} cannot be read or written, {why}: {check}") from None
    except _errors()[0] as error:
        raise _refusal(url, error) from None


def _refusal(url: str, error: Exception) -> UserError:
    """The error as one line: what the file system or the store says, and the way out."""
    status, code = refusals.status_and_code(error)
    # Not of a bucket that is missing: what is optional may be missing, but never the store.
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return NotFoundError(f"there is nothing at {url}: check the path")
    if status == 412:
        return UserError(f"{url} was replaced while it was read: start again")
    denied = isinstance(error, PermissionError) and code != "InvalidObjectState"
    if local_path(url):
        reason = f"{type(error).__name__}: {error}"
        way_out = "check its permissions" if denied else "check the path and the disk"
    else:
        reason, way_out = refusals.explain(error)
    what = f"access to {url} is denied" if denied else f"{url} cannot be read or written"
    why = config.redact(" ".join(reason.split()))
    return UserError(f"{what} ({why}): {way_out or 'check the path, AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID'}")


def _errors() -> tuple[s3_requests.Errors, s3_requests.Errors]:
    """(errors that a file system or store raises, those of them that a retry may cure)."""
    from aiohttp import ClientError
    from botocore import exceptions, parsers  # type: ignore[import-untyped]

    broken = exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError, ClientError
    damaged = exceptions.FlexibleChecksumError, parsers.ResponseParserError
    return (OSError, ValueError, exceptions.BotoCoreError), broken + damaged
