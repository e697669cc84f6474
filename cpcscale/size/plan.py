"""Estimates what a pretraining needs: time, cores for decoding, store, network and cache; and finds the bottleneck.

In each update a worker processes its share of the batch. Meanwhile cores decode, the store is read and gradients are
exchanged, all in parallel; the slowest of these is the bottleneck. Without GPUs, decoding takes cores from the update,
which is added up unless both were measured together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cpcscale import audio, storage
from cpcscale.cluster.pretrain_config import PretrainConfig, with_absolute_paths
from cpcscale.cluster.pretrain_data import open_data
from cpcscale.model.cost import network_cost
from cpcscale.shards.index import Index
from cpcscale.size.machines import Machines
from cpcscale.size.rates import Rates, check_gpu_rate, measure_rates
from cpcscale.stream import window
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train.resume import total_steps
from cpcscale.train.setup import Data


def run_size(config: PretrainConfig, machines: Machines, given: Rates) -> RunSize:
    """Estimates a whole run on these machines. Rates that are 0 in `given` are measured on this machine.

    Writes nothing. Raises UserError for workers without a lane, for missing shards, and when the rate of a GPU is
    neither given nor can be measured here.
    """
    config = with_absolute_paths(config)
    storage.configure(config.storage)
    workers = machines.workers(config)
    if machines.gpus_per_node:
        check_gpu_rate(config, given)
    data = open_data(config)
    windows = shard_windows(data.train, config.window)
    order = RunOrder(windows, config.seed, config.train.lanes, config.train.batch)
    speed = measure_rates(
        config, data.train, windows, workers, machines.workers_per_node(config), machines.cores_per_node, given
    )
    return _run_size(config, data, order, machines, speed)


_NUMBER_BYTES = 4
# Shares of an update's time: the backward pass takes twice as long as the forward pass, and hides the exchange.
_BACKWARD = 2 / 3
_FORWARD = 1 / 3
# Numbers in a checkpoint for each weight: the weight and Adam's two moments.
_COPIES = 3


@dataclass(frozen=True)
class SpeechSize:
    """The size of the training set; GB are decimal."""

    hours: float
    gb: float
    shards: int
    shards_per_lane: float
    windows: int
    steps_per_epoch: int


@dataclass(frozen=True)
class StoreReading:
    """What a node reads from an object store; all 0 on a local disk. MB and GB are decimal."""

    # While its cache fills, and once it is full.
    mb_per_s: float
    later_mb_per_s: float
    # The smallest cache that works, the limit of the cache, and the share of the set that fits it.
    cache_least_gb: float
    cache_gb: float
    cache_share: float


@dataclass(frozen=True)
class RunSize:
    """The estimate for a run. `steps_s` are the seconds of a step by part; `bottleneck` is the slowest part.

    MB are decimal.
    """

    speech: SpeechSize
    reading: StoreReading
    workers: int
    windows_per_worker: int
    lanes_per_node: int
    memory_mib: float
    update_audio_s_per_s: float
    decode_audio_s_per_s: float
    steps: int
    step_s: float
    steps_s: dict[str, float]
    bottleneck: str
    audio_s_per_s: float
    validation_s: float
    run_hours: float
    worker_hours: float
    # Needed to keep the updates supplied with data.
    decode_cores_per_node: float
    feeders_per_worker: int
    gradient_mb: float
    checkpoint_mb: float
    checkpoint_every_s: float


def _run_size(config: PretrainConfig, data: Data, order: RunOrder, machines: Machines, speed: Rates) -> RunSize:
    """Computes the estimate from measured or given rates; `order` is the order of the run's data."""
    workers, on_node, train = machines.workers(config), machines.workers_per_node(config), config.train
    # If workers do not divide the lanes, some have one lane more, and all wait for these.
    share = order.lanes.per_step * -(-train.lanes // workers)
    network = network_cost(config.model, config.window.samples, min(train.micro_batch or share, share))
    weights_mb = _NUMBER_BYTES * network.parameters.total / 1e6
    audio_s = share * _window_audio_s(data.train, config)
    decoding_s, updating_s = audio_s / speed.decode, share * config.window.seconds / speed.update
    update_s = updating_s
    if not machines.gpus_per_node and not speed.beside:
        update_s += decoding_s / max(1, machines.cores_per_node / on_node)
    parts = _parts(config, data.train, machines, audio_s, update_s, audio_s / (speed.beside or speed.decode)) | {
        # The exchange of gradients overlaps with the backward pass only.
        "network": _allreduce_s(weights_mb, machines, workers) / _BACKWARD
    }
    bottleneck = max(parts, key=lambda name: parts[name])
    step_s, steps = parts[bottleneck], total_steps(config, order)
    validation_s = _validation_audio_s(config, data, steps) / (workers * speed.update) * _FORWARD
    run_s = steps * step_s + validation_s
    return RunSize(
        speech=_speech(data.train, order, train.lanes),
        reading=_reading(config, data.train, machines.nodes, audio_s * on_node / step_s),
        workers=workers,
        windows_per_worker=share,
        lanes_per_node=-(-train.lanes // machines.nodes),
        memory_mib=network.memory_mib,
        update_audio_s_per_s=speed.update,
        decode_audio_s_per_s=speed.decode,
        steps=steps,
        step_s=step_s,
        steps_s=parts,
        bottleneck=bottleneck,
        audio_s_per_s=audio_s / share * train.batch * steps / run_s,
        validation_s=validation_s,
        run_hours=run_s / 3600,
        worker_hours=run_s / 3600 * workers,
        decode_cores_per_node=decoding_s / updating_s * on_node,
        feeders_per_worker=max(1, math.ceil(decoding_s / updating_s / config.feed.actor_cpus)),
        gradient_mb=weights_mb,
        checkpoint_mb=weights_mb * (_COPIES + bool(config.optim.ema_decay)),
        checkpoint_every_s=config.checkpoint.every_steps * step_s,
    )


def _parts(
    config: PretrainConfig, index: Index, machines: Machines, audio_s: float, updating_s: float, decoding_s: float
) -> dict[str, float]:
    """Seconds of a step for updating, decoding and reading the store on one node; the arguments are of one worker."""
    on_node = machines.workers_per_node(config)
    known = machines.store_mb_per_s and not storage.local_path(index.base)
    read_mb = audio_s * on_node * _mb(index) / index.duration_s
    return {
        "update": updating_s,
        "decode": decoding_s / _threads(config, machines, on_node),
        "store": read_mb / machines.store_mb_per_s if known else 0.0,
    }


def _speech(index: Index, order: RunOrder, lanes: int) -> SpeechSize:
    shards = index.shards.num_rows
    hours, gb = index.duration_s / 3600, _mb(index) / 1e3
    return SpeechSize(hours, gb, shards, shards / lanes, order.lanes.windows, order.lanes.steps_per_epoch)


def _reading(config: PretrainConfig, index: Index, nodes: int, audio_s_per_s: float) -> StoreReading:
    """The reading of a node that uses `audio_s_per_s`. Shards are shuffled over all lanes, so it may need any shard."""
    if storage.local_path(index.base):
        return StoreReading(0.0, 0.0, 0.0, 0.0, 0.0)
    cache, largest = config.feed.cache, int(index.shards["bytes"].to_numpy().max())
    share = min(1.0, cache.max_bytes / 1e6 / _mb(index))
    mb_per_s = audio_s_per_s * _mb(index) / index.duration_s
    least = cache.least_bytes(-(-config.train.lanes // nodes), largest)
    return StoreReading(mb_per_s, mb_per_s * (1 - share), least / 1e9, cache.max_bytes / 1e9, share)


def _window_audio_s(index: Index, config: PretrainConfig) -> float:
    """Mean seconds of audio in a window, without padding, over the utterances in the first part of the index."""
    _, samples = next(index.samples_by_part())
    counts = window.count(config.window, samples)
    used = np.where(samples < config.window.samples, samples, counts * config.window.samples)
    return float(used.sum() / counts.sum()) / audio.RATE_HZ


def _threads(config: PretrainConfig, machines: Machines, on_node: int) -> int:
    """The number of threads that decode for a worker."""
    feed = config.feed
    if feed.kind == "actors":
        return feed.actors * (feed.decode_threads or feed.actor_cpus)
    return feed.decode_threads or max(1, machines.cores_per_node // on_node // 2)


def _allreduce_s(gradient_mb: float, machines: Machines, workers: int) -> float:
    """Seconds of a ring all-reduce of the gradients between nodes: each card sends and receives them once."""
    if machines.nodes == 1:
        return 0.0
    return 8e-3 * gradient_mb * 2 * (workers - 1) / workers / machines.network_gbit_per_s


def _validation_audio_s(config: PretrainConfig, data: Data, steps: int) -> float:
    """Seconds of audio that all validations of the run score, the one at its end included."""
    visits = -(-steps // config.train.validate_every_steps)
    return sum(
        visits * min(config.train.validate_windows * config.window.seconds, index.duration_s)
        for index in data.validation.values()
    )


def _mb(index: Index) -> float:
    return float(index.shards["bytes"].to_numpy().sum()) / 1e6
