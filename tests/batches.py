"""Batches made by hand, for tests of the step that need no audio: ragged rows, a padded one and a bad one."""

from __future__ import annotations

import numpy as np

from cpcscale.stream.batch import BadWindow, Batch

SAMPLES = 10_240
# Rows 2 and 5 have no audio: with three ranks they are all that rank 2 has.
LENGTHS = (10_240, 9_999, 0, 4_800, 10_240, 0, 1_000, 10_240)


def made(rows: slice = slice(None), lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """These rows of one global batch of eight, lane by lane; the fifth is bad where it has no audio."""
    random = np.random.default_rng(seed)
    wave_BS = (3000 * random.standard_normal((len(lengths), SAMPLES))).clip(-32768, 32767).astype(np.int16)
    samples_B = np.array(lengths, np.int64)
    wave_BS[np.arange(SAMPLES) >= samples_B[:, None]] = 0
    number_B = np.arange(len(lengths), dtype=np.int64)
    bad = tuple(
        BadWindow(int(row), 0, "made", "made bad", f"u{row}", "made.tar", 1)
        for row in number_B[rows]
        if row == 5 and not samples_B[row]
    )
    key_B = random.integers(-(2**62), 2**62, len(lengths))
    # Two groups, each with rows on every rank.
    group_B = number_B // 2 % 2
    ids = key_B[rows], group_B[rows], number_B[rows], number_B[rows]
    return Batch(0, 0, wave_BS[rows], samples_B[rows], *ids, bad)
