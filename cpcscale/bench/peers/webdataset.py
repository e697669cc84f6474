"""WebDataset: reads tars in sequence; shards are shuffled, then utterances in a buffer.

Set up as https://webdataset.github.io/webdataset/sharding/ advises: `shardshuffle` and `.shuffle`, with batches made in
the worker since moving single samples is slow. JSON members are skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

import webdataset

from cpcscale.bench.peers.job import PeerJob, make_loader


@contextlib.contextmanager
def opened(job: PeerJob) -> Iterator[Callable[[], Iterable[Any]]]:
    dataset = webdataset.WebDataset(
        job.paths, shardshuffle=len(job.paths), seed=job.seed, select_files=partial(_is_audio, job.codec)
    )
    dataset = dataset.shuffle(job.shuffle, seed=job.seed).map(itemgetter(job.codec))
    yield partial(iter, make_loader(job, partial(iter, dataset)))


def _is_audio(codec: str, name: str) -> bool:
    return name.endswith(f".{codec}")
