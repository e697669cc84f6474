"""How well an epoch is shuffled: pairs of windows of one recording in a global batch, against a perfect shuffle. Pure.

Under a perfect shuffle a batch of b windows is a uniform draw without replacement from the N windows of an epoch, where
recording r has n_r of them. The expectation is linear in the pairs of the batch, so the expected number of pairs is
b (b - 1) / 2 * sum_r n_r (n_r - 1) / (N (N - 1)).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cpcscale.stream.epoch_order import mix


@dataclass(frozen=True)
class ShuffleQuality:
    """Pairs of one recording in a global batch: `pairs`, the mean over `batches`, and `perfect`, of a perfect shuffle.

    `error` is the standard error of `pairs` where batches were sampled; `exact` says that all of an epoch were counted.
    """

    pairs: float
    perfect: float
    error: float
    batches: int
    exact: bool

    @property
    def ratio(self) -> float | None:
        """`pairs` divided by `perfect`; 1 is a perfect shuffle. None where a perfect shuffle has no pairs."""
        return self.pairs / self.perfect if self.perfect > 0 else None


def count_pairs(recording: np.ndarray) -> int:
    """Pairs of rows of a batch with the same `recording`, given without padding and excluded windows."""
    same = np.unique(recording, return_counts=True)[1].astype(np.int64)
    return int((same * (same - 1) // 2).sum())


def expected_pairs(batch: int, windows: int, same: int) -> float:
    """Expected pairs of one recording in `batch` windows drawn from `windows`; `same` is sum_r n_r (n_r - 1)."""
    if windows < 2:
        return 0.0
    return batch * (batch - 1) / 2 * (same / (windows * (windows - 1)))


def sample_steps(steps: int, most: int, seed: int) -> np.ndarray:
    """int64, ascending: all steps of an epoch, or a keyed sample of `most` of them."""
    if steps <= most:
        return np.arange(steps)
    return np.sort(np.argsort(mix(np.arange(steps), seed), kind="stable")[:most])


def shuffle_quality(batches: Iterable[tuple[int, int]], windows: int, same: int, exact: bool) -> ShuffleQuality:
    """The quality of batches with these (rows that count, pairs); `windows` and `same` as in `expected_pairs`."""
    rows, pairs_found = np.array(list(batches), np.int64).reshape(-1, 2).T
    count = max(1, len(rows))
    perfect = sum(expected_pairs(int(batch), windows, same) for batch in rows) / count
    error = 0.0 if exact or count < 2 else float(pairs_found.std(ddof=1)) / count**0.5
    return ShuffleQuality(float(pairs_found.sum()) / count, perfect, error, len(rows), exact)
