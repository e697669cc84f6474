"""The interface to run a function over many items: in turn, as here, or side by side (cluster/tasks.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

# run(function, items, what=, unit=, shared=()) yields `function(item, *shared)` of each item, in order, and works on a
# bounded number of items ahead. `what` and `unit` are for progress, such as "packing" and "tars".
RunTasks: TypeAlias = Callable[..., Iterable[Any]]


def in_turn(
    function: Callable[..., Any], items: Sequence[Any], *, what: str, unit: str, shared: tuple[Any, ...] = ()
) -> Iterator[Any]:
    """The plain RunTasks: in this process, one item after the other, without progress."""
    return (function(item, *shared) for item in items)
