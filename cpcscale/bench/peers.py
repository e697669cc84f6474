"""The libraries that a feed is weighed against, each reading the same shard set the way its documentation advises.

Every peer decodes alike: soundfile on a member's bytes, one seek to a random start, one read into a row of the batch.
All have as many decoders as the feed has decode threads, shuffle as many utterances, and read from memory: a RAM disk
or the page cache. A data set is converted, a library imported and a worker process started before the clock runs, since
a training run pays for them once; filling a shuffle buffer is inside, as it is for the feed.

Two need no more than `pip install 'cpcscale[bench]'` beside what cpcscale needs: lhotse, and Ray Data. Others ask for
versions that would change what cpcscale runs on, and take part when they are installed without their dependencies:
`pip install --no-deps litdata mosaicml-streaming`, then what their import asks for.
"""

from __future__ import annotations

import random
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


@dataclass(frozen=True)
class Job:
    """What every peer does alike: `windows` crops of `samples` each, in batches of `batch`.

    `base` is a local folder, `shards` the tars of KEY.codec and KEY.json in it; every utterance is longer than a crop.
    `workers` decode, `shuffle` utterances are held to draw from; copies of the set in other formats go to `folder`.
    """

    base: str
    shards: list[str]
    codec: str
    samples: int
    batch: int
    windows: int
    workers: int
    shuffle: int
    seed: int
    folder: Path

    @property
    def paths(self) -> list[str]:
        return [str(Path(self.base, shard)) for shard in self.shards]


# Opens a peer: inside of the context all is ready, and a call begins to read; batches are int16 [rows, samples].
Opener = Callable[[Job], AbstractContextManager[Callable[[], Iterable[Any]]]]


def found() -> dict[str, Opener]:
    """The peers that are installed here."""
    peers: dict[str, Opener] = {}
    try:
        from cpcscale.bench import peer_webdataset

        peers["webdataset"] = peer_webdataset.opened
    except ModuleNotFoundError:
        pass
    try:
        from cpcscale.bench import peer_lhotse

        peers["lhotse"] = peer_lhotse.opened
    except ModuleNotFoundError:
        pass
    for name in ("ray", "litdata", "mosaic"):
        try:
            import importlib

            m = importlib.import_module("cpcscale.bench.peer_" + name)
            peers[name] = m.opened
        except ModuleNotFoundError as e:
            pass
    return peers


def installed(job: Job) -> dict[str, Callable[[], float]]:
    """For each peer installed here, what measures it once: seconds from the start of iteration to the last window."""
    return {name: partial(_measured, opened, job) for name, opened in found().items()}


def _measured(opened: Opener, job: Job) -> float:
    with opened(job) as start:
        rows, taken_s = 0, 0.0
        began = time.perf_counter()
        for batch in start():
            rows += len(batch)
            if rows >= job.windows and not taken_s:
                # The last batch is whole, so a few windows may have come on top.
                taken_s = (time.perf_counter() - began) * job.windows / rows
    if not taken_s:
        raise RuntimeError(f"only {rows} of {job.windows} windows were delivered")
    return taken_s


class Crops:
    """Members' bytes to a batch of their random crops, int16 [members, samples]."""

    def __init__(self, job: Job) -> None:
        self._samples, self._random = job.samples, random.Random(job.seed)

    def __call__(self, members: Sequence[bytes]) -> np.ndarray:
        wave_BS = np.empty((len(members), self._samples), np.int16)
        for wave_S, member in zip(wave_BS, members, strict=True):
            with soundfile.SoundFile(BytesIO(member)) as file:
                file.seek(self._random.randint(0, file.frames - self._samples))
                file.read(self._samples, dtype="int16", out=wave_S)
        return wave_BS


class Passes(IterableDataset[np.ndarray]):
    """Batches for a DataLoader: none in the first pass, which only starts the workers, then a worker's share of a job.

    The share is whole, so that a worker is at rest when it is ended: PyTorch's abort in the middle of a batch.
    """

    def __init__(self, job: Job, read: Callable[[], Iterable[np.ndarray]]) -> None:
        self._batches, self._read = -(-job.windows // job.batch), read
        self._ready = False

    def __iter__(self) -> Iterator[np.ndarray]:
        ready, self._ready = self._ready, True
        if ready:
            worker = get_worker_info()
            yield from islice(self._endless(), -(-self._batches // (worker.num_workers if worker else 1)))

    def _endless(self) -> Iterator[np.ndarray]:
        while True:
            yield from self._read()


def loader(dataset: IterableDataset[np.ndarray], workers: int) -> DataLoader[np.ndarray]:
    """The DataLoader of PyTorch over a dataset of batches, its workers started; 0 workers read in this process."""
    made: DataLoader[np.ndarray] = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        # A fork of a process whose threads hold locks may never run.
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )
    for _ in made:
        raise AssertionError("the first pass is empty")
    return made


def members_of(path: str, codec: str) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of every audio member of a tar, in order."""
    with tarfile.open(path) as tar:
        for entry in tar:
            key, _, suffix = entry.name.rpartition(".")
            file = tar.extractfile(entry)
            if suffix == codec and file:
                yield key, file.read()
