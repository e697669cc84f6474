"""One trial of a sweep, and the trials as runs in the tracker. Test speakers are never heard."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cpcscale.cluster.space import apply
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import fold_splits, start_fit
from cpcscale.emotion.features import Prepared
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.progress import Progress
from cpcscale.tracking.tracker import StoreError, Tracker, TrackingConfig

log = logging.getLogger(__name__)

# What is maximised: the mean over folds of the best CCC so far on the fold's development speakers.
METRIC = "inner_ccc"
# What a trial that cannot be trained scores: the least a CCC can be.
WORST = -1.0


def trial(values: Mapping[str, Any], config: EmotionRecipe, shared: tuple[Corpus, Prepared], threads: int) -> None:
    """One trial under Tune: all folds epoch by epoch side by side, inner_ccc reported after each epoch."""
    import torch
    from ray import tune

    torch.set_num_threads(threads)
    try:
        for report in folds_in_step(apply(config, values), *shared):
            tune.report(report)
    except UserError as error:
        # A combination that cannot be trained is a bad trial, not the end of the sweep.
        tune.report({METRIC: WORST, "epoch": 0, "error": " ".join(str(error).split())})


def folds_in_step(recipe: EmotionRecipe, corpus: Corpus, prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Yields {inner_ccc, epoch, train_loss} after each epoch of all folds. Hears no test speaker.

    A fold whose patience has ended keeps its best.
    """
    fits = [start_fit(recipe, corpus, prepared, split)[1] for split in fold_splits(recipe, corpus)]
    epochs = [iter(fit) for fit in fits]
    for number in range(1, recipe.fit.epochs + 1):
        if not [epoch for epoch in [next(fold, None) for fold in epochs] if epoch is not None]:
            return
        last = [fit.curve[-1] for fit in fits]
        yield {
            METRIC: float(np.mean([epoch.best_dev_ccc for epoch in last])),
            "epoch": number,
            "train_loss": float(np.mean([epoch.train_loss for epoch in last])),
        }


class Children:
    """The trials as child runs of the sweep, written by the driver alone: one process touches the store."""

    def __init__(self, tracking: TrackingConfig, parent: str, tags: dict[str, str], trials: int) -> None:
        self._tracking, self._parent, self._tags = tracking, parent, tags
        self._open: dict[str, Tracker] = {}
        self._progress = Progress("sweep", trials, "trials")
        self._done, self._best = 0, WORST

    def start(self, name: str, values: Mapping[str, Any]) -> None:
        try:
            self._open[name] = Tracker.start(
                self._tracking,
                kind="trial",
                name=name,
                run_dir=None,
                tags=self._tags,
                params=values,
                parent=self._parent,
            )
        except StoreError as error:
            log.warning("%s is not tracked: %s", name, error)

    def report(self, name: str, result: Mapping[str, Any]) -> None:
        self._best = max(self._best, result[METRIC])
        if name in self._open:
            values = {key: result[key] for key in (METRIC, "train_loss") if key in result}
            self._open[name].log(int(result["epoch"]), values)

    def end(self, name: str, status: str) -> None:
        if name in self._open:
            self._open.pop(name).finish(status)
        self._done += 1
        self._progress.at(self._done, f"best {METRIC} {self._best:.3f}")

    def close(self, status: str) -> None:
        for name in list(self._open):
            self._open.pop(name).finish(status)
        self._progress.close()
