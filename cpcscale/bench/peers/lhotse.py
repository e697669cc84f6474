"""lhotse: its Shar format with the original bytes of the members; shards are shuffled, then cuts in a buffer.

Set up as https://lhotse.readthedocs.io/en/latest/datasets.html and the docstring of LazySharIterator advise: sequential
reads, split between workers, batches made in the dataset. It iterates over the cuts without a DynamicCutSampler, which
balances batches of different durations: here there is nothing to balance, and it took 2 to 16 % longer in five runs.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import lhotse
from lhotse.shar.utils import to_shar_placeholder
from lhotse.shar.writers import JsonlShardWriter, TarWriter

from cpcscale.bench.peers.job import PeerJob, convert_once, make_loader, read_members


@contextlib.contextmanager
def opened(job: PeerJob) -> Iterator[Callable[[], Iterable[Any]]]:
    folder = convert_once(job, "lhotse", _convert)
    cuts = lhotse.CutSet.from_shar(in_dir=folder, split_for_dataloading=True, shuffle_shards=True, seed=job.seed)
    cuts = cuts.shuffle(rng=random.Random(job.seed), buffer_size=job.shuffle)
    yield partial(iter, make_loader(job, partial(_members, cuts)))


def _members(cuts: lhotse.CutSet) -> Iterator[bytes]:
    for cut in cuts:
        yield cut.recording.sources[0].source


def _convert(job: PeerJob, folder: Path) -> None:
    for number, path in enumerate(job.paths):
        with (
            TarWriter(str(folder / f"recording.{number:06d}.tar"), shard_size=None) as tar,
            JsonlShardWriter(str(folder / f"cuts.{number:06d}.jsonl.gz"), shard_size=None) as lines,
        ):
            for key, data in read_members(path, job.codec):
                recording = to_shar_placeholder(lhotse.Recording.from_bytes(data, key))
                tar.write(f"{key}.{job.codec}", BytesIO(data))
                tar.write(f"{key}.json", BytesIO(json.dumps(recording.to_dict()).encode()), count=False)
                lines.write(recording.to_cut())
