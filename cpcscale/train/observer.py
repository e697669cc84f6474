"""Who watches a run, and what a run is asked from outside while it goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who watches a run; called on rank 0 alone.

    `replayed` gives metrics that a checkpoint carries when a run goes on: the observer may have died without them.
    `quarantined` gives all windows so far that do not decode, when there are new ones. `saved` comes when a checkpoint
    is published, some steps after the one that it is of.
    """

    def note(self, text: str) -> None: ...
    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...
    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None: ...


class SilentObserver:
    """The observer of a run that nobody watches."""

    def note(self, text: str) -> None:
        log.debug(text)

    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...
    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None: ...


class StoppedError(Exception):
    """The run was asked to stop and has, behind a checkpoint of its last step."""


class RunRequests:
    """What rank 0 was asked so far, by any thread; `number` says it to the other ranks along with a step's counts."""

    def __init__(self) -> None:
        self._saves, self._stop = 0, False

    def save(self) -> None:
        """Asks for one checkpoint after the step under way."""
        self._saves += 1

    def stop(self) -> None:
        """Asks for one, and for no step after it."""
        self._stop = True

    @property
    def number(self) -> int:
        """0 when nothing was asked, another number after each that was."""
        return 2 * self._saves + self._stop


def asks_to_stop(number: int) -> bool:
    """Whether a Notices of this number was asked to stop."""
    return bool(number % 2)
