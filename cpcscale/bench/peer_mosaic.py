from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import streaming

from cpcscale.bench import peers
from cpcscale.bench.peers import Crops, Job


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Callable[[], Iterable[Any]]]:
    folder = job.folder / "mds"
    if not folder.exists():
        _convert(job, folder)
    workers = int(os.environ.get("W", job.workers))
    dataset = streaming.StreamingDataset(
        local=str(folder), shuffle=True, shuffle_seed=job.seed, shuffle_block_size=job.shuffle, batch_size=job.batch
    )
    loader = peers.loader(peers.Passes(job, partial(_plain, job, dataset, Crops(job))), workers)
    yield partial(iter, loader)


def _plain(job, dataset, crops):
    members = (x["audio"] for x in dataset)
    while len(batch := list(islice(members, job.batch))) == job.batch:
        yield crops(batch)


def _convert(job: Job, folder: Path) -> None:
    with streaming.MDSWriter(out=str(folder), columns={"audio": "bytes"}) as writer:
        for path in job.paths:
            for _, data in peers.members_of(path, job.codec):
                writer.write({"audio": data})
