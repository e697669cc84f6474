"""What a recogniser hears in each system: MFCC, the context c of a CPC network, or waveforms for one trained with it.

What does not depend on the fold is computed once (`prepare`) and shared by all folds and trials; what does is made for
a fold from its training speakers alone (`open_source`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale import audio, storage
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.fit import collate, device
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.recogniser import EndToEnd, Recogniser
from cpcscale.emotion.splits import Split
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig, build
from cpcscale.model.frontend import mfcc
from cpcscale.shards.packing.sources import Source as AudioFile
from cpcscale.train.checkpoint import load_encoder

COEFFICIENTS = 40
_LEAST_S = 0.1
_BATCH_S = 60.0


@dataclass(frozen=True)
class Prepared:
    """What all folds of a run share.

    `inputs` are float32 features [T, C] where `featured`, else int16 waveforms [S] at 16 kHz; one an utterance, in the
    corpus's order; none for `mean`. `encoder` is the checkpoint's network, for folds that make their own features or
    train it, and `source` says which checkpoint it was.
    """

    inputs: list[np.ndarray]
    featured: bool
    encoder: CPC | None = None
    source: dict[str, Any] = field(default_factory=dict)


class Source:
    """The inputs of one fold, and the network on top of them."""

    def __init__(self, recipe: EmotionRecipe, prepared: Prepared, encoder: CPC | None) -> None:
        """`encoder` turns the prepared waveforms into features, or is trained on them; None where they are features."""
        self._recipe, self._prepared, self._encoder = recipe, prepared, encoder
        self._device = device(recipe.fit)

    def inputs(self, rows: Sequence[int]) -> list[np.ndarray]:
        """What the network takes for these utterances."""
        inputs = [self._prepared.inputs[row] for row in rows]
        if self._encoder is None or self._recipe.trains_encoder:
            return inputs
        return encode(self._encoder, inputs, self._device)

    def network(self, train_rows: Sequence[int]) -> nn.Module:
        """A new recogniser that standardises by the training utterances, with the encoder where it is to be trained.

        The statistics under a trained encoder are those of its first weights.
        """
        inputs = self.inputs(train_rows)
        encoder = self._encoder if self._recipe.trains_encoder else None
        mean_C, deviation_C = statistics(inputs if encoder is None else encode(encoder, inputs, self._device))
        recogniser = Recogniser(self._recipe.recogniser, len(mean_C))
        recogniser.standardise(mean_C, deviation_C)
        return recogniser if encoder is None else EndToEnd(encoder, recogniser)


def prepare(recipe: EmotionRecipe, corpus: Corpus) -> Prepared:
    """Reads the checkpoint and all audio, and computes the features that do not depend on the fold.

    Raises UserError for a missing checkpoint, and for audio that is missing, does not decode or is under 0.1 s.
    """
    if recipe.system == "mean":
        return Prepared([], featured=False)
    encoder, source = open_encoder(recipe)
    waves = read_waves(corpus, recipe.corpus.max_s)
    match recipe.system:
        case "mfcc":
            return Prepared([mfcc(_floats(wave), COEFFICIENTS) for wave in waves], featured=True)
        case "random" if encoder is not None:
            shared: CPC | None = _untrained(encoder.config, recipe.seed, _level(encoder))
        case "precpc" if recipe.encoder.frozen:
            shared = encoder
        case _:
            return Prepared(waves, featured=False, encoder=encoder, source=source)
    assert shared is not None
    return Prepared(encode(shared, waves, device(recipe.fit)), featured=True, source=source)


def open_encoder(recipe: EmotionRecipe) -> tuple[CPC | None, dict[str, Any]]:
    """The network of `encoder.checkpoint` and its metadata, where the system uses one; else (None, {}).

    Raises UserError when there is none at the path, or none is given to a system that cannot do without.
    """
    url = recipe.encoder.checkpoint
    if recipe.system in ("mean", "mfcc"):
        return None, {}
    if not url:
        if recipe.system == "precpc":
            raise UserError("system=precpc needs encoder.checkpoint=RUN_DIR, the folder of a `cpcscale pretrain` run")
        return None, {}
    if not storage.exists(url):
        way_out = (
            ""
            if recipe.system == "precpc"
            else ', or pass encoder.checkpoint="" to use the network of pretraining.model'
        )
        raise UserError(
            f"no pretraining at encoder.checkpoint={url}: run `cpcscale pretrain` with run_dir={url} first{way_out}"
        )
    return load_encoder(url)


def open_source(recipe: EmotionRecipe, corpus: Corpus, prepared: Prepared, split: Split) -> Source:
    """The inputs of a fold. Nothing of its test speakers goes into an encoder's weights or level."""
    if prepared.featured:
        return Source(recipe, prepared, None)
    train, dev, _ = split.rows(corpus.speakers)
    match recipe.system:
        case "precpc":
            encoder = copy.deepcopy(prepared.encoder)
        case "minicpc":
            encoder = _pretrained_on(recipe, corpus, prepared, sorted(train + dev))
        case _:
            known = prepared.encoder
            level = wave_level([prepared.inputs[row] for row in train]) if known is None else _level(known)
            encoder = _untrained(_model(recipe, known), recipe.seed, level)
    return Source(recipe, prepared, encoder)


def read_waves(corpus: Corpus, max_s: float) -> list[np.ndarray]:
    """The first `max_s` seconds of each utterance as int16 [S], mono at 16 kHz. Raises UserError naming a bad file."""
    count = int(max_s * audio.RATE_HZ)

    def read(path: str) -> np.ndarray:
        try:
            wave = audio.decode(storage.read(path))
        except audio.AudioError as error:
            raise UserError(
                f"{path} in corpus {corpus.name} cannot be used: {error}; drop its row or mend it"
            ) from None
        if len(wave) < _LEAST_S * audio.RATE_HZ:
            raise UserError(
                f"{path} in corpus {corpus.name} lasts {len(wave) / audio.RATE_HZ:.3f} s, too short for speech (at "
                f"least {_LEAST_S} s): drop its row"
            )
        return audio.to_int16(wave[:count])

    # libsndfile and soxr let other threads run.
    with ThreadPoolExecutor(max_workers=max(2, torch.get_num_threads())) as pool:
        return list(pool.map(read, [row.path for row in corpus.utterances]))


def encode(encoder: CPC, waves: Sequence[np.ndarray], where: torch.device) -> list[np.ndarray]:
    """The context c of each waveform, float32 [T, D], from the encoder as it is; no gradient."""
    encoder.to(where).eval()
    contexts: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for rows in _by_length(waves, int(_BATCH_S * audio.RATE_HZ)):
            wave_BS, samples_B = collate([waves[row] for row in rows], where)
            c_BTD = encoder.features(wave_BS)[1].float().cpu().numpy()
            frames = (samples_B // encoder.hop_samples).tolist()
            # Copies: a slice would keep the padded batch alive.
            contexts.update({row: c_BTD[i, : frames[i]].copy() for i, row in enumerate(rows)})
    return [contexts[row] for row in range(len(waves))]


def statistics(features: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each feature over all frames, float32 [C], summed in float64 after centring."""
    frames = sum(len(x_TC) for x_TC in features)
    mean = sum(x_TC.sum(axis=0, dtype=np.float64) for x_TC in features) / frames
    square = sum(((x_TC - mean) ** 2).sum(axis=0) for x_TC in features) / frames
    return torch.from_numpy(np.asarray(mean)).float(), torch.from_numpy(np.sqrt(square)).float()


def wave_level(waves: Sequence[np.ndarray]) -> tuple[float, float]:
    """(offset, gain) that bring these int16 waveforms, together, to zero mean and unit variance as floats."""
    samples = sum(len(wave) for wave in waves)
    mean = sum(float(wave.sum(dtype=np.int64)) for wave in waves) / samples
    square = sum(float(np.square(wave, dtype=np.int64).sum()) for wave in waves) / samples
    deviation = max(square - mean * mean, 0.0) ** 0.5
    return mean / 32768, 32768 / deviation if deviation > 0 else 1.0


def encoder_digest(encoder: CPC | None) -> str:
    """sha256 of a network's weights, or an empty string without one."""
    if encoder is None:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _model(recipe: EmotionRecipe, known: CPC | None) -> ModelConfig:
    return recipe.pretraining.model if known is None else known.config


def _untrained(model: ModelConfig, seed: int, level: tuple[float, float]) -> CPC:
    return build(model, seed, offset=level[0], gain=level[1])


def _level(encoder: CPC) -> tuple[float, float]:
    return float(encoder.offset), float(encoder.gain)


def _pretrained_on(recipe: EmotionRecipe, corpus: Corpus, prepared: Prepared, rows: list[int]) -> CPC:
    from cpcscale.emotion.minicpc import pretrain_on

    chosen = [corpus.utterances[row] for row in rows]
    sources = [
        AudioFile(
            path=one.path, name=f"{one.key}{PurePosixPath(one.path).suffix}", group=one.speaker, language=one.language
        )
        for one in chosen
    ]
    # Other folds run beside this one: its share of the cores is what torch has here, not the whole machine.
    train = dataclasses.replace(
        recipe.pretraining.train, threads=recipe.pretraining.train.threads or torch.get_num_threads()
    )
    pretraining = dataclasses.replace(recipe.pretraining, model=_model(recipe, prepared.encoder), train=train)
    with tempfile.TemporaryDirectory(prefix="minicpc-") as folder:
        return pretrain_on(sources, pretraining, folder)


def _floats(wave: np.ndarray) -> np.ndarray:
    return wave.astype(np.float32) / 32768


def _by_length(waves: Sequence[np.ndarray], samples: int) -> list[list[int]]:
    """Row numbers in groups of like length, each of at most `samples` padded samples (or one row)."""
    groups: list[list[int]] = []
    for row in sorted(range(len(waves)), key=lambda row: len(waves[row])):
        if groups and len(waves[row]) * (len(groups[-1]) + 1) <= samples:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
