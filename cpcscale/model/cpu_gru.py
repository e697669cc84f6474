"""A faster GRU for CPUs: one matrix product for each frame, and one for the gradient of each weight matrix.

Cho et al. 2014 (arXiv 1406.1078) in the form of torch.nn.GRU: r and z are the reset and update gates,
n = tanh(W x + b + r (U h + c)), h' = n + z (h - n).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Frames whose factors the backward pass computes at a time, to use them while they are in the cache.
_PIECE = 64


def gru(x_BTC: Tensor, module: nn.GRU) -> Tensor:
    """[B, T, H]: the output of `module` (batch first, one direction) from an initial state of zeros.

    On a CPU without autocast it is computed here, with the same values and gradients up to fp32 rounding; else by
    torch.
    """
    if x_BTC.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return cast(Tensor, module(x_BTC)[0])
    x_TBC = x_BTC.transpose(0, 1).contiguous()
    for layer in range(module.num_layers):
        names = (f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        x_TBC = cast(Tensor, _Gru.apply(x_TBC, *(cast(Tensor, getattr(module, name)) for name in names)))
    return x_TBC.transpose(0, 1)


class _Gru(torch.autograd.Function):
    """x [T, B, C], weight [3 H, C], recurrent [3 H, H] and their biases [3 H], in the order r, z, n -> h [T, B, H].

    Tensors are split into tuples of frames once: to index them for each frame would take a quarter of the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, inner: Tensor) -> Tensor:
        frames, batch, width = x.shape[0], x.shape[1], recurrent.shape[1]
        h = x.new_zeros(frames + 1, batch, width)
        # `gates`: first the input's part of r and z, and c; the loop adds U h and applies the sigmoid to r and z.
        gates, n = x.new_empty(frames, batch, 3 * width), x.new_empty(frames, batch, width)
        rows, rz = x.flatten(0, 1), gates[:, :, : 2 * width]
        both = bias + F.pad(inner[: 2 * width], (0, width))
        torch.addmm(both, rows, weight.t(), out=gates.flatten(0, 1))
        n.copy_(gates[:, :, 2 * width :])
        gates[:, :, 2 * width :] = inner[2 * width :]
        columns = recurrent.t().contiguous()
        parts = (gates, rz, *gates.split(width, dim=2), n, h[1:])
        before = h[0]
        for gates_t, rz_t, r_t, z_t, u_t, n_t, h_t in zip(*(part.unbind(0) for part in parts), strict=True):
            gates_t.addmm_(before, columns)
            rz_t.sigmoid_()
            n_t.addcmul_(r_t, u_t).tanh_()
            before = torch.lerp(n_t, before, z_t, out=h_t)
        ctx.save_for_backward(x, weight, recurrent, gates, n, h)
        return h[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        x, weight, recurrent, gates, n, h = ctx.saved_tensors
        frames, batch, width = n.shape
        # The gradient of h' times these factors is that of the inputs of the gates: the recurrent part of n, r, z, and
        # n. The recurrent weights get the first three, the weights of the input the last three.
        factors = n.new_empty(frames, batch, 4, width)
        rows = factors.view(frames * batch, 4 * width)
        inner, outer = rows[:, : 3 * width], rows[:, width:]
        before = torch.cat([torch.zeros_like(h[:1]), gradients[0][:-1]])
        r, z, u = gates.split(width, dim=2)
        d_h = gradients[0][-1].clone()
        d_h_B1H = d_h.unsqueeze(1)
        # In the order n, r, z of the factors, and column-major, which is faster here.
        weight_nrz = recurrent.roll(width, 0).t().contiguous().t()
        for start in reversed(range(0, frames, _PIECE)):
            piece = slice(start, start + _PIECE)
            _fill(factors[piece], r[piece], z[piece], u[piece], n[piece], h[:-1][piece])
            parts = (before[piece], z[piece], factors[piece], inner.view(frames, batch, -1)[piece])
            for d_t, z_t, factors_t, inner_t in zip(*(reversed(part.unbind(0)) for part in parts), strict=True):
                factors_t.mul_(d_h_B1H)
                torch.addcmul(d_t, d_h, z_t, out=d_h)
                d_h.addmm_(inner_t, weight_nrz)
        sums = rows.sum(0)
        d_x = (outer @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        # Computed transposed, which is faster.
        d_weight = (x.flatten(0, 1).t() @ outer).t()
        d_recurrent = (h[:-1].flatten(0, 1).t() @ inner).t().roll(-width, 0)
        return d_x, d_weight, d_recurrent, sums[width:], sums[: 3 * width].roll(-width)


def _fill(factors: Tensor, r: Tensor, z: Tensor, u: Tensor, n: Tensor, h: Tensor) -> None:
    """Computes `factors` [T, B, 4, H] of some frames from their r, z, u = U h + c, n and previous h, each [T, B, H]."""
    inner, of_r, of_z, outer = factors.unbind(2)
    torch.ops.aten.tanh_backward.grad_input(1 - z, n, grad_input=outer)
    torch.mul(outer, r, out=inner)
    torch.ops.aten.sigmoid_backward.grad_input(h - n, z, grad_input=of_z)
    torch.ops.aten.sigmoid_backward.grad_input(outer * u, r, grad_input=of_r)
