from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import litdata
from litdata.streaming import Cache

from cpcscale.bench import peers
from cpcscale.bench.peers import Crops, Job


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Callable[[], Iterable[Any]]]:
    folder = job.folder / "litdata"
    if not folder.exists():
        _convert(job, folder)
    workers = int(os.environ.get("W", job.workers))
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=job.seed)
    dataset.set_batch_size(job.batch)
    dataset.set_num_workers(workers)
    loader = peers.loader(peers.Passes(job, partial(_plain, job, dataset, Crops(job))), workers)
    yield partial(iter, loader)


def _plain(job, dataset, crops):
    dataset.set_epoch(dataset.current_epoch + 1)
    members = iter(dataset)
    while len(batch := list(islice(members, job.batch))) == job.batch:
        yield crops(batch)


def _convert(job: Job, folder: Path) -> None:
    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes="64MB")
    n = 0
    for path in job.paths:
        for _, data in peers.members_of(path, job.codec):
            cache[n] = data
            n += 1
    cache.done()
    cache.merge()
