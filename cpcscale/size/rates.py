"""Measures how fast this machine updates the network and decodes the speech, with the code of a real run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.bench.updates import UpdateBench
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.machine import usable_cores
from cpcscale.progress import note
from cpcscale.shards.index import Index
from cpcscale.stream.feed import FeedSource, ThreadFeed
from cpcscale.stream.run_order import OrderConfig, RunOrder
from cpcscale.train.ranks import Ranks

_UPDATES = 2
_UPDATING_S = 8.0
# One feed is measured at least this long: at its start it fills its queues and takes more cores than later.
_FED_S = 4.0
_DECODING_S = 2.0


@dataclass(frozen=True)
class Rates:
    """Seconds of audio a second: `update` of one worker's device (padding included), `decode` of one core.

    Both are measured alone: updates on a batch in memory, decoding on an idle core. If updates and decoding were
    measured together, `beside` is the decoding rate of a core during the updates; else it is 0.
    """

    update: float
    decode: float
    beside: float = 0.0

    def __post_init__(self) -> None:
        configs.at_least(0, **{"--update-rate": self.update, "--decode-rate": self.decode})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rates that are known."""
        return tuple(name for name in ("update", "decode") if getattr(self, name))


def measure_rates(
    config: PretrainConfig, index: Index, windows: np.ndarray, workers: int, on_node: int, cores: int, given: Rates
) -> Rates:
    """Measures the rates that are 0 in `given`, with a worker's share of the batch.

    `windows` are the windows of each shard; `on_node` workers share a node's `cores`. If this machine can hold as many
    workers, they are measured together; else one worker alone.
    """
    share = config.train.batch // config.train.lanes * -(-config.train.lanes // workers)
    update, decode, beside = given.update, given.decode, 0.0
    if not decode:
        note("size: measuring how fast one core decodes")
        decode = _decoding(config, index, windows)
    if not update:
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        here = usable_cores()
        together = on_node if (torch.cuda.device_count() >= on_node if on_gpu else cores == here) else 1
        device = f"{together} worker(s), {'a GPU each' if on_gpu else 'on this CPU'}"
        note(f"size: measuring updates of {share} windows a worker: {device}")
        threads = config.train.threads or max(1, min(cores, here) // on_node)
        # Updates and decoding are measured together only if this machine has as many cores as a node.
        fed = not on_gpu and cores == here and config.feed.kind == "threads" and not given.decode
        found = _updating(config, index, share, threads, together, on_gpu, fed)
        update, beside = share * config.window.seconds / found["update_s"], found["beside"]
        if together < on_node and not on_gpu:
            # One worker alone has its threads to itself; `on_node` workers share the node's cores.
            update *= min(1.0, cores / (on_node * threads))
    return Rates(update, decode, beside)


def check_gpu_rate(config: PretrainConfig, given: Rates) -> None:
    """Raises UserError when the rate of a GPU is neither given nor can be measured here."""
    if not given.update and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError(
            "this process has no GPU to measure an update on: give --update-rate, the seconds of audio that one GPU "
            "updates on in a second (`cpcscale bench train` on such a machine prints it), or run this there"
        )


def _updating(
    config: PretrainConfig, index: Index, share: int, threads: int, together: int, on_gpu: bool, fed: bool
) -> dict[str, float]:
    """Runs `_measure_updates` on `together` Ray Train workers."""
    # Imported here: it loads Ray Train, which is not needed if the rates are given.
    from cpcscale.cluster.rehearsal import run_on_workers

    train = replace(config.train, batch=share * together, lanes=share * together, threads=threads)
    # The order has no say in the rate, and runs of a speaker may not fit so few rows.
    recipe = replace(config, train=train, workers=together, order=OrderConfig())
    return run_on_workers(partial(_measure_updates, recipe, index, fed), together, on_gpu)


def _measure_updates(recipe: PretrainConfig, index: Index, fed: bool, ranks: Ranks) -> dict[str, float]:
    """{update_s: mean seconds of an update of all workers, beside: audio a second that a core decoded meanwhile}.

    With `fed` the batches come from the feed, whose longest wait is subtracted; without it they are in memory and
    `beside` is 0. Means, not medians: work that takes the cores now and then is part of a run.
    """
    storage.configure(recipe.storage)
    updates, count = UpdateBench(recipe, index, ranks, _UPDATES), _UPDATES
    if fed:
        count = max(_UPDATES, math.ceil(_FED_S / _most_s(ranks, updates.measure_feed().wall_s) * _UPDATES))
    updating_s = spent_s = audio_s = decoding_s = 0.0
    made = 0
    while updating_s < _UPDATING_S and spent_s < 2 * _UPDATING_S:
        row = updates.measure_feed(count) if fed else updates.measure_memory()
        # When one worker waits for its feed, the others wait for that worker.
        waited_s = row.stalls.exposed_s["store"] + row.stalls.exposed_s["decode"]
        wall_s = _most_s(ranks, row.wall_s)
        updating_s += wall_s - _most_s(ranks, waited_s)
        spent_s += wall_s
        made += row.updates
        audio_s += row.amount
        decoding_s += row.stalls.exposed_s["decode"] + row.stalls.hidden_s["decode"]
    return {"update_s": updating_s / made, "beside": audio_s / decoding_s if fed else 0.0}


def _most_s(ranks: Ranks, seconds: float) -> float:
    return float(ranks.max(torch.tensor(seconds, dtype=torch.float64)))


def _decoding(config: PretrainConfig, index: Index, windows: np.ndarray) -> float:
    """Seconds of audio a second that one thread decodes from the run's shards, without waiting for disk or store."""
    spec = replace(config.feed, prefetch=1)
    order = RunOrder(windows, config.seed, lanes=1, batch=1)
    feed = ThreadFeed(FeedSource(index, order, config.window, spec, config.measures), [0], 0, threads=1)
    try:
        audio_s = spent_s = 0.0
        while spent_s < _DECODING_S:
            audio_s += feed.next().audio_s
            seconds = feed.seconds()
            spent_s = sum(seconds.get(name, 0.0) for name in ("verify", "decode", "measure", "collate"))
        return audio_s / spent_s
    finally:
        feed.close()
