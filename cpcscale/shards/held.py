"""A shard's bytes on this node: a local shard, or a file of the cache, whole or still being filled."""

from __future__ import annotations

import mmap
import os
from io import FileIO
from pathlib import Path


class Held:
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
