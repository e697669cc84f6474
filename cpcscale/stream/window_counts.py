"""What an index says of the windows of a set: how many each shard has, and the speaker of each of a shard's.

Windows are counted in one pass over the lengths of utterances; large sets keep the result on disk.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from cpcscale.shards.index import Index
from cpcscale.stream import window
from cpcscale.stream.window import WindowConfig

# With fewer utterances, a pass takes well under a second.
_KEPT_FROM = 1_000_000


def shard_windows(index: Index, spec: WindowConfig, kept_in: Path | None = None) -> np.ndarray:
    """int64 [shards]: the windows of each shard. Needs the memory of one part of the index.

    Counts of a large set are stored in the folder `kept_in`, by fingerprint and window spec, and read from there.
    """
    if spec.kind == "crop":
        return index.shards["utterances"].to_numpy()
    kept = None
    if kept_in and index.count >= _KEPT_FROM:
        kept = kept_in / f"windows-{index.fingerprint}-{spec.kind}-{spec.samples}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            counts = np.load(kept, allow_pickle=False)
            if len(counts) == index.shards.num_rows:
                return counts
    counts = np.zeros(index.shards.num_rows, np.int64)
    for first, samples in index.samples_by_part():
        # `last` is where the rows of the part end; shards without utterances there have no windows.
        last = int(np.searchsorted(index.bounds, index.bounds[first] + len(samples), side="right")) - 1
        bounds = index.bounds[first : last + 1] - index.bounds[first]
        counts[first:last] = window.per_shard(window.count(spec, samples), bounds)
    if kept:
        # Storing only saves a later pass: failing to is no error.
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f".{kept.name}.{os.getpid()}.tmp.npy")
            np.save(temporary, counts, allow_pickle=False)
            temporary.replace(kept)
    return counts


@dataclass(frozen=True)
class WindowSpeakers:
    """The speakers of the windows of a shard: int64, the same number for windows of one speaker; -1: unknown."""

    index: Index
    spec: WindowConfig

    def __call__(self, shard: int) -> np.ndarray:
        rows = self.index.rows(shard)
        group = rows.table["group"].combine_chunks()
        # Where the speaker is not known, the recording takes her place.
        unknown = pc.or_(pc.equal(group, ""), pc.equal(group, rows.table["recording"].combine_chunks())).to_numpy(False)
        number = group.dictionary_encode().indices.to_numpy().astype(np.int64)
        return np.repeat(np.where(unknown, -1, number), window.count(self.spec, rows.samples))
