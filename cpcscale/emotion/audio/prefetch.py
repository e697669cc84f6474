"""Threads read and decode the next items while others are computed on; a bound limits how many are in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, overload

Item = TypeVar("Item")
Result = TypeVar("Result")

# Decoding releases the GIL, and a read from an object store is mostly waiting.
_THREADS = 4
_UTTERANCES_AHEAD = 64


def bounded_map(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yields the results of `function` in order, with at most `ahead` of them in memory.

    `pool.map` would keep all results that its reader has not taken yet.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`bounded_map` with its own threads, which end with the iteration."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead") as pool:
        yield from bounded_map(pool, function, items, ahead)


def flatten_windows(utterances: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """The windows of all utterances, one after the other, read ahead by up to 64 utterances."""
    for windows in read_ahead(utterances.__getitem__, range(len(utterances)), _UTTERANCES_AHEAD):
        yield from windows


class SelectedRows(Sequence[Item]):
    """A view of some rows of a sequence; each row is read from it on access."""

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


def map_in_chunks(
    function: Callable[[list[Item]], Sequence[Result]], items: Iterable[Item], size: int
) -> Iterator[Result]:
    """Yields the results of `function` on consecutive lists of `size` items, one result an item."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield from function(chunk)
