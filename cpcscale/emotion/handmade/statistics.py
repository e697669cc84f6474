"""Statistics of frames over an utterance or a window: what systems with one vector an utterance take. numpy alone."""

from __future__ import annotations

import numpy as np

PERCENTILES = (10, 50, 90)


def summarise(x_TC: np.ndarray) -> np.ndarray:
    """float32 [5 C] of frames [T, C], such as a network's z or c: mean, deviation and PERCENTILES of each channel.

    Raises ValueError when there is no frame.
    """
    if x_TC.ndim != 2 or not len(x_TC):
        raise ValueError(f"a summary takes frames [T, C] with at least one, not shape {x_TC.shape}")
    x_TC = x_TC.astype(np.float64)
    blocks = [x_TC.mean(axis=0), x_TC.std(axis=0), *np.percentile(x_TC, PERCENTILES, axis=0)]
    return np.concatenate(blocks).astype(np.float32)
