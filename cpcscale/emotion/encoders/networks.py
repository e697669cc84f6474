"""Opens, builds or pretrains the encoders of recognisers, and encodes windows with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from cpcscale import audio, config, storage
from cpcscale.emotion.audio.array_cache import cache_kind
from cpcscale.emotion.audio.labelled_file import read_file
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.batching import collate, group_by_length
from cpcscale.emotion.corpora.corpus import Corpus, Utterance
from cpcscale.emotion.encoders.arrays import Arrays, arrays_of, filled
from cpcscale.emotion.encoders.huggingface import PREFIX, HFEncoder, open_hf, rebuilt_hf
from cpcscale.emotion.encoders.layer import VERSION, LayerFeatures, WaveNorm
from cpcscale.emotion.encoders.of_recogniser import SCORES, network_of
from cpcscale.emotion.heads.training import fit_device
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig, build
from cpcscale.model.layers import Layer, LayeredNetwork
from cpcscale.progress import note
from cpcscale.shards.pack import TRAIN, PackConfig, pack_sources
from cpcscale.shards.packing.sources import AudioFile as AudioFile
from cpcscale.train.checkpoint import is_pretraining, load_encoder
from cpcscale.train.loop import pretrain
from cpcscale.train.observer import SilentObserver
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.setup import Data

if TYPE_CHECKING:
    from cpcscale.emotion.recipe import EmotionRecipe

# Raise it when the same audio, recipe and seed give other weights of miniCPC: cached networks are then trained again.
MINICPC_VERSION = 1


@dataclass(frozen=True)
class WindowEncoder:
    """Encodes int16 windows [S] to the frames of a layer, float32 [T, C] each, without gradient: Features of systems.

    `name` is that of the features in the cache.
    """

    encoder: LayeredNetwork
    layer: Layer
    where: torch.device
    wave_norm: WaveNorm = "corpus"
    name: str = ""

    @property
    def digest(self) -> str:
        return features_digest(self.encoder, self.layer, self.wave_norm)

    @property
    def whole(self) -> bool:
        return False

    @property
    def least_samples(self) -> int:
        return self.encoder.least_samples

    def __call__(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.encoder.to(self.where).eval()
        layer_features = LayerFeatures(self.encoder, self.layer, self.wave_norm)
        found: dict[int, np.ndarray] = {}
        # With the digits of float32 on GPUs too, whose convolutions would have those of TF32.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for rows in group_by_length(waves):
                wave_BS, samples_B = collate([waves[row] for row in rows], self.where)
                x_BTC = layer_features(wave_BS, samples_B).float().cpu().numpy()
                frames = self.encoder.frames(samples_B).tolist()
                # Copies: a slice would keep the padded batch alive.
                found.update({row: x_BTC[place, : frames[place]].copy() for place, row in enumerate(rows)})
        return [found[row] for row in range(len(waves))]

    def description(self) -> dict[str, Any]:
        layer = {"name": self.name, "layer": self.layer, "wave_norm": self.wave_norm}
        return {"kind": self.encoder.kind, "network": self.encoder.settings, **layer}

    def arrays(self) -> Arrays:
        return arrays_of(self.encoder, left_out=self.encoder.unused)


def rebuilt_cpc(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> CPC:
    """The network of its settings and arrays, with a predictor of one step, all zeros: nothing is predicted by it."""
    model = config.build(ModelConfig, dict(settings))
    small = dataclasses.replace(model, predictor=dataclasses.replace(model.predictor, steps=1))
    network = filled(partial(CPC, small), arrays, CPC.unused)
    with torch.no_grad():
        # Else each rebuilding would have a digest of its own.
        for weights in network.predictor.parameters():
            weights.zero_()
    # What is made in its likeness, such as the network of minicpc, has all steps.
    network.config = model
    return network


# How a saved network of each kind is made again from its settings and arrays.
REBUILT: dict[str, Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], LayeredNetwork]] = {
    CPC.kind: rebuilt_cpc,
    HFEncoder.kind: rebuilt_hf,
}


def encoder_from(found: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> WindowEncoder:
    """The features of a `description` and `arrays`."""
    if found["layer"] not in get_args(Layer) or found["wave_norm"] not in get_args(WaveNorm):
        raise ValueError(f"layer={found['layer']}, wave_norm={found['wave_norm']}")
    network = REBUILT[found["kind"]](found["network"], arrays)
    return WindowEncoder(network, found["layer"], torch.device("cpu"), found["wave_norm"], found["name"])


def encoder_features(recipe: EmotionRecipe, encoder: LayeredNetwork) -> WindowEncoder:
    """The features of a system with this encoder."""
    place = fit_device(recipe.fit)
    return WindowEncoder(encoder, recipe.encoder.layer, place, recipe.encoder.wave_norm, f"{recipe.system} features")


# (encoder or None, metadata), see `open_encoder`.
OpenedEncoder: TypeAlias = "tuple[LayeredNetwork | None, dict[str, Any]]"


def open_encoder(recipe: EmotionRecipe) -> OpenedEncoder:
    """(the network of `encoder.checkpoint`, its metadata) if the system uses one, else (None, {}).

    Raises UserError if there is no checkpoint at the path, or if the system needs one and none is given.
    """
    url, system = recipe.encoder.checkpoint, recipe.definition
    if not system.takes_network:
        return None, {}
    if not url:
        if system.needs_checkpoint:
            raise UserError(
                f"system={system.name} needs encoder.checkpoint=RUN_DIR, the folder of a `cpcscale pretrain` run"
            )
        return None, {}
    if not url.startswith(PREFIX) and not storage.exists(url):
        way_out = (
            "" if system.needs_checkpoint else ', or pass encoder.checkpoint="" to use the network of pretraining.model'
        )
        raise UserError(
            f"no pretraining at encoder.checkpoint={url}: run `cpcscale pretrain` with run_dir={url} first{way_out}"
        )
    return open_network(url, recipe.encoder.which)


def open_network(url: str, which: Literal["newest", "best"] = "newest") -> tuple[LayeredNetwork, dict[str, Any]]:
    """(network, metadata) of a pretraining run, one of its checkpoints, a recogniser's folder, or hf:NAME."""
    if url.startswith(PREFIX):
        return open_hf(url)
    # No checkpoint has scores.
    if storage.exists(storage.join(url, SCORES)):
        features, source = network_of(url, encoder_from)
        return features.encoder, source
    return load_encoder(url, which)


def is_network(url: str) -> bool:
    """Whether `open_network` is to open this: hf:NAME, or a folder with a pretraining or a checkpoint."""
    return url.startswith(PREFIX) or is_pretraining(url)


def untrained_on(recipe: EmotionRecipe, waves: Callable[[], Iterable[np.ndarray]]) -> CPC:
    """A new network of `pretraining.model` at the level of these int16 waveforms, which are read once or twice."""
    offset, gain = measure_level(waves())
    network = build(recipe.pretraining.model, recipe.seed, offset=offset, gain=gain)
    network.calibrate(waves())
    return network


def measure_level(waves: Iterable[np.ndarray]) -> tuple[float, float]:
    """The (offset, gain) that scale all these int16 waveforms together, as floats, to zero mean and unit variance.

    Each waveform is read once, so one at a time is in memory.
    """
    samples, total, total_square = 0, 0.0, 0.0
    for wave in waves:
        samples += len(wave)
        total += float(wave.sum(dtype=np.int64))
        total_square += float(np.square(wave, dtype=np.int64).sum())
    mean = total / samples
    deviation = max(total_square / samples - mean * mean, 0.0) ** 0.5
    return mean / 32768, 32768 / deviation if deviation > 0 else 1.0


def pretrain_on(sources: Sequence[AudioFile], recipe: Recipe, folder: str) -> CPC:
    """miniCPC (Li et al. 2021): a network pretrained on these files alone, in this process.

    Its shards and checkpoints are below `folder`; if that holds a finished pretraining of the same files and recipe, it
    is used. The order of training depends on the names of the sources, not on their paths. Pass only files of the
    training speakers of one outer fold: an encoder trained on audio of a test speaker would make the test unfair.
    """
    packed = pack_sources(sources, storage.join(folder, "shards"), PackConfig())
    run_dir = storage.join(folder, "run")
    pretrain(recipe, Data(packed.splits[TRAIN], {}), run_dir, Ranks.current(), SilentObserver())
    return load_encoder(run_dir)[0]


def pretrain_on_rows(recipe: EmotionRecipe, corpus: Corpus, known: LayeredNetwork | None, rows: Sequence[int]) -> CPC:
    """Pretrains a network on these utterances alone, in this process."""
    # Other folds run at the same time: use the threads that torch has here, not all cores.
    train = dataclasses.replace(
        recipe.pretraining.train, threads=recipe.pretraining.train.threads or torch.get_num_threads()
    )
    pretraining = dataclasses.replace(recipe.pretraining, model=_model(recipe, known), train=train)
    with tempfile.TemporaryDirectory(prefix="minicpc-") as folder:
        sources = [_source(corpus.utterances[row], f"{folder}/parts/{row}.wav") for row in rows]
        return pretrain_on(sources, pretraining, folder)


def _source(one: Utterance, part: str) -> AudioFile:
    """The utterance's file; of a part of a file, only that part, written to `part`."""
    path = one.path
    if one.segment:
        _, wave = read_file(one)
        if not isinstance(wave, np.ndarray):
            raise UserError(f"{path} was changed since this run opened it: start again")
        storage.write(part, audio.encode(wave, "wav"))
        path = part
    return AudioFile(path=path, name=f"{one.key}{PurePosixPath(path).suffix}", group=one.speaker, language=one.language)


def pretrain_on_corpus(recipe: EmotionRecipe, waves: Waves, known: LayeredNetwork | None) -> CPC:
    """A network pretrained on all usable utterances, also of test speakers: results are marked TRANSDUCTIVE.

    It is kept in the audio cache by its config and audio, so runs with another head, layer or protocol share it. If
    several processes need it, one trains it and the others wait.
    """
    corpus, model = waves.corpus, _model(recipe, known)
    sources = [
        (one.key, one.speaker, one.language, digest)
        for one, digest in zip(corpus.utterances, waves.digests, strict=True)
    ]
    placeless = dataclasses.replace(
        recipe.pretraining, model=model, train=dataclasses.replace(recipe.pretraining.train, threads=0)
    )
    kind = cache_kind(
        "minicpc network", config.digest(placeless), json.dumps(sources), f"{MINICPC_VERSION} torch {torch.__version__}"
    )
    blank = build(model, seed=0)
    names = list(blank.state_dict())
    cached = waves.cache.arrays(kind)
    if any(name not in cached for name in names):
        with waves.cache.writer(kind) as writer:
            # Looked up again: this process may have waited for another that trained it.
            if any(name not in writer.arrays for name in names):
                note(f"minicpc: pretraining on all {len(corpus.utterances):,} utterances of {corpus.name}")
                made = pretrain_on_rows(recipe, corpus, known, range(len(corpus.utterances)))
                for name, tensor in made.state_dict().items():
                    writer.add(name, tensor.cpu().numpy())
        cached = writer.arrays
    cached.keep_only(names)
    blank.load_state_dict({name: torch.from_numpy(cached.read(name, _refuse_corrupt).copy()) for name in names})
    return blank


def encoder_digest(encoder: LayeredNetwork | None, left_out: str = "") -> str:
    """sha256 of a network's weights (and its settings, if it is not CPC); "" without a network.

    With `left_out`, without the weights whose names begin so.
    """
    if encoder is None:
        return ""
    digest = hashlib.sha256()
    if encoder.digests_settings:
        digest.update(json.dumps(encoder.settings, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if not left_out or not name.startswith(left_out):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def features_digest(encoder: LayeredNetwork, layer: Layer, wave_norm: WaveNorm) -> str:
    """A text that changes when the same waveform may give other features; part of their cache key."""
    settings = hashlib.sha256(json.dumps(encoder.settings, sort_keys=True).encode()).hexdigest()
    rest = f"{VERSION} {layer} {wave_norm} torch {torch.__version__} {encoder.library}"
    # A recogniser is saved without what no feature depends on, and has the same features.
    return f"{encoder_digest(encoder, encoder.unused)} {settings} {rest}"


def _refuse_corrupt() -> np.ndarray:
    raise UserError("the network of minicpc in the audio cache was corrupt, and is removed: start again")


def _model(recipe: EmotionRecipe, known: LayeredNetwork | None) -> ModelConfig:
    if known is None:
        return recipe.pretraining.model
    if not isinstance(known, CPC):
        raise UserError(f"system=minicpc pretrains a CPC network, and encoder.checkpoint has another, {known.kind}")
    return known.config
