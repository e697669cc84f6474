"""What a pretraining takes of a cluster: waited for or refused where there is too little."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from cpcscale.cluster import session
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError

_LOOK_EVERY_S = 1.0


class TooSmallError(UserError):
    """The cluster lacks what other nodes could bring: `lack` says what, `way_out` what else to do."""

    def __init__(self, lack: str, way_out: str) -> None:
        super().__init__(f"{lack}: {way_out}")
        self.lack, self.way_out = lack, way_out


def wait_for_capacity(config: PretrainConfig, say: Callable[[str], None]) -> bool:
    """`check_capacity` once the cluster has room, for which it waits `start_wait_s` at most. Nobody joins a Ray of our own, so
    there it waits for nothing."""
    try:
        return check_capacity(config)
    except TooSmallError as refusal:
        if not session.joins_cluster():
            raise
        if not config.start_wait_s:
            way_out = f"{refusal.way_out}; or have the start wait for nodes that are to come, by start_wait_s"
            raise TooSmallError(refusal.lack, way_out) from None
        say(f"{refusal.lack}; waiting {config.start_wait_s:g} s at most for other nodes (start_wait_s)")
    # It brings much that a cluster with room does not need.
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + config.start_wait_s
    try:
        while True:
            # Again and again: another driver's request takes its place. Where no autoscaler runs, nobody hears it.
            request_resources(bundles=_bundles(config))
            time.sleep(_LOOK_EVERY_S)
            try:
                return check_capacity(config)
            except TooSmallError as refusal:
                if time.monotonic() >= deadline:
                    waited = f"{refusal.lack}, and not enough other nodes came in start_wait_s={config.start_wait_s:g}"
                    raise TooSmallError(waited, refusal.way_out) from None
    finally:
        # Ray Train asks for itself from here on; nodes that nobody uses may go.
        request_resources(bundles=[])


def _bundles(config: PretrainConfig) -> list[dict[str, float]]:
    """What `check_capacity` asks of a cluster like this one, a part for each that must be on one node."""
    import ray

    feed, probing = config.feed, _probe_cores(config)
    gpus, workers = _start(config, ray.cluster_resources())
    feeder = {"CPU": float(feed.actor_cpus)} | ({feed.actor_resource: 1.0} if feed.actor_resource else {})
    worker = {"GPU" if gpus or config.device == "cuda" else "CPU": 1.0}
    return [worker] * workers + [feeder] * _feeders(config, workers) + ([{"CPU": float(probing)}] if probing else [])


def _start(config: PretrainConfig, have: Mapping[str, float]) -> tuple[bool, int]:
    """(whether each worker gets a GPU, how many workers will be started) on a cluster that has these resources."""
    gpus = int(have.get("GPU", 0))
    use_gpu = config.device != "cpu" and gpus >= config.least_workers
    return use_gpu, min(config.most_workers, gpus) if use_gpu else config.least_workers


def check_capacity(config: PretrainConfig) -> bool:
    """Whether each worker gets a GPU. Raises TooSmallError for a cluster that is too small for the least workers, and
    UserError for what is not waited for."""
    import ray

    have = ray.cluster_resources()
    use_gpu, workers = _start(config, have)
    if config.device == "cuda" and not use_gpu:
        raise TooSmallError(
            f"device=cuda: {workers} worker(s) need a GPU each and the cluster has {have.get('GPU', 0):g}",
            "lower workers, or use cpu",
        )
    if config.train.precision == "fp16" and not use_gpu:
        raise UserError(
            "train.precision=fp16 needs a GPU for every worker and there is none: use fp32 or bf16, or, where GPUs are "
            "to come, device=cuda with start_wait_s"
        )
    feeders, feeding, probing = _feeders(config, workers), feeder_cores(config, workers), _probe_cores(config)
    if have.get("CPU", 0) < feeding + probing + workers * (not use_gpu):
        beside = {"their feeders": feeding, "the probe": probing}
        more = "".join(f", and {who} {count} more," for who, count in beside.items() if count)
        raise TooSmallError(
            f"workers={config.workers}: {workers} need a core each{more} and the cluster has {have.get('CPU', 0):g}",
            f"lower workers or feed.actors{', or set probe.cpus=0' if probing else ''}",
        )
    named = config.feed.actor_resource
    if feeders and named and have.get(named, 0) < feeders:
        raise TooSmallError(
            f"feed.actor_resource={named}: {feeders} feeder(s) need a unit each and the cluster has "
            f"{have.get(named, 0):g}",
            f"start nodes with --resources='{{\"{named}\": N}}'",
        )
    if feeders and not named and config.elastic and not use_gpu:
        raise UserError(
            f"workers={config.workers} take every core that is free, and feed.kind=actors would find none: name nodes "
            "of their own by feed.actor_resource, fix the number of workers, or use feed.kind=threads"
        )
    if probing and config.elastic and not use_gpu:
        raise UserError(
            f"workers={config.workers} take every core that is free, and the probe would find none: set probe.cpus=0 "
            "to let it have what they leave, or fix the number of workers"
        )
    return use_gpu


def extra_cores(config: PretrainConfig, workers: int) -> int:
    """The cores that are taken beside those of so many workers: by feeder actors and by the probe."""
    return feeder_cores(config, workers) + _probe_cores(config)


def feeder_cores(config: PretrainConfig, workers: int) -> int:
    """The cores that feeder actors take beside so many workers."""
    return _feeders(config, workers) * config.feed.actor_cpus


def _probe_cores(config: PretrainConfig) -> int:
    return config.probe.cpus if config.probe.is_on else 0


def _feeders(config: PretrainConfig, workers: int) -> int:
    return workers * config.feed.actors if config.feed.kind == "actors" else 0
