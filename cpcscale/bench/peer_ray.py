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

from cpcscale.bench.peers import Crops, Job

_OBJECT_STORE_BYTES = 512 * 2**20


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Callable[[], Iterable[Any]]]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            address="local",
            num_cpus=job.workers,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            read = {"A": _a, "B": _b}[os.environ.get("R", "A")]
            for _ in read(job, job.paths[:1]):
                pass
            yield partial(read, job, job.paths)
        finally:
            ray.shutdown()


def _source(job, paths):
    return ray.data.read_webdataset(
        paths, decoder=None, fileselect=[f"*.{job.codec}"], shuffle=ray.data.FileShuffleConfig(seed=job.seed)
    )


def _a(job: Job, paths):
    crops = Crops(job)

    def dec(batch):
        return {
            "wave": crops(
                [
                    bytes(m)
                    for m in (batch[job.codec].to_pylist() if os.environ.get("BF") == "pyarrow" else batch[job.codec])
                ]
            )
        }

    rows = 0
    ds = _source(job, paths).map_batches(
        dec, batch_size=int(os.environ.get('MB', job.batch)), batch_format=os.environ.get("BF", "numpy"), zero_copy_batch=True
    )
    for batch in ds.iter_batches(
        batch_size=job.batch,
        batch_format="numpy",
        local_shuffle_buffer_size=job.shuffle,
        local_shuffle_seed=job.seed,
        prefetch_batches=2,
    ):
        yield batch["wave"]


def _b(job: Job, paths):
    crops = Crops(job)

    def dec(batch):
        return crops([bytes(m) for m in batch[job.codec]])

    for batch in (
        _source(job, paths)
        .select_columns([job.codec])
        .iter_torch_batches(
            batch_size=job.batch,
            collate_fn=dec,
            local_shuffle_buffer_size=job.shuffle,
            local_shuffle_seed=job.seed,
            prefetch_batches=int(os.environ.get("PF", "1")),
        )
    ):
        yield batch
