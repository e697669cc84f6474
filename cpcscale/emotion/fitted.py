"""A fitted recogniser: audio in, activation, valence and dominance out, and the arrays that it is made of.

It is what a fold of a cross-validation tests, and what is saved. U utterances, W windows, T frames, C and F features,
P primitives.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn

from cpcscale import audio, config
from cpcscale.emotion.audio.labelled_file import LEAST_S
from cpcscale.emotion.audio.windows import window_shares, window_spans
from cpcscale.emotion.batching import forward_by_length
from cpcscale.emotion.corpora.corpus import in_units
from cpcscale.emotion.encoders.arrays import Arrays, arrays_of, below, filled
from cpcscale.emotion.encoders.networks import REBUILT, WindowEncoder, encoder_from
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.blocks import UNSCALED, BlockScale, scale_from
from cpcscale.emotion.heads.ridge import LinearWeights
from cpcscale.emotion.heads.svm import SupportClasses, SupportVectors
from cpcscale.emotion.heads.vectors import Fitted
from cpcscale.emotion.held_out import Reference, window_means
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.emotion.systems.fusion import FusedFeatures, parts_of
from cpcscale.emotion.systems.handmade import HandmadeSystem
from cpcscale.emotion.systems.system import Features
from cpcscale.errors import UserError
from cpcscale.handmade.statistics import STATISTICS, Readout

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
# Samples of the audio by which a recogniser that is loaded is tried.
_TRIED = 8000
# Samples whose windows are encoded together, a minute.
_TOGETHER = 60 * audio.RATE_HZ


# Makes [W, R] of what features made of W windows of an utterance, and of its seconds.
Reader: TypeAlias = "Callable[[Sequence[np.ndarray], float], np.ndarray]"


class Head(Protocol):
    """Predicts from what `Features` made, window by window, so that no length of audio fills the memory."""

    def read(self, windows: Sequence[np.ndarray], seconds: float) -> np.ndarray:
        """float64 [W, R]: the readout of each window of an utterance of so many seconds."""

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        """float64 [U, P] on [-1, 1] for utterances, each the mean of its windows' readouts, by their weights."""

    def description(self) -> dict[str, Any]:
        """What it is, in plain values; with `arrays`, all that it is made again from."""

    def arrays(self) -> Arrays: ...


@dataclass(frozen=True)
class MeanHead:
    """The same for every utterance."""

    mean_P: np.ndarray

    def read(self, windows: Sequence[np.ndarray], seconds: float) -> np.ndarray:
        return np.zeros((len(windows), 0))

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        return np.tile(self.mean_P, (len(readout_UR), 1))

    def description(self) -> dict[str, Any]:
        return {"kind": "mean"}

    def arrays(self) -> Arrays:
        return {"mean_P": self.mean_P}


@dataclass(frozen=True)
class VectorHead:
    """A regression of `kind` svr or ridge for each primitive, on what `readout` and then `scale` make of features."""

    kind: str
    machines: tuple[Fitted, ...]
    readout: Readout = STATISTICS
    scale: BlockScale = UNSCALED

    def read(self, windows: Sequence[np.ndarray], seconds: float) -> np.ndarray:
        return self.readout(windows, seconds)

    def predict(self, readout_UR: np.ndarray) -> np.ndarray:
        x_UF = self.scale(readout_UR)
        return np.stack([machine.predict(x_UF) for machine in self.machines], axis=1)

    def description(self) -> dict[str, Any]:
        # Another kind, for release 0.2 knows no blocks: it would leave the scale out without a word.
        return {"kind": self.kind + " on blocks" * bool(self.scale.blocks), "readout": vars(self.readout)}

    def arrays(self) -> Arrays:
        named = zip(PRIMITIVES, self.machines, strict=True)
        found = {f"{name}.{key}": value for name, machine in named for key, value in machine.arrays().items()}
        return found | {f"scale.{key}": value for key, value in self.scale.arrays().items()}


@dataclass(frozen=True)
class NetworkHead:
    """The attention head of arXiv 2102.06357, with what it standardises by."""

    network: AttentionHead

    def read(self, windows: Sequence[np.ndarray], seconds: float) -> np.ndarray:
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
        return arrays_of(self.network)


@dataclass(frozen=True)
class FittedClassifier:
    """A classifier on the same features, and the names of its classes; `readout` and `scale` as in VectorHead."""

    machine: SupportClasses
    classes: tuple[str, ...]
    readout: Readout = STATISTICS
    scale: BlockScale = UNSCALED

    def predict(self, x_UF: np.ndarray) -> list[str]:
        """The class of each utterance, of the means of what `readout` gives."""
        return [self.classes[number] for number in self.machine.predict(self.scale(x_UF))]

    def arrays(self) -> Arrays:
        """All that it is made again from, but for names and readout."""
        return self.machine.arrays() | {f"scale.{key}": value for key, value in self.scale.arrays().items()}


@dataclass(frozen=True)
class Output:
    """What a recogniser says of U utterances: `unit_UP` float64 on [-1, 1].

    `distance_U` says how unlike its training they are (`Reference`), `classes_U` their classes; each is empty where the
    recogniser has no such part.
    """

    unit_UP: np.ndarray
    distance_U: np.ndarray
    classes_U: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedRecogniser:
    """Features of audio, a head on them, and how audio is divided into windows.

    `features` is None where the audio plays no part, FusedFeatures where several lie side by side. `scale`: (least,
    greatest) of the labels it was fitted to. `reference` is of the utterances that it has learnt from.
    """

    system: str
    features: Features | FusedFeatures | None
    head: Head
    max_s: float
    scale: tuple[float, float]
    reference: Reference | None = None
    classifier: FittedClassifier | None = None

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

    def predict(self, waves: Sequence[audio.Sliced]) -> Output:
        """What it says of whole utterances, int16 [S] at 16 kHz.

        In the windows that it was fitted on, each utterance by itself: it has the same result alone and among others.
        A few windows are in memory at a time. Raises TypeError for samples of another type, of which features would be
        others.
        """
        readers = [self.head.read]
        if self.reference is not None:
            readers.append(lambda windows, seconds: window_means(windows))
        if self.classifier is not None:
            readers.append(self.classifier.readout)
        readouts = [np.stack(parts) for parts in zip(*(self._read(wave, readers) for wave in waves), strict=True)]
        unit_UP = self.head.predict(readouts.pop(0))
        distances = [self.reference.distance(mean_F) for mean_F in readouts.pop(0)] if self.reference else []
        classes = self.classifier.predict(readouts.pop(0)) if self.classifier else []
        return Output(unit_UP, np.array(distances), tuple(classes))

    def _read(self, wave: audio.Sliced, readers: Sequence[Reader]) -> list[np.ndarray]:
        """What each reader makes of one utterance: [R], the mean over its windows by their weights."""
        if wave[:1].dtype != np.int16:
            raise TypeError("a recogniser takes int16 samples")
        if self.features is None:
            return [read([np.zeros(0)], 0.0)[0] for read in readers]
        parts = [self._read_with(features, wave, readers) for features in parts_of(self.features)]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _read_with(self, features: Features, wave: audio.Sliced, readers: Sequence[Reader]) -> list[np.ndarray]:
        least, size = features.least_samples, len(wave)
        seconds = size / audio.RATE_HZ
        if features.whole:
            made = features([wave if size >= least else np.resize(wave[:], least)])
            return [read(made, seconds)[0] for read in readers]
        most = round(self.max_s * audio.RATE_HZ)
        spans = window_spans(size, most)
        together = max(1, _TOGETHER // most)
        found: list[list[np.ndarray]] = []
        for at in range(0, len(spans), together):
            windows = [wave[start:stop] for start, stop in spans[at : at + together]]
            windows = [each if len(each) >= least else np.resize(each, least) for each in windows]
            made = features(windows)
            found.append([read(made, seconds) for read in readers])
        share_W = window_shares(spans)
        return [np.asarray(share_W @ np.concatenate(parts)) for parts in zip(*found, strict=True)]

    def on(self, where: torch.device) -> FittedRecogniser:
        """Itself, its networks moved there; on the CPU as it is saved and sent to processes without a GPU."""
        if isinstance(self.head, NetworkHead):
            self.head.network.to(where)
        if isinstance(self.features, FusedFeatures):
            return dataclasses.replace(self, features=self.features.each(partial(_moved, where)))
        return self if self.features is None else dataclasses.replace(self, features=_moved(where, self.features))

    def in_units(self, unit_UP: np.ndarray) -> np.ndarray:
        """Predictions on [-1, 1] in the units of the labels."""
        return in_units(unit_UP, self.scale)

    @property
    def training_rows(self) -> int:
        """How many vectors of utterances it holds as they are, at most: its support vectors."""
        by_scale, arrays = defaultdict(list), self.arrays()
        for name, array in arrays.items():
            if name.endswith(".vector_VF"):
                # Where blocks are scaled, a row of the classifier is another vector than that of the regressions.
                apart = name.startswith("classifier.") and "classifier.scale.0.mean_F" in arrays
                by_scale[apart, array.shape[1]].append(array)
        return sum(len(np.unique(np.concatenate(held), axis=0)) for held in by_scale.values())

    def description(self) -> dict[str, Any]:
        """What it is, in plain values; with `arrays`, all that it is made again from."""
        return {
            "system": self.system,
            "max_s": self.max_s,
            "scale": list(self.scale),
            "features": {"kind": "none"} if self.features is None else self.features.description(),
            "head": self.head.description(),
            "classes": list(self.classifier.classes) if self.classifier is not None else [],
            "classes_readout": vars(self.classifier.readout) if self.classifier is not None else {},
        }

    def arrays(self) -> Arrays:
        """Its arrays by name."""
        found = {f"head.{name}": value for name, value in self.head.arrays().items()}
        if self.features is not None:
            found |= {f"encoder.{name}": value for name, value in self.features.arrays().items()}
        if self.reference is not None:
            found |= {f"reference.{name}": value for name, value in vars(self.reference).items()}
        if self.classifier is not None:
            found |= {f"classifier.{name}": value for name, value in self.classifier.arrays().items()}
        return found


def fitted_from(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> FittedRecogniser:
    """The recogniser of a description and its arrays. Raises UserError where they do not fit each other."""
    try:
        features = _features_from(str(description["system"]), description["features"], below(arrays, "encoder."))
        head = _head_from(description["head"], below(arrays, "head."))
        low, high, max_s = (float(value) for value in (*description["scale"], description["max_s"]))
        if not (math.isfinite(low) and low < high and math.isfinite(high) and LEAST_S <= max_s < math.inf):
            raise ValueError(f"scale={low:g} to {high:g}, max_s={max_s:g}")
        reference = below(arrays, "reference.")
        made = FittedRecogniser(
            str(description["system"]),
            features,
            head,
            max_s,
            (low, high),
            Reference(**reference) if reference else None,
            _classifier_from(description, below(arrays, "classifier.")),
        )
        # What fits together predicts, and gives numbers.
        with np.errstate(all="ignore"):
            tried = made.predict([np.arange(_TRIED, dtype=np.int16)])
        if not (np.isfinite(tried.unit_UP).all() and np.isfinite(tried.distance_U).all()):
            raise ValueError("it gives no numbers")
        return made
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"its description and its arrays do not fit ({type(error).__name__}: {error}): it "
            "was changed, or made by another version of cpcscale"
        ) from None


def _moved(where: torch.device, features: Features) -> Features:
    if not isinstance(features, WindowEncoder):
        return features
    features.encoder.to(where)
    return dataclasses.replace(features, where=where)


def _classifier_from(description: Mapping[str, Any], arrays: Arrays) -> FittedClassifier | None:
    if not arrays:
        return None
    machine = {name: value for name, value in arrays.items() if not name.startswith("scale.")}
    names, readout = tuple(map(str, description["classes"])), Readout(**description.get("classes_readout", {}))
    return FittedClassifier(SupportClasses(**machine), names, readout, scale_from(below(arrays, "scale.")))


def _features_from(system: str, found: Mapping[str, Any], arrays: Arrays) -> Any:
    match found["kind"]:
        case "none":
            return None
        case "fused":
            parts = [(part["system"], part, below(arrays, f"{n}.")) for n, part in enumerate(found["parts"])]
            return FusedFeatures(tuple((name, _features_from(name, part, own)) for name, part, own in parts))
        case "handmade":
            return _handmade(system, found)
        case kind if kind in REBUILT:
            return encoder_from(found, arrays)
        case kind:
            raise UserError(f"features of the kind {kind} are not known: it was made by a later version of cpcscale")


def _handmade(name: str, found: Mapping[str, Any]) -> Features:
    system = SYSTEMS[name]
    assert isinstance(system, HandmadeSystem)
    features = system.features(found["which"])
    if not found.get("duration", True):
        features = features.without_duration()
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
        case "svr" | "ridge" | "svr on blocks" | "ridge on blocks" as known:
            kind = known.removesuffix(" on blocks")
            machine = SupportVectors if kind == "svr" else LinearWeights
            machines = tuple(machine(**below(arrays, f"{name}.")) for name in PRIMITIVES)
            return VectorHead(kind, machines, Readout(**found.get("readout", {})), scale_from(below(arrays, "scale.")))
        case "attention":
            settings = config.build(AttentionHeadConfig, found["recogniser"])
            network = filled(partial(AttentionHead, settings, int(found["width"]), tuple(found["layers"])), arrays)
            return NetworkHead(network)
        case kind:
            raise UserError(f"a head of the kind {kind} is not known: it was made by a later version of cpcscale")
