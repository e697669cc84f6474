"""The cores, GPUs and other resources that a pretraining needs: waits for them, or refuses to start without them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from cpcscale.cluster import session
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError

_POLL_S = 1.0


class TooSmallError(UserError):
    """The cluster lacks resources that more nodes could bring: `lack` names them, `way_out` says what else to do."""

    def __init__(self, lack: str, way_out: str) -> None:
        super().__init__(f"{lack}: {way_out}")
        self.lack, self.way_out = lack, way_out


def wait_for_capacity(config: PretrainConfig, say: Callable[[str], None]) -> bool:
    """`check_capacity`, after waiting up to `start_wait_s` for nodes if the cluster is too small.

    It does not wait on a Ray started by this process, which no node can join.
    """
    try:
        return check_capacity(config)
    except TooSmallError as refusal:
        if not session.joins_cluster():
            raise
        if not config.start_wait_s:
            way_out = f"{refusal.way_out}; or set start_wait_s to wait for nodes that are still to come"
            raise TooSmallError(refusal.lack, way_out) from None
        say(f"{refusal.lack}; waiting {config.start_wait_s:g} s at most for other nodes (start_wait_s)")
    # Imported here: it loads much that is not needed otherwise.
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + config.start_wait_s
    try:
        while True:
            # Repeated, because another driver's request replaces this one. Without an autoscaler it has no effect.
            request_resources(bundles=_bundles(config))
            time.sleep(_POLL_S)
            try:
                return check_capacity(config)
            except TooSmallError as refusal:
                if time.monotonic() >= deadline:
                    waited = f"{refusal.lack}, and not enough other nodes came in start_wait_s={config.start_wait_s:g}"
                    raise TooSmallError(waited, refusal.way_out) from None
    finally:
        # From here on Ray Train makes its own requests, and unused nodes may be released.
        request_resources(bundles=[])


def _bundles(config: PretrainConfig) -> list[dict[str, float]]:
    """The resources that `check_capacity` asks for, one bundle for each part that must be on one node."""
    import ray

    feed, probing = config.feed, _probe_cores(config)
    gpus, workers = _start(config, ray.cluster_resources())
    feeder = {"CPU": float(feed.actor_cpus)} | ({feed.actor_resource: 1.0} if feed.actor_resource else {})
    worker = {"GPU" if gpus or config.device == "cuda" else "CPU": 1.0}
    return [worker] * workers + [feeder] * _feeders(config, workers) + ([{"CPU": float(probing)}] if probing else [])


def _start(config: PretrainConfig, have: Mapping[str, float]) -> tuple[bool, int]:
    """(whether each worker gets a GPU, how many workers will be started) on a cluster with these resources."""
    gpus = int(have.get("GPU", 0))
    use_gpu = config.device != "cpu" and gpus >= config.least_workers
    return use_gpu, min(config.most_workers, gpus) if use_gpu else config.least_workers


def check_capacity(config: PretrainConfig) -> bool:
    """Whether each worker gets a GPU.

    Raises TooSmallError when the cluster is too small for the smallest number of workers, and UserError when more nodes
    would not help.
    """
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
            f"workers={config.workers} take every free core, so feed.kind=actors would find none: reserve nodes for "
            "feeders by feed.actor_resource, fix the number of workers, or use feed.kind=threads"
        )
    if probing and config.elastic and not use_gpu:
        raise UserError(
            f"workers={config.workers} take every free core, so the probe would find none: set probe.cpus=0 to let it "
            "share their cores, or fix the number of workers"
        )
    return use_gpu


def extra_cores(config: PretrainConfig, workers: int) -> int:
    """The cores that feeder actors and the probe take in addition to those of `workers` workers."""
    return feeder_cores(config, workers) + _probe_cores(config)


def feeder_cores(config: PretrainConfig, workers: int) -> int:
    """The cores that the feeder actors of `workers` workers take."""
    return _feeders(config, workers) * config.feed.actor_cpus


def _probe_cores(config: PretrainConfig) -> int:
    return config.probe.cpus if config.probe.is_on else 0


def _feeders(config: PretrainConfig, workers: int) -> int:
    return workers * config.feed.actors if config.feed.kind == "actors" else 0
