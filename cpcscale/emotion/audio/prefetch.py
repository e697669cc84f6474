"""Reading ahead of whoever computes: threads read and decode what comes next, and only so much of it is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, overload

Item = TypeVar("Item")
Result = TypeVar("Result")

# Decoding lets go of the interpreter, and a read from a store is mostly waiting.
_THREADS = 4
_UTTERANCES_AHEAD = 64


def flat_windows(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """The results in order, at most `ahead` of them in memory, where `pool.map` would gather all that the reader is
    behind."""
    coming: deque[Future[Result]] = deque()
    try:
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) >= ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`flat_windows` with threads of its own, which end with the iteration."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead") as pool:
        yield from flat_windows(pool, function, items, ahead)


def flat(utterances: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """The windows of all utterances, one after the other, a few utterances read ahead."""
    for windows in read_ahead(utterances.__getitem__, range(len(utterances)), _UTTERANCES_AHEAD):
        yield from windows


class SelectedRows(Sequence[Item]):
    """These rows of another sequence, each taken from it when it is asked for."""

    def __init__(self, known: Sequence[Item], rows: Sequence[int]) -> None:
        self._known, self._rows = known, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Item: ...
    @overload
    def __getitem__(self, row: slice) -> SelectedRows[Item]: ...
    def __getitem__(self, row: int | slice) -> Item | SelectedRows[Item]:
        if isinstance(row, slice):
            return SelectedRows(self._known, self._rows[row])
        return self._known[self._rows[row]]


def in_chunks(function: Callable[[list[Item]], Sequence[Result]], items: Iterable[Item], size: int) -> Iterator[Result]:
    """What `function` makes of consecutive lists of `size` items, one result an item; one list is in memory."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield from function(chunk)
