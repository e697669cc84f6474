"""Sends records to a tracking store that may be away: a queue, sent in order and in batches by one thread.

No record is lost without a warning. A resumed run logs no step twice: because one thread sends records in order, the
store always holds a prefix of each metric key's records. So a record is sent only if its step is above the highest
step that the store has for the *same key*. Keys that are logged at different intervals (`heldout_*`) do not block each
other, and a step of which only some keys were sent before the process died is completed, not repeated. A batch that is
sent again after a lost answer keeps its timestamps, by which the store recognises it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.tracking.model_folder import TrackedModel

logger = logging.getLogger(__name__)

SEND_EVERY_S = 2.0
RETRY_AT_MOST_S = 30.0
CLOSE_WAIT_S = 20.0
# The most metric values that one MLflow call takes.
BATCH_VALUES = 1000
# About 20 MB. A longer queue is thinned: only every second (fourth, ...) value of each key is kept.
QUEUE_VALUES = 100_000

# (key, value, timestamp in ms, step)
Record = tuple[str, float, int, int]


class StoreAwayError(Exception):
    """The store did not answer; the same call may succeed later."""


class Sink(Protocol):
    """A store that takes records. Every method raises StoreAwayError when the store does not answer."""

    def last_values(self) -> dict[str, tuple[int, float]]:
        """{key: (step, value)} of the newest records."""

    def send_values(self, records: list[Record]) -> None:
        """Stores at most BATCH_VALUES records, all or none; the same records twice are stored once."""

    def send_tag(self, key: str, value: str) -> None:
        """Sets one tag."""

    def send_artifact(self, name: str, data: bytes) -> None:
        """Stores one file; replaces a file of the same name. The place of files may be away when the store is not."""

    def send_model(self, model: TrackedModel) -> None:
        """Stores one model; the same model twice is stored once. Its files may be away as those of `send_artifact`."""

    def end(self, status: str, summary: dict[str, float]) -> None:
        """Closes the run with this status, after its summary."""


class Outbox:
    """The records that one run has still to send. They are written to `spill_url` if the store is away at the end.

    Nothing is sent or written while `allowed()` is false.
    """

    def __init__(self, run_id: str, sink: Sink, spill_url: str | None, allowed: Callable[[], bool]) -> None:
        self._run_id = run_id
        self._sink = sink
        self._spill_url = spill_url
        self._allowed = allowed
        # The highest step by key; None until the store was asked.
        self._known: dict[str, int] | None = None
        self._values: deque[Record] = deque()
        self._in_flight: list[Record] = []
        self._seen: Counter[str] = Counter()
        # Only every n-th value of each key enters the queue; more than 1 in a long outage.
        self._stride = 1
        self._tags: dict[str, str] = {}
        self._files: dict[str, bytes | TrackedModel] = {}
        self._lock, self._sending, self._wake = threading.Lock(), threading.Lock(), threading.Event()
        self._away = self._spilled = self._closed = False
        # Whether the place of files did not take one; it is not tried again before this time.
        self._held, self._held_until_s = False, -math.inf
        # How the run ended, once it has: (status, summary); and how it had for an earlier process that could not say.
        self._end: tuple[str, dict[str, float]] | None = None
        self.unsent_end: tuple[str, dict[str, float]] | None = None
        self._restore()
        threading.Thread(target=self._run, name="tracking", daemon=True).start()

    def put(self, records: list[Record]) -> None:
        """Queues records. Steps of one key must rise; a record whose step does not is dropped."""
        with self._lock:
            for record in records:
                if self._seen[record[0]] % self._stride == 0:
                    self._values.append(record)
                self._seen[record[0]] += 1
            if len(self._values) > QUEUE_VALUES:
                self._values = deque(_every_second(self._values))
                self._stride *= 2
            full = len(self._values) >= BATCH_VALUES
        if full and not self._away:
            self._wake.set()

    def put_tag(self, key: str, value: str) -> None:
        """Queues one tag."""
        with self._lock:
            self._tags[key] = value

    def put_file(self, name: str, content: bytes | TrackedModel) -> None:
        """Queues one file, or one model with its files."""
        with self._lock:
            self._files[name] = content
        if not self._away:
            self._wake.set()

    def flush(self) -> bool:
        """Sends all; if that fails, writes the rest to `spill_url`. Returns whether all was sent.

        Does not try a store that is known to be away.
        """
        if not self._away and self.send() and not self._files:
            return True
        self._spill()
        return False

    def close(self, status: str, summary: dict[str, float]) -> bool:
        """Sends the rest and the end of the run. Returns whether the store took it within CLOSE_WAIT_S."""
        self._end, self._held_until_s = (status, summary), -math.inf
        deadline = time.monotonic() + CLOSE_WAIT_S
        while not (sent := self.send()) and time.monotonic() < deadline:
            time.sleep(1)
        self._closed = True
        self._wake.set()
        if not sent or self._files:
            self._spill()
        return sent

    def send(self) -> bool:
        """Sends all records, then the end of the run. Returns False if it is not allowed to, or if the store is away.

        Warns once when the store goes away. Files that their place does not take wait, with a warning.
        """
        with self._sending:
            if not self._allowed():
                return False
            try:
                self._send_values()
                self._send_tags()
                self._send_files()
                if self._end:
                    self._sink.end(*self._end)
            except StoreAwayError as error:
                if not self._away:
                    logger.warning("the tracking store is away (%s): records are kept and sent later", error)
                self._away = True
                return False
            if self._away:
                logger.info("the tracking store answers again: all records are sent")
            self._away, self._stride = False, 1
            if self._spilled and self._spill_url and not self._files:
                # If it cannot be removed, it may stay: the store has all its records.
                with contextlib.suppress(UserError):
                    storage.remove(self._spill_url)
                self._spilled = False
            return True

    def _run(self) -> None:
        wait_s = SEND_EVERY_S
        while not self._closed:
            self._wake.wait(wait_s)
            self._wake.clear()
            if not self._closed:
                wait_s = SEND_EVERY_S if self.send() else min(2 * wait_s, RETRY_AT_MOST_S)

    def _send_values(self) -> None:
        if self._known is None:
            self._known = {key: step for key, (step, _) in self._sink.last_values().items()}
        while batch := self._in_flight or self._take(self._known):
            self._in_flight = batch
            self._sink.send_values(batch)
            self._in_flight = []

    def _take(self, known: dict[str, int]) -> list[Record]:
        """The next records that the store does not have, at most one batch."""
        fresh: list[Record] = []
        with self._lock:
            while self._values and len(fresh) < BATCH_VALUES:
                key, _, _, step = record = self._values.popleft()
                if step > known.get(key, -1):
                    known[key] = step
                    fresh.append(record)
        return fresh

    def _send_tags(self) -> None:
        for key, value in list(self._tags.items()):
            self._sink.send_tag(key, value)
            self._forget(self._tags, key, value)

    def _send_files(self) -> None:
        for name, content in list(self._files.items()) if time.monotonic() >= self._held_until_s else ():
            try:
                if isinstance(content, bytes):
                    self._sink.send_artifact(name, content)
                else:
                    self._sink.send_model(content)
            except StoreAwayError as error:
                self._sink.last_values()  # Raises if the whole store is away.
                if not self._held:
                    why = "the records are tracked, the files wait, and are kept in unsent.json at the end"
                    logger.warning("the tracking store cannot keep files of run %s (%s): %s", self._run_id, error, why)
                self._held, self._held_until_s = True, time.monotonic() + RETRY_AT_MOST_S
                return
            self._forget(self._files, name, content)

    def _forget(self, queue: dict[str, Any], name: str, sent: Any) -> None:
        """Takes what was sent from a queue, unless something newer is there under its name."""
        with self._lock:
            if queue.get(name) is sent:
                del queue[name]

    def _spill(self) -> None:
        if not self._spill_url or not self._allowed():
            return
        with self._lock:
            files = {name: data for name, data in self._files.items() if isinstance(data, bytes)}
            note = {
                "run_id": self._run_id,
                "values": [*self._in_flight, *self._values],
                "tags": dict(self._tags),
                "artifacts": {name: base64.b64encode(data).decode() for name, data in files.items()},
                # Their files are in the run folder.
                "models": {name: asdict(each) for name, each in self._files.items() if isinstance(each, TrackedModel)},
                "end": self._end,
            }
        try:
            storage.write(self._spill_url, json.dumps(note).encode())
            self._spilled = True
        except UserError as error:
            logger.warning("unsent records of run %s could not be kept: %s", self._run_id, error)

    def _restore(self) -> None:
        """Queues the records that an earlier process of this run could not send."""
        note = read_note(self._spill_url) if self._spill_url else {}
        if note.get("run_id") == self._run_id:
            self._spilled = True
            self._values.extend((key, value, at_ms, step) for key, value, at_ms, step in note["values"])
            self._tags.update(note.get("tags", {}))
            self._files.update({name: base64.b64decode(text) for name, text in note["artifacts"].items()})
            self._files.update({name: TrackedModel(**values) for name, values in note.get("models", {}).items()})
            self.unsent_end = tuple(note["end"]) if note.get("end") else None


def always() -> bool:
    """The `allowed` of a run that no other process writes to."""
    return True


def read_note(url: str) -> dict[str, Any]:
    """The JSON object at `url`; empty when there is no file, or, with a warning, when it is not a JSON object."""
    try:
        content = config.read_json(storage.read(url))
    except storage.NotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        logger.warning("%s is not a JSON object and is ignored: move it away", url)
        return {}
    return content


def _every_second(records: Iterable[Record]) -> Iterator[Record]:
    """Every second record of each key: a curve at half its resolution is better than one with a gap."""
    seen: Counter[str] = Counter()
    for record in records:
        seen[record[0]] += 1
        if seen[record[0]] % 2:
            yield record
