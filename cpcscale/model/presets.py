"""The presets of `model.size`: values for all keys that a config does not set. All give 100 frames a second.

| size  | parameters | kept at inference | after |
|-------|------------|-------------------|-------|
| paper | 1.02 M | 0.63 M | Li et al. 2021 (arXiv 2102.06357) |
| small | 3.95 M | 2.37 M | Riviere et al. 2020 (arXiv 2002.02848), the modified CPC, with a second LSTM layer |
| base  | 30.7 M | 24.4 M | the encoder of van den Oord et al. 2018, channel norm; a transformer of 6 layers |
| large | 103 M  | 90.7 M | the same encoder; a transformer of the shape of wav2vec 2.0 base: 12 layers, 768 wide |
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from cpcscale.model.context import ContextConfig
from cpcscale.model.encoder import EncoderConfig
from cpcscale.model.predictor import PredictorConfig

Size = Literal["paper", "small", "base", "large"]
Part = TypeVar("Part", EncoderConfig, ContextConfig, PredictorConfig)


def preset(size: Size, on_log_mel: bool = False) -> tuple[EncoderConfig, ContextConfig, PredictorConfig]:
    """The configs of encoder, context and predictor of a size, with every key set.

    `on_log_mel`: instead of the size's layers over the waveform, the encoder has one over three frames of log mel.
    """
    encoder, context, predictor = _over_waveforms(size)
    if on_log_mel:
        encoder = dataclasses.replace(encoder, kind="logmel", kernels=[3], strides=[1])
    return encoder, context, predictor


def _over_waveforms(size: Size) -> tuple[EncoderConfig, ContextConfig, PredictorConfig]:
    match size:
        case "paper":
            return (
                EncoderConfig(channels=128, kernels=[10, 8, 8, 4], strides=[5, 4, 4, 2], norm="none"),
                ContextConfig(kind="gru", layers=1, width=256, heads=4),
                PredictorConfig(kind="linear", heads=4),
            )
        case "small":
            return (
                _five_layers(256),
                ContextConfig(kind="lstm", layers=2, width=256, heads=4),
                PredictorConfig(kind="shared", heads=4),
            )
        case "base":
            return (
                _five_layers(512),
                ContextConfig(kind="transformer", layers=6, width=512, heads=8),
                PredictorConfig(kind="shared", heads=8),
            )
        case "large":
            return (
                _five_layers(512),
                ContextConfig(kind="transformer", layers=12, width=768, heads=12),
                PredictorConfig(kind="shared", heads=12),
            )


def fill_defaults(given: Part, sized: Part) -> Part:
    """`given`, with values 0, [] and auto replaced by those of `sized`."""
    values: dict[str, Any] = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    open_ = {name: getattr(sized, name) for name, value in values.items() if not value or value == "auto"}
    return dataclasses.replace(given, **open_)


def _five_layers(channels: int) -> EncoderConfig:
    """Five layers as in van den Oord et al. 2018, with the channel norm of Riviere et al. 2020."""
    return EncoderConfig(channels=channels, kernels=[10, 8, 4, 4, 4], strides=[5, 4, 2, 2, 2], norm="channel")
