"""Messages between rank 0 and the driver: an actor that keeps them until the other side takes them.

Only the driver writes to the terminal and the tracker, so one process uses the tracking store however many workers
there are and wherever they run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from cpcscale.cluster import ray_loss
from cpcscale.train.observer import Observer

_POLL_S = 0.3
_PROGRESS_EVERY_S = 0.3
# Metrics that are sent again when a mailbox was lost: far more than a run logs within _POLL_S.
_RECENT = 64


@dataclass(frozen=True)
class RunEnd:
    """How a run ended. One field is set: its summary, the message of a requested stop, or that of a UserError."""

    summary: dict[str, Any] | None = None
    stopped: str = ""
    error: str = ""


class Mailbox:
    """The actor: holds the messages in the order they were sent, how the run ended, and whether it is asked to stop.

    If its process dies it is started again, empty. `MailboxObserver` then sends the newest metrics again.
    """

    def __init__(self) -> None:
        self._messages: list[tuple[str, tuple[Any, ...]]] = []
        self._warned: set[str] = set()
        self._end, self._stop, self._id = RunEnd(), False, uuid.uuid4().hex

    def put(self, kind: str, *content: Any) -> None:
        self._messages.append((kind, content))

    def warn(self, text: str) -> None:
        """Puts a note, unless another worker has put it."""
        if text not in self._warned:
            self._warned.add(text)
            self.put("note", text)

    def take(self) -> tuple[list[tuple[str, tuple[Any, ...]]], RunEnd, str]:
        """(the messages since the last call, how the run ended, an id that changes when the actor is started again)."""
        taken, self._messages = self._messages, []
        return taken, self._end, self._id

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> tuple[bool, str]:
        """(whether the run is asked to stop, an id that changes when this actor is started again)."""
        return self._stop, self._id

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
        self._recent: deque[tuple[int, dict[str, float]]] = deque(maxlen=_RECENT)
        logging.getLogger("cpcscale").addHandler(_NoteHandler(self))

    def note(self, text: str) -> None:
        self._mailbox.put.remote("note", text)

    def progress(self, step: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_progress_s >= _PROGRESS_EVERY_S or step == total:
            self._last_progress_s = now
            self._mailbox.put.remote("progress", step, total)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._recent.append((step, dict(values)))
        self._mailbox.put.remote("metrics", *self._recent[-1])

    def send_again(self) -> None:
        """Sends the newest metrics again, to a mailbox that may have lost some; the tracker skips those that it has."""
        for step, values in list(self._recent):
            self.replayed(step, values)
        self._mailbox.put.remote("resent")

    def warning(self, text: str) -> None:
        self._mailbox.warn.remote(text)

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
        self._observer.warning(record.getMessage())


class MessageDelivery:
    """In the driver: a thread that passes messages to an observer until the block ends, including the last ones."""

    def __init__(self, mailbox: Any, observer: Observer) -> None:
        self._mailbox, self._observer = mailbox, observer
        # How the run ended, as far as it is known.
        self.end = RunEnd()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="delivery", daemon=True)

    def __enter__(self) -> MessageDelivery:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # A call to a Ray that has died may never return.
        while self._thread.is_alive() and not ray_loss.lost():
            self._thread.join(_POLL_S)

    def _deliver(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # Ray is ending, and the run with it.
            self._deliver_all()

    def _deliver_all(self) -> None:
        known: str = ""
        held: list[tuple[str, tuple[Any, ...]]] | None = None
        while True:
            last = self._stop.wait(_POLL_S)
            messages, end, mailbox = ray.get(self._mailbox.take.remote())
            # A mailbox that was started again knows no end.
            self.end = end if end != RunEnd() else self.end
            if mailbox != known and known:
                # Metrics wait for those that were lost, for the tracker takes steps in their order.
                held = []
            known = mailbox
            for kind, content in messages:
                if held is not None and kind in ("metrics", "replayed"):
                    held.append((kind, content))
                elif kind != "resent":
                    self._pass_on(kind, content)
                if kind == "resent":
                    self._pass_on_held(held)
                    held = None
            if last:
                self._pass_on_held(held)
                return

    def _pass_on_held(self, held: list[tuple[str, tuple[Any, ...]]] | None) -> None:
        for kind, content in sorted(held or (), key=lambda each: each[1][0]):
            self._pass_on(kind, content)

    def _pass_on(self, kind: str, content: tuple[Any, ...]) -> None:
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
