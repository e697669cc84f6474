"""A causal strided convolution as matrix products, channels last: about twice as fast as nn.Conv1d on a CPU.

The s samples of one stride are one row of s x C numbers in memory. If the kernel is m strides long, output frame t is
the sum over the last m rows, each multiplied by its slice of the kernel: m matrix products of the input as it is,
without unfolding, transposing or padding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With shorter rows than this, it is faster to unfold the input, which is then small.
SHORT_ROW = 32


def causal_conv(x_BSC: Tensor, layer: nn.Conv1d) -> Tensor:
    """[B, S // stride, C']: `layer` over x_BSC with kernel - stride zeros in front, so that it is causal.

    Computed in the precision of autocast where that is on.
    """
    (kernel,), (stride,) = layer.kernel_size, layer.stride
    frames, channels = x_BSC.shape[1] // stride, x_BSC.shape[2]
    pad = (0, 0, kernel - stride, 0)
    if channels * stride < SHORT_ROW:
        rows_BTN = F.pad(x_BSC[:, : frames * stride], pad).unfold(1, kernel, stride).flatten(2)
        return F.linear(rows_BTN, layer.weight.flatten(1), layer.bias)
    if kernel % stride:
        return layer(F.pad(x_BSC, pad).transpose(1, 2)).transpose(1, 2)
    rows_BTN = x_BSC[:, : frames * stride].reshape(len(x_BSC), frames, stride * channels)
    # Slice n of the kernel, its oldest samples first, as [stride x C, C'].
    weight_MNC = layer.weight.permute(2, 1, 0).reshape(kernel // stride, stride * channels, -1)
    parts = [rows_BTN, weight_MNC, cast(Tensor, layer.bias)]
    if torch.is_autocast_enabled(x_BSC.device.type):
        parts = [part.to(torch.get_autocast_dtype(x_BSC.device.type)) for part in parts]
    return cast(Tensor, _Strided.apply(*parts))


class _Strided(torch.autograd.Function):
    """rows [B, T, N], weight [M, N, C'], bias [C'] -> [B, T, C']: row t - lag is multiplied by slice M - 1 - lag."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        # Not a view of another tensor, so that a ReLU may overwrite it.
        y = rows.new_empty(*rows.shape[:2], weight.shape[2])
        torch.addmm(bias, rows.flatten(0, 1), weight[-1], out=y.flatten(0, 1))
        for lag in range(1, min(len(weight), rows.shape[1])):
            late = y[:, lag:]
            torch.baddbmm(late, rows[:, :-lag], weight[-1 - lag].expand(len(rows), -1, -1), out=late)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        d = gradients[0].contiguous()
        flat = d.flatten(0, 1)
        d_weight, d_rows = torch.zeros_like(weight), None
        # Computed transposed, which is a third faster.
        d_weight[-1] = (flat.t() @ rows.flatten(0, 1)).t()
        if ctx.needs_input_grad[0]:
            d_rows = torch.mm(flat, weight[-1].t()).view_as(rows)
        for lag in range(1, min(len(weight), rows.shape[1])):
            # Summed over the rows of the batch in fp32, whatever the precision.
            d_weight[-1 - lag] = (rows[:, :-lag].transpose(1, 2) @ d[:, lag:]).sum(0, dtype=torch.float32)
            if d_rows is not None:
                early = d_rows[:, :-lag]
                torch.baddbmm(early, d[:, lag:], weight[-1 - lag].t().expand(len(rows), -1, -1), out=early)
        return d_rows, d_weight, flat.sum(0)
