"""The config of a cross-validated recogniser: every key that changes what is computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from cpcscale import config
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.degraded import parse_condition as parse_condition
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.encoders.layer import WaveNorm
from cpcscale.emotion.heads.attention import AttentionHeadConfig
from cpcscale.emotion.heads.svm import SVMConfig
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.protocol.splits import parse_protocol
from cpcscale.emotion.systems import SYSTEMS as SYSTEMS
from cpcscale.emotion.systems import system_of as system_of
from cpcscale.emotion.systems.system import Regressor, System
from cpcscale.errors import UserError
from cpcscale.handmade.prosody import KINDS as PROSODY_KINDS
from cpcscale.handmade.statistics import Readout
from cpcscale.model.layers import Layer
from cpcscale.train.recipe import Recipe

HEADS = ("auto", "attention", "svr", "ridge")


@dataclass(kw_only=True)
class ProtocolConfig:
    """Which speakers a fold trains on, chooses the epoch by, and tests; the protocols are in protocol/splits.py."""

    # speakers5 (or another number): folds of whole speakers. loso: leave one session (or speaker) out. official: the
    # owner's partitions. random5: folds of utterances, marked LEAKY.
    split: str = "speakers5"
    # share of the speakers not tested in a fold that is held back to choose the epoch
    dev_share: float = 0.2
    # seed of the folds alone, so that runs of a system with several seeds share their folds
    seed: int = 0
    # share of the utterances of each training and development speaker that is used; a larger share contains a smaller
    train_share: float = 1.0

    def __post_init__(self) -> None:
        parse_protocol(self.split)
        if not 0 < self.train_share <= 1:
            raise UserError(f"protocol.train_share={self.train_share} is not a share: give more than 0, at most 1")
        if not 0 < self.dev_share < 1:
            raise UserError(f"protocol.dev_share={self.dev_share} is not between 0 and 1: it is a share of speakers")


@dataclass(kw_only=True)
class PretrainedConfig:
    """The pretrained network that gives the recogniser its input."""

    # the run_dir of a pretraining, or one of its checkpoints; the folder of a recogniser, or the name of a released
    # one (emotion-small), for the encoder in it; models:/NAME@ALIAS of either. precpc needs it; raw, random and minicpc
    # take only the architecture from it, if it is given, so that all systems use the same network. hf:FOLDER or
    # hf:NAME: a wav2vec 2.0, HuBERT or WavLM network of the transformers library instead, for all systems but minicpc
    checkpoint: str = ""
    # what the audio that it was pretrained on is given under, for the card of a recogniser: a line for each source.
    # Empty: as the recogniser says that the encoder is from, else unknown
    licence: str = field(default="", metadata=config.PLACE)
    # which checkpoint of a run_dir; best: by the run's own checkpoint.best_by
    which: Literal["newest", "best"] = "newest"
    # a checkpoint that a probe chose on speakers of this corpus is refused, unless this is true: then the result is
    # marked SELECTED-ON-TEST
    selected_on_test: bool = False
    # precpc and minicpc: whether the encoder keeps its weights; raw is always trained, random never
    frozen: bool = True
    # learning rate of a pretrained encoder that is trained further (frozen=false)
    learning_rate: float = 1e-4
    # what the recogniser takes as input: c, the context (the paper); z, the latents; both, side by side; mix, the sum
    # of z and c (hf: of all hidden states) by learnt shares, which the result reports
    layer: Layer = "c"
    # input level of the encoder. corpus: as in its pretraining. As ablations: window scales each window to zero mean
    # and unit variance, none leaves the waveform as it is
    wave_norm: WaveNorm = "corpus"

    def __post_init__(self) -> None:
        config.at_least(0, **{"encoder.learning_rate": self.learning_rate})


@dataclass(kw_only=True)
class EmotionRecipe:
    """One system on one corpus under one protocol."""

    # mean, random, functionals, prosody, mfcc, logmel, raw, minicpc or precpc; or several, as precpc+functionals: a
    # regression on the vectors of all, each of the same weight
    system: str = "precpc"
    # name of the tracked run; empty: the system
    name: str = field(default="", metadata=config.PLACE)
    # keys the initial weights, the order of the batches and dropout
    seed: int = 0
    # the labelled data
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    # the folds
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    # the pretrained network
    encoder: PretrainedConfig = field(default_factory=PretrainedConfig)
    # attention: the paper's recogniser. svr: support vector regression on mean, deviation and percentiles over time.
    # ridge: a linear regression on the same, which keeps no vector of an utterance. auto: svr for functionals and
    # prosody, which have no frames, and for fusions, else attention
    head: str = "auto"
    # svr, ridge and classify: how they read frames. statistics: mean, deviation and percentiles over time. slopes: with
    # the deviation of slopes, without the first 0.2 s. components: 32 or 64 principal components of what slopes gives
    readout: Literal["statistics", "slopes", "components", "slopes+components"] = field(
        default="statistics", metadata=config.ADDED
    )
    # All but statistics: whether vectors have the seconds of the utterance, those of functionals and prosody too.
    # With readout=statistics, functionals and prosody (pitch) have them, and frames do not
    duration: bool = field(default=False, metadata=config.ADDED)
    # attention: the head's size and dropout
    recogniser: AttentionHeadConfig = field(default_factory=AttentionHeadConfig)
    # attention: how the head is trained
    fit: FitConfig = field(default_factory=FitConfig)
    # svr and classify: the support vector machine
    svm: SVMConfig = field(default_factory=SVMConfig)
    # svr: choose the best of 16 configs on inner folds of the training speakers, instead of `svm`
    svm_search: bool = True
    # attention: choose rate, decay, dropout and pooling among 16 configs (4 if the encoder is trained) on each fold's
    # development speakers, instead of those of `fit` and `recogniser`; takes about three times as long
    fit_search: bool = False
    # also classify the corpus's categories, by a support vector machine on the same features
    classify: bool = False
    # egemaps, pitch, or auto: egemaps if the extra opensmile is installed, else pitch
    prosody: str = "auto"
    # where decoded audio and features are kept
    audio_cache: AudioCacheConfig = field(default_factory=AudioCacheConfig, metadata=config.PLACE)
    # also test on degraded audio, such as [noise10, reverb, telephone, gain-12] (audio/degraded.py); training is clean
    test_conditions: list[str] = field(default_factory=list)
    # standardise features by the mean and deviation of each speaker's own audio, also for test speakers: marked
    # SPEAKER-ADAPTED
    speaker_norm: bool = False
    # minicpc: how each fold's encoder is pretrained; its `model` is the network if no checkpoint is given
    pretraining: Recipe = field(default_factory=Recipe)
    # minicpc. fold: pretrain for each fold, on its training speakers. corpus: pretrain once on all audio, also of test
    # speakers: marked TRANSDUCTIVE
    pretraining_on: Literal["fold", "corpus"] = "fold"

    def __post_init__(self) -> None:
        config.check_choice("head", self.head, HEADS)
        config.check_choice("prosody", self.prosody, PROSODY_KINDS)
        for name in self.test_conditions:
            parse_condition(name)
        if len(set(self.test_conditions)) < len(self.test_conditions):
            raise UserError(f"test_conditions={self.test_conditions} names one twice: give each once")
        if self.head == "attention" and self.definition.regressors[0] == "svr":
            raise UserError(
                f"head=attention takes frames of one system, and system={self.system} has none: use head=auto"
            )
        if self.duration and self.readout == "statistics":
            raise UserError(
                "duration=true is for readout=slopes or components: with readout=statistics, functionals and prosody "
                "have the duration as they are, and frames cannot have it"
            )
        if self.fit_search and self.regressor != "attention":
            raise UserError(
                f"fit_search=true chooses a config of the attention head, and system={self.system} with "
                f"head={self.head} has none (svr has svm_search): leave it out"
            )
        if self.trains_encoder and (self.regressor in ("svr", "ridge") or self.classify):
            key = "classify=true" if self.classify else f"head={self.regressor}"
            raise UserError(
                f"{key} takes fixed features, but this encoder is trained: use encoder.frozen=true (for raw, which is "
                "always trained, another system), or leave it out"
            )
        self._check_encoder()

    def _check_encoder(self) -> None:
        self.definition.check(self)
        if self.fit.augment.enabled and not self.trains_encoder:
            raise UserError(
                f"fit.augment changes waveforms, but system={self.system} trains on fixed features: use "
                "encoder.frozen=false (precpc and minicpc) or system=raw, or leave it out"
            )
        if self.trains_encoder and self.speaker_norm:
            raise UserError(
                "speaker_norm=true scales fixed features, but this encoder is trained: use encoder.frozen=true "
                "(for raw, which is always trained, another system), or leave it out"
            )
        mixed = self.definition.takes_network and self.encoder.layer == "mix"
        if mixed and (self.regressor in ("svr", "ridge") or self.classify):
            key = "classify=true" if self.classify else f"head={self.regressor}"
            raise UserError(
                f"encoder.layer=mix is learnt by the attention head, and {key} takes fixed features: use "
                "encoder.layer=both"
            )

    @property
    def definition(self) -> System:
        """What `system` is."""
        return system_of(self.system)

    @property
    def parts(self) -> tuple[EmotionRecipe, ...]:
        """Of a fusion: the recipe of each of its systems."""
        return tuple(dataclasses.replace(self, system=part.name, head=self.regressor) for part in self.definition.parts)

    def check_readout(self) -> None:
        """Raises UserError for a `readout` that nothing reads; a table of several systems may have such rows."""
        if self.readout != "statistics" and self.regressor == "attention" and not self.classify:
            raise UserError(
                f"readout={self.readout} is how svr and ridge read frames, and system={self.system} with "
                f"head={self.head} has the attention head: add head=svr, or leave it out"
            )

    @property
    def vector_readout(self) -> Readout:
        """How svr, ridge and the classifier read frames."""
        return Readout(self.readout, self.duration)

    @property
    def keeps_duration(self) -> bool:
        """Whether the vectors of functionals and prosody have the duration."""
        return self.duration or self.readout == "statistics"

    @property
    def marks(self) -> list[str]:
        """The marks of results that used audio of test speakers before testing: TRANSDUCTIVE, SPEAKER-ADAPTED."""
        return self.definition.marks(self)

    @property
    def trains_encoder(self) -> bool:
        """Whether the fit updates the encoder's weights too."""
        return self.definition.trains_encoder(self)

    @property
    def regressor(self) -> Regressor:
        """What predicts: mean (a constant), svr, ridge, or attention (the paper's recogniser)."""
        known = self.definition.regressors
        return next((name for name in known if name == self.head), known[0])
