"""The interfaces of a run to the outside: an observer that is told of events, and requests to save or to stop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told of the events of a run, on rank 0 only.

    `replayed` passes metrics from a checkpoint when a run resumes: an earlier observer may have died before it stored
    them. `quarantined` passes all windows so far that do not decode, when there are new ones. `saved` is called when a
    checkpoint was published, some steps after the step it belongs to.
    """

    def note(self, text: str) -> None: ...
    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...
    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None: ...


class SilentObserver:
    """An observer that ignores all events but logs notes at debug level."""

    def note(self, text: str) -> None:
        log.debug(text)

    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...
    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None: ...


class StoppedError(Exception):
    """The run was asked to stop, and stopped after a checkpoint of its last step."""


class RunRequests:
    """Requests to rank 0 from any thread. `number` encodes them; it is sent to the other ranks with a step's counts."""

    def __init__(self) -> None:
        self._saves, self._stop = 0, False

    def save(self) -> None:
        """Asks for a checkpoint after the current step."""
        self._saves += 1

    def stop(self) -> None:
        """Asks for a checkpoint after the current step, and to stop then."""
        self._stop = True

    @property
    def number(self) -> int:
        """0 without requests; changes with each request."""
        return 2 * self._saves + self._stop


def asks_to_stop(number: int) -> bool:
    """Whether this `RunRequests.number` contains a request to stop."""
    return bool(number % 2)
