"""functionals: 66 statistics of MFCCs over the utterance and a support vector regression (handmade/functionals.py)."""

from __future__ import annotations

from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.handmade import functionals

SEARCHED_ALREADY = "the settings of its support vector machine are chosen on inner folds already (svm_search)"


class Functionals(HandmadeSystem):
    """A vector an utterance, of the spectrum."""

    name = "functionals"
    regressors = ("svr", "ridge")
    not_swept = SEARCHED_ALREADY

    def features(self, kind: str = "") -> HandmadeFeatures:
        measure = functionals.functionals
        return HandmadeFeatures(
            *(self.name, functionals.version(), measure), whole=True, by_slices=True, ends_with_duration=True
        )
