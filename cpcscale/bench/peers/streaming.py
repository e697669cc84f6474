"""mosaicml-streaming: its MDS format in a local folder, shuffled by its default algorithm in blocks of `job.shuffle`.

Set up as https://docs.mosaicml.com/projects/streaming/en/latest/distributed_training/performance_tuning.html advises:
`batch_size` is given, and the shuffle is py1e, the default. Shards are as large as ours, so a block spans as many.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import streaming
from streaming.base.shared import SharedMemory

from cpcscale.bench.peers.job import PeerJob, convert_once, make_loader, read_members


@contextlib.contextmanager
def opened(job: PeerJob) -> Iterator[Callable[[], Iterable[Any]]]:
    folder = convert_once(job, "streaming", _convert)
    with tempfile.TemporaryDirectory() as locks:
        dataset = _dataset(job, folder, locks)
        try:
            yield partial(iter, make_loader(job, partial(_members, dataset)))
        finally:
            _unlink(dataset)


def _dataset(job: PeerJob, folder: Path, locks: str) -> streaming.StreamingDataset:
    before, tempfile.tempdir = tempfile.tempdir, locks
    try:
        return streaming.StreamingDataset(
            local=str(folder),
            # One epoch is the whole job, because workers wait for each other at the start of each epoch.
            epoch_size=job.share * max(1, job.processes) * job.batch,
            shuffle=True,
            shuffle_seed=job.seed,
            shuffle_block_size=job.shuffle,
            num_canonical_nodes=1,
            batch_size=job.batch,
        )
    finally:
        tempfile.tempdir = before


def _members(dataset: streaming.StreamingDataset) -> Iterator[bytes]:
    for sample in dataset:
        yield sample["audio"]


def _unlink(dataset: streaming.StreamingDataset) -> None:
    """Frees the dataset's shared memory, which would otherwise stay until this process ends."""
    for part in vars(dataset).values():
        memory: Any = part
        while memory is not None and not isinstance(memory, SharedMemory):
            # Scalars and barriers hold an array, which holds the shared memory.
            memory = getattr(memory, "arr", None) or getattr(memory, "_arr", None) or getattr(memory, "shm", None)
        if memory:
            memory.cleanup()


def _convert(job: PeerJob, folder: Path) -> None:
    with streaming.MDSWriter(out=str(folder), columns={"audio": "bytes"}, size_limit=job.shard_bytes) as writer:
        for path in job.paths:
            for _, data in read_members(path, job.codec):
                writer.write({"audio": data})
