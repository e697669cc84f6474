"""Everything that decides what a cross-validated recogniser computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cpcscale import config
from cpcscale.emotion.cache import AudioCacheConfig
from cpcscale.emotion.classic import SVMConfig
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.fit import FitConfig
from cpcscale.emotion.prosody import KINDS as PROSODY_KINDS
from cpcscale.emotion.recogniser import RecogniserConfig
from cpcscale.emotion.splits import parse_protocol
from cpcscale.errors import UserError
from cpcscale.model.cpc import Layer
from cpcscale.train.recipe import Recipe

# The controls, the classic systems, then the paper's four and log-mel.
CLASSIC = ("functionals", "prosody")
FRAMES = ("mfcc", "logmel")
SYSTEMS = ("mean", "random", *CLASSIC, *FRAMES, "raw", "minicpc", "precpc")
HEADS = ("auto", "attention", "svr")


@dataclass(kw_only=True)
class ProtocolConfig:
    """Who is trained on, chosen by and tested; see splits.py."""

    # speakers5 and the like: folds of whole speakers. loso: leave one session (or speaker) out. official: the owner's
    # partitions. random5: folds of utterances, tagged LEAKY.
    split: str = "speakers5"
    dev_share: float = 0.2  # of the speakers that a fold does not test: they choose the epoch
    seed: int = 0  # of the folds alone, so that several seeds of a system share them

    def __post_init__(self) -> None:
        parse_protocol(self.split)
        if not 0 < self.dev_share < 1:
            raise UserError(f"protocol.dev_share={self.dev_share} is not between 0 and 1: it is a share of speakers")


@dataclass(kw_only=True)
class PretrainedConfig:
    """The CPC network under the recogniser."""

    # The run_dir of a pretraining, or one of its checkpoints. precpc needs it; raw, random and minicpc take the
    # architecture from it, where it is given, so that all systems are one network.
    checkpoint: str = ""
    frozen: bool = True  # precpc and minicpc; raw is always trained, random never
    learning_rate: float = 1e-4  # of the encoder where it is pretrained and then trained on
    # What the recogniser hears: the context c (the paper), the latents z, or both side by side, which its first layer
    # mixes as it learns.
    layer: Layer = "c"

    def __post_init__(self) -> None:
        config.at_least(0, **{"encoder.learning_rate": self.learning_rate})


@dataclass(kw_only=True)
class EmotionRecipe:
    """One system on one corpus under one protocol."""

    system: str = "precpc"  # mean, random, functionals, prosody, mfcc, logmel, raw, minicpc, precpc
    name: str = ""  # of the tracked run; empty: the system
    seed: int = 0  # keys the first weights, the order of the batches and dropout
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    encoder: PretrainedConfig = field(default_factory=PretrainedConfig)
    # attention: the paper's recogniser. svr: support vector regression on mean, deviation and percentiles over time.
    # auto: svr for functionals and prosody, which have no frames, else attention.
    head: str = "auto"
    recogniser: RecogniserConfig = field(default_factory=RecogniserConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    svm: SVMConfig = field(default_factory=SVMConfig)
    svm_search: bool = True  # svr: the config is the best of 16 on inner folds of the training speakers, not `svm`
    # attention: rate, decay, dropout and pooling are the best of 16 (4 under a trained encoder) on each fold's
    # development speakers, not those of `fit` and `recogniser`; it takes about three times as long.
    fit_search: bool = False
    classify: bool = False  # also a support vector classification of the corpus's categories, from the same features
    prosody: str = "auto"  # egemaps where the extra opensmile is installed, else pitch
    audio_cache: AudioCacheConfig = field(default_factory=AudioCacheConfig)
    # minicpc is pretrained by it on each fold's training speakers; its `model` is the network where no checkpoint is.
    pretraining: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        config.choose("system", self.system, SYSTEMS)
        config.choose("head", self.head, HEADS)
        config.choose("prosody", self.prosody, PROSODY_KINDS)
        if self.head == "attention" and self.system in CLASSIC:
            raise UserError(f"head=attention hears frames, and system={self.system} has none: use head=auto")
        if self.fit_search and self.regressor != "attention":
            raise UserError(
                f"fit_search=true chooses a config of the attention head, and system={self.system} with "
                f"head={self.head} has none (svr has svm_search): leave it out"
            )
        if self.trains_encoder and (self.head == "svr" or self.classify):
            key = "head=svr" if self.head == "svr" else "classify=true"
            raise UserError(
                f"{key} takes features that stay, and this encoder is trained: use encoder.frozen=true (for raw, which "
                "is always trained, another system), or leave it out"
            )

    @property
    def trains_encoder(self) -> bool:
        """Whether the fit moves the encoder's weights too."""
        return self.system == "raw" or (self.system in ("minicpc", "precpc") and not self.encoder.frozen)

    @property
    def encoder_rate(self) -> float:
        """The learning rate of the encoder: from scratch the recogniser's own, else `encoder.learning_rate`."""
        return self.fit.learning_rate if self.system == "raw" else self.encoder.learning_rate

    @property
    def regressor(self) -> Literal["mean", "svr", "attention"]:
        """What predicts: a constant, a support vector regression or the recogniser of the paper."""
        if self.system == "mean":
            return "mean"
        return "svr" if self.head == "svr" or self.system in CLASSIC else "attention"
