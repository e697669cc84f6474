"""Small sweeps for the tests: six voices of tones, MFCC, three folds, two epochs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from made_voices import recipe
from stores import store

from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.store import TrackingConfig

SPACE = {"fit.learning_rate": {"loguniform": [1e-3, 1e-2]}, "fit.batch": {"choice": [4, 6]}}


def settings(folder: Path, *, epochs: int = 2, **changes: Any) -> SweepConfig:
    """A sweep of three trials in `folder`, over the corpus in `folder/tones`."""
    base = recipe(folder / "tones", "mfcc", epochs=epochs)
    parts = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    tracking = TrackingConfig(uri=store(folder))
    # One process for trials: each further one imports torch for longer than a trial takes.
    given = {"run_dir": str(folder / "run"), "trials": 3, "workers": 1, "space": SPACE, "tracking": tracking}
    return SweepConfig(**parts | given | changes)


def family(config: SweepConfig) -> tuple[TrackedRun, list[TrackedRun], list[TrackedRun]]:
    """(the sweep, its trials by name, the folds below the best) as the store has them; all there is in it."""
    runs = read_runs(config.tracking, children=True)
    [parent] = [run for run in runs if run.kind == "sweep"]
    trials = sorted((run for run in runs if run.kind == "trial"), key=lambda run: run.name)
    folds = sorted((run for run in runs if run.kind == "fold"), key=lambda run: run.name)
    assert len(runs) == 1 + len(trials) + len(folds)
    assert {run.parent for run in trials} <= {parent.run_id}
    return parent, trials, folds
