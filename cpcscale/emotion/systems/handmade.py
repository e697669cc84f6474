"""Systems whose features are a formula, without a network: the classic ones and the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpcscale import audio
from cpcscale.emotion.systems.system import Features, System
from cpcscale.errors import UserError

if TYPE_CHECKING:
    from cpcscale.emotion.encoders.arrays import Arrays
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork


@dataclass(frozen=True)
class HandmadeFeatures:
    """Features (see system.py) that `measure` makes of a float waveform in [-1, 1).

    `kind` is which of a system's formulas it is, where the system has several; `licence` is that of the library behind
    it, where it limits what the features may be used for. `by_slices`: `measure` takes anything that gives slices, so
    that hours of audio need not lie in memory; else an array. `ends_with_duration`: the last feature is the seconds of
    the utterance, which `duration` false leaves out.
    """

    name: str
    digest: str
    measure: Callable[..., np.ndarray]
    whole: bool = False
    kind: str = ""
    by_slices: bool = False
    least_samples: int = 1
    licence: str = ""
    ends_with_duration: bool = False
    duration: bool = True

    def without_duration(self) -> HandmadeFeatures:
        """The same without the seconds of the utterance."""
        if not self.ends_with_duration:
            return self
        return dataclasses.replace(self, digest=f"{self.digest} without duration", duration=False)

    def __call__(self, waves: Sequence[audio.Sliced]) -> list[np.ndarray]:
        floats = map(_Floats, waves)
        made = [self.measure(each if self.by_slices else each[:]) for each in floats]
        return made if self.duration else [x_F[:-1] for x_F in made]

    def description(self) -> dict[str, Any]:
        described = {"kind": "handmade", "which": self.kind, "digest": self.digest}
        return described if self.duration else {**described, "duration": False}

    def arrays(self) -> Arrays:
        return {}


class _Floats:
    """int16 audio as floats in [-1, 1), made slice by slice."""

    def __init__(self, wave_S: audio.Sliced) -> None:
        self._wave_S = wave_S

    def __len__(self) -> int:
        return len(self._wave_S)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._wave_S[part].astype(np.float32) / 32768


class HandmadeSystem(System):
    """A system whose features are the same in all folds."""

    def features(self, kind: str = "") -> HandmadeFeatures:
        """Its features; `kind` is which, where it has several. Raises UserError where a library is missing."""
        raise NotImplementedError

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> Features:
        found = self.features(recipe.prosody)
        if recipe.duration and found.whole and not found.ends_with_duration:
            raise UserError(
                f"duration=true, and the features of {self.shown(recipe)} have no duration: leave it out, or use "
                "prosody=pitch"
            )
        return found if recipe.keeps_duration else found.without_duration()
