"""Pretraining on Ray Train: checks, terminal and tracker in the driver, one loop in each worker."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.cluster import pack as packing
from cpcscale.cluster import session
from cpcscale.cluster.console import Console
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.shards import cache
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.pack import HELDOUT, TRAIN, UNSEEN, PackConfig
from cpcscale.shards.packing.sources import find_sources
from cpcscale.storage import StorageConfig
from cpcscale.stream.counts import shard_windows
from cpcscale.stream.lane import served
from cpcscale.tracking.tracker import Tracker, TrackingConfig, environment_tags
from cpcscale.train import checkpoint, resume
from cpcscale.train.checkpoint import Restored
from cpcscale.train.lease import Lease, LeaseConfig, free, hold
from cpcscale.train.ledger import Ledger
from cpcscale.train.loop import Data, thread_feed
from cpcscale.train.loop import pretrain as train
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe

log = logging.getLogger(__name__)

_RAY = "ray-"


@dataclass(kw_only=True)
class DataConfig:
    """Where the speech is."""

    # A folder that `cpcscale pack` made: `train` is learned from, `heldout` and `unseen` are scored.
    shards: str = "runs/shards"
    # Audio to pack into `shards` first, when there is no shard set yet; empty: none.
    audio: str = ""
    # A run that goes on with a set to which shards were appended lets them in, at the next edge of an epoch.
    append: bool = False
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass(kw_only=True)
class PretrainConfig(Recipe):
    """A pretraining run: the recipe, its data and where it runs."""

    name: str = "pretrain"
    # The folder (or s3:// prefix) of the run; the same folder goes on with it.
    run_dir: str = "runs/pretrain"
    workers: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Restarts of the worker group after a worker died, before the run fails.
    max_failures: int = 3
    data: DataConfig = field(default_factory=DataConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.at_least(1, workers=self.workers)
        configs.at_least(0, max_failures=self.max_failures)
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the run")
        served(self.train.lanes, 0, self.workers)


def pretrain(config: PretrainConfig, *, take_over: bool = False) -> dict[str, Any]:
    """Runs or resumes a pretraining and returns its summary: that of train.loop.pretrain, with run_id and run_dir.

    Everything a user can get wrong is refused here, before a worker starts or a file is written; so is a run that
    another driver holds and that lives, unless `take_over`. Raises OvertakenError when another one takes this run over.
    """
    config = _absolute(config)
    storage.configure(config.storage)
    folder = storage.local_path(config.run_dir)
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir={storage.shown(config.run_dir)} is a file: name a folder for the run")
    ledger = Ledger(config.run_dir)
    restored = checkpoint.newest(ledger, ledger.head())
    origin = _origin(config, restored)
    # A set that is there is refused before Ray starts, one that is packed first after it.
    data = None if config.data.audio else _checked_data(config, restored)
    before = free(ledger, take_over=take_over, say=_say)
    session.connect(config.workers + feeder_cores(config))
    use_gpu = _use_gpu(config)
    if data is None:
        _pack_first(config)
        data = _checked_data(config, restored)
    gone = before.holder.id if before.holder else ""
    with hold(config.run_dir, config.lease, take_over=take_over, say=_say, gone=gone) as lease:
        return _tracked(config, data.train.fingerprint, origin, use_gpu, lease)


def _say(text: str) -> None:
    note(f"pretrain: {text}")


def _origin(config: PretrainConfig, restored: Restored | None) -> dict[str, str]:
    """Tags that say whose weights a new run begins with; none for a run from scratch, or that goes on."""
    begun = resume.origin(restored, config)
    if not begun:
        return {}
    return {f"cpcscale.init_{name}": str(begun[1][name]) for name in ("url", "step", "fingerprint")}


def _tracked(
    config: PretrainConfig, fingerprint: str, origin: Mapping[str, str], use_gpu: bool, lease: Lease
) -> dict[str, Any]:
    own = {"cpcscale.config_hash": configs.digest(config), "cpcscale.fingerprint": fingerprint}
    tracker = Tracker.start(
        config.tracking,
        kind="pretrain",
        name=config.name,
        run_dir=config.run_dir,
        tags=environment_tags() | own | dict(origin),
        params=configs.flat(config),
        allowed=lease.held,
    )
    status = "FAILED"
    try:
        summary = _fit(config, fingerprint, use_gpu, tracker, lease.id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        # The tracked run is another driver's when this one was overtaken.
        if lease.held(now=True):
            tracker.finish(status)
    return {**summary, "run_id": tracker.run_id, "run_dir": config.run_dir}


def _fit(config: PretrainConfig, fingerprint: str, use_gpu: bool, tracker: Tracker, holder: str) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cpcscale.cluster.mailbox import Delivery, Mailbox

    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    # A driver that was overtaken may be at work in its own still.
    ray_folder = storage.join(config.run_dir, f"{_RAY}{holder}")
    _remove_ray_folders(config.run_dir)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config, "mailbox": mailbox, "fingerprint": fingerprint, "holder": holder},
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name="train", storage_path=ray_folder, failure_config=FailureConfig(max_failures=config.max_failures)
        ),
    )
    console = Console(tracker)
    interrupts = signal.getsignal(signal.SIGINT)
    try:
        with Delivery(mailbox, console):
            trainer.fit()
    except SystemExit:
        # Ray Train answers Ctrl-C by exiting with status 0; for us it is an interrupted run like any other.
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError:
        _, error = ray.get(mailbox.outcome.remote())
        if error:
            raise UserError(error) from None
        raise
    finally:
        # Ray Train's handler stays installed and would end the process at a later Ctrl-C, whatever runs then.
        signal.signal(signal.SIGINT, interrupts)
        console.close()
        storage.remove(ray_folder)
    summary, error = ray.get(mailbox.outcome.remote())
    if error:
        raise UserError(error)
    return dict(summary)


def _remove_ray_folders(run_dir: str) -> None:
    """Removes what drivers that were killed have left of Ray Train's."""
    local = storage.local_path(run_dir)
    names = [path.name for path in local.iterdir()] if local else storage.list_files(run_dir)
    for name in {name.partition("/")[0] for name in names if name.startswith(_RAY)}:
        storage.remove(storage.join(run_dir, name))


def _work(spec: dict[str, Any]) -> None:
    """One worker: its ranks, its data, the loop. A user's error is left with the driver and not tried again."""
    import ray
    from ray.train.torch import get_device

    from cpcscale.cluster.feeders import actor_feed
    from cpcscale.cluster.mailbox import MailboxObserver

    config, mailbox = spec["config"], spec["mailbox"]
    _, error = ray.get(mailbox.outcome.remote())
    if error:
        return
    storage.configure(config.storage)
    ranks = Ranks.current(get_device())
    make_feed = partial(actor_feed, config.storage) if config.feed.kind == "actors" else thread_feed
    try:
        data = _open_data(config)
        if data.train.fingerprint != spec["fingerprint"]:
            raise UserError(
                f"the index at {data.train.base} is another version than when this run was started: start the same "
                "command again to take it over"
            )
        observer = MailboxObserver(mailbox)
        summary = train(config, data, config.run_dir, ranks, observer, make_feed, holder=spec["holder"])
    except UserError as failure:
        ray.get(mailbox.fail.remote(str(failure)))
        raise
    if ranks.first:
        ray.get(mailbox.finish.remote(summary))


def _open_data(config: PretrainConfig) -> Data:
    """The shard sets; raises UserError when there are none."""
    base = config.data.shards
    if storage.exists(storage.join(base, MARKER)):
        return Data(Index.load(base), {}, config.data.append)
    if not storage.exists(storage.join(base, TRAIN, MARKER)):
        raise UserError(
            f"no shard set at data.shards={storage.shown(base)}: make one with `cpcscale pack AUDIO "
            f"{storage.shown(base)}`, or set data.audio to the folder of audio to pack into it"
        )
    sets = {name: storage.join(base, name) for name in (HELDOUT, UNSEEN)}
    present = {name: Index.load(url) for name, url in sets.items() if storage.exists(storage.join(url, MARKER))}
    return Data(Index.load(storage.join(base, TRAIN)), present, config.data.append)


def _pack_first(config: PretrainConfig) -> None:
    """Packs `data.audio` where there is no shard set yet."""
    base = config.data.shards
    if not config.data.audio or any(storage.exists(storage.join(base, *at, MARKER)) for at in ((), (TRAIN,))):
        return
    sources = find_sources(config.data.audio, config.data.pack)
    note(f"pretrain: no shard set at {storage.shown(base)} yet, packing {storage.shown(config.data.audio)} into it")
    packing.pack_sources(sources, base, config.data.pack)


def _checked_data(config: PretrainConfig, restored: Restored | None) -> Data:
    """The shard sets; what the workers would refuse is refused before they start."""
    data = _open_data(config)
    windows = shard_windows(data.train, config.window, config.feed.cache.path)
    resume.order_of(resume.position(restored, config, data.train, windows, data.append), config, windows)
    largest = int(max(data.train.shards["bytes"].to_numpy(), default=0))
    # A worker checks again for all the lanes of its node.
    cache.holds_lanes(config.feed.cache, data.train.base, -(-config.train.lanes // config.workers), largest)
    return data


def _use_gpu(config: PretrainConfig) -> bool:
    import ray

    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    if config.device == "cuda" and gpus < config.workers:
        raise UserError(
            f"device=cuda asks for {config.workers} GPUs and the cluster has {gpus}: lower workers, or use cpu"
        )
    use_gpu = config.device != "cpu" and gpus >= config.workers
    if config.train.precision == "fp16" and not use_gpu:
        raise UserError("train.precision=fp16 needs a GPU for every worker and there is none: use fp32 or bf16")
    feeding = feeder_cores(config)
    needed = feeding + config.workers * (not use_gpu)
    if have.get("CPU", 0) < needed:
        feeders = f", and their feeders {feeding} more," if feeding else ""
        raise UserError(
            f"workers={config.workers} need a core each{feeders} and the cluster has {have.get('CPU', 0):g}: lower "
            "workers or feed.actors"
        )
    named = config.feed.actor_resource if feeding else ""
    if named and have.get(named, 0) < config.workers * config.feed.actors:
        raise UserError(
            f"feed.actor_resource={named}: {config.workers * config.feed.actors} feeders need a unit each and the "
            f"cluster has {have.get(named, 0):g}: start nodes with --resources='{{\"{named}\": N}}'"
        )
    return use_gpu


def feeder_cores(config: PretrainConfig) -> int:
    """The cores that feeder actors take beside the workers."""
    feed = config.feed
    return config.workers * feed.actors * feed.actor_cpus if feed.kind == "actors" else 0


def _absolute(config: PretrainConfig) -> PretrainConfig:
    """Local paths made absolute: workers stand in other folders."""
    train = replace(
        config.train,
        log_window_ids=storage.absolute(config.train.log_window_ids) if config.train.log_window_ids else "",
    )
    data = replace(
        config.data,
        shards=storage.absolute(config.data.shards),
        audio=storage.absolute(config.data.audio) if config.data.audio else "",
    )
    # Ray unpacks what `ray job submit --working-dir` sends under such a name, and throws it away in the end.
    if "_ray_pkg_" in storage.absolute(config.run_dir):
        log.warning(
            "run_dir=%s lies in the job's temporary folder: name an absolute path or s3:// to keep it", config.run_dir
        )
    init_from = storage.absolute(config.init_from) if config.init_from else ""
    return replace(config, run_dir=storage.absolute(config.run_dir), init_from=init_from, train=train, data=data)
