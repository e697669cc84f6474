"""The encoder that people load, and by which they turn audio into frames. S samples, T frames, C features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpcscale import audio
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.encoders.networks import WindowEncoder, open_network
from cpcscale.errors import UserError
from cpcscale.model.layers import Layer, LayeredNetwork
from cpcscale.serve.given_audio import read_wave

# Windows that are encoded before their frames are put in their places: so an hour takes little more than its result.
_WINDOWS = 8


@dataclass(frozen=True)
class Frames:
    """The frames of some audio: `frames`, float32 [T, C], and `times_s`, float64 [T], the middle of each in seconds.

    `layer` says which: z, c, both (z and c side by side) or mix (all hidden states of a Hugging Face network).
    """

    frames: np.ndarray
    times_s: np.ndarray
    layer: str


def found_device(name: str) -> torch.device:
    """The device of this name, such as cpu, cuda or cuda:0. Raises UserError where there is none."""
    try:
        where = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name} is no device ({str(error).splitlines()[0]}): give cpu, cuda or cuda:0") from None
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but this process sees {torch.cuda.device_count()} GPUs: use cpu")
    return where


class Encoder:
    """A network that was pretrained on speech without labels, from audio to frames.

    >>> import numpy as np, torch
    >>> from cpcscale.emotion.encoders.networks import WindowEncoder
    >>> from cpcscale.model.cpc import ModelConfig, build
    >>> network = build(ModelConfig(size="small"), seed=0)
    >>> encoder = Encoder(WindowEncoder(network, "c", torch.device("cpu")), {})
    >>> found = encoder.encode(np.sin(np.arange(44_100) / 9), rate=44_100)
    >>> found.frames.shape == (100, encoder.width("c")), found.times_s[:3].tolist()
    (True, [0.005, 0.015, 0.025])
    """

    def __init__(self, features: WindowEncoder, source: Mapping[str, Any], max_s: float = CorpusConfig().max_s) -> None:
        """Use `cpcscale.load`. `source` says where the network is from, `max_s` is the length of its windows."""
        self._features, self.max_s = features, max_s
        self.source: dict[str, Any] = {"url": "", "fingerprint": "unknown", **source}

    @classmethod
    def open(cls, url: str) -> Encoder:
        """That of a pretraining's folder (its newest checkpoint), a checkpoint's, a recogniser's, or of hf:NAME.

        Raises UserError where there is none.
        """
        network, source = open_network(url)
        return cls(WindowEncoder(network.eval(), "c", torch.device("cpu")), source)

    @property
    def network(self) -> LayeredNetwork:
        """The network itself, a torch module."""
        return self._features.encoder

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that `encode` gives."""
        return self.network.layers

    @property
    def hop_s(self) -> float:
        """The time between two frames."""
        return self.network.hop_samples / audio.RATE_HZ

    @property
    def first_s(self) -> float:
        """The middle of the first frame: of its hop, or of all samples that it depends on where these are padded."""
        return self.network.least_samples / 2 / audio.RATE_HZ

    def width(self, layer: str = "c") -> int:
        """C, the features of a frame."""
        return sum(self.network.widths(self._checked(layer)))

    def to(self, device: str) -> Encoder:
        """The same on another device, such as cuda. Raises UserError where there is none."""
        features = dataclasses.replace(self._features, where=found_device(device))
        return Encoder(features, self.source, self.max_s)

    def encode(self, source: str | Path | bytes | np.ndarray, rate: int = 0, layer: str = "c") -> Frames:
        """The frames of a file (a path or s3:// URL, or its bytes), or of an array [S] or [S, channels] at `rate` Hz.

        Arrays are floats in [-1, 1] or int16. Any rate and number of channels: they come through the door that files
        come through. Up to `max_s` seconds, the frames are those that a recogniser takes. Longer audio is encoded in
        windows of `max_s`, each half a window after the one before, and the frames change from one to the next in the
        middle of what both have. So each frame knows at least max_s / 4 of its past, as long as there is so much, and
        time goes on evenly: `first_s + hop_s * t`.

        Raises UserError for a file that is not there, what is no sound, an array without a rate, and a layer that the
        network does not have.
        """
        features = dataclasses.replace(self._features, layer=self._checked(layer))
        wave_S = read_wave(source, rate)
        frames = self._in_windows(features, np.resize(wave_S, max(len(wave_S), features.least_samples)))
        return Frames(frames, self.first_s + self.hop_s * np.arange(len(frames)), layer)

    def __repr__(self) -> str:
        step = f", step {self.source['step']}" if "step" in self.source else ""
        return f"<Encoder {self.network.kind} of {self.source['url'] or 'a recogniser'}{step}>"

    def _checked(self, layer: str) -> Layer:
        found = next((known for known in self.network.layers if known == layer), None)
        if found is None:
            raise UserError(f"layer={layer} is not one that this encoder gives: use one of {', '.join(self.layers)}")
        return found

    def _in_windows(self, features: WindowEncoder, wave_S: np.ndarray) -> np.ndarray:
        """float32 [T, C] of a waveform of any length."""
        hop, most = self.network.hop_samples, round(self.max_s * audio.RATE_HZ)
        step = max(most // 2 // hop, 1) * hop
        starts = [0]
        while starts[-1] + most < len(wave_S):
            starts.append(starts[-1] + step)
        total = int(self.network.frames(torch.tensor(len(wave_S))))
        cuts = [0, *((start + (most - step) // 2) // hop for start in starts[1:]), total]
        x_TC = np.empty((total, self.width(features.layer)), np.float32)
        for first in range(0, len(starts), _WINDOWS):
            group = starts[first : first + _WINDOWS]
            for place, found in enumerate(features([wave_S[start : start + most] for start in group]), first):
                began = starts[place] // hop
                x_TC[cuts[place] : cuts[place + 1]] = found[cuts[place] - began : cuts[place + 1] - began]
        return x_TC
