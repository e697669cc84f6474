"""The config of `cpcscale evaluate`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.emotion.audio.degraded import CONDITIONS
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.protocol.splits import parse_protocol
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.many_runs_config import check_systems_and_seeds, system_recipe
from cpcscale.runs.lease import LeaseConfig
from cpcscale.tracking.store import TrackingConfig

KINDS = ("robustness", "learning", "cross", "encoders")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Arm:
    """A system of an evaluation, with one of its encoders ("": none); `label` tells pretrainings of one apart."""

    label: str
    encoder: str
    recipe: EmotionRecipe

    @property
    def name(self) -> str:
        """Part of the names of its runs."""
        return f"{self.label}{self.recipe.system}"


@dataclass(kw_only=True)
class EvaluateConfig(EmotionRecipe):
    """The kind of evaluation, the recipe that all runs share, the systems and seeds. `system` and `seed` stay unset."""

    # robustness: trained on clean audio, tested on audio degraded by `test_conditions` (empty: all conditions).
    # learning: trained on `shares` of the training speakers' utterances. cross: trained on each of `corpora`, tested on
    # the others. encoders: each of `encoders` against the classic systems on all of `corpora`.
    kind: str = "robustness"
    # Folder (or s3:// prefix); each run has a folder below it.
    run_dir: str = field(default="runs/evaluate", metadata=configs.PLACE)
    # Folds that run at the same time.
    workers: int = field(default=2, metadata=configs.PLACE)
    # Any of the systems of `cpcscale reproduce`.
    systems: list[str] = field(default_factory=lambda: ["functionals", "precpc"])
    # A system whose result does not depend on the seed runs once, with the first.
    seeds: list[int] = field(default_factory=lambda: [0])
    # For kind=learning: shares of the training speakers' utterances.
    shares: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 1.0])
    # For kind=cross and encoders: corpora by names of your choice, each with the keys of `corpus`, such as
    # {emodb: {path: data/emodb}, mine: {path: mine.csv}}.
    corpora: dict[str, Any] = field(default_factory=dict)
    # For kind=encoders: checkpoints by names of your choice, each what encoder.checkpoint takes, or a list of them that
    # differ in the seed of their pretraining, such as {mine: [runs/seed0, runs/seed1], wav2vec: hf:FOLDER}.
    encoders: dict[str, Any] = field(default_factory=dict, metadata=configs.ADDED)
    # Changes for one system alone, by key of the recipe, such as {precpc: {fit.epochs: 20}}.
    overrides: dict[str, Any] = field(default_factory=dict)
    # Only list the runs that are done and that are left.
    dry_run: bool = False
    lease: LeaseConfig = field(default_factory=LeaseConfig, metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        # The checks of EmotionRecipe are for one system: the recipe of each system is checked below instead.
        configs.check_choice("kind", self.kind, KINDS)
        configs.at_least(1, workers=self.workers)
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the evaluation")
        check_systems_and_seeds(self, self.systems, self.seeds, self.overrides)
        for name, kinds in (("test_conditions", "robustness"), ("corpora", "cross encoders"), ("encoders", "encoders")):
            if getattr(self, name) and self.kind not in kinds.split():
                wanted = kinds.replace(" ", " and ")
                raise UserError(f"{name} is only for kind={wanted}, not for kind={self.kind}: leave it out")
        if self.kind == "learning":
            self._check_shares()
        if self.kind in ("cross", "encoders"):
            self._check_corpora()
        if self.kind == "encoders":
            self._check_encoders()
        self.arms()

    def recipe(self, system: str) -> EmotionRecipe:
        """The recipe of one system, with seed, share and corpus unset. Raises UserError for overrides that do not fit
        it."""
        found = system_recipe(self, self.overrides, system)
        if self.kind != "robustness":
            return found
        return dataclasses.replace(found, test_conditions=self.test_conditions or list(CONDITIONS))

    def arms(self) -> list[Arm]:
        """The systems; for kind=encoders, those that take a network once with each of `encoders`. Raises UserError for
        overrides that do not fit them."""
        if self.kind != "encoders":
            return [Arm("", "", self.recipe(system)) for system in self.systems]
        found = []
        for recipe in map(self.recipe, self.systems):
            if not recipe.definition.takes_network:
                found.append(Arm("", "", recipe))
                continue
            for name, checkpoints in self.checkpoints().items():
                # An untrained network differs by the seed of its weights, not by what was learnt in a pretraining.
                taken = checkpoints if recipe.definition.takes_weights else checkpoints[:1]
                for number, checkpoint in enumerate(taken):
                    encoder = dataclasses.replace(recipe.encoder, checkpoint=checkpoint)
                    label = f"{name}-" if len(taken) == 1 else f"{name}-{number}-"
                    found.append(Arm(label, name, dataclasses.replace(recipe, encoder=encoder)))
        return found

    def checkpoints(self) -> dict[str, list[str]]:
        """The checkpoints of each of `encoders`."""
        lists = {name: [given] if isinstance(given, str) else given for name, given in self.encoders.items()}
        for name, given in lists.items():
            if not _NAME.fullmatch(str(name)):
                raise UserError(f"encoders: {name!r} cannot name a folder: use letters, digits, and _ . - in it")
            whole = isinstance(given, Sequence) and all(isinstance(each, str) and each for each in given)
            if not whole or not given or len(set(given)) < len(given):
                raise UserError(
                    f"encoders.{name}={self.encoders[name]!r} names no checkpoint, or one twice: give RUN_DIR, or "
                    "[RUN_DIR, RUN_DIR, ...] of several seeds"
                )
        return {name: list(given) for name, given in lists.items()}

    def corpus_configs(self) -> dict[str, CorpusConfig]:
        """`corpora` by name with absolute paths; all take `max_s` and `on_bad` from `corpus`."""
        shared = {"max_s": self.corpus.max_s, "on_bad": self.corpus.on_bad}
        found = {}
        for name, values in self.corpora.items():
            if not _NAME.fullmatch(str(name)):
                raise UserError(f"corpora: {name!r} cannot name a folder: use letters, digits, and _ . - in it")
            if not isinstance(values, Mapping) or not values.get("path") or set(shared) & set(values):
                raise UserError(
                    f"corpora.{name}={values!r} does not describe a corpus: give {{path: FOLDER}}, with kind, name and "
                    "scale if needed (but max_s and on_bad as corpus.max_s and corpus.on_bad, for all corpora)"
                )
            if values.get("shards"):
                raise UserError(f"corpora.{name}.shards: kind={self.kind} reads audio files, not shards; leave it out")
            made = configs.build(CorpusConfig, {**values, **shared})
            found[name] = dataclasses.replace(made, path=storage.absolute(made.path))
        return found

    def _check_shares(self) -> None:
        if not self.shares or len(set(self.shares)) < len(self.shares):
            raise UserError(f"shares={self.shares} is empty or has a value twice: give each value once")
        if self.protocol.train_share != 1:
            raise UserError(
                "protocol.train_share is set, which kind=learning varies itself: leave it out and give shares=[...]"
            )
        for share in self.shares:
            dataclasses.replace(self.protocol, train_share=share)

    def _check_corpora(self) -> None:
        if self.corpus.path:
            raise UserError(
                f"kind={self.kind} has several corpora: give corpora={{NAME: {{path: FOLDER}}, ...}}, not corpus.path"
            )
        least, words = (2, "two corpora") if self.kind == "cross" else (1, "one corpus")
        if len(self.corpora) < least:
            raise UserError(f"kind={self.kind} takes {words} or more: give corpora={{NAME: {{path: FOLDER}}, ...}}")
        if self.kind == "cross" and parse_protocol(self.protocol.split)[0] not in ("speakers", "loso"):
            raise UserError(
                f"protocol.split={self.protocol.split} is not for kind=cross, whose diagonal needs speaker-disjoint "
                "folds: use speakers5 or loso"
            )
        paths = [each.path for each in self.corpus_configs().values()]
        for name, path in zip(self.corpora, paths, strict=True):
            if paths.count(path) > 1:
                raise UserError(f"corpora.{name} and another corpus are both at {path}: leave one out")

    def _check_encoders(self) -> None:
        if self.encoder.checkpoint:
            raise UserError("kind=encoders has several encoders: give encoders={NAME: RUN_DIR}, not encoder.checkpoint")
        if not self.checkpoints():
            raise UserError("kind=encoders takes an encoder or more: give encoders={NAME: RUN_DIR, ...}")
