"""What this process may use of its machine: the cores and folders that it was given; and which processes live on it."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cpcscale.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may use: of its affinity (taskset, SLURM), its cgroup's quota and SLURM's share."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("SLURM_CPUS_PER_TASK", "")
    quotas = [quota for group in _groups("cpu") for quota in _quota(group)]
    return max(1, min(affinity, *quotas, int(share) if share.isdecimal() and int(share) else affinity))


def threads_of(cpus: float) -> int:
    """The threads of a process with so many cores: as many as OMP_NUM_THREADS at most, where the user set that."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(int(cpus), int(given)) if given.isdecimal() and int(given) else int(cpus))


def usable_memory() -> int:
    """The bytes of memory that this process may use: of the machine, of its cgroup's limit and of those above it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([pages, *(limit for group in _groups("memory") for limit in _memory_limit(group))])


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


class ProcessMark(NamedTuple):
    """A process: the boot and namespace of process ids that it is in, and its start in ticks since that boot.

    `machine` and `started` are empty where the system does not tell (not Linux).
    """

    machine: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> ProcessMark:
        """That of this process."""
        pid = os.getpid()
        return cls(_boot(), pid, _started(pid) or "")

    def lives(self) -> bool | None:
        """Whether the process is alive; None when it is where this process cannot see it."""
        if not self.machine or self.machine != _boot():
            return None
        return _started(self.pid) == self.started


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a live process of this machine started, None when it is gone.

    Not psutil's create_time: it follows the wall clock, and setting the clock would make a live holder a dead one.
    """
    try:
        # The process name stands in brackets and may itself hold brackets and spaces: split after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def check_surroundings() -> None:
    """Raises UserError for a folder or an encoding that no verb can work in, and gives a user without a home one.

    Without it MLflow and Ray cannot be imported.
    """
    refuse_deleted_folder()
    refuse_encoding()
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"cpcscale-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)


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


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it that may limit what `controller` controls."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS if not controllers else _CGROUPS / controllers
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / path.lstrip("/")
        # In a container the path is that of the host, and the container's own group is the root.
        for group in (folder, *folder.parents, root):
            if group == root or root in group.parents:
                yield group


def _quota(group: Path) -> Iterator[int]:
    """The cores that a cgroup may use at a time, rounded down."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota.isdecimal():
            yield max(1, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):
        return


def _memory_limit(group: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = (group / name).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            yield int(limit)
