"""A tiny labelled corpus of tones whose labels can be heard, for the tests of recognisers."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import saved_recognisers
import soundfile
import torch

from cpcscale.emotion.batching import seeded
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.encoders.networks import WindowEncoder
from cpcscale.emotion.fitted import FittedRecogniser, NetworkHead, VectorHead
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig
from cpcscale.emotion.heads.svm import SupportVectors
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.recipe import EmotionRecipe, PretrainedConfig, ProtocolConfig
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.handmade import functionals
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.publisher import Publisher
from cpcscale.train.checkpoint import RunPosition, checkpoint_files_of
from cpcscale.train.recipe import Recipe

TINY = ModelConfig(encoder=EncoderConfig(channels=6), context=ContextConfig(width=8))


def put_corpus(folder: Path, speakers: int = 6, each: int = 6) -> Path:
    """Activation is loudness, valence is pitch and dominance is noise, on 1 to 5; they swell as syllables do."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = ["path,speaker,activation,valence,dominance"]
    for number in range(speakers * each):
        labels = rng.uniform(1, 5, 3)
        samples = int(rng.integers(4000, 9000))
        tone = np.sin(np.arange(samples) * (0.05 + 0.05 * labels[1]))
        wave = 0.02 * labels[0] ** 1.5 * (tone + 0.2 * labels[2] * rng.normal(0, 1, samples))
        # A level that stays the same is no speech to a recogniser.
        wave *= 1 + 0.8 * np.sin(2 * np.pi * 6 * np.arange(samples) / 16_000)
        soundfile.write(folder / f"{number:02}.wav", wave.clip(-1, 1), 16_000)
        lines.append(f"{number:02}.wav,voice{number % speakers}," + ",".join(f"{value:.3f}" for value in labels))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def put_checkpoint(run_dir: Path, seed: int = 7) -> str:
    """A pretraining run of TINY that stopped at step 1, with a level unlike that of the corpus."""
    network = build(TINY, seed, offset=0.01, gain=3.0)
    position = RunPosition(step=1, fingerprint="f" * 64, identity={"model": asdict(TINY)})
    ledger = Ledger(str(run_dir))
    publisher = Publisher(ledger, ledger.head(), 0, keep=1)
    publisher.publish(1, None, checkpoint_files_of({"model": network.state_dict()}, position, Recipe(model=TINY)))
    return str(run_dir)


def recogniser(system: str = "precpc", model: ModelConfig = TINY, seed: int = 0, max_s: float = 0.5):
    """A recogniser of random numbers, in windows of `max_s`: precpc with an attention head, or functionals."""
    rng = np.random.default_rng(seed)
    if system == "functionals":
        width = len(functionals.NAMES)
        machines = tuple(
            SupportVectors(
                mean_F=np.zeros(width),
                deviation_F=np.full(width, 50.0),
                vector_VF=rng.normal(0, 1, (9, width)),
                dual_V=rng.normal(0, 1, 9),
                intercept=np.array(0.1),
                gamma=np.array(0.02),
            )
            for _ in range(3)
        )
        return FittedRecogniser(system, SYSTEMS[system].features(), VectorHead("svr", machines), max_s, (1.0, 5.0))
    encoder = build(model, seed, offset=0.01, gain=3.0).eval()
    with seeded(seed, "head"):
        head = AttentionHead(AttentionHeadConfig(heads=2, hidden=16, dense=16), encoder.context_width)
    features = WindowEncoder(encoder, "c", torch.device("cpu"))
    return FittedRecogniser(system, features, NetworkHead(head.eval()), max_s, (1.0, 5.0))


def put_recogniser(folder: Path, **made) -> str:
    """The folder of a `recogniser`."""
    return saved_recognisers.put_recogniser(folder, 0.5, recogniser(**made), marks=["MADE"])


def recipe(corpus: Path, system: str, checkpoint: str = "", **fit) -> EmotionRecipe:
    """Three folds of a tiny recogniser, a few updates."""
    return EmotionRecipe(
        system=system,
        corpus=CorpusConfig(path=str(corpus)),
        protocol=ProtocolConfig(split="speakers3", dev_share=0.25),
        encoder=PretrainedConfig(checkpoint=checkpoint),
        recogniser=AttentionHeadConfig(heads=2, hidden=16, dense=16, pool_frames=4),
        fit=replace(FitConfig(epochs=2, batch=6, learning_rate=3e-3, device="cpu"), **fit),
        pretraining=Recipe(model=TINY),
    )
