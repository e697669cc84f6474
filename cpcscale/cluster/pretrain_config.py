"""The config of a pretraining: the recipe, its data and where it runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.protocol.splits import parse_protocol
from cpcscale.errors import UserError
from cpcscale.runs.lease import LeaseConfig
from cpcscale.shards.pack import PackConfig
from cpcscale.storage import StorageConfig
from cpcscale.stream.lanes import served
from cpcscale.tracking.tracker import TrackingConfig
from cpcscale.train.recipe import Recipe


@dataclass(kw_only=True)
class ProbeConfig:
    """Checkpoints scored on a labelled set beside the run: folds of whole speakers, support vector regression."""

    # No probe without its path.
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    # Every how manyth checkpoint; the run's last one is always probed.
    every: int = 1
    # The protocol of the folds: speakers5, loso, official or random5 (LEAKY).
    split: str = "speakers5"
    # Mean, deviation and percentiles of c over each utterance, into one config of support vector regression.
    head: Literal["svr"] = "svr"
    # Cores of the cluster that it takes for the length of the run; 0: none of its own, it has what others leave.
    cpus: int = 1
    audio_cache: AudioCacheConfig = field(default_factory=AudioCacheConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        configs.at_least(1, **{"probe.every": self.every})
        configs.at_least(0, **{"probe.cpus": self.cpus})
        parse_protocol(self.split)

    @property
    def is_on(self) -> bool:
        """Whether there is a set to probe on."""
        return bool(self.corpus.path)


log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig:
    """Where the speech is."""

    # A folder that `cpcscale pack` made: `train` is learned from, `heldout` and `unseen` are scored.
    shards: str = field(default="runs/shards", metadata=configs.PLACE)
    # Audio to pack into `shards` first, when there is no shard set yet; empty: none.
    audio: str = field(default="", metadata=configs.PLACE)
    # A run that goes on with a set to which shards were appended lets them in, at the next edge of an epoch.
    append: bool = False
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass(kw_only=True)
class PretrainConfig(Recipe):
    """A pretraining run: the recipe, its data and where it runs."""

    # What MLflow calls the run.
    name: str = field(default="pretrain", metadata=configs.PLACE)
    # The folder (or s3:// prefix) of the run; the same folder goes on with it.
    run_dir: str = field(default="runs/pretrain", metadata=configs.PLACE)
    # As many workers, or [least, most]: as many as the cluster has room for, anew when one dies or a node joins.
    workers: Any = field(default=1, metadata=configs.PLACE)
    # auto: a GPU for each worker where the cluster has enough of them now, else cores.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # The seconds that a start waits for nodes that it lacks, while it asks the cluster's autoscaler for them; 0: it is
    # refused at once. For GPUs that are to come, device=cuda.
    start_wait_s: float = field(default=0.0, metadata=configs.PLACE)
    # Restarts after a worker died or failed, before the run fails; -1: no limit. A node that is taken away as it was
    # announced does not count.
    max_failures: int = field(default=3, metadata=configs.PLACE)
    # With [least, most]: how often a cluster that has grown is looked at. Each growth costs the steps since the last
    # checkpoint.
    grow_every_s: float = field(default=60.0, metadata=configs.PLACE)
    # The longest that workers may take for a checkpoint when the driver is asked to stop (SIGTERM).
    stop_grace_s: float = field(default=60.0, metadata=configs.PLACE)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig, metadata=configs.PLACE)
    storage: StorageConfig = field(default_factory=StorageConfig, metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.workers = _workers(self.workers)
        configs.at_least(-1, max_failures=self.max_failures)
        configs.at_least(0, stop_grace_s=self.stop_grace_s, start_wait_s=self.start_wait_s)
        configs.at_least(1, grow_every_s=self.grow_every_s)
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the run")
        served(self.train.lanes, 0, self.most_workers)
        if self.checkpoint.best_by == "probe" and not self.probe.is_on:
            raise UserError(
                "checkpoint.best_by=probe without a probe: name a labelled corpus by probe.corpus.path, or use loss"
            )

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return isinstance(self.workers, list)

    @property
    def least_workers(self) -> int:
        """The workers without which it does not go on."""
        return int(self.workers[0] if self.elastic else self.workers)

    @property
    def most_workers(self) -> int:
        """The workers that it takes at most."""
        return int(self.workers[1] if self.elastic else self.workers)


def _workers(value: Any) -> int | list[int]:
    """`workers` as it is written, or refused."""
    bounds = value if isinstance(value, list) else [value, value]
    if len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
        raise UserError(f"workers={value} is neither a number nor two, [least, most]: write 4, or [2, 8]")
    configs.at_least(1, workers=bounds[0])
    if bounds[0] > bounds[1]:
        raise UserError(f"workers={value} has more workers at least than at most: write [{bounds[1]}, {bounds[0]}]")
    return value if isinstance(value, list) else bounds[0]


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
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
    labelled = replace(
        config.probe.corpus, path=storage.absolute(config.probe.corpus.path) if config.probe.is_on else ""
    )
    if storage.in_job_folder(config.run_dir):
        log.warning(
            "run_dir=%s lies in the job's temporary folder: name an absolute path or s3:// to keep it", config.run_dir
        )
    init_from = storage.absolute(config.init_from) if config.init_from else ""
    probe = replace(config.probe, corpus=labelled)
    return replace(
        config, run_dir=storage.absolute(config.run_dir), init_from=init_from, train=train, data=data, probe=probe
    )
