"""How a function is run over many items: in turn here, or as tasks of a cluster (cluster/session.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

# run(function, items, what=, unit=, shared=()): `function(item, *shared)` of each item, in the order of the items, a
# bounded number of them ahead. `what` and `unit` are for people, as "packing" and "tars".
RunTasks: TypeAlias = Callable[..., Iterable[Any]]


def in_turn(
    function: Callable[..., Any], items: Sequence[Any], *, what: str, unit: str, shared: tuple[Any, ...] = ()
) -> Iterator[Any]:
    """The plain RunTasks: in this process, one after the other, without a word."""
    return (function(item, *shared) for item in items)
