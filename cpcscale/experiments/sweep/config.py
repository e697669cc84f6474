"""The config of a sweep: the recipe that trials start from, what they change, and where they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpcscale import config as configs
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.sweep.space import NOT_SWEPT
from cpcscale.runs.lease import LeaseConfig
from cpcscale.tracking.tracker import TrackingConfig


@dataclass(kw_only=True)
class SweepConfig(EmotionRecipe):
    """A sweep: the recipe that trials start from, what they change, and where they run."""

    run_dir: str = field(
        default="runs/sweep", metadata=configs.PLACE
    )  # folder (or s3:// prefix) of the sweep; an unfinished one goes on
    workers: int = field(
        default=0, metadata=configs.PLACE
    )  # trials at a time; 0: as many as the cluster has GPUs, or else cores, for
    trials: int = 16  # configurations that are tried
    search: str = "random"  # random, or optuna (its TPE sampler)
    scheduler: str = "asha"  # asha stops the worse trials early; none lets all end
    grace_epochs: int = 1  # asha: no trial is stopped before
    reduction_factor: float = 3.0  # asha: one in so many goes on at each rung
    max_failures: int = field(
        default=3, metadata=configs.PLACE
    )  # starts of one trial after its process died, before it counts as failed; -1: no limit
    space: dict[str, Any] = field(default_factory=dict)  # config key: {form: arguments}, see space.py
    lease: LeaseConfig = field(default_factory=LeaseConfig, metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check_choice("search", self.search, ("random", "optuna"))
        configs.check_choice("scheduler", self.scheduler, ("asha", "none"))
        configs.at_least(0, workers=self.workers)
        configs.at_least(1, trials=self.trials, grace_epochs=self.grace_epochs)
        configs.at_least(1.1, reduction_factor=self.reduction_factor)
        configs.at_least(-1, max_failures=self.max_failures)
        if self.system in NOT_SWEPT:
            raise UserError(f"system={self.system} is not swept: {NOT_SWEPT[self.system]}; sweep another system")
        if self.head == "svr":
            raise UserError("head=svr is not swept: it is chosen on inner folds already (svm_search); leave head out")
        if self.fit_search:
            raise UserError("fit_search=true is a search of its own on the same speakers: leave it out of a sweep")
        if self.scheduler == "asha" and self.grace_epochs > self.fit.epochs:
            raise UserError(f"grace_epochs={self.grace_epochs} is above fit.epochs={self.fit.epochs}: lower it")
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the sweep")

    @property
    def rungs(self) -> list[int]:
        """The epochs after which asha compares a trial with those that got as far; none without it."""
        rungs, rung = [], float(self.grace_epochs)
        while self.scheduler == "asha" and rung < self.fit.epochs:
            # Tune judges at the first report that is not before the rung.
            rungs.append(-int(-rung // 1))
            rung *= self.reduction_factor
        return rungs
