"""Packs that work on one local folder, and what killed ones left in it.

A pack locks the folder itself, which ends with its process: alone while it begins, then together with others. Whoever
had it alone may remove files that were being written, since no task that could own them is alive. Where locks do not
work, as on some network file systems, or others hold one, only files that nothing has touched for a day go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

_ASIDE = re.compile(
    r"\.(shard-\d{6,}\.tar|assignment\.(json|parquet)|quarantine\.csv|index\.json|shards-[0-9a-f]{16}\.parquet"
    r"|part-\d{5,}-[0-9a-f]{8}\.parquet|\d{6,}\.json)\.[0-9a-f]{8}\.tmp"
)
_PART = re.compile(r"part-\d{5,}-[0-9a-f]{8}\.parquet")
_A_DAY_S = 86_400.0


class FolderLock:
    """A pack's lock on a local folder that is there, or on nothing (None, for a store); use it as a context manager."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._opened, self._alone = folder, -1, False

    def __enter__(self) -> FolderLock:
        """Waits while another pack begins."""
        if self._folder:
            self._opened = os.open(self._folder, os.O_RDONLY)
            self._alone = self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._alone:
                self._lock(fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder:
            os.close(self._opened)

    def share(self) -> None:
        """Lets other packs begin."""
        if self._alone:
            self._lock(fcntl.LOCK_SH)

    def clean(self, below: Sequence[str], marker: str) -> None:
        """Removes what killed packs left in the folder and those `below` it.

        That is files that were being written, and parts of an index where there is no `marker`.
        """
        if not self._folder:
            return
        untouched_since = time.time() - (0.0 if self._alone else _A_DAY_S)
        for folder in (self._folder, *(self._folder / name for name in below)):
            stale = [path for path in folder.glob("**/.*.tmp") if _ASIDE.fullmatch(path.name)]
            if not (folder / marker).exists():
                stale += [path for path in folder.glob("utterances/*.parquet") if _PART.fullmatch(path.name)]
            for path in stale:
                _remove_older(path, untouched_since)

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._opened, kind)
        except OSError:
            return False
        return True


def _remove_older(path: Path, moment: float) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_mtime <= moment:
            path.unlink()
