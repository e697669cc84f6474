"""The config of a pretraining run: the recipe, the data, the cluster, probes and tracking."""

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
from cpcscale.stream.lanes import lanes_of_rank
from cpcscale.tracking.store import TrackingConfig
from cpcscale.train.recipe import Recipe


@dataclass(kw_only=True)
class ProbeConfig:
    """Probes: checkpoints are scored on a labelled corpus while the run goes on; off without probe.corpus.path."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    # Every n-th checkpoint is probed; the last one of the run always is.
    every: int = 1
    # The protocol of the folds: speakers5, loso, official or random5 (LEAKY).
    split: str = "speakers5"
    # svr: support vector regression, with fixed settings, on mean, deviation and percentiles of c over each utterance.
    head: Literal["svr"] = "svr"
    # Cores that the probe reserves during the run; 0: none, it uses what others leave idle.
    cpus: int = 1
    audio_cache: AudioCacheConfig = field(default_factory=AudioCacheConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        configs.at_least(1, **{"probe.every": self.every})
        configs.at_least(0, **{"probe.cpus": self.cpus})
        parse_protocol(self.split)

    @property
    def is_on(self) -> bool:
        """Whether a corpus to probe on is given."""
        return bool(self.corpus.path)


log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig:
    """The speech of a pretraining."""

    # A folder made by `cpcscale pack`: the run trains on `train`, validations score `heldout` and `unseen`.
    shards: str = field(default="runs/shards", metadata=configs.PLACE)
    # Audio that is packed into `shards` first if there is no shard set yet; empty: none.
    audio: str = field(default="", metadata=configs.PLACE)
    # Whether a resumed run uses shards that were appended to the set meanwhile, from the next epoch on.
    append: bool = False
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass(kw_only=True)
class PretrainConfig(Recipe):
    """A pretraining run: the recipe, its data and where it runs."""

    # The name of the run in MLflow.
    name: str = field(default="pretrain", metadata=configs.PLACE)
    # The folder (or s3:// prefix) of the run; a start with the same folder resumes the run.
    run_dir: str = field(default="runs/pretrain", metadata=configs.PLACE)
    # Whether the encoder is logged to MLflow as a model when the run is finished: final, or none.
    publish: Literal["none", "final"] = field(default="none", metadata=configs.PLACE)
    # The number of workers, or [least, most]: then as many as fit, chosen again when a worker dies or a node joins.
    workers: Any = field(default=1, metadata=configs.PLACE)
    # auto: a GPU for each worker if the cluster has enough of them at the start, else cores.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Seconds that a start waits for missing nodes, which it requests from the cluster's autoscaler; 0: a start without
    # enough nodes fails at once. To wait for GPUs, set device=cuda too.
    start_wait_s: float = field(default=0.0, metadata=configs.PLACE)
    # Restarts after a worker died or failed before the run fails; -1: no limit. A node that is taken away after an
    # announcement does not count.
    max_failures: int = field(default=3, metadata=configs.PLACE)
    # With [least, most]: seconds between checks whether the cluster has grown. Each growth repeats the steps since the
    # last checkpoint.
    grow_every_s: float = field(default=60.0, metadata=configs.PLACE)
    # Seconds that workers have for a last checkpoint when the driver is asked to stop (SIGTERM).
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
        lanes_of_rank(self.train.lanes, 0, self.most_workers)
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
        """The smallest number of workers with which the run continues."""
        return int(self.workers[0] if self.elastic else self.workers)

    @property
    def most_workers(self) -> int:
        """The largest number of workers."""
        return int(self.workers[1] if self.elastic else self.workers)


def _workers(value: Any) -> int | list[int]:
    """A valid value of `workers`: a number or [least, most]. Raises UserError for any other."""
    bounds = value if isinstance(value, list) else [value, value]
    if len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
        raise UserError(f"workers={value} is neither a number nor [least, most]: write 4, or [2, 8]")
    configs.at_least(1, workers=bounds[0])
    if bounds[0] > bounds[1]:
        raise UserError(f"workers={value} has a minimum above its maximum: write [{bounds[1]}, {bounds[0]}]")
    return value if isinstance(value, list) else bounds[0]


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The config with absolute local paths, since workers run in other folders."""
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
