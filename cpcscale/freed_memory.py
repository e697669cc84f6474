"""Memory that is freed stays with the process: the next update takes the same pages again.

An update allocates and frees hundreds of MB. glibc hands blocks of over 32 MB back to the kernel at once, which then
has to find and clear the same pages for the next update: a quarter to a third of the time of the paper's network on two
cores. In return a process keeps its peak. Threads share one heap: the others of glibc hold no block of over 64 MB.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

# mallopt(3): by its name in an environment, the parameter's number in <malloc.h> and its value; -1: no threshold.
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_ARENA_MAX": (-8, 1),
}


def keep_freed_memory() -> None:
    """From here on, in this process; call it before threads start. What the user's environment sets stands, and without
    glibc nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, (parameter, value) in _SETTINGS.items():
        if name not in os.environ:
            mallopt(parameter, value)


def environment() -> dict[str, str]:
    """What a process has to be started with for the same; without what this one's environment sets already."""
    return {name: str(value % 2**63) for name, (_, value) in _SETTINGS.items() if name not in os.environ}


def private_mib(process: psutil.Process | None = None) -> float:
    """What a process, by default this one, has in memory and shares with no other one."""
    # Not needed to keep memory, which every command does at its start.
    import psutil

    return float((process or psutil.Process()).memory_full_info().uss) / 2**20
