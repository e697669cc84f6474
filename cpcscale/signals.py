"""Signal handlers that are put back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handlers_restored(*numbers: signal.Signals, meanwhile: Handler | None = None) -> Iterator[None]:
    """After the block, each signal has the handler of before: Ray and its libraries install theirs and leave them.

    In the block it has the handler `meanwhile`, if there is one. Nothing happens in a thread other than the main one:
    Python sets no handlers there.
    """
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if here}
    try:
        for number in before if meanwhile else ():
            signal.signal(number, meanwhile)
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that no Python code installed: Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
