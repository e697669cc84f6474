"""Messages between rank 0 and the driver: an actor that keeps them until the other side takes them.

Only the driver writes to the terminal and the tracker, so one process uses the tracking store however many workers
there are and wherever they run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from cpcscale.train.observer import Observer

_POLL_S = 0.3
_PROGRESS_EVERY_S = 0.3


@dataclass(frozen=True)
class RunEnd:
    """How a run ended. One field is set: its summary, the message of a requested stop, or that of a UserError."""

    summary: dict[str, Any] | None = None
    stopped: str = ""
    error: str = ""


class Mailbox:
    """The actor: holds the messages in the order they were sent, how the run ended, and whether it is asked to stop."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, tuple[Any, ...]]] = []
        self._end, self._stop = RunEnd(), False

    def put(self, kind: str, *content: Any) -> None:
        self._messages.append((kind, content))

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        taken, self._messages = self._messages, []
        return taken

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop

    def finish(self, summary: dict[str, Any]) -> None:
        self._end = replace(self._end, summary=summary)

    def stopped(self, text: str) -> None:
        self._end = replace(self._end, stopped=text)

    def fail(self, error: str) -> None:
        self._end = replace(self._end, error=self._end.error or error)

    def run_end(self) -> RunEnd:
        return self._end


class MailboxObserver:
    """The `Observer` of a worker: sends events to the mailbox, and the package's warnings as notes. Never waits."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last_progress_s = mailbox, 0.0
        logging.getLogger("cpcscale").addHandler(_NoteHandler(self))

    def note(self, text: str) -> None:
        self._mailbox.put.remote("note", text)

    def progress(self, step: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_progress_s >= _PROGRESS_EVERY_S or step == total:
            self._last_progress_s = now
            self._mailbox.put.remote("progress", step, total)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._mailbox.put.remote("metrics", step, dict(values))

    def saved(self) -> None:
        self._mailbox.put.remote("saved")

    def replayed(self, step: int, values: Mapping[str, float]) -> None:
        self._mailbox.put.remote("replayed", step, dict(values))

    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None:
        self._mailbox.put.remote("quarantined", list(windows))


class _NoteHandler(logging.Handler):
    def __init__(self, observer: MailboxObserver) -> None:
        super().__init__(logging.WARNING)
        self._observer = observer

    def emit(self, record: logging.LogRecord) -> None:
        self._observer.note(record.getMessage())


class MessageDelivery:
    """In the driver: a thread that passes messages to an observer until the block ends, including the last ones."""

    def __init__(self, mailbox: Any, observer: Observer) -> None:
        self._mailbox, self._observer = mailbox, observer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="delivery", daemon=True)

    def __enter__(self) -> MessageDelivery:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _deliver(self) -> None:
        while True:
            last = self._stop.wait(_POLL_S)
            for kind, content in ray.get(self._mailbox.take.remote()):
                match kind:
                    case "note":
                        self._observer.note(*content)
                    case "progress":
                        self._observer.progress(*content)
                    case "metrics":
                        self._observer.metrics(*content)
                    case "saved":
                        self._observer.saved()
                    case "replayed":
                        self._observer.replayed(*content)
                    case "quarantined":
                        self._observer.quarantined(*content)
            if last:
                return
