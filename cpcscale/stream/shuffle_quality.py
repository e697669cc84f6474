"""How well the plan shuffles: pairs of windows of one recording in a global batch, against a perfect shuffle. Pure.

Under a perfect shuffle a batch of b windows is a uniform draw without replacement from the N windows of an epoch, where
recording r has n_r of them. By linearity over the pairs of the batch the expected number of pairs of one recording is
b (b - 1) / 2 * sum_r n_r (n_r - 1) / (N (N - 1)).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cpcscale.stream.epoch_order import mix


@dataclass(frozen=True)
class ShuffleQuality:
    """Pairs of one recording in a global batch: the mean over `batches` of the plan, and the perfect shuffle's.

    `error` is the standard error of the plan's mean, of sampled batches; `exact` is true for all of an epoch.
    """

    pairs: float
    perfect: float
    error: float
    batches: int
    exact: bool

    @property
    def ratio(self) -> float | None:
        """The plan's pairs to a perfect shuffle's: 1 is perfect. None where a perfect shuffle has none."""
        return self.pairs / self.perfect if self.perfect > 0 else None


def count_pairs(recording: np.ndarray) -> int:
    """Pairs of rows of a batch with the same `recording`; padding and what is excluded must be left out before."""
    same = np.unique(recording, return_counts=True)[1].astype(np.int64)
    return int((same * (same - 1) // 2).sum())


def expected_pairs(batch: int, windows: int, same: int) -> float:
    """Expected pairs of one recording in `batch` of `windows` windows, where `same` is sum_r n_r (n_r - 1)."""
    if windows < 2:
        return 0.0
    return batch * (batch - 1) / 2 * (same / (windows * (windows - 1)))


def sample_steps(steps: int, most: int, seed: int) -> np.ndarray:
    """int64, in order: all steps of an epoch, or a keyed sample of `most` of them."""
    if steps <= most:
        return np.arange(steps)
    return np.sort(np.argsort(mix(np.arange(steps), seed), kind="stable")[:most])


def shuffle_quality(found: Iterable[tuple[int, int]], windows: int, same: int, exact: bool) -> ShuffleQuality:
    """The figure of batches whose (rows that count, pairs) are `found`; `windows` and `same` as in perfect_pairs."""
    rows, pairs_found = np.array(list(found), np.int64).reshape(-1, 2).T
    count = max(1, len(rows))
    perfect = sum(expected_pairs(int(batch), windows, same) for batch in rows) / count
    error = 0.0 if exact or count < 2 else float(pairs_found.std(ddof=1)) / count**0.5
    return ShuffleQuality(float(pairs_found.sum()) / count, perfect, error, len(rows), exact)
