"""Fusions, such as precpc+functionals: the vectors of several systems side by side, each of the same weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpcscale import config
from cpcscale.emotion.systems.functionals import SEARCHED_ALREADY
from cpcscale.emotion.systems.system import Features, System
from cpcscale.errors import UserError

if TYPE_CHECKING:
    from cpcscale.emotion.encoders.arrays import Arrays
    from cpcscale.emotion.recipe import EmotionRecipe

JOINED = "+"


class Fusion(System):
    """Several systems, each prepared as it is alone; a regression reads the vectors of all (heads/blocks.py)."""

    regressors = ("svr", "ridge")
    not_swept = SEARCHED_ALREADY

    def __init__(self, parts: Sequence[System]) -> None:
        self.parts = tuple(parts)
        self.name = JOINED.join(part.name for part in parts)
        self.takes_network = any(part.takes_network for part in parts)
        self.needs_checkpoint = any(part.needs_checkpoint for part in parts)
        self.takes_weights = any(part.takes_weights for part in parts)
        self.pretrains = any(part.pretrains for part in parts)
        self.draws_weights = any(part.draws_weights for part in parts)

    def check(self, recipe: EmotionRecipe) -> None:
        for part in self.parts:
            part.check(recipe)

    def trains_encoder(self, recipe: EmotionRecipe) -> bool:
        return any(part.trains_encoder(recipe) for part in self.parts)

    def marks(self, recipe: EmotionRecipe) -> list[str]:
        return list(dict.fromkeys(mark for part in self.parts for mark in part.marks(recipe)))

    def shown(self, recipe: EmotionRecipe) -> str:
        return JOINED.join(part.shown(recipe) for part in self.parts)


def fusion(key: str, name: str, systems: dict[str, System]) -> Fusion:
    """The fusion that `name` names. Raises UserError for a part that is not known, has no vector, or is named twice."""
    parts = name.split(JOINED)
    for part in parts:
        config.check_choice(key, part, [each for each, system in systems.items() if "svr" in system.regressors])
    if len(set(parts)) < len(parts):
        raise UserError(f"{key}={name} names a system twice: name each once")
    return Fusion([systems[part] for part in parts])


@dataclass(frozen=True)
class FusedFeatures:
    """The features of several systems, by the name of each."""

    parts: tuple[tuple[str, Features], ...]

    def each(self, change: Callable[[Features], Features]) -> FusedFeatures:
        """The features that `change` makes of those of each system."""
        return FusedFeatures(tuple((name, change(part)) for name, part in self.parts))

    def description(self) -> dict[str, Any]:
        """What they are, in plain values; with `arrays`, all that they are made again from."""
        return {"kind": "fused", "parts": [{"system": name, **part.description()} for name, part in self.parts]}

    def arrays(self) -> Arrays:
        """Those of each part, behind its number."""
        return {f"{n}.{name}": value for n, (_, part) in enumerate(self.parts) for name, value in part.arrays().items()}


def parts_of(features: Features | FusedFeatures | None) -> tuple[Features, ...]:
    """The features that lie side by side: one, several, or none."""
    if isinstance(features, FusedFeatures):
        return tuple(part for _, part in features.parts)
    return () if features is None else (features,)
