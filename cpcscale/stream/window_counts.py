"""Counts the windows of each shard in one pass over the lengths of utterances; large sets keep the result on disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

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
