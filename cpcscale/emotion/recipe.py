"""Everything that decides what a cross-validated recogniser computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpcscale import config
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.fit import FitConfig
from cpcscale.emotion.recogniser import RecogniserConfig
from cpcscale.errors import UserError
from cpcscale.train.recipe import Recipe

# The controls, then the paper's four systems.
SYSTEMS = ("mean", "random", "mfcc", "raw", "minicpc", "precpc")


@dataclass(kw_only=True)
class ProtocolConfig:
    """Who is trained on, chosen by and tested: speaker-disjoint folds."""

    folds: int = 5
    dev_share: float = 0.2  # of the speakers that a fold does not test: they choose the epoch
    seed: int = 0  # of the folds alone, so that several seeds of a system share them

    def __post_init__(self) -> None:
        config.at_least(2, **{"protocol.folds": self.folds})
        if not 0 < self.dev_share < 1:
            raise UserError(f"protocol.dev_share={self.dev_share} is not between 0 and 1: it is a share of speakers")

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"speakers{self.folds}"


@dataclass(kw_only=True)
class PretrainedConfig:
    """The CPC network under the recogniser."""

    # The run_dir of a pretraining, or one of its checkpoints. precpc needs it; raw, random and minicpc take the
    # architecture from it, where it is given, so that all systems are one network.
    checkpoint: str = ""
    frozen: bool = True  # precpc and minicpc; raw is always trained, random never
    learning_rate: float = 1e-4  # of the encoder where it is pretrained and then trained on

    def __post_init__(self) -> None:
        config.at_least(0, **{"encoder.learning_rate": self.learning_rate})


@dataclass(kw_only=True)
class EmotionRecipe:
    """One system on one corpus under one protocol."""

    system: str = "precpc"  # mean, random, mfcc, raw, minicpc, precpc
    name: str = ""  # of the tracked run; empty: the system
    seed: int = 0  # keys the first weights, the order of the batches and dropout
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    encoder: PretrainedConfig = field(default_factory=PretrainedConfig)
    recogniser: RecogniserConfig = field(default_factory=RecogniserConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    # minicpc is pretrained by it on each fold's training speakers; its `model` is the network where no checkpoint is.
    pretraining: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        config.choose("system", self.system, SYSTEMS)

    @property
    def trains_encoder(self) -> bool:
        """Whether the fit moves the encoder's weights too."""
        return self.system == "raw" or (self.system in ("minicpc", "precpc") and not self.encoder.frozen)

    @property
    def encoder_rate(self) -> float:
        """The learning rate of the encoder: from scratch the recogniser's own, else `encoder.learning_rate`."""
        return self.fit.learning_rate if self.system == "raw" else self.encoder.learning_rate
