"""Indexing tars that others made on Ray: a task a tar, their entries taken in order as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cpcscale.cluster import session
from cpcscale.progress import Progress
from cpcscale.shards import adopt
from cpcscale.shards.adopt import Adopted
from cpcscale.shards.foreign import IndexConfig


def index(base: str, spec: IndexConfig, *, append: bool = False) -> Adopted:
    """Indexes the tars below `base`, or checks the index that is there; see shards.adopt.adopt."""
    return adopt.adopt(base, spec, append=append, run=_run)


def in_order(
    function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any, *, what: str, unit: str
) -> Iterator[Any]:
    """`function(item, shared)` of every item as Ray tasks of one core, in order; a task's UserError is raised as is.

    Unlike session.map_tasks it holds no more results than there are tasks in flight; `shared` is sent to a node once.
    """
    import ray

    session.connect()
    remote, everywhere = ray.remote(num_cpus=1)(function), ray.put(shared)
    most = max(8, 4 * int(ray.cluster_resources().get("CPU", 1)))
    waiting, pending = iter(items), deque[Any]()
    with Progress(what, len(items), unit) as progress:
        for done in range(1, len(items) + 1):
            while len(pending) < most and (item := next(waiting, None)) is not None:
                pending.append(remote.remote(item, everywhere))
            yield session._result(pending.popleft())
            progress.at(done)


def _run(function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
    return in_order(function, items, shared, what="indexing", unit="tars")
