"""Loss and accuracy on fixed windows of a held-out shard set, with the same windows and negatives every time."""

from __future__ import annotations

import numpy as np

from cpcscale.shards.index import Index
from cpcscale.stream.feed import FeedSource, fixed_batches
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.scores import ObjectiveSums, reduce_scores
from cpcscale.train.step import TrainStep

_SEED = 0


class Validation:
    """The fixed windows of one held-out set, decoded once and kept; each rank scores its share of them."""

    def __init__(self, index: Index, recipe: Recipe, ranks: Ranks) -> None:
        # Always tiles: crops would change with the epoch.
        spec = WindowConfig(kind="tile", seconds=recipe.window.seconds)
        order = RunOrder(shard_windows(index, spec), _SEED, lanes=1, batch=1)
        positions = np.arange(min(order.epoch_order.total, recipe.train.validate_windows))[ranks.rank :: ranks.world]
        size = max(1, recipe.train.micro_batch or recipe.train.batch // ranks.world)
        self._batches = list(
            fixed_batches(FeedSource(index, order, spec, recipe.feed, recipe.measures), positions, size)
        )
        self._ranks = ranks

    def __call__(self, step: TrainStep) -> dict[str, float]:
        """{loss, accuracy_mean, loss_k01, ...} over all windows, on every rank."""
        # A rank may have no window.
        scores = [score for objective in step.objectives if (score := objective.by_row())]
        whole = [ObjectiveSums.zero(score, self._ranks.device) for score in scores]
        with step.averaged():
            for batch in self._batches:
                whole = [one + other for one, other in zip(whole, step.evaluate(batch), strict=True)]
        return reduce_scores(whole, self._ranks, counted=False)
