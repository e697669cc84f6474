"""The `probe:` section of a pretraining: the labelled set that its checkpoints are scored on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cpcscale import config as configs
from cpcscale.emotion.cache import AudioCacheConfig
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.splits import parse_protocol


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
