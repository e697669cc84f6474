"""torch's GRU on a CPU, faster backward: the gradient of the recurrent weights is one matrix product, not one a frame.

Cho et al. 2014 (arXiv 1406.1078) in the form of torch.nn.GRU: r and z are the reset and update gates,
n = tanh(W x + r (U h)), h' = n + z (h - n).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gru(x_BTC: Tensor, module: nn.GRU) -> Tensor:
    """[B, T, H]: what `module` (batch first, one direction, from a state of zeros) gives; by cuDNN on a GPU.

    Elsewhere with the same values and gradients to fp32 rounding.
    """
    if x_BTC.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return cast(Tensor, module(x_BTC)[0])
    x_TBC = x_BTC.transpose(0, 1)
    for layer in range(module.num_layers):
        names = (f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        weight, recurrent, bias, recurrent_bias = (cast(Tensor, getattr(module, name)) for name in names)
        gates, width = 2 * module.hidden_size, module.hidden_size
        # The bias of n's recurrent half alone stays inside: r scales it.
        inner = F.pad(recurrent_bias[:gates], (0, width))
        x_TBC = cast(Tensor, _Gru.apply(F.linear(x_TBC, weight, bias + inner), recurrent, recurrent_bias[gates:]))
    return x_TBC.transpose(0, 1)


class _Gru(torch.autograd.Function):
    """inputs [T, B, 3 H] in the order r, z, n, their biases within; weight [3 H, H]; bias [H] -> h [T, B, H]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        frames, batch, width = inputs.shape[0], inputs.shape[1], weight.shape[1]
        h = inputs.new_zeros(frames + 1, batch, width)
        rz, n = inputs.new_empty(frames, batch, 2 * width), inputs.new_empty(frames, batch, width)
        # U h of n, before r scales it.
        un = torch.empty_like(n)
        weight_rz, weight_n = (part.t().contiguous() for part in weight.split([2 * width, width]))
        input_rz, input_n = inputs.split([2 * width, width], dim=2)
        r, z = rz.split(width, dim=2)
        for t in range(frames):
            torch.addmm(input_rz[t], h[t], weight_rz, out=rz[t]).sigmoid_()
            torch.addmm(bias, h[t], weight_n, out=un[t])
            torch.addcmul(input_n[t], r[t], un[t], out=n[t]).tanh_()
            torch.lerp(n[t], h[t], z[t], out=h[t + 1])
        ctx.save_for_backward(weight, h, rz, n, un)
        return h[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, h, rz, n, un = ctx.saved_tensors
        d_out = gradients[0]
        frames, batch, width = n.shape
        r, z = rz.split(width, dim=2)
        # What the gradient of h' is multiplied by to give those before the gates: r, z, n's recurrent half, n's input.
        factors = n.new_empty(frames, batch, 4, width)
        torch.mul(1 - z, 1 - n * n, out=factors[:, :, 3])
        torch.mul(factors[:, :, 3], r, out=factors[:, :, 2])
        torch.mul(h[:-1] - n, z - z * z, out=factors[:, :, 1])
        torch.mul(factors[:, :, 3], un, out=factors[:, :, 0]).mul_(r - r * r)
        recurrent = factors.flatten(2)[:, :, : 3 * width]
        d_h, kept = torch.zeros_like(h[0]), torch.empty_like(h[0])
        for t in range(frames - 1, -1, -1):
            d_h += d_out[t]
            torch.mul(d_h, z[t], out=kept)
            factors[t] *= d_h.unsqueeze(1)
            torch.addmm(kept, recurrent[t], weight, out=d_h)
        recurrent = recurrent.reshape(frames * batch, 3 * width)
        d_inputs = torch.cat([factors[:, :, :2], factors[:, :, 3:]], dim=2).flatten(2)
        return d_inputs, recurrent.t() @ h[:-1].flatten(0, 1), recurrent[:, 2 * width :].sum(0)
