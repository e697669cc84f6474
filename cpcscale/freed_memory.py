"""Makes glibc keep freed memory in the process, so that the next update uses the same pages again.

An update allocates and frees hundreds of MB. glibc returns blocks of over 32 MB to the kernel at once, which must find
and clear pages again for the next update: a quarter to a third of the time of the paper's network on two cores. The
price: a process keeps its peak memory. All threads share one heap, for glibc's others hold no block of over 64 MB.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

# Environment variable: (number of the parameter in <malloc.h>, value); see mallopt(3). -1: no threshold.
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_ARENA_MAX": (-8, 1),
}


def keep_freed_memory() -> None:
    """Keeps memory that this process frees from now on. Call it before threads start.

    Settings of the user's environment stay as they are. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, (parameter, value) in _SETTINGS.items():
        if name not in os.environ:
            mallopt(parameter, value)


def environment() -> dict[str, str]:
    """The environment variables that do the same for a new process, without those that are set already."""
    return {name: str(value % 2**63) for name, (_, value) in _SETTINGS.items() if name not in os.environ}


def private_mib(process: psutil.Process | None = None) -> float:
    """MiB of memory that a process, by default this one, shares with no other process."""
    # Imported here, for every command imports this module at its start.
    import psutil

    return float((process or psutil.Process()).memory_full_info().uss) / 2**20
