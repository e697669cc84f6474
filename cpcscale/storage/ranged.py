"""An object of a store as a file to read and seek in, a ranged request a read."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any


class RangedFile(io.RawIOBase):
    """An object of `size` bytes as a file: each read is one range, sent for by `send_for(start, stop)`.

    What a range raises goes through the context manager that `failures` gives.
    """

    def __init__(
        self,
        size: int,
        send_for: Callable[[int, int], Future[bytes]],
        failures: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self._size, self._send_for, self._failures = size, send_for, failures
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
        coming = self._ask(self._size if size is None or size < 0 else size)
        return self._received(coming) if coming else b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def chunks(self, count: int) -> Iterator[bytes]:
        """The bytes from here on, `count` at a time; the next are on their way while some are in use."""
        coming = self._ask(count)
        try:
            while coming:
                data = self._received(coming)
                coming = self._ask(count)
                yield data
        finally:
            if coming:
                coming.cancel()

    def _ask(self, count: int) -> Future[bytes] | None:
        if self.closed:
            raise ValueError("read of a closed file")
        stop = min(self._at + count, self._size)
        return self._send_for(self._at, stop) if stop > self._at else None

    def _received(self, coming: Future[bytes]) -> bytes:
        with self._failures():
            data = coming.result()
        self._at += len(data)
        return data
