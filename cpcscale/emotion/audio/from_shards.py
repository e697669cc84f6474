"""Labelled audio in shards: finds each utterance by name, reads its byte range and decodes it on each access.

Only the index rows of the corpus are in memory, under a kilobyte an utterance. If all shards of an object store fit the
cache, whole shards are kept on this node, since an epoch visits the utterances in random order; else members are read
one by one. Every member is verified by its checksum.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cpcscale import audio, storage
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.prefetch import bounded_map
from cpcscale.emotion.corpora.corpus import Utterance
from cpcscale.errors import UserError
from cpcscale.shards.cache import CacheConfig, ShardCache
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.pack import TRAIN
from cpcscale.shards.reader import ShardReader
from cpcscale.shards.rows import ShardRows
from cpcscale.tables import nfc

log = logging.getLogger(__name__)

# Most shards kept open at a time.
_OPEN = 512
_ASKED_AT_ONCE = 16


class ShardPlace(NamedTuple):
    """Where an utterance lies: the index rows of its shard, its row number there, and its part of that member.

    `start` and `samples`, the length, are in samples at 16 kHz.
    """

    rows: ShardRows
    row: int
    start: int
    samples: int


class ShardedAudio:
    """Reads the utterances of a corpus by their digests, each the sha256 of (shard, place in the shard)."""

    def __init__(self, index: Index, places: dict[str, ShardPlace], settings: AudioCacheConfig) -> None:
        self.index = index
        self._places = places
        shards = {place.rows.shard for place in places.values()}
        cache = _cache(index, shards, settings)
        self._reader = ShardReader(index, cache, keep=min(_OPEN, len(shards)))
        weakref.finalize(self, self._reader.close)
        self._reader.prefetch(sorted(shards))

    def shape(self, digest: str) -> tuple[int, ...]:
        """The shape of an utterance; reads no audio."""
        return (self._places[digest].samples,)

    def read(self, digest: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Samples [start, stop) of an utterance, int16; the same as in the whole utterance.

        Raises UserError, naming the shard, if its bytes are not those that were indexed or do not decode.
        """
        place = self._places[digest]
        rows, row = place.rows, place.row
        data = self._reader.member(rows, row)
        try:
            return audio.decode_slice(data, place.start + start, (place.samples if stop is None else stop) - start)
        except audio.AudioError as error:
            raise UserError(
                f"{self.index.url(rows.shard)}: {rows.table['key'][row].as_py()} cannot be used ({error}): leave it "
                "out with `cpcscale index SHARDS --exclude KEYS`, and pass corpus.on_bad=skip"
            ) from None


def open_index(base: str) -> Index:
    """The index of the shard set at `base`, or of `base`/train for a pack. Raises UserError if there is none."""
    whole = storage.exists(storage.join(base, MARKER)) or not storage.exists(storage.join(base, TRAIN, MARKER))
    return Index.load(base if whole else storage.join(base, TRAIN))


def locate(index: Index, utterances: Sequence[Utterance]) -> list[ShardPlace | None]:
    """The place of each utterance in the shards, or None if it is not there.

    An utterance is matched by its path, then by its key. A member matches by its key or by the name of the file that it
    was packed from, which is the end of the path. Raises UserError for an utterance that was cut when it was packed, or
    that matches two members with different audio.
    """
    named = dict[str, "ShardPlace | None"]()
    keyed = dict[str, ShardPlace]()
    other = dict[str, ShardPlace]()
    for shard in range(index.shards.num_rows):
        rows = index.rows(shard)
        columns, kept = (rows.table[name].to_pylist() for name in ("key", "recording", "samples")), _compact(rows)
        for row, (key, recording, samples) in enumerate(zip(*columns, strict=True)):
            place, name = ShardPlace(kept, row, 0, samples), _without_suffix(recording)
            if rows.excluded[row]:
                continue
            if _content(keyed.setdefault(key, place)) != _content(place):
                other[key] = place
            # A file that several members were cut from matches none of them.
            named[name] = None if name in named else place
    found = []
    for one in utterances:
        name = next((name for name in _names(one) if keyed.get(name) or named.get(name)), "")
        if name in other:
            first, second = (index.shards["path"][place.rows.shard].as_py() for place in (keyed[name], other[name]))
            raise UserError(
                f"{one.key} is {name} in {first} and in {second} of {index.base}, with other audio: pack the corpus "
                "into one set, or leave one out with `cpcscale index SHARDS --exclude SHARD:KEY`"
            )
        found.append(keyed.get(name) or named.get(name))
        if found[-1] is None and any(name in named for name in _names(one)):
            raise UserError(
                f"{one.key} lies in the shards at {index.base} in pieces, but its labels are for the whole: pack the "
                "corpus again with max_s=0"
            )
    return found


def open_sharded(
    index: Index, located: Sequence[ShardPlace], settings: AudioCacheConfig
) -> tuple[ShardedAudio, list[str]]:
    """(the audio at these places, the digest of each).

    Raises UserError if a shard is missing or its size is not that of the index.
    """
    hashes = {shard: index.shards["sha256"][shard].as_py() for shard in {place.rows.shard for place in located}}
    _refuse_missing(index, sorted(hashes))
    digests = [
        sha256(
            hashes[place.rows.shard] + int(place.rows.offset[place.row]).to_bytes(8, "little") + _part(place)
        ).hexdigest()
        for place in located
    ]
    return ShardedAudio(index, dict(zip(digests, located, strict=True)), settings), digests


def _part(place: ShardPlace) -> bytes:
    """What tells a part of a member from others; nothing for a whole member."""
    whole = (place.start, place.samples) == (0, int(place.rows.samples[place.row]))
    return b"" if whole else f"{place.start} {place.samples}".encode()


def _compact(rows: ShardRows) -> ShardRows:
    """The rows with the columns needed to read them, copied: a slice would keep the whole table in memory."""
    columns = rows.table.select(["key", "offset", "size", "checksum", "samples"])
    return dataclasses.replace(rows, table=columns.take(pa.array(np.arange(len(columns)))))


def _names(one: Utterance) -> Iterator[str]:
    """The names that a member of this utterance may have, the most specific first."""
    parts = _without_suffix(one.path).strip("/").split("/")
    yield from ("/".join(parts[start:]) for start in range(len(parts)))
    yield one.key


def _content(place: ShardPlace) -> tuple[int, int]:
    """(checksum, bytes) of the member at this place."""
    return int(place.rows.checksum[place.row]), int(place.rows.size[place.row])


def _without_suffix(name: str) -> str:
    stem, dot, suffix = nfc(name).rpartition(".")
    return stem if dot and "/" not in suffix else nfc(name)


def _refuse_missing(index: Index, shards: Sequence[int]) -> None:
    def size(shard: int) -> int | None:
        try:
            return storage.size(index.url(shard))
        except storage.NotFoundError:
            return None

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for shard, found in zip(shards, bounded_map(pool, size, shards, _ASKED_AT_ONCE), strict=True):
            expected = int(index.shards["bytes"][shard].as_py())
            if found != expected:
                has = "is missing" if found is None else f"has {found} bytes, but its index says {expected}"
                raise UserError(f"{index.url(shard)} {has}: restore the shard, or pack the corpus again")


def _cache(index: Index, shards: set[int], settings: AudioCacheConfig) -> ShardCache | None:
    """This node's cache of whole shards, shared with other runs, or None if these shards do not fit it."""
    if storage.local_path(index.base) is not None or not settings.enabled:
        return None
    spec = CacheConfig(folder=settings.path, max_gb=settings.limit_gb)
    needed = sum(int(index.shards["bytes"][shard].as_py()) for shard in shards)
    if needed > spec.max_bytes:
        log.warning(
            "audio_cache.limit_gb=%g does not hold the %.3g GB of shards at %s: reading each utterance by itself, in "
            "every epoch; raise it to read each shard once",
            *(settings.limit_gb, needed / 1e9, index.base),
        )
        return None
    return ShardCache(spec.path, spec.max_bytes)
