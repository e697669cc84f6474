"""Ray Data: `read_webdataset`, decoding in `map_batches`, and `iter_batches` with a local shuffle, on a local Ray.

Set up as https://docs.ray.io/en/latest/data/shuffling-data.html advises for speed: files are shuffled, then windows in
a local buffer. The buffer holds decoded windows; shuffling bytes and decoding in the threads of `iter_torch_batches`
takes about twice as long. Ray and its workers are started, and a first shard is read, before the clock starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data

from cpcscale.bench.peers.job import CropDecoder, PeerJob

_BLOCKS_BYTES = 512 * 2**20


@contextlib.contextmanager
def opened(job: PeerJob) -> Iterator[Callable[[], Iterable[Any]]]:
    # A Ray that only this process can reach needs no token, and making one would write into the user's home.
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=job.workers,
            include_dashboard=False,
            object_store_memory=_BLOCKS_BYTES + 4 * job.shuffle * job.samples,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            for _ in _epoch(job, job.batch):
                pass
            yield partial(_batches, job)
        finally:
            ray.shutdown()


def _batches(job: PeerJob) -> Iterator[np.ndarray]:
    left = job.windows
    while left:
        for wave_BS in _epoch(job, left):
            left -= len(wave_BS)
            yield wave_BS


def _epoch(job: PeerJob, most: int) -> Iterator[np.ndarray]:
    crops = CropDecoder(job)

    def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"wave": crops(list(batch[job.codec]))}

    order = ray.data.FileShuffleConfig(seed=job.seed)
    tars = ray.data.read_webdataset(job.paths, decoder=None, fileselect=[f"*.{job.codec}"], shuffle=order)
    windows = tars.map_batches(decode, batch_size=job.batch, batch_format="numpy", zero_copy_batch=True)
    # Limited and read to its end: an abandoned execution would go on in its thread and start Ray again.
    for batch in windows.limit(most).iter_batches(
        batch_size=job.batch,
        prefetch_batches=2,
        local_shuffle_buffer_size=job.shuffle,
        local_shuffle_seed=job.seed,
    ):
        yield batch["wave"]
