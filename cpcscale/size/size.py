"""`cpcscale size`: a pretraining's config and its machines -> what it takes, before anything is taken."""

from __future__ import annotations

from cpcscale import storage
from cpcscale.cluster.data import open_data
from cpcscale.cluster.spec import PretrainConfig, absolute
from cpcscale.size.machines import Machines
from cpcscale.size.plan import Sizes, sizes
from cpcscale.size.rates import Rates, needs_gpu, rates
from cpcscale.stream.counts import shard_windows
from cpcscale.stream.order import Order


def size(config: PretrainConfig, machines: Machines, given: Rates) -> Sizes:
    """The sizes of a run from its first step on, on these machines; rates of 0 are measured, on this one.

    Writes nothing. Raises UserError for workers without a lane, without shards, and for the rate of GPUs where there is
    none to measure.
    """
    config = absolute(config)
    storage.configure(config.storage)
    workers = machines.workers(config)
    if machines.gpus_per_node:
        needs_gpu(config, given)
    data = open_data(config)
    windows = shard_windows(data.train, config.window)
    order = Order(windows, config.seed, config.train.lanes, config.train.batch)
    speed = rates(config, data.train, windows, workers, machines.on_node(config), machines.cores_per_node, given)
    return sizes(config, data, order, machines, speed)
