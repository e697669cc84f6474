"""Causal self-attention over frames: the blocks of transformer contexts and predictors.

Shapes: B rows, T frames, D width, H heads of width E = D / H, P = E / 2 pairs. There is no dropout, so that an update
is a pure function of its batch and the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale.errors import UserError

# The slowest rotary pair turns once in 2 pi times this many frames (Su et al. 2021, section 3.2.2).
_ROTARY_BASE = 10_000.0
# Standard deviation of initial weights (Radford et al. 2019 and their code).
_DEVIATION = 0.02

# (query, key, value), each [B, H, T, E] -> [B, H, T, E]: causal attention with positions.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_heads(part: str, heads: int, width: int, positions: str) -> None:
    """Raises UserError for `heads` that do not divide `width`, and for heads of odd width with rotary positions."""
    even = 2 if positions == "rotary" else 1
    if width % (heads * even):
        split = "into heads of even width, which rotary positions need" if width % heads == 0 else "into equal heads"
        fitting = [fewer for fewer in range(1, heads) if width % (fewer * even) == 0]
        way_out = f"use {part}.heads={fitting[-1]}" if fitting else "use another model.context.width"
        raise UserError(f"{part}.heads={heads} does not split model.context.width={width} {split}: {way_out}")


class Transformer(nn.Module):
    """x_BTD -> y_BTD: causal pre-norm blocks and a last layer norm (Xiong et al. 2020, arXiv 2002.04745).

    Frame t attends to frames 0 to t; T may be any. `positions`: `rotary` rotates queries and keys by an angle that
    grows with their frame (Su et al. 2021, arXiv 2104.09864, eq. 34); `relative` subtracts the distance times a fixed
    slope of each head from the scores (ALiBi, Press et al. 2022, arXiv 2108.12409, section 3), made for sequences
    longer than those of training.

    Weights are drawn from a normal distribution of deviation 0.02; for the last layer of a residual path, divided by
    the root of the number of such paths. Biases start at 0 (GPT-2, Radford et al. 2019, section 2.3).
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
        """The attention function of all blocks. What depends on positions is computed once for each forward pass."""
        match self._positions:
            case "rotary":
                return partial(_rotary_attention, angle_TP=_angles(frames, self._head_width, device))
            case "relative":
                return partial(_biased_attention, bias_HTT=_distance_bias(frames, self._heads, device))
        raise AssertionError(self._positions)


class Block(nn.Module):
    """x_BTD -> y_BTD: causal self-attention, then a feed-forward network of 4 times the width with GELU.

    Each is on a residual path after a layer norm. `paths` is the number of residual paths in the whole stack.
    """

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
    rotated = (_rotate(query, angle_TP), _rotate(key, angle_TP))
    return F.scaled_dot_product_attention(*rotated, value, is_causal=True)


def _biased_attention(query: Tensor, key: Tensor, value: Tensor, *, bias_HTT: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias_HTT.to(query.dtype).unsqueeze(0))


def _angles(frames: int, width: int, device: torch.device) -> Tensor:
    """fp32 [T, P]: the angle in radians by which each pair of a head of this width is rotated at each frame."""
    frequency_P = _ROTARY_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.arange(frames, device=device, dtype=torch.float32).unsqueeze(1) * frequency_P


def _rotate(x_BHTE: Tensor, angle_TP: Tensor) -> Tensor:
    """Each pair (i, i + P) of the last axis rotated by the angle of its frame; computed in fp32 at least."""
    first, second = x_BHTE.chunk(2, dim=-1)
    cosine, sine = angle_TP.cos(), angle_TP.sin()
    rotated = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return rotated.type_as(x_BHTE)


def _distance_bias(frames: int, heads: int, device: torch.device) -> Tensor:
    """fp32 [H, T, T]: what is added to the score of query t and key s.

    It is -(t - s) times the slope of the head, 2 ** (-8 h / H) for h = 1 to H, and minus infinity for later keys.
    """
    place_T = torch.arange(frames, device=device)
    distance_TT = place_T.unsqueeze(1) - place_T
    slope_H = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)
    bias_HTT = -slope_H.view(-1, 1, 1) * distance_TT
    return bias_HTT.masked_fill(distance_TT < 0, -torch.inf)
