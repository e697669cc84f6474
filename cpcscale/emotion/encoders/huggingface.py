"""wav2vec 2.0, HuBERT and WavLM networks as encoders, by the optional extra `hf` (the transformers library).

They take audio at 16 kHz and give 50 frames/s. B rows, S samples, T frames, C features, L hidden layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.model.layers import Layer, LayeredNetwork

PREFIX = "hf:"
# Random parts of these networks in training, switched off: they would make the gradient of a batch depend on how it is
# split over micro-batches and ranks, and SpecAugment draws from numpy's global generator. The adapter changes the frame
# rate.
_DETERMINISTIC = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
}
# Entries of a config about the file it came from, not about the network.
_PLACES = ("_name_or_path", "transformers_version", "architectures", "dtype")


class HFEncoder(LayeredNetwork):
    """A network of the transformers library as an encoder, from waveforms to the frames of one of its layers.

    `z` is the output of its convolutions, `c` its last hidden state, `both` the two side by side, and `mix` all L + 1
    hidden states side by side, each frame normalised to zero mean and unit variance as in SUPERB (Yang et al. 2021,
    arXiv 2105.01051).
    """

    kind = "hf"
    layers: ClassVar[tuple[Layer, ...]] = ("c", "z", "both", "mix")
    network: Any

    def __init__(self, network: nn.Module, normalises: bool) -> None:
        super().__init__()
        self.network, self.normalises = network, normalises
        self.offset, self.gain = 0.0, 1.0

    @property
    def settings(self) -> dict[str, Any]:
        values = {name: value for name, value in self._config.to_dict().items() if name not in _PLACES}
        return json.loads(json.dumps({"normalises": self.normalises, **values}, default=str))

    @property
    def least_samples(self) -> int:
        """The receptive field of a frame in samples, 400."""
        samples = 1
        for kernel, stride in reversed(list(zip(self._config.conv_kernel, self._config.conv_stride, strict=True))):
            samples = (samples - 1) * stride + kernel
        return samples

    def frames(self, samples_B: Tensor) -> Tensor:
        # The convolutions are not padded.
        for kernel, stride in zip(self._config.conv_kernel, self._config.conv_stride, strict=True):
            samples_B = (samples_B - kernel) // stride + 1
        return samples_B

    @property
    def hop_samples(self) -> int:
        return math.prod(self._config.conv_stride)

    def widths(self, name: Layer) -> tuple[int, ...]:
        z, c = int(self._config.conv_dim[-1]), int(self._config.hidden_size)
        states = int(self._config.num_hidden_layers) + 1
        return {"z": (z,), "c": (c,), "both": (z, c), "mix": (c,) * states}[name]

    def freeze_unused(self, name: Layer) -> None:
        if name == "z":
            for part, module in self.network.named_children():
                module.requires_grad_(part == "feature_extractor")

    @property
    def library(self) -> str:
        return f"transformers {version('transformers')}"

    def untrained(self, seed: int) -> HFEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HFEncoder(_classes()[self._config.model_type](self._config), self.normalises).eval()

    def layer(self, wave_BS: Tensor, name: Layer, samples_B: Tensor | None = None) -> Tensor:
        """Features [B, T, C] of the layer.

        Networks whose first convolution is normalised over time (wav2vec2-base, hubert-base) take no mask, so padding
        would change their output: rows of each length are computed without it.
        """
        if samples_B is None:
            samples_B = torch.full((len(wave_BS),), wave_BS.shape[1], device=wave_BS.device)
        if self._config.feat_extract_norm == "layer":
            valid_BS = torch.arange(wave_BS.shape[1], device=wave_BS.device)[None] < samples_B[:, None]
            return self._layer(wave_BS, valid_BS.long(), name)
        frames, places, parts = int(self.frames(samples_B).max()), [], []
        for samples in samples_B.unique().tolist():
            rows = (samples_B == samples).nonzero()[:, 0]
            x_BTC = self._layer(wave_BS[rows, :samples], None, name)
            parts.append(F.pad(x_BTC, (0, 0, 0, frames - x_BTC.shape[1])))
            places.append(rows)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _layer(self, wave_BS: Tensor, valid_BS: Tensor | None, name: str) -> Tensor:
        if name == "z":
            return self.network.feature_extractor(wave_BS).transpose(1, 2)
        with _outputs(self.network.feature_extractor) as z:
            found = self.network(wave_BS, attention_mask=valid_BS, output_hidden_states=name == "mix", return_dict=True)
        c_BTC = found.last_hidden_state
        if name == "mix":
            # The last state is taken from the output: some networks normalise it once more.
            states = (*found.hidden_states[:-1], c_BTC)
            return torch.cat([F.layer_norm(x_BTC, x_BTC.shape[-1:]) for x_BTC in states], dim=2)
        return torch.cat([z[0].transpose(1, 2), c_BTC], dim=2) if name == "both" else c_BTC

    @property
    def _config(self) -> Any:
        return self.network.config

    def __reduce__(self) -> tuple[Callable[..., HFEncoder], tuple[Any, ...]]:
        """Pickles weights and config: torch cannot pickle weights computed from others, as the positional ones here."""
        weights = {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}
        return _rebuilt, (self._config.to_dict(), self.normalises, weights)


def open_hf(url: str) -> tuple[HFEncoder, dict[str, Any]]:
    """(network, metadata) of `hf:FOLDER`, or of `hf:NAME` on the Hugging Face hub; reads safetensors only.

    Raises UserError if the extra `hf` is not installed, for a missing checkpoint, other kinds of networks, weights that
    are not safetensors or not complete, and networks for another sampling rate.
    """
    classes = _classes()
    from transformers import AutoConfig, Wav2Vec2FeatureExtractor

    name = url.removeprefix(PREFIX)
    with _refusing(url), _quiet():
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in classes:
            raise UserError(
                f"encoder.checkpoint={url} is a network of the kind {config.model_type}: "
                f"use one of {', '.join(classes)}"
            )
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(name)
        network, loaded = classes[config.model_type].from_pretrained(
            name,
            config=_without_randomness(config),
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if loaded["missing_keys"]:
        raise UserError(
            f"encoder.checkpoint={url} lacks {len(loaded['missing_keys'])} weights of the network, such as "
            f"{min(loaded['missing_keys'])}, which would be random: save it whole with save_pretrained"
        )
    if extractor.sampling_rate != audio.RATE_HZ:
        raise UserError(
            f"encoder.checkpoint={url} wants audio at {extractor.sampling_rate} Hz, but audio here is at "
            f"{audio.RATE_HZ} Hz: use a network of that rate"
        )
    # Such networks come without a digest of their pretraining data.
    return HFEncoder(network, bool(extractor.do_normalize)).eval(), {"url": url, "fingerprint": "unknown"}


def absolute_hf(url: str) -> str:
    """The URL with a local folder made absolute; a name on the hub stays as it is."""
    name = url.removeprefix(PREFIX)
    return PREFIX + storage.absolute(name) if Path(name).expanduser().is_dir() else url


def _classes() -> dict[str, Any]:
    try:
        from transformers import HubertModel, Wav2Vec2Model, WavLMModel
    except ImportError:
        raise UserError(
            f"encoder.checkpoint={PREFIX}... needs the transformers library: pip install 'cpcscale[hf]'"
        ) from None
    return {"wav2vec2": Wav2Vec2Model, "hubert": HubertModel, "wavlm": WavLMModel}


def _without_randomness(config: Any) -> Any:
    config.update({name: value for name, value in _DETERMINISTIC.items() if hasattr(config, name)})
    return config


def rebuilt_hf(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> HFEncoder:
    """The network of its settings and arrays. Raises UserError without the extra `hf`."""
    weights = {name.removeprefix("network."): torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return _rebuilt(dict(settings), bool(settings["normalises"]), weights)


def _rebuilt(values: dict[str, Any], normalises: bool, weights: dict[str, Tensor]) -> HFEncoder:
    made = _classes()[values["model_type"]]
    with torch.random.fork_rng(devices=[]):
        network = made(made.config_class.from_dict(values))
    network.load_state_dict(weights)
    return HFEncoder(network, normalises).eval()


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """A block that collects the outputs of `module` in a list."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _given, made: found.append(made))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _refusing(url: str) -> Iterator[None]:
    """A block that turns the library's error for a checkpoint it cannot load into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"encoder.checkpoint={url} cannot be loaded ({lines[0]}): give a folder that save_pretrained wrote (its "
            "config.json, preprocessor_config.json and *.safetensors, not git-lfs pointers), "
            "or a name on the hub"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without the library's progress bars and its list of unused weights, such as another task's head."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
