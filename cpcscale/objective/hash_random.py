"""Random numbers as functions of a key: the same for every batch layout, order and device.

The hash is splitmix64 (Steele et al. 2014). torch's generators give different numbers on different devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64's constants as signed 64-bit integers, which is what torch multiplies with wrap-around.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def hashed(key: Tensor, value: Tensor) -> Tensor:
    """int64: 64 bits for each pair of int64 `key` and `value`, broadcast against each other.

    One of them may be a scalar tensor on the CPU, which needs no copy to the device of the other.
    """
    state = key + (value + 1) * _GOLDEN
    for bits, factor in ((30, _FIRST), (27, _SECOND)):
        state ^= _shifted(state, bits)
        state *= factor
    return state.bitwise_xor_(_shifted(state, 31))


def bounded(bits: Tensor, count: Tensor) -> Tensor:
    """int64 in 0..count-1 from hashed bits, for counts below 2^32; the bias is at most one part in 2^31 / count."""
    # 31 bits times the range: needs no division.
    return (bits & 0x7FFFFFFF).mul_(count).bitwise_right_shift_(31)


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from the upper 24 of the hashed bits, which float32 represents exactly."""
    return _shifted(bits, 40).to(torch.float32) * 2**-24


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's >> on int64 copies the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
