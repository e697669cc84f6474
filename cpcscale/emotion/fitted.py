"""A fitted recogniser: audio in, activation, valence and dominance out, and the arrays that it is made of.

It is what a fold of a cross-validation tests, and what is saved. U utterances, W windows, T frames, C and F features,
P primitives.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cpcscale import audio, config
from cpcscale.emotion.audio.labelled_file import LEAST_S
from cpcscale.emotion.audio.windows import window_shares, window_spans
from cpcscale.emotion.batching import forward_by_length
from cpcscale.emotion.corpora.corpus import in_units
from cpcscale.emotion.encoders.huggingface import rebuilt_hf
from cpcscale.emotion.encoders.layer import Encoder
from cpcscale.emotion.encoders.networks import WindowEncoder
from cpcscale.emotion.handmade.statistics import summarise
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.svm import SupportVectors
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.emotion.systems.system import Features
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
# Samples of the audio by which a recogniser that is loaded is tried.
_TRIED = 8000
# Samples whose windows are encoded together, a minute.
_TOGETHER = 60 * audio.RATE_HZ
Network = TypeVar("Network", bound=nn.Module)
# Arrays by name, as a safetensors file has them.
Arrays = dict[str, np.ndarray]


class Head(Protocol):
    """Predicts from what `Features` made, window by window, so that no length of audio fills the memory."""

    def read(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [W, R]: the readout of each window."""

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        """float64 [U, P] on [-1, 1] for utterances, each the mean of its windows' readouts, by their weights."""

    def description(self) -> dict[str, Any]:
        """What it is, in plain values; with `arrays`, all that it is made again from."""

    def arrays(self) -> Arrays: ...


@dataclass(frozen=True)
class MeanHead:
    """The same for every utterance."""

    mean_P: np.ndarray

    def read(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((len(windows), 0))

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        return np.tile(self.mean_P, (len(readout_UR), 1))

    def description(self) -> dict[str, Any]:
        return {"kind": "mean"}

    def arrays(self) -> Arrays:
        return {"mean_P": self.mean_P}


@dataclass(frozen=True)
class SVRHead:
    """A support vector regression for each primitive, on vectors or on statistics of frames."""

    machines: tuple[SupportVectors, ...]

    def read(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        vectors = [each if each.ndim == 1 else summarise(each) for each in windows]
        return np.stack(vectors).astype(np.float64)

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        return np.stack([machine.predict(readout_UR) for machine in self.machines], axis=1)

    def description(self) -> dict[str, Any]:
        return {"kind": "svr"}

    def arrays(self) -> Arrays:
        named = zip(PRIMITIVES, self.machines, strict=True)
        return {f"{name}.{key}": value for name, machine in named for key, value in vars(machine).items()}


@dataclass(frozen=True)
class NetworkHead:
    """The attention head of arXiv 2102.06357, with what it standardises by."""

    network: AttentionHead

    def read(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        where = next(self.network.parameters()).device
        with torch.inference_mode():
            return forward_by_length(self.network.eval(), windows, where).double().cpu().numpy()

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        return readout_UR

    def description(self) -> dict[str, Any]:
        layers = self.network.layer_mix.widths if self.network.layer_mix is not None else []
        settings = dataclasses.asdict(self.network.config)
        return {"kind": "attention", "recogniser": settings, "width": len(self.network.mean_C), "layers": layers}

    def arrays(self) -> Arrays:
        return _arrays_of(self.network)


@dataclass(frozen=True)
class FittedRecogniser:
    """Features of audio, a head on them, and how audio is divided into windows.

    `features` is None where the audio plays no part. `scale`: (least, greatest) of the labels it was fitted to.
    """

    system: str
    features: Features | None
    head: Head
    max_s: float
    scale: tuple[float, float]

    @classmethod
    def of_network(
        cls, system: str, features: Features, network: nn.Module, *, max_s: float, scale: tuple[float, float]
    ) -> FittedRecogniser:
        """That of a trained network; an encoder that was trained with the head is part of the features."""
        if isinstance(network, EncoderWithHead):
            assert isinstance(features, WindowEncoder)
            features = dataclasses.replace(features, encoder=network.encoder)
            network = network.recogniser
        assert isinstance(network, AttentionHead)
        return cls(system, features, NetworkHead(network), max_s, scale)

    def predict(self, waves: Sequence[audio.Sliced]) -> np.ndarray:
        """float64 [U, P] on [-1, 1] for whole utterances, int16 [S] at 16 kHz.

        In the windows that it was fitted on, each utterance by itself: it has the same result alone and among others.
        A few windows are in memory at a time.
        """
        return self.head.predict(np.stack([self._readout(wave) for wave in waves]))

    def _readout(self, wave: audio.Sliced) -> np.ndarray:
        """[R] of one utterance: the mean over its windows, by their weights."""
        if self.features is None:
            return self.head.read([np.zeros(0)])[0]
        least, size = self.features.least_samples, len(wave)
        if self.features.whole:
            return self.head.read(self.features([wave if size >= least else np.resize(wave[:], least)]))[0]
        most = round(self.max_s * audio.RATE_HZ)
        spans = window_spans(size, most)
        together = max(1, _TOGETHER // most)
        found = []
        for at in range(0, len(spans), together):
            windows = [wave[start:stop] for start, stop in spans[at : at + together]]
            windows = [each if len(each) >= least else np.resize(each, least) for each in windows]
            found.append(self.head.read(self.features(windows)))
        return np.asarray(window_shares(spans) @ np.concatenate(found))

    def on_cpu(self) -> FittedRecogniser:
        """Itself, its networks moved there, as it is saved and sent to processes without a GPU."""
        if isinstance(self.head, NetworkHead):
            self.head.network.to(CPU)
        if not isinstance(self.features, WindowEncoder):
            return self
        self.features.encoder.to(CPU)
        return dataclasses.replace(self, features=dataclasses.replace(self.features, where=CPU))

    def in_units(self, unit_UP: np.ndarray) -> np.ndarray:
        """Predictions on [-1, 1] in the units of the labels."""
        return in_units(unit_UP, self.scale)

    def description(self) -> dict[str, Any]:
        """What it is, in plain values; with `arrays`, all that it is made again from."""
        return {
            "system": self.system,
            "max_s": self.max_s,
            "scale": list(self.scale),
            "features": _features_description(self.features),
            "head": self.head.description(),
        }

    def arrays(self) -> Arrays:
        """Its arrays by name."""
        found = {f"head.{name}": value for name, value in self.head.arrays().items()}
        if isinstance(self.features, WindowEncoder):
            found |= {f"encoder.{name}": value for name, value in _encoder_arrays(self.features.encoder).items()}
        return found


def fitted_from(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> FittedRecogniser:
    """The recogniser of a description and its arrays. Raises UserError where they do not fit each other."""
    try:
        features = _features_from(description, _below(arrays, "encoder."))
        head = _head_from(description["head"], _below(arrays, "head."))
        low, high = (float(value) for value in description["scale"])
        max_s = float(description["max_s"])
        if not (math.isfinite(low) and low < high and math.isfinite(high) and LEAST_S <= max_s < math.inf):
            raise ValueError(f"scale={low:g} to {high:g}, max_s={max_s:g}")
        made = FittedRecogniser(str(description["system"]), features, head, max_s, (low, high))
        # What fits together predicts, and gives numbers.
        with np.errstate(all="ignore"):
            tried = made.predict([np.arange(_TRIED, dtype=np.int16)])
        if not np.isfinite(tried).all():
            raise ValueError("it gives no numbers")
        return made
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"its description and its arrays do not fit ({type(error).__name__}: {error}): it "
            "was changed, or made by another version of cpcscale"
        ) from None


def _features_description(features: Features | None) -> dict[str, Any]:
    if features is None:
        return {"kind": "none"}
    if not isinstance(features, WindowEncoder):
        assert isinstance(features, HandmadeFeatures)
        return {"kind": "handmade", "which": features.kind, "digest": features.digest}
    layer = {"name": features.name, "layer": features.layer, "wave_norm": features.wave_norm}
    if isinstance(features.encoder, CPC):
        return {"kind": "cpc", "model": dataclasses.asdict(features.encoder.config), **layer}
    return {"kind": "hf", "network": features.encoder.settings, **layer}


def _encoder_arrays(encoder: Encoder) -> Arrays:
    """Without the predictors of pretraining, which take no part in features."""
    return {name: value for name, value in _arrays_of(encoder).items() if not name.startswith("predictor.")}


def _features_from(description: Mapping[str, Any], arrays: Arrays) -> Features | None:
    found = description["features"]
    match found["kind"]:
        case "none":
            return None
        case "handmade":
            return _handmade(str(description["system"]), found)
        case "cpc":
            model = config.build(ModelConfig, found["model"])
            model = dataclasses.replace(model, predictor=dataclasses.replace(model.predictor, steps=1))
            network = _filled(partial(CPC, model), arrays, "predictor.")
            return WindowEncoder(network.eval(), found["layer"], CPU, found["wave_norm"], found["name"])
        case "hf":
            weights = {name: torch.from_numpy(array.copy()) for name, array in _below(arrays, "network.").items()}
            made = rebuilt_hf(dict(found["network"]), bool(found["network"]["normalises"]), weights)
            return WindowEncoder(made, found["layer"], CPU, found["wave_norm"], found["name"])
        case kind:
            raise UserError(f"features of the kind {kind} are not known: it was made by a later version of cpcscale")


def _handmade(name: str, found: Mapping[str, Any]) -> Features:
    system = SYSTEMS[name]
    assert isinstance(system, HandmadeSystem)
    features = system.features(found["which"])
    if features.digest != found["digest"]:
        log.warning(
            "the features of system=%s are made by other versions here (%s) than where the recogniser was fitted (%s): "
            "its values may differ a little",
            *(name, features.digest, found["digest"]),
        )
    return features


def _head_from(found: Mapping[str, Any], arrays: Arrays) -> Head:
    match found["kind"]:
        case "mean":
            return MeanHead(arrays["mean_P"])
        case "svr":
            return SVRHead(tuple(SupportVectors(**_below(arrays, f"{name}.")) for name in PRIMITIVES))
        case "attention":
            settings = config.build(AttentionHeadConfig, found["recogniser"])
            network = _filled(partial(AttentionHead, settings, int(found["width"]), tuple(found["layers"])), arrays)
            return NetworkHead(network.eval())
        case kind:
            raise UserError(f"a head of the kind {kind} is not known: it was made by a later version of cpcscale")


def _filled(build: Callable[[], Network], arrays: Arrays, left_out: str = "") -> Network:
    """The network with these arrays. Raises ValueError unless they are its own, before it takes memory."""
    with torch.device("meta"), _WithoutDraws():
        blank = build().state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in blank.items()}
    if left_out:
        expected = {name: shape for name, shape in expected.items() if not name.startswith(left_out)}
    if expected != {name: array.shape for name, array in arrays.items()}:
        raise ValueError("the arrays are not those of the network")
    network = build()
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, strict=False)
    return network


class _WithoutDraws(TorchFunctionMode):
    """Leaves out `normal_`, which has nothing to do on meta and imports torch's compiler for it: 2 s and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def _arrays_of(network: nn.Module) -> Arrays:
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
