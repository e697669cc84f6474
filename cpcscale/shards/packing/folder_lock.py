"""A lock on the local folder of a pack, and removal of unfinished files that killed packs left.

The kernel releases the lock when the process ends. While a pack starts, it has an exclusive lock, later a shared one.
With the exclusive lock it may remove all unfinished files, since no process that writes them is alive. Where locks do
not work, as on some network file systems, or others hold one, it removes only files older than a day.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from cpcscale.storage.locks import lock

_TEMPORARY = re.compile(
    r"\.(shard-\d{6,}\.tar|assignment\.(json|parquet)|quarantine\.csv|index\.json|shards-[0-9a-f]{16}\.parquet"
    r"|part-\d{5,}-[0-9a-f]{8}\.parquet|\d{6,}\.json)\.[0-9a-f]{8}\.tmp"
)
_PART = re.compile(r"part-\d{5,}-[0-9a-f]{8}\.parquet")
_A_DAY_S = 86_400.0


class FolderLock:
    """A lock on an existing local folder; None, for a store, locks nothing. Use it as a context manager."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._opened, self._exclusive = folder, -1, False

    def __enter__(self) -> FolderLock:
        """Takes the exclusive lock, or waits for a shared one while another pack starts."""
        if self._folder:
            self._opened = os.open(self._folder, os.O_RDONLY)
            self._exclusive = bool(lock(self._opened, wait=False))
            if not self._exclusive:
                lock(self._opened, shared=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder:
            os.close(self._opened)

    def share(self) -> None:
        """Makes the lock shared, so that other packs can start."""
        if self._exclusive:
            lock(self._opened, shared=True)

    def clean(self, below: Sequence[str], marker: str) -> None:
        """Removes unfinished files of killed packs in the folder and in those `below` it.

        These are temporary files and, where there is no `marker`, parts of an index.
        """
        if not self._folder:
            return
        untouched_since = time.time() - (0.0 if self._exclusive else _A_DAY_S)
        for folder in (self._folder, *(self._folder / name for name in below)):
            stale = [path for path in folder.glob("**/.*.tmp") if _TEMPORARY.fullmatch(path.name)]
            if not (folder / marker).exists():
                stale += [path for path in folder.glob("utterances/*.parquet") if _PART.fullmatch(path.name)]
            for path in stale:
                _remove_older(path, untouched_since)


def _remove_older(path: Path, moment: float) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_mtime <= moment:
            path.unlink()
