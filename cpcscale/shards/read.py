"""Verified audio bytes of an utterance: one ranged read of its shard, checked against the index."""

from __future__ import annotations

import xxhash

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards.index import Index

_ATTEMPTS = 3


class ShardReader:
    """Reads members of a shard set by utterance number. Safe to share between threads."""

    def __init__(self, index: Index) -> None:
        self._paths = [storage.join(index.base, path) for path in index.shards["path"].to_pylist()]
        self._shard = index.utterances["shard"].to_numpy()
        self._offset = index.utterances["offset"].to_numpy()
        self._size = index.utterances["size"].to_numpy()
        self._checksum = index.utterances["checksum"].to_numpy()

    def shard_path(self, utterance: int) -> str:
        """Where the shard of an utterance lies, for messages."""
        return self._paths[self._shard[utterance]]

    def member(self, utterance: int) -> bytes:
        """The audio member's bytes, equal to what was packed.

        Bytes that fail their checksum are fetched again; when they keep failing, UserError names the shard, since
        data that changed must stop a run and never silently change what it learns.
        """
        path, offset = self.shard_path(utterance), int(self._offset[utterance])
        for _ in range(_ATTEMPTS):
            data = storage.read(path, offset, offset + int(self._size[utterance]))
            if xxhash.xxh3_64_intdigest(data) == self._checksum[utterance]:
                return data
        raise UserError(
            f"{path}: bytes {offset}..{offset + int(self._size[utterance])} fail their checksum {_ATTEMPTS} times: "
            "the shard changed after it was packed or its store is damaged; restore it, or remove it and pack again"
        )
