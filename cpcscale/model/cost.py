"""What a network costs, computed from its config: parameters, operations, memory, and the receptive field."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from cpcscale import audio
from cpcscale.model.cpc import CPC, ModelConfig
from cpcscale.model.log_mel import frame_operations
from cpcscale.model.strided_conv import SHORT_ROW

# Bytes of a number in fp32.
_BYTES = 4
# Numbers that each layer keeps for the backward pass, for each frame and unit of width.
_KEPT_RECURRENT = {"gru": 5, "lstm": 17}
# Of a block of a transformer: input and output of 2 norms, query, key, value, their sum, 2 feed-forward layers of 4.
_KEPT_BLOCK = 16
# Rotated queries and keys, and the sum of values in another layout.
_KEPT_ROTARY = 3
# The input of the last norm, and that of the linear map before or after the blocks.
_KEPT_ENDS = 2


@dataclass(frozen=True)
class CostByPart:
    """One kind of cost for each part of the network."""

    encoder: float
    context: float
    predictor: float

    @property
    def total(self) -> float:
        """The cost of the whole network, as in pretraining."""
        return self.kept + self.predictor

    @property
    def kept(self) -> float:
        """The cost without the predictors, as in every use after pretraining."""
        return self.encoder + self.context

    def times(self, factor: float) -> CostByPart:
        return CostByPart(self.encoder * factor, self.context * factor, self.predictor * factor)


@dataclass(frozen=True)
class NetworkCost:
    """The result of `network_cost`; names of fields end with their units."""

    parameters: CostByPart
    # Operations of the forward pass for each second of audio; training takes 3 times as many.
    flops_per_s: CostByPart
    frames_per_s: float
    # The receptive field: how much audio one frame of z depends on.
    receptive_ms: float
    # An estimate of the memory for training in fp32.
    memory_mib: float


def network_cost(config: ModelConfig, window_samples: int, rows: int) -> NetworkCost:
    """The cost of a network that is trained on `rows` windows of `window_samples` at once.

    Operations are those of convolutions, matrix products and attention; a multiplication with its addition counts as 2.
    Biases, norms, activations, Fourier transforms and the objective are not counted. Attention counts as the full
    square of the frames of a window, though a causal kernel may skip half. The backward pass takes twice as many as the
    forward pass.

    Memory is that of weights, gradients, the two moments of Adam and what layers keep for the backward pass on a CPU.
    Temporary arrays, the scores of the objective and unused memory of the allocator are not counted.
    """
    encoder = config.encoder
    frames_per_s = audio.RATE_HZ / encoder.hop_samples
    frames = window_samples // encoder.hop_samples
    per_frame = _flops(config, frames)
    parameters = _parameters(config)
    # The backward pass keeps the kernels once more, as matrices; those of stride 1 are matrices as they are.
    kernels = parameters.encoder if max(encoder.strides) > 1 else 0
    numbers = 4 * parameters.total + kernels + _kept_numbers(config, frames, rows)
    return NetworkCost(
        parameters=parameters,
        flops_per_s=per_frame.times(frames_per_s),
        frames_per_s=frames_per_s,
        receptive_ms=1000 * encoder.receptive_samples / audio.RATE_HZ,
        memory_mib=numbers * _BYTES / 2**20,
    )


def _parameters(config: ModelConfig) -> CostByPart:
    # On the meta device, parameters have shapes but take no memory.
    with torch.device("meta"):
        network = CPC(config)
    return CostByPart(_count(network.encoder), _count(network.context), _count(network.predictor))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(config: ModelConfig, frames: int) -> CostByPart:
    """Operations of the forward pass for one frame, in windows of `frames`."""
    encoder, context, predictor = config.encoder, config.context, config.predictor
    channels, width = encoder.channels, context.width
    block = 24 * width**2 + 4 * frames * width
    convolutions = 0
    for layer, kernel in enumerate(encoder.kernels):
        outputs = math.prod(encoder.strides[layer + 1 :])
        convolutions += 2 * (channels if layer else encoder.inputs) * channels * kernel * outputs
    if encoder.on_log_mel:
        convolutions += frame_operations(encoder.bands) * math.prod(encoder.strides)
    match context.kind:
        case "transformer":
            over_frames = 2 * channels * width + context.layers * block
        case _:
            gates = 3 if context.kind == "gru" else 4
            over_frames = 2 * gates * width * (channels + width + (context.layers - 1) * 2 * width)
    maps = 2 * predictor.steps * width * channels
    return CostByPart(convolutions, over_frames, maps + _predictor_blocks(config) * block)


def _kept_numbers(config: ModelConfig, frames: int, rows: int) -> int:
    """Numbers that the layers keep for the backward pass of `rows` windows of `frames`."""
    encoder, context, predictor = config.encoder, config.context, config.predictor
    channels, width = encoder.channels, context.width
    outputs = [math.prod(encoder.strides[layer + 1 :]) for layer in range(len(encoder.strides))]
    # The output of each layer, and the input of its norm if any; that of the first layer, unfolded if its rows are
    # short; copies for unfit strides.
    first = encoder.kernels[0] if encoder.inputs * encoder.strides[0] < SHORT_ROW else encoder.strides[0]
    a_frame = channels * sum(outputs) * (1 if encoder.norm == "none" else 2) + encoder.inputs * first * outputs[0]
    if encoder.fuses_first_layers:
        # The waveform itself replaces the output of the first layer and the unfolded waveform.
        a_frame += encoder.hop_samples - (channels + encoder.kernels[0]) * outputs[0]
    for layer in range(2 if encoder.fuses_first_layers else 1, len(outputs)):
        if encoder.kernels[layer] % encoder.strides[layer] or channels * encoder.strides[layer] < SHORT_ROW:
            a_frame += channels * outputs[layer - 1]
    bias, blocks = 0, _predictor_blocks(config)
    if context.kind == "transformer":
        a_frame += width * (context.layers * _kept_block(context.positions) + _KEPT_ENDS + (0 if blocks else 1))
        bias += context.heads * frames**2 * (context.positions == "relative")
    else:
        a_frame += width * context.layers * _KEPT_RECURRENT[context.kind]
        # Its input and what linear predictors take of it in another layout, which a single row has already.
        a_frame += (channels + (0 if blocks else width)) * (rows > 1)
    a_frame += width * blocks * (_kept_block(predictor.positions) + _KEPT_ENDS)
    bias += blocks * predictor.heads * frames**2 * (predictor.positions == "relative")
    return rows * frames * a_frame + bias


def _kept_block(positions: str) -> int:
    return _KEPT_BLOCK + (_KEPT_ROTARY if positions == "rotary" else 0)


def _predictor_blocks(config: ModelConfig) -> int:
    return {"linear": 0, "shared": 1, "each": config.predictor.steps}[config.predictor.kind]
