"""The CPC network: encoder, context network and predictors; the normalisation of the waveform is part of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from cpcscale import config as configs
from cpcscale.model import attention
from cpcscale.model.context import Context, ContextConfig
from cpcscale.model.encoder import ConvEncoder, EncoderConfig
from cpcscale.model.layers import Layer, LayeredNetwork
from cpcscale.model.predictor import Predictor, PredictorConfig
from cpcscale.model.presets import Size, fill_defaults, preset


@dataclass(kw_only=True)
class ModelConfig:
    """The network of a run. `size` chooses a preset (presets.py); a key that is set in a part overrides the preset.

    When it is built, all presets are filled in, so a stored config does not depend on them. Raises UserError for parts
    that do not fit together.
    """

    # The preset for all keys of parts that are not set: 1, 4, 31 or 103 M parameters.
    size: Size = "paper"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)

    def __post_init__(self) -> None:
        encoder, context, predictor = preset(self.size, self.encoder.on_log_mel)
        self.encoder = fill_defaults(self.encoder, encoder)
        self.context = fill_defaults(self.context, context)
        self.predictor = fill_defaults(self.predictor, predictor)
        if self.predictor.kind != "linear":
            heads, positions = self.predictor.heads, self.predictor.positions
            attention.check_heads("model.predictor", heads, self.context.width, positions)


class CPC(LayeredNetwork):
    """waveform -> latents z and contexts c.

    `offset` and `gain` bring the training corpus to zero mean and unit variance. They are one pair for the whole
    corpus, so the loudness of each utterance is kept, and are buffers, so checkpoints hold them. `calibrate` measures
    what an encoder over log mel energies needs to know of the corpus besides.
    """

    kind = "cpc"
    unused: ClassVar[str] = "predictor."
    # Results of all releases know a CPC network by its weights alone.
    digests_settings = False
    offset: Tensor
    gain: Tensor

    def __init__(self, config: ModelConfig, *, offset: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config.encoder)
        self.context = Context(config.context, config.encoder.channels)
        self.predictor = Predictor(config.predictor, config.context.width, config.encoder.channels)
        self.register_buffer("offset", torch.tensor(offset))
        self.register_buffer("gain", torch.tensor(gain))

    @property
    def hop_samples(self) -> int:
        """Samples between two frames."""
        return self.config.encoder.hop_samples

    @property
    def least_samples(self) -> int:
        return self.hop_samples

    @property
    def channels(self) -> int:
        """C, the width of z."""
        return self.config.encoder.channels

    @property
    def context_width(self) -> int:
        """D, the width of c."""
        return self.config.context.width

    @property
    def settings(self) -> dict[str, Any]:
        return configs.identity(self.config)

    @property
    def constants(self) -> dict[str, Tensor]:
        """What it has from the corpus and does not learn, by name: `offset`, `gain` and those of the encoder."""
        learnt = dict(self.named_parameters())
        return {name: tensor for name, tensor in self.state_dict().items() if name not in learnt}

    def calibrate(self, waves: Iterable[np.ndarray]) -> None:
        """Measures the other constants on int16 waveforms [S] of the corpus; reads none where there are no others."""
        if self.encoder.front:
            device = self.gain.device
            self.encoder.front.measure(
                self._levelled(torch.from_numpy(wave_S).to(device).float() / 32768) for wave_S in waves
            )

    def frames(self, samples_B: Tensor) -> Tensor:
        return samples_B // self.hop_samples

    def widths(self, name: Layer) -> tuple[int, ...]:
        z, c = self.channels, self.context_width
        return {"c": (c,), "z": (z,)}.get(name, (z, c))

    def features(self, wave_BS: Tensor, past_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BTC, c_BTD) of float waveforms in [-1, 1) at 16 kHz; T = S // hop_samples.

        With `past_BS`, contexts are computed from that instead: past-only augmentation (arXiv 2007.00991). Both are
        causal: padding after a row does not change the frames of the row.
        """
        z_BTC = self._latents(wave_BS)
        return z_BTC, self.context(z_BTC if past_BS is None else self._latents(past_BS))

    def layer(self, wave_BS: Tensor, name: Layer, samples_B: Tensor | None = None) -> Tensor:
        z_BTC, c_BTD = self.features(wave_BS)
        match name:
            case "c":
                return c_BTD
            case "z":
                return z_BTC
            case _:
                return torch.cat([z_BTC, c_BTD], dim=2)

    def freeze_unused(self, name: Layer) -> None:
        self.predictor.requires_grad_(False)
        if name == "z":
            self.context.requires_grad_(False)

    def untrained(self, seed: int) -> CPC:
        network = build(self.config, seed)
        network.load_state_dict({**network.state_dict(), **self.constants})
        return network

    def _latents(self, wave_BS: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(self._levelled(wave_BS)))

    def _levelled(self, wave: Tensor) -> Tensor:
        return (wave - self.offset) * self.gain


def build(config: ModelConfig, seed: int, *, offset: float = 0.0, gain: float = 1.0) -> CPC:
    """A network whose initial weights depend on `seed` alone; the state of torch's global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CPC(config, offset=offset, gain=gain)
