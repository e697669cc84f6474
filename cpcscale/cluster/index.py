"""Indexing tars that others made on Ray: a task a tar, their entries taken in order as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cpcscale.cluster import session
from cpcscale.shards.adoption import adopt
from cpcscale.shards.adoption.adopt import Adopted
from cpcscale.shards.adoption.foreign import IndexConfig


def index(base: str, spec: IndexConfig, *, append: bool = False) -> Adopted:
    """Indexes the tars below `base`, or checks the index that is there; see shards.adopt.adopt."""
    return adopt.adopt(base, spec, append=append, run=_run)


def in_order(
    function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any, *, what: str, unit: str
) -> Iterator[Any]:
    """`function(item, shared)` of every item, as session.stream_tasks; `shared` is sent to each node once."""
    import ray

    session.connect()
    everywhere = ray.put(shared)

    def call(item: Any) -> Any:
        return function(item, ray.get(everywhere))

    return session.stream_tasks(call, items, what=what, unit=unit)


def _run(function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
    return in_order(function, items, shared, what="indexing", unit="tars")
