"""What a pretraining takes of its machines: time, cores that decode, store, network, cache; and what holds it up.

Every update a worker hears its share of the batch. In that time its device updates, cores decode, the store is read
and gradients travel, side by side; the slowest of them is the bottleneck. Without GPUs, decoding takes the cores that
the update would have had, unless both were measured side by side.
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
    """The sizes of a run from its first step on, on these machines; rates of 0 are measured, on this one.

    Writes nothing. Raises UserError for workers without a lane, without shards, and for the rate of GPUs where there is
    none to measure.
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
        config, data.train, windows, workers, machines.on_node(config), machines.cores_per_node, given
    )
    return _run_size(config, data, order, machines, speed)


_NUMBER_BYTES = 4
# Of the time of an update, which is 1 part forward and 2 parts backward: gradients travel beside the latter.
_BACKWARD = 2 / 3
_FORWARD = 1 / 3
# What a checkpoint has of each weight: itself and Adam's two moments.
_COPIES = 3


@dataclass(frozen=True)
class SpeechSize:
    """What there is to learn from; GB are decimal."""

    hours: float
    gb: float
    shards: int
    shards_per_lane: float
    windows: int
    steps_per_epoch: int


@dataclass(frozen=True)
class StoreReading:
    """What a node reads of an object store: while its cache fills, and once it is full; 0 on a local disk. MB and GB
    are decimal."""

    mb_per_s: float
    later_mb_per_s: float
    # The least that the cache needs, its limit, and the share of the set that stays in it.
    cache_least_gb: float
    cache_gb: float
    cache_share: float


@dataclass(frozen=True)
class RunSize:
    """`steps_s` are the seconds of a step that each part takes, of which `bottleneck` takes most;
    MB are decimal."""

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
    # What keeps the updates fed.
    decode_cores_per_node: float
    feeders_per_worker: int
    gradient_mb: float
    checkpoint_mb: float
    checkpoint_every_s: float


def _run_size(config: PretrainConfig, data: Data, order: RunOrder, machines: Machines, speed: Rates) -> RunSize:
    """`order` is that of the run. See the module."""
    workers, on_node, train = machines.workers(config), machines.on_node(config), config.train
    # Lanes that do not divide leave some workers with one more, and all wait for these.
    share = order.lanes.per_step * -(-train.lanes // workers)
    network = network_cost(config.model, config.window.samples, min(train.micro_batch or share, share))
    weights_mb = _NUMBER_BYTES * network.parameters.total / 1e6
    heard_s = share * _heard_s(data.train, config)
    decoding_s, updating_s = heard_s / speed.decode, share * config.window.seconds / speed.update
    crowded_s = updating_s
    if not machines.gpus_per_node and not speed.beside:
        crowded_s += decoding_s / max(1, machines.cores_per_node / on_node)
    parts = _parts(config, data.train, machines, heard_s, crowded_s, heard_s / (speed.beside or speed.decode)) | {
        # Beside the backward pass alone.
        "network": _travelling_s(weights_mb, machines, workers) / _BACKWARD
    }
    bottleneck = max(parts, key=lambda name: parts[name])
    step_s, steps = parts[bottleneck], total_steps(config, order)
    validation_s = _validated_s(config, data, steps) / (workers * speed.update) * _FORWARD
    run_s = steps * step_s + validation_s
    return RunSize(
        speech=_speech(data.train, order, train.lanes),
        reading=_reading(config, data.train, machines.nodes, heard_s * on_node / step_s),
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
        audio_s_per_s=heard_s / share * train.batch * steps / run_s,
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
    config: PretrainConfig, index: Index, machines: Machines, heard_s: float, updating_s: float, decoding_s: float
) -> dict[str, float]:
    """Seconds of a step that a node's devices, cores and store take; the arguments are of one worker."""
    on_node = machines.on_node(config)
    known = machines.store_mb_per_s and not storage.local_path(index.base)
    read_mb = heard_s * on_node * _mb(index) / index.duration_s
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
    """Of a node that hears so much. Every epoch shuffles the shards over the lanes, so any of them may be needed."""
    if storage.local_path(index.base):
        return StoreReading(0.0, 0.0, 0.0, 0.0, 0.0)
    cache, largest = config.feed.cache, int(index.shards["bytes"].to_numpy().max())
    share = min(1.0, cache.max_bytes / 1e6 / _mb(index))
    mb_per_s = audio_s_per_s * _mb(index) / index.duration_s
    least = cache.least_bytes(-(-config.train.lanes // nodes), largest)
    return StoreReading(mb_per_s, mb_per_s * (1 - share), least / 1e9, cache.max_bytes / 1e9, share)


def _heard_s(index: Index, config: PretrainConfig) -> float:
    """The mean audio of a window, whose padding is not heard; of the utterances in the first part of the index."""
    _, samples = next(index.samples_by_part())
    counts = window.count(config.window, samples)
    heard = np.where(samples < config.window.samples, samples, counts * config.window.samples)
    return float(heard.sum() / counts.sum()) / audio.RATE_HZ


def _threads(config: PretrainConfig, machines: Machines, on_node: int) -> int:
    """The threads that decode for a worker."""
    feed = config.feed
    if feed.kind == "actors":
        return feed.actors * (feed.decode_threads or feed.actor_cpus)
    return feed.decode_threads or max(1, machines.cores_per_node // on_node // 2)


def _travelling_s(gradient_mb: float, machines: Machines, workers: int) -> float:
    """Seconds that a ring all-reduce of the gradients takes between nodes, whose cards it passes once each way."""
    if machines.nodes == 1:
        return 0.0
    return 8e-3 * gradient_mb * 2 * (workers - 1) / workers / machines.network_gbit_per_s


def _validated_s(config: PretrainConfig, data: Data, steps: int) -> float:
    """Seconds of audio that the run's validations score; one stands at its end."""
    visits = -(-steps // config.train.validate_every_steps)
    return sum(
        visits * min(config.train.validate_windows * config.window.seconds, index.duration_s)
        for index in data.validation.values()
    )


def _mb(index: Index) -> float:
    return float(index.shards["bytes"].to_numpy().sum()) / 1e6
