"""litdata: its chunked format in a local folder; chunks are shuffled, then the items in each.

Set up as https://github.com/Lightning-AI/litData#readme advises: a StreamingDataset on the folder, which memory-maps
the chunks, with its default shuffle inside of chunks; chunks are as large as our shards.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
from litdata.streaming import Cache

from cpcscale.bench.peers.job import PeerJob, convert_once, make_loader, read_members


@contextlib.contextmanager
def opened(job: PeerJob) -> Iterator[Callable[[], Iterable[Any]]]:
    dataset = litdata.StreamingDataset(str(convert_once(job, "litdata", _convert)), shuffle=True, seed=job.seed)
    # Set by hand what litdata's own loader would set: that loader batches decoded items, ours decodes into the batch.
    dataset.set_batch_size(job.batch)
    dataset.set_num_workers(job.processes)
    yield partial(iter, make_loader(job, partial(_members, dataset)))


def _members(dataset: litdata.StreamingDataset) -> Iterator[bytes]:
    dataset.set_epoch(dataset.current_epoch + 1)
    yield from dataset


def _convert(job: PeerJob, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        chunks = Cache(str(folder), chunk_bytes=job.shard_bytes)
        audio = (data for path in job.paths for _, data in read_members(path, job.codec))
        for number, data in enumerate(audio):
            chunks[number] = data
        chunks.done()
        chunks.merge()
