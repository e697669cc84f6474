"""mfcc: 40 mel-frequency cepstral coefficients a frame, the paper's baseline (arXiv 2102.06357, Table 1)."""

from __future__ import annotations

from functools import partial

from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.handmade import mfcc

COEFFICIENTS = 40


class MFCC(HandmadeSystem):
    """Frames of cepstra."""

    name = "mfcc"

    def features(self, kind: str = "") -> HandmadeFeatures:
        measure = partial(mfcc.mfcc, coefficients=COEFFICIENTS)
        return HandmadeFeatures(self.name, f"{COEFFICIENTS} {mfcc.version()}", measure)
