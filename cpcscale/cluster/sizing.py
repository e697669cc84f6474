"""What a pretraining takes of a cluster: refused where there is too little."""

from __future__ import annotations

from cpcscale.cluster.spec import PretrainConfig
from cpcscale.errors import UserError


def use_gpu(config: PretrainConfig) -> bool:
    """Whether each worker gets a GPU. Raises UserError for a cluster that is too small for the least workers."""
    import ray

    have = ray.cluster_resources()
    gpus, workers = int(have.get("GPU", 0)), config.least_workers
    if config.device == "cuda" and gpus < workers:
        raise UserError(
            f"device=cuda: {workers} worker(s) need a GPU each and the cluster has {gpus}: lower workers, or use cpu"
        )
    use_gpu = config.device != "cpu" and gpus >= workers
    if config.train.precision == "fp16" and not use_gpu:
        raise UserError("train.precision=fp16 needs a GPU for every worker and there is none: use fp32 or bf16")
    if use_gpu:
        # As many as will be started.
        workers = min(config.most_workers, gpus)
    feeders, feeding, probing = _feeders(config, workers), feeder_cores(config, workers), _probe_cores(config)
    if have.get("CPU", 0) < feeding + probing + workers * (not use_gpu):
        beside = {"their feeders": feeding, "the probe": probing}
        more = "".join(f", and {who} {count} more," for who, count in beside.items() if count)
        raise UserError(
            f"workers={config.workers}: {workers} need a core each{more} and the cluster has {have.get('CPU', 0):g}: "
            f"lower workers or feed.actors{', or set probe.cpus=0' if probing else ''}"
        )
    named = config.feed.actor_resource
    if feeders and named and have.get(named, 0) < feeders:
        raise UserError(
            f"feed.actor_resource={named}: {feeders} feeder(s) need a unit each and the cluster has "
            f"{have.get(named, 0):g}: start nodes with --resources='{{\"{named}\": N}}'"
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


def cores_beside(config: PretrainConfig, workers: int) -> int:
    """The cores that are taken beside those of so many workers: by feeder actors and by the probe."""
    return feeder_cores(config, workers) + _probe_cores(config)


def feeder_cores(config: PretrainConfig, workers: int) -> int:
    """The cores that feeder actors take beside so many workers."""
    return _feeders(config, workers) * config.feed.actor_cpus


def _probe_cores(config: PretrainConfig) -> int:
    return config.probe.cpus if config.probe.is_on else 0


def _feeders(config: PretrainConfig, workers: int) -> int:
    return workers * config.feed.actors if config.feed.kind == "actors" else 0
