"""Packing and indexing as Ray tasks; the tasks themselves are in shards/pack.py and shards/adoption/adopt.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.shards import pack as packing
from cpcscale.shards.adoption import adopt
from cpcscale.shards.adoption.adopt import AdoptedSet
from cpcscale.shards.adoption.read_tar import IndexConfig
from cpcscale.shards.pack import PackConfig, PackedSets
from cpcscale.shards.packing.sources import AudioFile, find_audio


def pack(source: str, target: str, config: PackConfig) -> PackedSets:
    """Packs the audio tree at `source` into shard sets below `target`; see shards.pack.pack."""
    return pack_sources(find_audio(source, config), target, config)


def pack_sources(sources: Sequence[AudioFile], target: str, config: PackConfig) -> PackedSets:
    """Like `pack`, for an explicit list of files."""
    session.connect()
    return packing.pack_sources(sources, storage.absolute(target), config, session.stream_tasks)


def index(base: str, spec: IndexConfig, *, append: bool = False) -> AdoptedSet:
    """Indexes the tars below `base`, or checks the existing index; see shards.adoption.adopt.adopt."""
    return adopt.adopt(base, spec, append=append, run=connected_tasks)


def connected_tasks(*call: Any, **options: Any) -> Iterator[Any]:
    """`session.stream_tasks`, which starts or joins Ray on the first call."""
    session.connect()
    return session.stream_tasks(*call, **options)
