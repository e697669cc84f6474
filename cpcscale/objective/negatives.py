"""Which frames a prediction is compared with: drawn from its own utterance, never the positive, by a keyed hash.

Frame t predicting frame t + k draws N frames, with replacement, from the utterance's other frames: 0..n-1 without
t + k, where n counts the frames of real audio. N may exceed n. The draw is a function of (window key, k, t, draw
number) alone: the same under every batch size, worker count and device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64's constants as signed 64-bit integers, which is what torch multiplies with wrap-around.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def draw(key_B: Tensor, frames_B: Tensor, k: int, targets: int, negatives: int) -> Tensor:
    """int64 [B, targets, negatives]: the frames compared with z[t + k] for t = 0..targets-1.

    Rows whose target lies beyond `frames_B` hold frame numbers too, of no meaning; the caller masks them.
    """
    t_1TN = (torch.arange(targets, device=key_B.device) * negatives).view(1, -1, 1)
    n_11N = torch.arange(negatives, device=key_B.device).view(1, 1, -1)
    # k is hashed into the key, not added to it: added, steps k and k + 1 would draw the same frames one place apart.
    keyed_B11 = _hash(key_B.view(-1, 1, 1), torch.tensor(k, device=key_B.device))
    hashed_BTN = _hash(keyed_B11, t_1TN + n_11N)
    others_B11 = (frames_B - 1).clamp(min=1).view(-1, 1, 1)
    # 31 bits times the range: unbiased to one part in 2^31 / n, and no division.
    drawn_BTN = ((hashed_BTN & 0x7FFFFFFF) * others_B11) >> 31
    positive_1T1 = (torch.arange(targets, device=key_B.device) + k).view(1, -1, 1)
    return drawn_BTN + (drawn_BTN >= positive_1T1)


def _hash(key: Tensor, value: Tensor) -> Tensor:
    state = key + (value + 1) * _GOLDEN
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's >> on int64 copies the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
