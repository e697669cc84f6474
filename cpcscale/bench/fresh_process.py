"""Runs a function in a fresh process, so that its memory can be measured."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cpcscale import freed_memory


def run_in_fresh_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Returns what `work` returns in a new process with the memory settings of a run.

    Raises RuntimeError when the process fails, even after `work` has returned.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    try:
        with contextlib.suppress(EOFError):
            found = ours.recv()
    finally:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the process of {work.__name__} ended with status {process.exitcode}")
    return found


def peak_mib() -> float:
    """Peak memory of this process in MiB."""
    # Not getrusage: its peak includes that of the parent, which a new program inherits.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1)


def _report(out: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    freed_memory.keep_freed_memory()
    out.send(work(*arguments))
