"""How far louder, quieter and telephone audio shifts what a recogniser says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpcscale.emotion.audio.degraded import degrade, parse_condition
from cpcscale.emotion.fitted import FittedRecogniser
from cpcscale.emotion.scores.ccc import PRIMITIVES

CHANGES = ("gain+12", "gain-12", "telephone")
# More would cost minutes, and the mean of these is certain to a fifth of the deviation that stands beside it.
_UTTERANCES = 24


def measure_shift(fitted: FittedRecogniser, waves: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """{change: {primitive: [mean, deviation]}} of the value after the change less that before, in units of the labels.

    For the first window of 24 utterances (of all, if there are fewer), spread over `waves`, the int16 windows of each.
    """
    rows = np.linspace(0, len(waves) - 1, min(len(waves), _UTTERANCES)).round().astype(int)
    clean = [waves[row][0] for row in rows.tolist()]
    before_UP = fitted.in_units(fitted.predict(clean).unit_UP)
    shifts = {}
    for name in CHANGES:
        change = parse_condition(name)
        after = fitted.predict([degrade(wave_S, change, 0, "") for wave_S in clean])
        shift_UP = fitted.in_units(after.unit_UP) - before_UP
        found = zip(shift_UP.mean(axis=0).tolist(), shift_UP.std(axis=0).tolist(), strict=True)
        shifts[name] = dict(zip(PRIMITIVES, map(list, found), strict=True))
    return shifts
