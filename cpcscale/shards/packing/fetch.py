"""Opens audio files for libsndfile, from a disk or a store: whole, or only the parts that it reads."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

from cpcscale import audio, storage
from cpcscale.errors import UserError

HEADER_BYTES, STREAM_BYTES = 1 << 16, 1 << 22
_CHUNKS_KEPT = 4


class RemoteAudio(io.RawIOBase):
    """An object of a store as a file: chunks are fetched when they are needed, and the last few are kept.

    libsndfile calls `readinto` from C, where an exception would be lost: the first is stored in `error`, and the file
    seems to end.
    """

    def __init__(self, url: str, chunk_bytes: int) -> None:
        super().__init__()
        self.name = url
        self.error: UserError | None = None
        self._chunk_bytes, self._at = chunk_bytes, 0
        self._chunks: dict[int, bytes] = {}
        self._file: io.RawIOBase | io.BufferedReader | None = None
        # The first request gives all of a small file, so its size need not be requested.
        first = _start(url, chunk_bytes)
        self._chunks[0] = first
        if len(first) < chunk_bytes:
            self._size = len(first)
        else:
            self._file = storage.opened(url)
            self._size = self._file.seek(0, os.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        filled = 0
        while filled < len(view) and self._at < self._size and self.error is None:
            try:
                part = self._part(len(view) - filled)
            except UserError as error:
                self.error = error
                break
            view[filled : filled + len(part)] = part
            filled += len(part)
            self._at += len(part)
        return filled

    def close(self) -> None:
        if self._file:
            self._file.close()
        super().close()

    def _part(self, count: int) -> bytes:
        """Up to `count` bytes at the current position; more than a chunk is fetched in one request and not kept."""
        number, skip = divmod(self._at, self._chunk_bytes)
        if number not in self._chunks and count > self._chunk_bytes:
            return self._fetched(self._at, count)
        chunk = self._chunks.pop(number, None) or self._fetched(number * self._chunk_bytes, self._chunk_bytes)
        self._chunks[number] = chunk
        while len(self._chunks) > _CHUNKS_KEPT:
            self._chunks.pop(next(iter(self._chunks)))
        return chunk[skip : skip + count]

    def _fetched(self, start: int, count: int) -> bytes:
        assert self._file is not None
        self._file.seek(start)
        return self._file.read(count) or b""


@contextlib.contextmanager
def opened(path: str, chunk_bytes: int = 0) -> Iterator[audio.Source]:
    """Yields the file at `path` for the functions of audio.py: a local path, the bytes of an object, or a RemoteAudio.

    An object is read in chunks if `chunk_bytes` is given. Raises the error of the store if a request failed.
    """
    local = storage.local_path(path)
    if local:
        yield str(local)
    elif not chunk_bytes:
        yield storage.read(path)
    else:
        with contextlib.closing(RemoteAudio(path, chunk_bytes)) as remote:
            try:
                yield remote
            finally:
                if remote.error:
                    raise remote.error


def _start(url: str, count: int) -> bytes:
    try:
        return storage.read(url, 0, count)
    except storage.NotFoundError:
        raise
    except UserError:
        # A store refuses any range of an empty object.
        if storage.size(url):
            raise
        return b""
