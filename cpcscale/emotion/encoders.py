"""The CPC networks under recognisers: from a checkpoint, untrained, or pretrained for a fold; and what they hear."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from cpcscale import storage
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.recipe import CLASSIC, FRAMES, EmotionRecipe
from cpcscale.emotion.rows import collate, like_lengths
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, Layer, ModelConfig, build
from cpcscale.shards.packing.sources import Source as AudioFile
from cpcscale.train.checkpoint import load_encoder


@dataclass(frozen=True)
class Encode:
    """int16 windows [S] to what an encoder makes of each at a layer, float32 [T, C]; no gradient."""

    encoder: CPC
    layer: Layer
    where: torch.device

    def __call__(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.encoder.to(self.where).eval()
        found: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for rows in like_lengths(windows):
                wave_BS, samples_B = collate([windows[row] for row in rows], self.where)
                x_BTC = self.encoder.layer(wave_BS, self.layer).float().cpu().numpy()
                frames = (samples_B // self.encoder.hop_samples).tolist()
                # Copies: a slice would keep the padded batch alive.
                found.update({row: x_BTC[place, : frames[place]].copy() for place, row in enumerate(rows)})
        return [found[row] for row in range(len(windows))]


def open_encoder(recipe: EmotionRecipe) -> tuple[CPC | None, dict[str, Any]]:
    """The network of `encoder.checkpoint` and its metadata, where the system uses one; else (None, {}).

    Raises UserError when there is none at the path, or none is given to a system that cannot do without.
    """
    url = recipe.encoder.checkpoint
    if recipe.system in ("mean", *CLASSIC, *FRAMES):
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


def untrained(recipe: EmotionRecipe, known: CPC | None, level: tuple[float, float]) -> CPC:
    """A new network of the checkpoint's architecture, or of `pretraining.model`, with this (offset, gain)."""
    return build(_model(recipe, known), recipe.seed, offset=level[0], gain=level[1])


def level_of(encoder: CPC) -> tuple[float, float]:
    """(offset, gain) of its input."""
    return float(encoder.offset), float(encoder.gain)


def wave_level(waves: Sequence[np.ndarray]) -> tuple[float, float]:
    """(offset, gain) that bring these int16 waveforms, together, to zero mean and unit variance as floats."""
    samples = sum(len(wave) for wave in waves)
    mean = sum(float(wave.sum(dtype=np.int64)) for wave in waves) / samples
    square = sum(float(np.square(wave, dtype=np.int64).sum()) for wave in waves) / samples
    deviation = max(square - mean * mean, 0.0) ** 0.5
    return mean / 32768, 32768 / deviation if deviation > 0 else 1.0


def pretrained_on(recipe: EmotionRecipe, corpus: Corpus, known: CPC | None, rows: Sequence[int]) -> CPC:
    """A network pretrained on these utterances alone, in this process."""
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
    pretraining = dataclasses.replace(recipe.pretraining, model=_model(recipe, known), train=train)
    with tempfile.TemporaryDirectory(prefix="minicpc-") as folder:
        return pretrain_on(sources, pretraining, folder)


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
