"""The libraries that the feed is weighed against, each reading the same shard set as its own documentation advises.

Every peer decodes alike: soundfile on a member's bytes, one seek to a random start, one read into a row of the batch.
Each has as many decoders as the feed has decode threads, shuffles as many utterances and reads from memory: a RAM disk
or the page cache. Before the clock starts, the library is imported, the set is converted to its format and the worker
processes are up, since a training run pays for these once; filling the shuffle buffer counts, as it does for the feed.

With one decoder the PyTorch datasets read in this process. In the best of seven runs of each, one worker process took 3
to 17 % longer: it hands every batch over through shared memory. With more decoders each has a process.

webdataset and Ray Data come with cpcscale, lhotse with `pip install 'cpcscale[bench]'`. Two ask for versions that would
change what cpcscale runs on; they take part where they are installed without what they ask for, as by
`pip install --constraint constraints.txt boto3` and `pip install --no-deps litdata`. mosaicml-streaming also imports
catalogue, Brotli, python-snappy, zstd, transformers<5 and the torchvision that fits the torch installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from cpcscale.bench.peers.job import PeerJob

# Opens a peer: inside of the context all is ready, a call starts to read, and batches are int16 [rows, samples].
Opener = Callable[[PeerJob], AbstractContextManager[Callable[[], Iterable[Any]]]]


def installed_peers() -> dict[str, Opener]:
    """The peers that are installed here."""
    peers: dict[str, Opener] = {}
    with suppress(ModuleNotFoundError):
        from cpcscale.bench.peers import webdataset

        peers["webdataset"] = webdataset.opened
    with suppress(ModuleNotFoundError):
        from cpcscale.bench.peers import lhotse

        peers["lhotse"] = lhotse.opened
    with suppress(ModuleNotFoundError):
        from cpcscale.bench.peers import ray

        peers["ray.data"] = ray.opened
    with suppress(ModuleNotFoundError):
        from cpcscale.bench.peers import litdata

        peers["litdata"] = litdata.opened
    with suppress(ModuleNotFoundError):
        from cpcscale.bench.peers import streaming

        peers["mosaicml-streaming"] = streaming.opened
    return peers


def peer_measurements(job: PeerJob) -> dict[str, Callable[[], float]]:
    """For each peer installed here, what measures it once: seconds from the start of iteration to the last window."""
    return {name: partial(_measured, opened, job) for name, opened in installed_peers().items()}


def _measured(opened: Opener, job: PeerJob) -> float:
    rows, taken_s = 0, 0.0
    with opened(job) as start:
        began = time.perf_counter()
        for batch in start():
            rows += len(batch)
            if rows >= job.windows and not taken_s:
                # Batches are whole, so the last one may bring a few windows too many.
                taken_s = (time.perf_counter() - began) * job.windows / rows
    if not taken_s:
        raise RuntimeError(f"only {rows} of {job.windows} windows were delivered")
    return taken_s
