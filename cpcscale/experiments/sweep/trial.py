"""One trial of a sweep, run in a process of Ray Tune. It uses no audio of test speakers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cpcscale.emotion.crossval import start_fit
from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.sweep.features import feature_key
from cpcscale.experiments.sweep.journal import METRIC, WORST
from cpcscale.experiments.sweep.space import with_values


def run_trial(assigned: Mapping[str, Any], config: EmotionRecipe, features: Mapping[str, Any], threads: int) -> None:
    """Trains all folds of one trial epoch by epoch, and reports inner_ccc to Tune after each epoch.

    `assigned` holds the trial's `number` and `values`. `features` are references to PreparedCorpus objects in Ray's
    object store, by feature_key; the trial reads the one that fits its recipe.
    """
    import ray
    import torch
    from ray import tune

    torch.set_num_threads(threads)
    started = time.monotonic()
    try:
        recipe = with_values(config, assigned["values"])
        for report in train_folds_by_epoch(recipe, ray.get(features[feature_key(recipe)])):
            tune.report(report | {"seconds": time.monotonic() - started})
    except UserError as error:
        # A combination of values that cannot be trained fails the trial, not the sweep.
        why = " ".join(str(error).split())
        tune.report({METRIC: WORST, "epoch": 0, "seconds": time.monotonic() - started, "error": why})


def train_folds_by_epoch(recipe: EmotionRecipe, prepared: PreparedCorpus) -> Iterator[dict[str, Any]]:
    """Yields {inner_ccc, epoch, train_loss, folds} each time all folds were trained for one more epoch.

    `folds` are the last Epoch of each fold as plain values. A fold whose patience ended repeats its last epoch. No test
    speaker is used.
    """
    fits = [start_fit(recipe, prepared, split)[1] for split in prepared.folds.splits]
    epochs = [iter(fit) for fit in fits]
    for number in range(1, recipe.fit.epochs + 1):
        if not [epoch for epoch in [next(fold, None) for fold in epochs] if epoch is not None]:
            return
        last = [fit.curve[-1] for fit in fits]
        yield {
            METRIC: float(np.mean([epoch.best_dev_ccc for epoch in last])),
            "epoch": number,
            "train_loss": float(np.mean([epoch.train_loss for epoch in last])),
            "folds": [dataclasses.asdict(epoch) for epoch in last],
        }
