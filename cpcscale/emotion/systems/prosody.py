"""prosody: statistics of pitch, energy and voicing, and a support vector regression (handmade/prosody.py)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from cpcscale.emotion.handmade.prosody import LICENCE, choose_kind, prosody, version
from cpcscale.emotion.systems.functionals import SEARCHED_ALREADY
from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.emotion.systems.system import Regressor


class Prosody(HandmadeSystem):
    """A vector an utterance, of how it is said."""

    name = "prosody"
    regressors: ClassVar[tuple[Regressor, ...]] = ("svr", "ridge")
    not_swept = SEARCHED_ALREADY

    def features(self, kind: str = "") -> HandmadeFeatures:
        kind = choose_kind(kind)
        measure, licence = partial(prosody, kind=kind), LICENCE if kind == "egemaps" else ""
        return HandmadeFeatures(self.name, version(kind), measure, whole=True, kind=kind, licence=licence)
