"""The networks under recognisers: from a checkpoint, untrained, or pretrained for a fold; and what they encode."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch

from cpcscale import config, storage
from cpcscale.emotion.audio.array_cache import kind
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.batching import collate, like_lengths
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders import minicpc
from cpcscale.emotion.encoders.huggingface import PREFIX, HFEncoder, absolute_hf, library_version, open_hf, untrained_hf
from cpcscale.emotion.encoders.layer import Encoder, EncoderLayer, LayerFeatures, WaveNorm
from cpcscale.emotion.recipe import CLASSIC, FRAMES, EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig, build
from cpcscale.progress import note
from cpcscale.shards.packing.sources import AudioFile as AudioFile
from cpcscale.train.checkpoint import load_encoder


@dataclass(frozen=True)
class WindowEncoder:
    """int16 windows [S] to what an encoder makes of each at a layer, float32 [T, C]; no gradient."""

    encoder: Encoder
    layer: EncoderLayer
    where: torch.device
    wave_norm: WaveNorm = "corpus"

    def __call__(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.encoder.to(self.where).eval()
        hearing = LayerFeatures(self.encoder, self.layer, self.wave_norm)
        found: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for rows in like_lengths(windows):
                wave_BS, samples_B = collate([windows[row] for row in rows], self.where)
                x_BTC = hearing(wave_BS, samples_B).float().cpu().numpy()
                frames = hearing.frames(samples_B).tolist()
                # Copies: a slice would keep the padded batch alive.
                found.update({row: x_BTC[place, : frames[place]].copy() for place, row in enumerate(rows)})
        return [found[row] for row in range(len(windows))]


# A network, where there is one, and its metadata: see `open_encoder`.
OpenedEncoder: TypeAlias = "tuple[Encoder | None, dict[str, Any]]"


def open_encoder(recipe: EmotionRecipe) -> OpenedEncoder:
    """The network of `encoder.checkpoint` and its metadata, where the system uses one; else (None, {}).

    Raises UserError when there is none at the path, or none is given to a system that cannot do without.
    """
    url = recipe.encoder.checkpoint
    if not _uses_network(recipe):
        return None, {}
    if not url:
        if recipe.system == "precpc":
            raise UserError("system=precpc needs encoder.checkpoint=RUN_DIR, the folder of a `cpcscale pretrain` run")
        return None, {}
    if url.startswith(PREFIX):
        return open_hf(url)
    if not storage.exists(url):
        way_out = (
            ""
            if recipe.system == "precpc"
            else ', or pass encoder.checkpoint="" to use the network of pretraining.model'
        )
        raise UserError(
            f"no pretraining at encoder.checkpoint={url}: run `cpcscale pretrain` with run_dir={url} first{way_out}"
        )
    return load_encoder(url, recipe.encoder.which)


def open_encoders(recipes: Mapping[str, EmotionRecipe]) -> dict[str, OpenedEncoder]:
    """`open_encoder` of each recipe, by name; a checkpoint that several of them use is read once."""
    known: dict[tuple[str, str], OpenedEncoder] = {}
    opened = {}
    for name, recipe in recipes.items():
        place = recipe.encoder.checkpoint, recipe.encoder.which
        opened[name] = (known.get(place) if _uses_network(recipe) else None) or open_encoder(recipe)
        if opened[name][0] is not None:
            known[place] = opened[name]
    return opened


def _uses_network(recipe: EmotionRecipe) -> bool:
    return recipe.system not in ("mean", *CLASSIC, *FRAMES)


def absolute_checkpoint(url: str) -> str:
    """`encoder.checkpoint` with a local path made absolute: workers stand in other folders."""
    if url.startswith(PREFIX):
        return absolute_hf(url)
    return storage.absolute(url) if url else ""


def untrained(recipe: EmotionRecipe, known: Encoder | None, level: tuple[float, float]) -> Encoder:
    """A new network of the checkpoint's architecture, or of `pretraining.model`, with this (offset, gain) if CPC."""
    if isinstance(known, HFEncoder):
        return untrained_hf(known, recipe.seed)
    return build(_model(recipe, known), recipe.seed, offset=level[0], gain=level[1])


def level_of(encoder: Encoder) -> tuple[float, float]:
    """(offset, gain) of its input."""
    if isinstance(encoder, HFEncoder):
        return 0.0, 1.0
    return float(encoder.offset), float(encoder.gain)


def wave_level(waves: Iterable[np.ndarray]) -> tuple[float, float]:
    """(offset, gain) that bring these int16 waveforms, together, to zero mean and unit variance as floats.

    Each is asked for once, so that no more than one need be in memory.
    """
    samples, total, total_square = 0, 0.0, 0.0
    for wave in waves:
        samples += len(wave)
        total += float(wave.sum(dtype=np.int64))
        total_square += float(np.square(wave, dtype=np.int64).sum())
    mean = total / samples
    deviation = max(total_square / samples - mean * mean, 0.0) ** 0.5
    return mean / 32768, 32768 / deviation if deviation > 0 else 1.0


def pretrained_on(recipe: EmotionRecipe, corpus: Corpus, known: Encoder | None, rows: Sequence[int]) -> CPC:
    """A network pretrained on these utterances alone, in this process."""
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
    pretraining = dataclasses.replace(recipe.pretraining, model=_model(recipe, known), train=train)
    with tempfile.TemporaryDirectory(prefix="minicpc-") as folder:
        return minicpc.pretrain_on(sources, pretraining, folder)


def pretrained_on_corpus(recipe: EmotionRecipe, waves: Waves, known: Encoder | None) -> CPC:
    """A network pretrained on all utterances that can be used, those of test speakers too: TRANSDUCTIVE.

    It is kept in the audio cache by what it follows from, so that runs with another head, layer or protocol share it;
    of several processes one makes it and the others wait.
    """
    corpus, model = waves.corpus, _model(recipe, known)
    heard = [
        (one.key, one.speaker, one.language, digest)
        for one, digest in zip(corpus.utterances, waves.digests, strict=True)
    ]
    placeless = dataclasses.replace(
        recipe.pretraining, model=model, train=dataclasses.replace(recipe.pretraining.train, threads=0)
    )
    what = kind(
        "minicpc network", config.digest(placeless), json.dumps(heard), f"{minicpc.VERSION} torch {torch.__version__}"
    )
    blank = build(model, seed=0)
    names = list(blank.state_dict())
    held = waves.cache.held(what)
    if any(name not in held for name in names):
        with waves.cache.filling(what) as filler:
            # Anew: this process may have waited for one that made it.
            if any(name not in filler.held for name in names):
                note(f"minicpc: pretraining on all {len(corpus.utterances):,} utterances of {corpus.name}")
                made = pretrained_on(recipe, corpus, known, range(len(corpus.utterances)))
                for name, tensor in made.state_dict().items():
                    filler.add(name, tensor.cpu().numpy())
        held = filler.held
    held.keep(names)
    blank.load_state_dict({name: torch.from_numpy(held.read(name, _gone).copy()) for name in names})
    return blank


def encoder_digest(encoder: Encoder | None) -> str:
    """sha256 of a network's weights, and of another's than CPC its settings; an empty string without one."""
    if encoder is None:
        return ""
    digest = hashlib.sha256()
    if isinstance(encoder, HFEncoder):
        digest.update(json.dumps(encoder.settings, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def features_digest(hearing: LayerFeatures) -> str:
    """What decides the features of an encoder beside the waveform."""
    library = library_version() if isinstance(hearing.encoder, HFEncoder) else ""
    return f"{encoder_digest(hearing.encoder)} {hearing.features} torch {torch.__version__} {library}"


def _gone() -> np.ndarray:
    raise UserError("the network of minicpc in the audio cache was garbled, and is removed: start again")


def _model(recipe: EmotionRecipe, known: Encoder | None) -> ModelConfig:
    return known.config if isinstance(known, CPC) else recipe.pretraining.model
