"""logmel: 40 log mel energies a frame, which the MFCCs are made of."""

from __future__ import annotations

from functools import partial

from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.handmade import mfcc

BANDS = 40


class LogMel(HandmadeSystem):
    """Frames of a spectrum."""

    name = "logmel"

    def features(self, kind: str = "") -> HandmadeFeatures:
        return HandmadeFeatures(self.name, f"{BANDS} {mfcc.version()}", partial(mfcc.log_mel, bands=BANDS))
