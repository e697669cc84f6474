"""How fast this machine updates the network and decodes the speech: measured with the parts that a run has."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.bench.updates import Updates
from cpcscale.cluster.spec import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.shards.index import Index
from cpcscale.stream.feed import FeedSource, ThreadFeed
from cpcscale.stream.order import Order
from cpcscale.train.ranks import Ranks

_UPDATES = 2
_UPDATING_S = 8.0
_DECODING_S = 2.0


@dataclass(frozen=True)
class Rates:
    """Seconds of audio in a second: that a worker's device updates on, from memory and with any padding, and that one
    core decodes."""

    update: float
    decode: float

    def __post_init__(self) -> None:
        configs.at_least(0, **{"--update-rate": self.update, "--decode-rate": self.decode})

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are known."""
        return tuple(name for name in ("update", "decode") if getattr(self, name))


def rates(
    config: PretrainConfig, index: Index, windows: np.ndarray, workers: int, on_node: int, cores: int, given: Rates
) -> Rates:
    """Measures what `given` has no rate of (0), with the share of the batch that one of so many workers has.

    `windows` are those of each shard, `on_node` the workers that share a node's `cores`. Where this machine can hold as
    many, they are measured together; else one of them alone.
    """
    share = config.train.batch // config.train.lanes * -(-config.train.lanes // workers)
    update, decode = given.update, given.decode
    if not decode:
        note("size: measuring how fast one core decodes")
        decode = _decoding(config, index, windows)
    if not update:
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        here = os.cpu_count() or 1
        together = on_node if (torch.cuda.device_count() >= on_node if on_gpu else cores == here) else 1
        device = f"{together} worker(s), {'a GPU each' if on_gpu else 'on this CPU'}"
        note(f"size: measuring updates of {share} windows a worker: {device}")
        threads = config.train.threads or max(1, min(cores, here) // on_node)
        update = _updating(config, index, share, threads, together, on_gpu)
        if together < on_node and not on_gpu:
            # One alone has its threads to itself; so many have the node's cores between them.
            update *= min(1.0, cores / (on_node * threads))
    return Rates(update, decode)


def needs_gpu(config: PretrainConfig, given: Rates) -> None:
    """Refuses to size for GPUs by the rate of a CPU."""
    if not given.update and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError(
            "this process has no GPU to measure an update on: give --update-rate, the seconds of audio that one GPU "
            "updates on in a second (`cpcscale bench train` on such a machine prints it), or run this there"
        )


def _updating(config: PretrainConfig, index: Index, share: int, threads: int, together: int, on_gpu: bool) -> float:
    """Of one of so many workers, as a run has them."""
    # It brings Ray Train, which given rates do not need.
    from cpcscale.cluster.rehearsal import rehearsed

    train = replace(config.train, batch=share * together, lanes=share * together, threads=threads)
    recipe = replace(config, train=train, workers=together)
    return share * config.window.seconds / rehearsed(partial(_update_s, recipe, index), together, on_gpu)["update_s"]


def _update_s(recipe: PretrainConfig, index: Index, ranks: Ranks) -> dict[str, float]:
    """The mean seconds of an update on a batch in memory, of the slowest worker each time.

    No median: what comes now and then and takes the cores is part of a run.
    """
    storage.configure(recipe.storage)
    updates, spent_s, made = Updates(recipe, index, ranks, _UPDATES), 0.0, 0
    while spent_s < _UPDATING_S:
        spent_s += float(ranks.most(torch.tensor(updates.memory().wall_s, dtype=torch.float64)))
        made += _UPDATES
    return {"update_s": spent_s / made}


def _decoding(config: PretrainConfig, index: Index, windows: np.ndarray) -> float:
    """Of one thread over the shards that the run reads, without its waits for disk or store."""
    spec = replace(config.feed, prefetch=1)
    order = Order(windows, config.seed, lanes=1, batch=1)
    feed = ThreadFeed(FeedSource(index, order, config.window, spec), [0], 0, threads=1)
    try:
        audio_s = spent_s = 0.0
        while spent_s < _DECODING_S:
            audio_s += feed.next().audio_s
            seconds = feed.seconds()
            spent_s = sum(seconds.get(name, 0.0) for name in ("verify", "decode", "collate"))
        return audio_s / spent_s
    finally:
        feed.close()
