"""The config of an evaluation beyond one number: its kind, the recipe that all runs share, and where they run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.emotion.audio.degraded import CONDITIONS
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.protocol.splits import parse_protocol
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.many_runs_config import check_lists, recipe_of
from cpcscale.runs.lease import LeaseConfig
from cpcscale.tracking.tracker import TrackingConfig

KINDS = ("robustness", "learning", "cross")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(kw_only=True)
class EvaluateConfig(EmotionRecipe):
    """What is asked of which systems, and where it runs. `system` and `seed` stay unset."""

    # robustness: trained on clean audio, tested on degraded, under `test_conditions` (none: all that there are).
    # learning: trained on `shares` of the training speakers' utterances. cross: trained on each of `corpora`, tested on
    # the others.
    kind: str = "robustness"
    run_dir: str = field(
        default="runs/evaluate", metadata=configs.PLACE
    )  # folder (or s3:// prefix); each run has a folder below it
    workers: int = field(default=2, metadata=configs.PLACE)  # folds at a time
    # Of those that `cpcscale reproduce` knows.
    systems: list[str] = field(default_factory=lambda: ["functionals", "precpc"])
    seeds: list[int] = field(default_factory=lambda: [0])  # a system that draws nothing runs with the first
    # Of learning: how much of the training speakers' utterances.
    shares: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 1.0])
    # Of cross: by a name of yours, each as `corpus` is given, as {emodb: {path: data/emodb}, mine: {path: mine.csv}}.
    corpora: dict[str, Any] = field(default_factory=dict)
    # What one system has otherwise, by key of the recipe, as {precpc: {fit.epochs: 20}}.
    overrides: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False  # only list the runs, done and to do
    lease: LeaseConfig = field(default_factory=LeaseConfig, metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        # Not the checks of the recipe as it stands: they are of one system, and each of several is checked below.
        configs.check_choice("kind", self.kind, KINDS)
        configs.at_least(1, workers=self.workers)
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the evaluation")
        check_lists(self, self.systems, self.seeds, self.overrides)
        for given, kind in ((self.test_conditions, "robustness"), (self.corpora, "cross")):
            if given and self.kind != kind:
                name = "test_conditions" if kind == "robustness" else "corpora"
                raise UserError(f"{name} is of kind={kind}, not of kind={self.kind}: leave it out")
        if self.kind == "learning":
            self._check_shares()
        if self.kind == "cross":
            self._check_corpora()
        for system in self.systems:
            self.recipe(system)

    def recipe(self, system: str) -> EmotionRecipe:
        """What one system's runs compute, but for the seed, the share and the corpus. Raises UserError for overrides
        that are no keys of it, or that it refuses."""
        found = recipe_of(self, self.overrides, system)
        if self.kind != "robustness":
            return found
        return dataclasses.replace(found, test_conditions=self.test_conditions or list(CONDITIONS))

    def corpus_configs(self) -> dict[str, CorpusConfig]:
        """`corpora` by name, local paths absolute, each heard as `corpus.max_s` and `corpus.on_bad` say."""
        shared = {"max_s": self.corpus.max_s, "on_bad": self.corpus.on_bad}
        found = {}
        for name, values in self.corpora.items():
            if not _NAME.fullmatch(str(name)):
                raise UserError(f"corpora: {name!r} is to name a folder: use letters, digits, and _ . - in it")
            if not isinstance(values, Mapping) or not values.get("path") or set(shared) & set(values):
                raise UserError(
                    f"corpora.{name}={values!r} is not given as a corpus is: {{path: FOLDER}}, with kind, name and "
                    "scale where it needs them (max_s and on_bad are those of `corpus`, for all)"
                )
            if values.get("shards"):
                raise UserError(f"corpora.{name}.shards: kind=cross hears audio files; leave it out")
            made = configs.build(CorpusConfig, {**values, **shared})
            found[name] = dataclasses.replace(made, path=storage.absolute(made.path))
        return found

    def _check_shares(self) -> None:
        if not self.shares or len(set(self.shares)) < len(self.shares):
            raise UserError(f"shares={self.shares} names none, or one twice: give each once")
        if self.protocol.train_share != 1:
            raise UserError("protocol.train_share is what kind=learning varies: give shares=[...] and leave it out")
        for share in self.shares:
            dataclasses.replace(self.protocol, train_share=share)

    def _check_corpora(self) -> None:
        if self.corpus.path:
            raise UserError("kind=cross has several corpora: give corpora={NAME: {path: FOLDER}, ...}, not corpus.path")
        if len(self.corpora) < 2:
            raise UserError("kind=cross takes two corpora or more: give corpora={NAME: {path: FOLDER}, ...}")
        if parse_protocol(self.protocol.split)[0] not in ("speakers", "loso"):
            raise UserError(
                f"protocol.split={self.protocol.split}: the diagonal of kind=cross keeps speakers apart; use speakers5 "
                "or loso"
            )
        paths = [each.path.rstrip("/") for each in self.corpus_configs().values()]
        for name, path in zip(self.corpora, paths, strict=True):
            if paths.count(path) > 1:
                raise UserError(f"corpora.{name} is at {path}, and so is another: a corpus is no test of itself")
