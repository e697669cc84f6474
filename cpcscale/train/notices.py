"""What a run is asked from outside while it goes on: a checkpoint just now, or one and then to end."""

from __future__ import annotations


class StoppedError(Exception):
    """The run was asked to stop and has, behind a checkpoint of its last step."""


class Notices:
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
