"""An object of a store as a file: each read is one ranged request."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any


class RangedFile(io.RawIOBase):
    """An object of `size` bytes as a file: each read is one call of `request(start, stop)`.

    `failures` returns the context manager in which the result is awaited, so that it can translate errors.
    """

    def __init__(
        self,
        size: int,
        request: Callable[[int, int], Future[bytes]],
        failures: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self._size, self._request, self._failures = size, request, failures
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"seek to {at}, before the beginning")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, fewer at the end only. Not by way of `readinto`, which would copy them twice."""
        pending = self._request_next(self._size if size is None or size < 0 else size)
        return self._result(pending) if pending else b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def chunks(self, count: int) -> Iterator[bytes]:
        """The bytes from the current position on, `count` at a time; the next ones are requested ahead."""
        pending = self._request_next(count)
        try:
            while pending:
                data = self._result(pending)
                pending = self._request_next(count)
                yield data
        finally:
            if pending:
                pending.cancel()

    def _request_next(self, count: int) -> Future[bytes] | None:
        if self.closed:
            raise ValueError("read of a closed file")
        stop = min(self._at + count, self._size)
        return self._request(self._at, stop) if stop > self._at else None

    def _result(self, pending: Future[bytes]) -> bytes:
        with self._failures():
            data = pending.result()
        self._at += len(data)
        return data
