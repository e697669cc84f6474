"""Who watches a run: what the loop tells on its way, and to whom it matters."""

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


class Quiet:
    """The observer of a run that nobody watches."""

    def note(self, text: str) -> None:
        log.debug(text)

    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...
    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None: ...
