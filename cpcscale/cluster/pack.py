"""Packing on Ray: both passes of shards.pack as tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.shards import pack as shards
from cpcscale.shards.pack import PackConfig, Packed
from cpcscale.shards.sources import Source, find_sources


def pack(source: str, target: str, config: PackConfig) -> Packed:
    """Packs the audio tree at `source` into shard sets below `target`; see shards.pack.pack."""
    return pack_sources(find_sources(source), target, config)


def pack_sources(sources: Sequence[Source], target: str, config: PackConfig) -> Packed:
    """`pack` of an explicit list of files."""
    session.connect()
    return shards.pack_sources(sources, storage.absolute(target), config, _run)


def _run(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    probing = function is shards.probe_sources
    what, unit = ("probing", "groups of files") if probing else ("packing", "shards")
    return session.map_tasks(function, items, what=what, unit=unit)
