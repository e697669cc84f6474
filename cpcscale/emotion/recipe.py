"""Everything that decides what a cross-validated recogniser computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cpcscale import config
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.degraded import parse_condition as parse_condition
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.encoders.huggingface import PREFIX
from cpcscale.emotion.encoders.layer import EncoderLayer, WaveNorm
from cpcscale.emotion.handmade.prosody import KINDS as PROSODY_KINDS
from cpcscale.emotion.heads.attention import AttentionHeadConfig
from cpcscale.emotion.heads.svm import SVMConfig
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.protocol.splits import parse_protocol
from cpcscale.errors import UserError
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
    # Of the utterances of each training and development speaker, how many are used; a share holds every smaller one.
    train_share: float = 1.0

    def __post_init__(self) -> None:
        parse_protocol(self.split)
        if not 0 < self.train_share <= 1:
            raise UserError(f"protocol.train_share={self.train_share} is no share: give more than 0, at most 1")
        if not 0 < self.dev_share < 1:
            raise UserError(f"protocol.dev_share={self.dev_share} is not between 0 and 1: it is a share of speakers")


@dataclass(kw_only=True)
class PretrainedConfig:
    """The network under the recogniser."""

    # The run_dir of a pretraining, or one of its checkpoints. precpc needs it; raw, random and minicpc take the
    # architecture from it, where it is given, so that all systems are one network. hf:FOLDER or hf:NAME: a wav2vec 2.0,
    # HuBERT or WavLM network of the transformers library instead, for all but minicpc.
    checkpoint: str = ""
    which: Literal["newest", "best"] = "newest"  # of a run_dir; best: as the run's checkpoint.best_by says
    # A checkpoint that was chosen by a probe on speakers of this corpus is refused without it, and marked with it.
    selected_on_test: bool = False
    frozen: bool = True  # precpc and minicpc; raw is always trained, random never
    learning_rate: float = 1e-4  # of the encoder where it is pretrained and then trained on
    # What the recogniser hears: the context c (the paper), the latents z, both side by side, which its first layer
    # mixes as it learns, or mix: z and c (hf: all hidden states) summed by learnt shares, which the result has.
    layer: EncoderLayer = "c"
    # corpus: the level it was pretrained at. An ablation: window brings each window by itself to zero mean and unit
    # variance, whatever its loudness, none leaves it as it is.
    wave_norm: WaveNorm = "corpus"

    def __post_init__(self) -> None:
        config.at_least(0, **{"encoder.learning_rate": self.learning_rate})


@dataclass(kw_only=True)
class EmotionRecipe:
    """One system on one corpus under one protocol."""

    system: str = "precpc"  # mean, random, functionals, prosody, mfcc, logmel, raw, minicpc, precpc
    name: str = field(default="", metadata=config.PLACE)  # of the tracked run; empty: the system
    seed: int = 0  # keys the first weights, the order of the batches and dropout
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    encoder: PretrainedConfig = field(default_factory=PretrainedConfig)
    # attention: the paper's recogniser. svr: support vector regression on mean, deviation and percentiles over time.
    # auto: svr for functionals and prosody, which have no frames, else attention.
    head: str = "auto"
    recogniser: AttentionHeadConfig = field(default_factory=AttentionHeadConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    svm: SVMConfig = field(default_factory=SVMConfig)
    svm_search: bool = True  # svr: the config is the best of 16 on inner folds of the training speakers, not `svm`
    # attention: rate, decay, dropout and pooling are the best of 16 (4 under a trained encoder) on each fold's
    # development speakers, not those of `fit` and `recogniser`; it takes about three times as long.
    fit_search: bool = False
    classify: bool = False  # also a support vector classification of the corpus's categories, from the same features
    prosody: str = "auto"  # egemaps where the extra opensmile is installed, else pitch
    audio_cache: AudioCacheConfig = field(default_factory=AudioCacheConfig, metadata=config.PLACE)
    # Test audio is also heard degraded, as [noise10, reverb, telephone, gain-12]: robustness.py. Training never is.
    test_conditions: list[str] = field(default_factory=list)
    # Features by the mean and deviation of each speaker's own audio, test speakers too: marked SPEAKER-ADAPTED.
    speaker_norm: bool = False
    # minicpc is pretrained by it on each fold's training speakers; its `model` is the network where no checkpoint is.
    pretraining: Recipe = field(default_factory=Recipe)
    # corpus: minicpc once for all folds, on all audio of the corpus, test speakers too: marked TRANSDUCTIVE.
    pretraining_on: Literal["fold", "corpus"] = "fold"

    def __post_init__(self) -> None:
        config.check_choice("system", self.system, SYSTEMS)
        config.check_choice("head", self.head, HEADS)
        config.check_choice("prosody", self.prosody, PROSODY_KINDS)
        for name in self.test_conditions:
            parse_condition(name)
        if len(set(self.test_conditions)) < len(self.test_conditions):
            raise UserError(f"test_conditions={self.test_conditions} names one twice: give each once")
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
        self._check_encoder()

    def _check_encoder(self) -> None:
        if self.system == "minicpc" and self.corpus.shards:
            raise UserError(
                "system=minicpc packs the training speakers of each fold from their audio files: give corpus.path with "
                "the audio, and leave corpus.shards out"
            )
        if self.fit.augment.enabled and not self.trains_encoder:
            raise UserError(
                f"fit.augment changes waveforms, and those of system={self.system} are features that stay: use "
                "encoder.frozen=false (precpc and minicpc) or system=raw, or leave it out"
            )
        if self.trains_encoder and self.speaker_norm:
            raise UserError(
                "speaker_norm=true scales features that stay, and this encoder is trained: use encoder.frozen=true "
                "(for raw, which is always trained, another system), or leave it out"
            )
        mixed = self.system in ("random", "minicpc", "precpc") and self.encoder.layer == "mix"
        if mixed and (self.head == "svr" or self.classify):
            key = "head=svr" if self.head == "svr" else "classify=true"
            raise UserError(
                f"encoder.layer=mix is learnt by the attention head, and {key} takes features that stay: use "
                "encoder.layer=both"
            )
        if self.system == "minicpc" and self.encoder.checkpoint.startswith(PREFIX):
            raise UserError(
                f"system=minicpc pretrains a CPC network, and encoder.checkpoint={self.encoder.checkpoint} is none: "
                'use encoder.checkpoint="" or the folder of a `cpcscale pretrain` run, or system=precpc'
            )

    @property
    def marks(self) -> list[str]:
        """What the recipe itself takes from test speakers before it scores them."""
        adapted = self.speaker_norm and self.system != "mean"
        transductive = self.system == "minicpc" and self.pretraining_on == "corpus"
        return ["TRANSDUCTIVE"] * transductive + ["SPEAKER-ADAPTED"] * adapted

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
