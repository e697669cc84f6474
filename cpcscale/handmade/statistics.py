"""Statistics of frames over time, for heads that take one vector an utterance. Imports numpy alone.

W windows, T frames, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

PERCENTILES = (10, 50, 90)
# The slope of a line through five frames is the sum of these times the frames, as Kaldi's deltas are.
_SLOPE = np.arange(-2, 3) / 10
# Of a window of 60 frames or more, the first 20 are left out: an encoder begins each window in a state that knows
# nothing, and takes about so long to settle. In a mean over time that start would tell how long the window is.
START_UP, _LONG = 20, 60


ReadoutKind = Literal["statistics", "slopes", "components", "slopes+components"]


@dataclass(frozen=True)
class Readout:
    """How a vector head reads frames.

    `statistics`: `summarise`. `slopes`: `summarise_slopes`. `components`: the same, of which heads take principal
    components; `slopes+components`: both, side by side. With `duration` the vector ends with the seconds of the
    utterance.
    """

    kind: ReadoutKind = "statistics"
    duration: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _SUMMARIES:
            raise ValueError(f"readout={self.kind}")

    def __call__(self, windows: Sequence[np.ndarray], seconds: float) -> np.ndarray:
        """float64 [W, F]: the vector [F] of each window as it is, or what its frames [T, C] become.

        `seconds` is the duration of their utterance, whose vector is the mean of its windows' by their weights.
        """
        return np.stack([each if each.ndim == 1 else self._vector(each, seconds) for each in windows]).astype(
            np.float64
        )

    def _vector(self, x_TC: np.ndarray, seconds: float) -> np.ndarray:
        x_F = _SUMMARIES[self.kind](x_TC)
        return np.append(x_F, np.float32(seconds)) if self.duration else x_F


def summarise(x_TC: np.ndarray) -> np.ndarray:
    """Mean, deviation and PERCENTILES of each channel of frames [T, C], such as a network's z or c; float32 [5 C].

    Raises ValueError when there is no frame.

    >>> summarise(np.array([[0.0, 5.0], [2.0, 5.0]])).round(2)
    array([1. , 5. , 1. , 0. , 0.2, 5. , 1. , 5. , 1.8, 5. ], dtype=float32)
    """
    if x_TC.ndim != 2 or not len(x_TC):
        raise ValueError(f"a summary takes frames [T, C] with at least one frame, not shape {x_TC.shape}")
    x_TC = x_TC.astype(np.float64)
    blocks = [x_TC.mean(axis=0), x_TC.std(axis=0), *np.percentile(x_TC, PERCENTILES, axis=0)]
    return np.concatenate(blocks).astype(np.float32)


def summarise_slopes(x_TC: np.ndarray) -> np.ndarray:
    """As `summarise`, and the deviation of the slopes through five frames, of frames that have settled; float32 [6 C].

    The slopes' deviation is 0 for fewer than five frames.
    """
    settled_TC = settled(x_TC)
    found = summarise(settled_TC)
    if len(settled_TC) < len(_SLOPE):
        return np.concatenate([found, np.zeros(x_TC.shape[1], np.float32)])
    five_TC5 = np.lib.stride_tricks.sliding_window_view(settled_TC.astype(np.float64), len(_SLOPE), axis=0)
    return np.concatenate([found, (five_TC5 @ _SLOPE).std(axis=0).astype(np.float32)])


def settled(x_TC: np.ndarray) -> np.ndarray:
    """The frames without the START_UP of an encoder's state, where there are enough others."""
    return x_TC[START_UP if len(x_TC) >= _LONG else 0 :]


_SUMMARIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "statistics": summarise,
    "slopes": summarise_slopes,
    "components": summarise_slopes,
    "slopes+components": summarise_slopes,
}
STATISTICS = Readout()
