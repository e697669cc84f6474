"""The config of `cpcscale reproduce`, and the recipe of one system or seed out of a config for many runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpcscale import config as configs
from cpcscale.emotion.recipe import SYSTEMS, EmotionRecipe, system_of
from cpcscale.errors import UserError, nearest
from cpcscale.experiments.sweep.space import with_values
from cpcscale.runs.lease import LeaseConfig
from cpcscale.tracking.store import TrackingConfig

RECIPE_FIELDS = tuple(one.name for one in dataclasses.fields(EmotionRecipe))
# Keys that cannot differ between systems: figures would not be comparable, or two runs would have the same name.
_SHARED = ("system", "name", "seed", "corpus", "protocol", "audio_cache", "test_conditions", "pretraining.seed")


@dataclass(kw_only=True)
class ReproduceConfig(EmotionRecipe):
    """The recipe that all runs share, the systems and seeds, and where they run. `system` and `seed` stay unset."""

    # Folder (or s3:// prefix) of the table; each run is in SYSTEM-seedN below it.
    run_dir: str = field(default="runs/reproduce", metadata=configs.PLACE)
    # Folds that run at the same time.
    workers: int = field(default=2, metadata=configs.PLACE)
    # Rows of the table; by default all systems but duration, which is a control of `evaluate` with kind=encoders.
    systems: list[str] = field(default_factory=lambda: [name for name in SYSTEMS if name != "duration"])
    # A seed decides the initial weights, the batches and minicpc's pretraining. A system whose result does not depend
    # on the seed runs once, with the first.
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    # The system that all others are tested against.
    reference: str = "random"
    # Changes for one system alone, by key of the recipe, such as {raw: {fit.epochs: 20}}.
    overrides: dict[str, Any] = field(default_factory=dict)
    # Only list the runs that are done and that are left.
    dry_run: bool = False
    lease: LeaseConfig = field(default_factory=LeaseConfig, metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        # The checks of EmotionRecipe are for one system: the recipe of each system is checked below instead.
        configs.at_least(1, workers=self.workers)
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the reproduction")
        check_systems_and_seeds(self, self.systems, self.seeds, self.overrides)
        configs.check_choice("reference", self.reference, self.systems)
        for system in self.systems:
            self.recipe(system)

    def recipe(self, system: str) -> EmotionRecipe:
        """The recipe of one system, with the seed unset. Raises UserError for overrides that do not fit it."""
        return system_recipe(self, self.overrides, system)


def check_systems_and_seeds(
    base: EmotionRecipe, systems: list[str], seeds: list[int], overrides: Mapping[str, Any]
) -> None:
    """Raises UserError if a list is empty or has a value twice, a system is unknown, or `system` or `seed` is set."""
    if base.system != EmotionRecipe.system or base.seed != EmotionRecipe.seed:
        raise UserError(
            f"system={base.system} and seed={base.seed} are for a single run: give systems=[...] and seeds=[...] here"
        )
    for name, given in (("systems", systems), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise UserError(f"{name}={given} is empty or has a value twice: give each value once")
    for system in systems:
        system_of(system, "systems")
    for system in overrides:
        system_of(system, "overrides")


def system_recipe(base: EmotionRecipe, overrides: Mapping[str, Any], system: str) -> EmotionRecipe:
    """The recipe of one system, with the seed unset: the recipe fields of `base`, changed by `overrides.SYSTEM`.

    Raises UserError for overrides that are not keys of the recipe, or whose values it refuses.
    """
    known = [key for key in configs.flat(base) if _field(key) in RECIPE_FIELDS and not _within(key, _SHARED)]
    given = overrides.get(system, {})
    if not isinstance(given, Mapping):
        raise UserError(f"overrides.{system}={given!r} is not a mapping of keys to values, such as {{fit.epochs: 20}}")
    values = dict(configs.leaves(given))
    for key in values:
        if _within(key, _SHARED):
            raise UserError(f"overrides.{system}: {key} has to be the same for all systems: leave it out")
        if key not in known:
            raise UserError(f"overrides.{system}: {key} is not a key of the recipe{nearest(key, known)}")
    try:
        return with_values(base, values | {"system": system})
    except UserError as error:
        raise UserError(f"system {system}: {error} (for this system alone: overrides.{system}.KEY)") from None


def with_seed(recipe: EmotionRecipe, seed: int) -> EmotionRecipe:
    """The recipe with this seed, in its fine-tuning and in minicpc's pretraining."""
    return dataclasses.replace(recipe, seed=seed, pretraining=dataclasses.replace(recipe.pretraining, seed=seed))


def depends_on_seed(recipe: EmotionRecipe) -> bool:
    """Whether the result depends on the seed: only if weights of the encoder or the head are drawn at random."""
    return recipe.regressor == "attention" or (recipe.regressor != "mean" and recipe.definition.draws_weights)


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _field(key: str) -> str:
    return key.partition(".")[0]
