"""Statistics of frames over time, for systems that take one vector an utterance. Imports numpy alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PERCENTILES = (10, 50, 90)


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


def summarise_windows(windows: Iterable[np.ndarray], share_W: np.ndarray) -> np.ndarray:
    """The summaries of the frames [T, C] of each window of an utterance, averaged by the windows' weights; [5 C]."""
    return np.asarray(share_W @ np.stack([summarise(x_TC) for x_TC in windows]))
