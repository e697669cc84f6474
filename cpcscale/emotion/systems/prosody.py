"""prosody: statistics of pitch, energy and voicing, and a support vector regression (handmade/prosody.py)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from cpcscale.emotion.handmade.prosody import choose_kind, prosody, version
from cpcscale.emotion.systems.functionals import SEARCHED_ALREADY
from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.emotion.systems.system import Regressor


class Prosody(HandmadeSystem):
    """A vector an utterance, of how it is said."""

    name = "prosody"
    regressors: ClassVar[tuple[Regressor, ...]] = ("svr",)
    not_swept = SEARCHED_ALREADY

    def features(self, kind: str = "") -> HandmadeFeatures:
        kind = choose_kind(kind)
        return HandmadeFeatures(self.name, version(kind), partial(prosody, kind=kind), whole=True, kind=kind)
