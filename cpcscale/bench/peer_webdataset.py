from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import webdataset

from cpcscale.bench import peers
from cpcscale.bench.peers import Crops, Job


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Callable[[], Iterable[Any]]]:
    dataset = (
        webdataset.WebDataset(
            job.paths,
            shardshuffle=len(job.paths),
            seed=job.seed,
            select_files=partial(_is_audio, job.codec),
            empty_check=False,
        )
        .shuffle(job.shuffle, seed=job.seed)
        .map(partial(_member, job.codec))
        .batched(job.batch, collation_fn=None)
        .map(Crops(job))
    )
    workers = int(os.environ.get("W", job.workers))
    loader = peers.loader(peers.Passes(job, partial(iter, dataset)), workers)
    yield partial(iter, loader)


def _is_audio(codec: str, name: str) -> bool:
    return name.endswith(f".{codec}")


def _member(codec: str, sample: dict[str, Any]) -> bytes:
    return sample[codec]
