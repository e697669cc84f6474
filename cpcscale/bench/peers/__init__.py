"""The libraries that the feed is compared with (peers), each reading the same shard set as its documentation advises.

All peers decode alike: soundfile on a member's bytes, one seek to a random start, one read into a row of the batch.
Each has as many decoders as the feed has decode threads, shuffles as many utterances and reads from memory: a RAM disk
or the page cache. Before the clock starts, the library is imported, the set is converted to its format and the worker
processes are started, since a training run pays for these once; filling the shuffle buffer counts, as for the feed.

With one decoder the PyTorch datasets read in this process: in the best of seven runs of each, one worker process took 3
to 17 % longer, because it passes every batch through shared memory. With more decoders each has a process.

webdataset, lhotse and Ray Data come with `pip install 'cpcscale[bench]'`. litdata and mosaicml-streaming require
versions that would replace some of cpcscale's; they take part if installed without their requirements, by
`pip install --constraint requirements/core.txt boto3` and `pip install --no-deps litdata`. mosaicml-streaming also
imports catalogue, Brotli, python-snappy, zstd, transformers<5 and the torchvision that fits the installed torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from cpcscale.bench.peers.job import PeerJob

# Opens a peer. Inside the context all is ready; calling the result starts to read batches of int16 [rows, samples].
Opener = Callable[[PeerJob], AbstractContextManager[Callable[[], Iterable[Any]]]]


def installed_peers() -> dict[str, Opener]:
    """{name: opener} of the peers that are installed here."""
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
    """For each installed peer, a function that measures the seconds from the start of iteration to the last window."""
    return {name: partial(_measured, opened, job) for name, opened in installed_peers().items()}


def _measured(opened: Opener, job: PeerJob) -> float:
    rows, taken_s = 0, 0.0
    with opened(job) as start:
        began = time.perf_counter()
        for batch in start():
            rows += len(batch)
            if rows >= job.windows and not taken_s:
                # The last batch may hold a few windows too many: count their share of the time only.
                taken_s = (time.perf_counter() - began) * job.windows / rows
    if not taken_s:
        raise RuntimeError(f"only {rows} of {job.windows} windows were delivered")
    return taken_s
