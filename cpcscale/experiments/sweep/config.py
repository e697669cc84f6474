"""The config of `cpcscale sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpcscale import config as configs
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.runs.lease import LeaseConfig
from cpcscale.tracking.store import TrackingConfig


@dataclass(kw_only=True)
class SweepConfig(EmotionRecipe):
    """A sweep: the recipe that all trials start from, the keys that they change, and where they run."""

    # Folder (or s3:// prefix) of the sweep. If it holds an unfinished sweep, that one is continued.
    run_dir: str = field(default="runs/sweep", metadata=configs.PLACE)
    # Trials that run at the same time. 0: one for each GPU of the cluster, or for each core if there is no GPU.
    workers: int = field(default=0, metadata=configs.PLACE)
    # How many trials there are.
    trials: int = 16
    # How values are drawn: random, or optuna (its TPE sampler).
    search: str = "random"
    # asha stops the worse trials early; none trains every trial to its end.
    scheduler: str = "asha"
    # For asha: no trial is stopped before this epoch.
    grace_epochs: int = 1
    # For asha: at each rung, the best 1 in reduction_factor trials goes on.
    reduction_factor: float = 3.0
    # A trial whose process dies is started again this many times before it counts as failed. -1: no limit.
    max_failures: int = field(default=3, metadata=configs.PLACE)
    # What is searched, as config key: {form: arguments}, such as fit.batch: {choice: [8, 16]}. Forms: uniform,
    # loguniform, quniform, randint, choice.
    space: dict[str, Any] = field(default_factory=dict)
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
        if why := self.definition.not_swept:
            raise UserError(f"system={self.system} cannot be swept: {why}; sweep another system")
        if self.head in ("svr", "ridge"):
            raise UserError(
                f"head={self.head} cannot be swept: its settings are chosen on inner folds already; leave head out"
            )
        if self.fit_search:
            raise UserError(
                "fit_search=true already searches on the same development speakers: leave it out of a sweep"
            )
        if self.scheduler == "asha" and self.grace_epochs > self.fit.epochs:
            raise UserError(f"grace_epochs={self.grace_epochs} is above fit.epochs={self.fit.epochs}: lower it")
        if not self.run_dir:
            raise UserError("run_dir is empty: name the folder of the sweep")

    @property
    def rungs(self) -> list[int]:
        """The epochs after which asha compares a trial with the others; empty for scheduler=none."""
        rungs, rung = [], float(self.grace_epochs)
        while self.scheduler == "asha" and rung < self.fit.epochs:
            # Tune compares at the first report at or after the rung.
            rungs.append(-int(-rung // 1))
            rung *= self.reduction_factor
        return rungs
