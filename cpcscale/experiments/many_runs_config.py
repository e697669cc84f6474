"""The config of a reproduction: the recipe that all runs share, the systems and seeds, and where they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpcscale import config as configs
from cpcscale.emotion.recipe import SYSTEMS, EmotionRecipe
from cpcscale.errors import UserError, nearest
from cpcscale.experiments.sweep.space import apply
from cpcscale.runs.lease import LeaseConfig
from cpcscale.tracking.tracker import TrackingConfig

RECIPE_FIELDS = tuple(one.name for one in dataclasses.fields(EmotionRecipe))
# What all systems share, or what names a run: figures would not compare, or runs could not be told apart.
_SHARED = ("system", "name", "seed", "corpus", "protocol", "audio_cache", "test_conditions", "pretraining.seed")


@dataclass(kw_only=True)
class ReproduceConfig(EmotionRecipe):
    """The recipe that all runs share, the systems and seeds, and where they run. `system` and `seed` stay unset."""

    run_dir: str = field(
        default="runs/reproduce", metadata=configs.PLACE
    )  # folder (or s3:// prefix); each run is in SYSTEM-seedN below it
    workers: int = field(default=2, metadata=configs.PLACE)  # folds at a time
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))  # rows of the table; by default all
    # Each keys the weights, the batches and minicpc's pretraining; a system that draws nothing runs with the first.
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    reference: str = "random"  # the system that all others are tested against
    # What one system has otherwise, by key of the recipe, as {raw: {fit.epochs: 20}}.
    overrides: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False  # only list the runs, done and to do
    lease: LeaseConfig = field(default_factory=LeaseConfig, metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        # Not the checks of the recipe as it stands: they are of one system, and each of several is checked below.
        configs.at_least(1, workers=self.workers)
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the reproduction")
        check_lists(self, self.systems, self.seeds, self.overrides)
        configs.check_choice("reference", self.reference, self.systems)
        for system in self.systems:
            self.recipe(system)

    def recipe(self, system: str) -> EmotionRecipe:
        """What one system's runs compute, but for the seed. Raises UserError for overrides that are no keys of it, or
        that it refuses."""
        return recipe_of(self, self.overrides, system)


def check_lists(base: EmotionRecipe, systems: list[str], seeds: list[int], overrides: Mapping[str, Any]) -> None:
    """Raises UserError where a config of several runs names none, one twice, or one that is no system, or has the
    fields of a single run set."""
    if base.system != EmotionRecipe.system or base.seed != EmotionRecipe.seed:
        raise UserError(
            f"system={base.system} and seed={base.seed} are of single runs: give lists of them, systems=[...] and "
            "seeds=[...]"
        )
    for name, given in (("systems", systems), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise UserError(f"{name}={given} names none, or one twice: give each once")
    for system in systems:
        configs.check_choice("systems", system, SYSTEMS)
    for system in overrides:
        configs.check_choice("overrides", system, SYSTEMS)


def recipe_of(base: EmotionRecipe, overrides: Mapping[str, Any], system: str) -> EmotionRecipe:
    """What one system's runs compute, but for the seed: the recipe fields of `base`, changed by `overrides.SYSTEM`.

    Raises UserError for overrides that are no keys of the recipe, or that it refuses.
    """
    known = [key for key in configs.flat(base) if _field(key) in RECIPE_FIELDS and not _within(key, _SHARED)]
    given = overrides.get(system, {})
    if not isinstance(given, Mapping):
        raise UserError(f"overrides.{system}={given!r} is no mapping of keys to values, as {{fit.epochs: 20}}")
    values = dict(configs.leaves(given))
    for key in values:
        if _within(key, _SHARED):
            raise UserError(f"overrides.{system}: {key} is shared by all systems, or nothing compares: leave it out")
        if key not in known:
            raise UserError(f"overrides.{system}: {key} is no key of the recipe{nearest(key, known)}")
    try:
        return apply(base, values | {"system": system})
    except UserError as error:
        raise UserError(f"system {system}: {error} (here by overrides.{system}.KEY)") from None


def with_seed(recipe: EmotionRecipe, seed: int) -> EmotionRecipe:
    """The recipe of one run: all that is drawn in it follows from `seed`, minicpc's pretraining too."""
    return dataclasses.replace(recipe, seed=seed, pretraining=dataclasses.replace(recipe.pretraining, seed=seed))


def draws(recipe: EmotionRecipe) -> bool:
    """Whether the seed changes a result of this system: it has weights that are drawn, in its encoder or its head."""
    return recipe.regressor == "attention" or (recipe.regressor == "svr" and recipe.system in ("random", "minicpc"))


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _field(key: str) -> str:
    return key.partition(".")[0]
