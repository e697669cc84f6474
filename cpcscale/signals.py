"""Signal handlers that are put back, and the signals that ask a command to end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
# A terminal that is closed sends SIGHUP, and SLURM one of the last two before it preempts a job that asked for it.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def handlers_restored(*numbers: signal.Signals, meanwhile: Handler | None = None) -> Iterator[None]:
    """After the block, each signal has the handler of before: Ray and its libraries install theirs and leave them.

    In the block it has the handler `meanwhile`, if there is one and the signal is not ignored, as SIGHUP is under
    nohup. Nothing happens in a thread other than the main one: Python sets no handlers there.
    """
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if here}
    try:
        for number, handler in before.items():
            if meanwhile and handler is not signal.SIG_IGN:
                signal.signal(number, _after_hangup(meanwhile) if number == signal.SIGHUP else meanwhile)
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that no Python code installed: Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _after_hangup(handler: Handler) -> Handler:
    """The handler; what is written to a terminal that was closed is dropped, for it would be an OSError each time."""

    def answer(number: int, frame: FrameType | None) -> None:
        for stream in (1, 2):
            # It may be closed, as by `>&-`.
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, stream)
                    os.close(nowhere)
        handler(number, frame)

    return answer
