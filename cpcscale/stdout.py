"""Standard output that may be closed early, be full, or lack letters: `| head`, `> FULL_DISK`, an ASCII terminal."""

from __future__ import annotations

import contextlib
import functools
import io
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any


class _OutputError(Exception):
    """Raised where standard output cannot be written, so that it is not taken for a failure of another file."""


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _OutputError("" if isinstance(error, BrokenPipeError) else error.strerror) from None


def guarded(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """`main`, which returns an exit status: 141 if the reader of standard output leaves early, 2 if that is full.

    Letters that the terminal's encoding lacks are escaped.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        before = sys.stdout
        if before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper):
            return main(arguments)
        raw = _Output(before.fileno(), "w", closefd=False)
        form: dict[str, Any] = {"encoding": before.encoding, "errors": "backslashreplace"}
        form["line_buffering"] = before.line_buffering or before.write_through
        try:
            before.flush()
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BufferedWriter(raw), **form)) as output:
                try:
                    return main(arguments)
                finally:
                    output.flush()
        except _OutputError as error:
            # Nothing that is left may be written when the object goes.
            raw.close()
            if not str(error):
                return 128 + signal.SIGPIPE
            sys.stderr.write(f"cpcscale: error: the output cannot be written: {error}\n")
            return 2

    return run
