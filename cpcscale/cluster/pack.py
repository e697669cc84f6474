"""Packing on Ray: both passes of shards.pack as tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.shards import pack as shards
from cpcscale.shards.pack import PackConfig, Packed
from cpcscale.shards.packing.probe import probe_sources
from cpcscale.shards.packing.sources import Source, find_sources


def pack(source: str, target: str, config: PackConfig) -> Packed:
    """Packs the audio tree at `source` into shard sets below `target`; see shards.pack.pack."""
    return pack_sources(find_sources(source, config), target, config)


def pack_sources(sources: Sequence[Source], target: str, config: PackConfig) -> Packed:
    """`pack` of an explicit list of files."""
    session.connect()
    return shards.pack_sources(sources, storage.absolute(target), config, _run)


def _run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    what, unit = ("probing", "groups of files") if function is probe_sources else ("packing", "groups of shards")
    return session.stream_tasks(function, items, what=what, unit=unit)
