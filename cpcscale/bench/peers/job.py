"""The job of every peer of the feed bench, and code that peers share: crops, a DataLoader, conversion of the set."""

from __future__ import annotations

import random
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from torch.utils.data import DataLoader, IterableDataset

from cpcscale.errors import UserError

_PREFETCH = 4


@dataclass(frozen=True)
class PeerJob:
    """The job of every peer: read `windows` random crops of `samples` samples, in batches of `batch`.

    `base` is a local folder and `shards` are tars of KEY.codec and KEY.json in it; no utterance is shorter than a crop.
    `workers` decoders work at a time, and the shuffle buffer holds `shuffle` utterances. Converted sets go to `folder`.
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

    @property
    def processes(self) -> int:
        """The number of worker processes, 0 for one decoder in this process; each needs at least one shard."""
        return 0 if self.workers == 1 else min(self.workers, len(self.shards))

    @property
    def share(self) -> int:
        """The number of full batches that each process makes; together they hold all windows."""
        return -(-self.windows // (self.batch * max(1, self.processes)))

    @property
    def shard_bytes(self) -> int:
        """The size of the largest shard; sets in other formats get shards of this size."""
        return max(Path(path).stat().st_size for path in self.paths)


class CropDecoder:
    """Decodes members' bytes into a batch of random crops, int16 [members, samples]."""

    def __init__(self, job: PeerJob) -> None:
        self._samples, self._random = job.samples, random.Random(job.seed)

    def __call__(self, members: Sequence[bytes]) -> np.ndarray:
        wave_BS = np.empty((len(members), self._samples), np.int16)
        for wave_S, member in zip(wave_BS, members, strict=True):
            with soundfile.SoundFile(BytesIO(member)) as file:
                if file.frames < self._samples:
                    raise UserError(
                        f"an utterance has {file.frames} samples and a window {self._samples}, and peers read whole "
                        "windows only: lower window.seconds, or take a set of longer utterances"
                    )
                file.seek(self._random.randint(0, file.frames - self._samples))
                file.read(self._samples, dtype="int16", out=wave_S)
        return wave_BS


class CropBatches(IterableDataset[np.ndarray]):
    """Decoded batches for a DataLoader, from the shuffled members of `epoch()`, which is repeated as needed.

    The first pass is empty and only starts the workers. The second yields exactly each worker's share of the job,
    because PyTorch aborts a worker that is stopped in the middle of a batch.
    """

    def __init__(self, job: PeerJob, epoch: Callable[[], Iterable[bytes]]) -> None:
        self._rows, self._batches, self._epoch = job.batch, job.share, epoch
        self._crops, self._started = CropDecoder(job), False

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._started:
            members = self._members()
            for _ in range(self._batches):
                yield self._crops(list(islice(members, self._rows)))
        self._started = True

    def _members(self) -> Iterator[bytes]:
        while True:
            empty = True
            for member in self._epoch():
                yield member
                empty = False
            if empty:
                raise RuntimeError("a worker was given no shard to read")


def make_loader(job: PeerJob, epoch: Callable[[], Iterable[bytes]]) -> DataLoader[np.ndarray]:
    """A DataLoader over the members of `epoch()`, with its workers started."""
    made: DataLoader[np.ndarray] = DataLoader(
        CropBatches(job, epoch),
        batch_size=None,
        num_workers=job.processes,
        # Not forked: a fork of a process with threads may hang.
        multiprocessing_context="spawn" if job.processes else None,
        prefetch_factor=_PREFETCH if job.processes else None,
        persistent_workers=job.processes > 0,
    )
    for _ in made:
        raise AssertionError("the first pass is empty")
    return made


def read_members(path: str, codec: str) -> Iterator[tuple[str, bytes]]:
    """Yields (key, bytes) of every audio member of a tar, in order."""
    with tarfile.open(path) as tar:
        for entry in tar:
            key, _, suffix = entry.name.rpartition(".")
            file = tar.extractfile(entry)
            if suffix == codec and file:
                yield key, file.read()


def convert_once(job: PeerJob, name: str, convert: Callable[[PeerJob, Path], None]) -> Path:
    """The folder of the set in another format, below `job.folder`; `convert` fills it the first time."""
    folder, making = job.folder / name, job.folder / f"{name}.part"
    if not folder.exists():
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        convert(job, making)
        making.rename(folder)
    return folder
