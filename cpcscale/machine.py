"""What this process may use of its machine: the cores and folders that it was given, not those that are there."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cpcscale.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may use: of its affinity (taskset, SLURM), its cgroup's quota and SLURM's share."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(affinity, *_quotas(), int(share) if share.isdecimal() and int(share) else affinity))


def cache_folder() -> Path:
    """The folder for caches: XDG_CACHE_HOME, else ~/.cache, else a temporary one for a user without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    # A user without an entry in passwd often has the home `/`, which only root can write.
    if home.is_dir() and os.access(home, os.W_OK):
        return home / ".cache"
    return Path(tempfile.gettempdir()) / f"cpcscale-{os.getuid()}"


def refuse_deleted_folder() -> None:
    """Raises UserError if the current folder was deleted, in which no path can be found."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder was deleted: change to another one") from None


def refuse_encoding() -> None:
    """Raises UserError if Python reads the names of files as something else than UTF-8."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise UserError(
            f"this Python reads names of files as {encoding}, so that other names do not match: set PYTHONUTF8=1"
        )


def _quotas() -> Iterator[int]:
    """The cores that the cgroup of this process, and each above it, may use at a time, rounded down."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS if not controllers else _CGROUPS / controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / path.lstrip("/")
        # In a container the path is that of the host, and the container's own group is the root.
        for group in (folder, *folder.parents, root):
            if group == root or root in group.parents:
                yield from _quota(group)


def _quota(group: Path) -> Iterator[int]:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota.isdecimal():
            yield max(1, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):
        return
