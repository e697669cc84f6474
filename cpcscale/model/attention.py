"""Causal self-attention over frames: the blocks of transformer contexts and predictors.

Shapes: B rows, T frames, D width, H heads of width E = D / H, P pairs = E / 2. There is no dropout: the update of a
step stays a pure function of its batch and of the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale.errors import UserError

# The widest turn of a rotary pair takes 2 pi times this many frames (Su et al. 2021, section 3.2.2).
_ROTARY_BASE = 10_000.0
# Of every weight at the start (Radford et al. 2019 and their code).
_DEVIATION = 0.02

# (query, key, value), each [B, H, T, E], to what every frame takes from those up to itself, [B, H, T, E].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_heads(part: str, heads: int, width: int, positions: str) -> None:
    """Refuses `heads` that do not split the `width`, and for rotary positions heads of odd width."""
    even = 2 if positions == "rotary" else 1
    if width % (heads * even):
        split = "into heads of even width, which rotary positions need" if width % heads == 0 else "into equal heads"
        fitting = [fewer for fewer in range(1, heads) if width % (fewer * even) == 0]
        way_out = f"use {part}.heads={fitting[-1]}" if fitting else "use another model.context.width"
        raise UserError(f"{part}.heads={heads} does not split model.context.width={width} {split}: {way_out}")


class Transformer(nn.Module):
    """x_BTD -> y_BTD by causal pre-norm blocks and a last layer norm (Xiong et al. 2020, arXiv 2002.04745).

    Frame t sees frames 0 to t, on any T. `positions`: `rotary` turns queries and keys by their place (Su et al. 2021,
    arXiv 2104.09864, eq. 34); `relative` lowers a score by the distance times a fixed slope of the head (ALiBi, Press
    et al. 2022, arXiv 2108.12409, section 3), which was made for sequences longer than those of training.

    Weights start normal with deviation 0.02, those that end a residual path over the root of the number of such paths,
    biases at zero, as in GPT-2 (Radford et al. 2019, section 2.3).
    """

    def __init__(self, width: int, layers: int, heads: int, positions: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads, paths=2 * layers) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self._heads, self._head_width, self._positions = heads, width // heads, positions

    def forward(self, x_BTD: Tensor) -> Tensor:
        attend = self._attention(x_BTD.shape[1], x_BTD.device)
        for block in self.blocks:
            x_BTD = block(x_BTD, attend)
        return self.norm(x_BTD)

    def _attention(self, frames: int, device: torch.device) -> Attend:
        """The attention of all blocks; what it knows of positions is made once a forward pass."""
        match self._positions:
            case "rotary":
                return partial(_rotary_attention, angle_TP=_angles(frames, self._head_width, device))
            case "relative":
                return partial(_biased_attention, bias_HTT=_distance_bias(frames, self._heads, device))
        raise AssertionError(self._positions)


class Block(nn.Module):
    """x_BTD -> y_BTD: causal self-attention, then a feed-forward of 4 times the width with GELU, each on a residual
    path behind a layer norm. `paths`: residual paths in the whole stack."""

    def __init__(self, width: int, heads: int, paths: int) -> None:
        super().__init__()
        self._heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.dense_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        for layer in (self.query_key_value, self.mix, self.up, self.down):
            ends = layer in (self.mix, self.down)
            nn.init.normal_(layer.weight, std=_DEVIATION / (paths**0.5 if ends else 1.0))
            nn.init.zeros_(layer.bias)

    def forward(self, x_BTD: Tensor, attend: Attend) -> Tensor:
        split = self.query_key_value(self.attention_norm(x_BTD)).unflatten(-1, (3, self._heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        x_BTD = x_BTD + self.mix(attend(query, key, value).transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.dense_norm(x_BTD))))


def _rotary_attention(query: Tensor, key: Tensor, value: Tensor, *, angle_TP: Tensor) -> Tensor:
    turned = (_turned(query, angle_TP), _turned(key, angle_TP))
    return F.scaled_dot_product_attention(*turned, value, is_causal=True)


def _biased_attention(query: Tensor, key: Tensor, value: Tensor, *, bias_HTT: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias_HTT.to(query.dtype).unsqueeze(0))


def _angles(frames: int, width: int, device: torch.device) -> Tensor:
    """Radians by which the pairs of a head of this width turn at each frame, fp32 [T, P]."""
    frequency_P = _ROTARY_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.arange(frames, device=device, dtype=torch.float32).unsqueeze(1) * frequency_P


def _turned(x_BHTE: Tensor, angle_TP: Tensor) -> Tensor:
    """Each pair (i, i + P) of the last axis turned by its frame's angle, in fp32 at least."""
    first, second = x_BHTE.chunk(2, dim=-1)
    cosine, sine = angle_TP.cos(), angle_TP.sin()
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.type_as(x_BHTE)


def _distance_bias(frames: int, heads: int, device: torch.device) -> Tensor:
    """What is added to the score of query t and key s, fp32 [H, T, T]: minus the head's slope times t - s, and minus
    infinity for later keys. Slopes are 2 ** (-8 h / H) for heads h = 1 to H."""
    place_T = torch.arange(frames, device=device)
    distance_TT = place_T.unsqueeze(1) - place_T
    slope_H = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)
    bias_HTT = -slope_H.view(-1, 1, 1) * distance_TT
    return bias_HTT.masked_fill(distance_TT < 0, -torch.inf)
