from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import torch
from lhotse.dataset import DynamicCutSampler, IterableDatasetWrapper
from lhotse.shar.utils import to_shar_placeholder
from lhotse.shar.writers import JsonlShardWriter, TarWriter

from cpcscale.bench import peers
from cpcscale.bench.peers import Crops, Job


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Callable[[], Iterable[Any]]]:
    folder = job.folder / "lhotse"
    if not folder.exists():
        _convert(job, folder)
    cuts = lhotse.CutSet.from_shar(in_dir=folder, split_for_dataloading=True, shuffle_shards=True, seed=job.seed)
    if os.environ.get("L") == "sampler":
        sampler = DynamicCutSampler(
            cuts,
            max_cuts=job.batch,
            shuffle=True,
            shuffle_buffer_size=job.shuffle,
            drop_last=True,
            seed=job.seed,
            world_size=1,
            rank=0,
        )
        ds = IterableDatasetWrapper(_Ds(job), sampler, auto_increment_epoch=True)
        read = partial(iter, ds)
    else:
        read = partial(
            _plain, job, cuts.shuffle(rng=__import__("random").Random(job.seed), buffer_size=job.shuffle), Crops(job)
        )
    loader = peers.loader(peers.Passes(job, read), int(os.environ.get("W", job.workers)))
    yield partial(iter, loader)


class _Ds(torch.utils.data.Dataset):
    def __init__(self, job):
        self.crops = Crops(job)

    def __getitem__(self, cuts):
        return self.crops([c.recording.sources[0].source for c in cuts])


def _plain(job, cuts, crops):
    members = (c.recording.sources[0].source for c in cuts)
    while len(batch := list(islice(members, job.batch))) == job.batch:
        yield crops(batch)


def _convert(job: Job, folder: Path) -> None:
    folder.mkdir()
    n = 0
    for number, path in enumerate(job.paths):
        with (
            TarWriter(f"{folder}/recording.{number:06d}.tar", shard_size=None) as tar,
            JsonlShardWriter(f"{folder}/cuts.{number:06d}.jsonl.gz", shard_size=None) as lines,
        ):
            for key, data in peers.members_of(path, job.codec):
                recording = to_shar_placeholder(lhotse.Recording.from_bytes(data, key))
                tar.write(f"{key}.{job.codec}", BytesIO(data))
                tar.write(f"{key}.json", BytesIO(json.dumps(recording.to_dict()).encode()), count=False)
                lines.write(recording.to_cut())
