"""The one door to files and object stores: whole and ranged reads, publishing writes, listing. Paths are local or s3://.

A write is seen whole or not at all: a local file is written aside and renamed, an object is one put. Names are str, not
Path, because Path collapses the double slash of s3://.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import fsspec

from cpcscale import config
from cpcscale.errors import UserError

_SCHEMES = ("file", "s3")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A dead store must answer in seconds, not hang a run: botocore's own retries, with jitter, inside these bounds.
_S3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}}}


class NotFoundError(UserError):
    """A path or object that does not exist."""


def join(base: str, *parts: str) -> str:
    """`base/part/part`, for local paths and URLs alike."""
    return "/".join([*([base.rstrip("/")] if base else []), *parts])


def absolute(url: str) -> str:
    """A local path made absolute from the current folder, a URL as it is: worker processes stand elsewhere."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def shown(url: str) -> str:
    """`url` as a person would type it: relative where it lies below the current folder."""
    path = Path(url)
    return str(path.relative_to(Path.cwd())) if "://" not in url and path.is_relative_to(Path.cwd()) else url


def local_path(url: str) -> Path | None:
    """The local path of `url`, or None for an object store."""
    scheme, path = _split(url)
    return Path(path) if scheme == "file" else None


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file, by default all. Raises NotFoundError, or UserError for a store that fails."""
    filesystem, path = _open(url)
    with _failures(url):
        return filesystem.cat_file(path, start=start, end=stop)


def write(url: str, data: bytes) -> None:
    """Publishes `data` at `url`, replacing what stood there; readers see the old bytes or the new, never a part."""
    filesystem, path = _open(url)
    with _failures(url):
        if isinstance(filesystem, fsspec.implementations.local.LocalFileSystem):
            with publishing(url) as aside:
                aside.write_bytes(data)
        else:
            filesystem.pipe_file(path, data)


@contextlib.contextmanager
def publishing(url: str) -> Iterator[Path]:
    """A fresh local path beside `url` (in the temporary folder for a store), published when the block ends well.

    When the block raises, nothing is published and the file written aside is removed. Raises UserError for a place
    that cannot be written, and when the block runs out of room.
    """
    import tempfile

    filesystem, path = _open(url)
    target = local_path(url)
    folder = target.parent if target else Path(tempfile.gettempdir())
    aside = folder / f".{Path(path).name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _failures(url):
            folder.mkdir(parents=True, exist_ok=True)
        yield aside
        with _failures(url):
            if target:
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
                aside.replace(target)
            else:
                filesystem.put_file(str(aside), path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"no room to write {url} in {folder} ({error.strerror}): free some, and run again") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def undoing_folders(url: str) -> Iterator[None]:
    """When the block raises, the folder `url` and those above it that it made go again, as far as they are empty."""
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
    """Whether a file, folder or object prefix stands at `url`."""
    filesystem, path = _open(url)
    with _failures(url):
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))


def list_files(url: str) -> list[str]:
    """The files below a folder or prefix, relative to it, sorted; temporary and hidden names left out.

    Linked folders are entered. Raises NotFoundError when there is no such folder, UserError when one cannot be read.
    """
    filesystem, path = _open(url)
    local = local_path(url)
    with _failures(url):
        if local:
            if not local.is_dir():
                raise NotFoundError(f"{url} is not a folder: check the path")
            return sorted(os.path.relpath(name, local) for name in _walk(str(local)))
        filesystem.invalidate_cache()
        root = filesystem._strip_protocol(path).rstrip("/")
        if not filesystem.isdir(root):
            raise NotFoundError(f"{url} is not a folder: check the path")
        below = (name[len(root) + 1 :] for name in filesystem.find(root))
        return sorted(name for name in below if not any(part.startswith(".") for part in name.split("/")))


def remove(url: str) -> None:
    """Removes a file or a whole folder; nothing when it is not there."""
    filesystem, path = _open(url)
    with _failures(url), contextlib.suppress(FileNotFoundError):
        if local_path(url):
            filesystem.rm(path, recursive=True)
            return
        # One by one: the recursive removal of a store reads [ ] * ? in a name as wildcards, and removes other objects.
        for name in filesystem.find(path):
            filesystem.rm_file(name)


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a local folder, broken links among them; a link back to a folder we are in is not entered."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, real))
            elif entry.is_file() or entry.is_symlink():
                yield entry.path


def _split(url: str) -> tuple[str, str]:
    if not url:
        raise UserError("a path is empty: name a folder or file, or an s3:// URL")
    scheme, separator, rest = url.partition("://")
    if not separator:
        if url.split(":", 1)[0] in ("pipe", "cmd"):
            raise UserError(f"{url!r} is a command, which is never run: name a path or an s3:// URL")
        return "file", absolute(url)
    if scheme not in _SCHEMES:
        raise UserError(
            f"{config.redact(url)!r} has the scheme {scheme}://, which is not supported: use a path or s3://"
        )
    if "@" in rest.partition("/")[0]:
        raise UserError(
            f"{config.redact(url)} holds credentials: give them as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )
    return scheme, absolute(rest) if scheme == "file" else url


@lru_cache(maxsize=8)
def _filesystem(scheme: str, process: int) -> fsspec.AbstractFileSystem:
    """One filesystem a process: its event loop and connections do not survive a fork, so the pid is part of the key."""
    return fsspec.filesystem(scheme, **(_S3 if scheme == "s3" else {}))


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    scheme, path = _split(url)
    return _filesystem(scheme, os.getpid()), path


@contextlib.contextmanager
def _failures(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"there is nothing at {url}: check the path") from None
    except PermissionError as error:
        check = "its permissions" if local_path(url) else "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UserError(f"access to {url} is denied ({_one_line(error)}): check {check}") from None
    except _store_errors() as error:
        check = "the path and the disk" if local_path(url) else "the path, AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID"
        why = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"{url} cannot be read or written ({why}): check {check}") from None


def _store_errors() -> tuple[type[Exception], ...]:
    """What a file system raises: a store has its own errors for no credentials, no answer, a name that cannot be."""
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    return OSError, ValueError, BotoCoreError


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
