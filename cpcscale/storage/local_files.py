"""Local files where they differ from objects: folders that link to folders, hard links, what is still in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from cpcscale.errors import UserError

# As FAT and some network file systems answer to a hard link.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
ELSEWHERE = "keep what needs them (run_dir) in a folder of another disk, or in a store that has them, such as AWS S3"


def walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a local folder, also broken links; a link back to a folder above is not entered."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry.path, (*above, real))
            elif entry.is_file() or entry.is_symlink():
                yield entry.path


def link(old: Path, new: Path) -> None:
    """Gives the file `old` the name `new`. Raises FileExistsError, or UserError where there are no hard links."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise UserError(
            f"{new} cannot be created: its file system has no hard links ({error.strerror}): {ELSEWHERE}"
        ) from None


def flush(path: Path) -> None:
    """Returns when the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
