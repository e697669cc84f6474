"""prosody: statistics of pitch, energy and voicing, and a support vector regression (handmade/prosody.py)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cpcscale.emotion.systems.functionals import SEARCHED_ALREADY
from cpcscale.emotion.systems.handmade import HandmadeFeatures, HandmadeSystem
from cpcscale.handmade.prosody import LICENCE, choose_kind, feature_names, prosody, version

if TYPE_CHECKING:
    from cpcscale.emotion.recipe import EmotionRecipe


class Prosody(HandmadeSystem):
    """A vector an utterance, of how it is said."""

    name = "prosody"
    regressors = ("svr", "ridge")
    not_swept = SEARCHED_ALREADY

    def features(self, kind: str = "") -> HandmadeFeatures:
        kind = choose_kind(kind)
        measure, licence = partial(prosody, kind=kind), LICENCE if kind == "egemaps" else ""
        ends_with_duration = feature_names(kind)[-1] == "duration_s"
        return HandmadeFeatures(
            *(self.name, version(kind), measure),
            whole=True,
            kind=kind,
            licence=licence,
            ends_with_duration=ends_with_duration,
        )

    def shown(self, recipe: EmotionRecipe) -> str:
        return f"{self.name} ({choose_kind(recipe.prosody)})"
