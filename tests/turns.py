"""Threads that take turns at the storage: each operation waits until it is let go, so any order of them can be tried.

What runs is the real code on the real storage; a schedule says whose next operation comes. A thread that the schedule
leaves in the middle is ended there, as by SIGKILL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest

from cpcscale import storage
from cpcscale.errors import UserError

# The last is no operation, but stands before those that a module does on a local folder by itself.
_OPERATIONS = ("create", "write", "read", "list_files", "remove", "exists", "size", "local_path")


class Ended(BaseException):
    """Ends a thread at its next operation, past every handler."""


class Player:
    """One thread. `error` is the user's error that it ended with."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._go, self._back = work, threading.Semaphore(0), threading.Semaphore(0)
        self._ending = False
        self.done, self.error = False, cast(Exception | None, None)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Returns when it stands before its first operation."""
        self._thread.start()
        self._back.acquire()

    def step(self) -> None:
        """Lets one operation go; returns when it stands before the next."""
        self._go.release()
        self._back.acquire()

    def end(self) -> None:
        self._ending = True
        if not self.done:
            self.step()
        self._thread.join()

    def wait(self) -> None:
        if not self._ending:
            self._back.release()
            self._go.acquire()
        if self._ending:
            raise Ended

    def _run(self) -> None:
        _turns.player = self
        self.error = AssertionError("something else than an error of the user")
        try:
            self._work()
            self.error = None
        except Ended:
            self.error = None
        except UserError as error:
            self.error = error
        finally:
            self.done = True
            self._back.release()


_turns = threading.local()


@contextmanager
def at_the_storage():
    """Within the block, players wait before each operation."""

    def waiting(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if player := getattr(_turns, "player", None):
            player.wait()
        return operation(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(storage, name, partial(waiting, getattr(storage, name)))
        yield


def play(
    works: Iterable[Callable[[], Any]], schedule: Iterable[tuple[int, int]], after: Callable[[], None]
) -> list[Player]:
    """Runs the works as the schedule says: whose turn it is, modulo those that are not done, for how many operations.

    `after` is called after each operation.
    """
    players = [Player(work) for work in works]
    with at_the_storage():
        for player in players:
            player.start()
        try:
            for number, operations in schedule:
                waiting = [player for player in players if not player.done]
                player = waiting[number % len(waiting)] if waiting else players[0]
                for _ in range(operations):
                    if not player.done:
                        player.step()
                        after()
        finally:
            for player in players:
                player.end()
    return players
