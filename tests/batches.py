"""Batches made by hand, for tests of the step that need no audio: ragged rows, a padded one and a bad one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cpcscale.handmade.targets import FRAME_NAMES, WINDOW_NAMES
from cpcscale.stream.batch import BadWindow, Batch

SAMPLES = 10_240
# Rows 2 and 5 have no audio: with three ranks they are all that rank 2 has.
LENGTHS = (10_240, 9_999, 0, 4_800, 10_240, 0, 1_000, 10_240)


def made(rows: slice = slice(None), lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """These rows of one global batch of eight, lane by lane; the fifth is bad where it has no audio."""
    random = np.random.default_rng(seed)
    samples = max(SAMPLES, *lengths)
    wave_BS = (3000 * random.standard_normal((len(lengths), samples))).clip(-32768, 32767).astype(np.int16)
    samples_B = np.array(lengths, np.int64)
    wave_BS[np.arange(samples) >= samples_B[:, None]] = 0
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


def made_measured(rows: slice = slice(None), seed: int = 0) -> Batch:
    """As `made`, twice as long, with measures made up, and two windows of each utterance.

    A quarter of the frames have no F0, row 6 is too short for measures of its window and row 3 has no F0 statistics.
    """
    random = np.random.default_rng(seed)
    batch = made(lengths=tuple(2 * length for length in LENGTHS), seed=seed)
    frames_B = batch.samples_B // 160
    frame_BTF = random.standard_normal((len(frames_B), 2 * SAMPLES // 160, len(FRAME_NAMES))).astype(np.float32)
    frame_BTF[:, :, 2] = frame_BTF[:, :, 2] > 0
    frame_BTF[:, ::4, 1] = np.nan
    frame_BTF[np.arange(frame_BTF.shape[1]) >= frames_B[:, None]] = np.nan
    window_BF = random.standard_normal((len(frames_B), len(WINDOW_NAMES))).astype(np.float32)
    window_BF[frames_B < 50] = np.nan
    window_BF[3, -31:-20] = np.nan
    # A second window of an utterance is no negative of the first.
    utterance_B = batch.utterance_B // 2
    arrays = {"frame_BTF": frame_BTF, "window_BF": window_BF, "utterance_B": utterance_B}
    arrays |= {name: getattr(batch, name) for name in ("wave_BS", "samples_B", "key_B", "group_B", "number_B")}
    bad = made(rows).bad
    return replace(batch, bad=bad, **{name: array[rows] for name, array in arrays.items()})
