"""Loss and accuracy on fixed windows of a held-out shard set: the same windows and negatives at every visit."""

from __future__ import annotations

import numpy as np
import torch

from cpcscale.shards.index import Index
from cpcscale.stream.counts import shard_windows
from cpcscale.stream.feed import FeedSource, fixed_batches
from cpcscale.stream.order import Order
from cpcscale.stream.window import WindowConfig
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.step import StepResult, TrainStep, scores

_SEED = 0


class Validation:
    """The fixed windows of one held-out set, decoded once and kept; each rank scores its share of them."""

    def __init__(self, index: Index, recipe: Recipe, ranks: Ranks) -> None:
        # Tiles whatever the training windows are: a crop would change with the epoch.
        spec = WindowConfig(kind="tile", seconds=recipe.window.seconds)
        order = Order(shard_windows(index, spec), _SEED, lanes=1, batch=1)
        positions = np.arange(min(order.plan.total, recipe.train.validate_windows))[ranks.rank :: ranks.world]
        size = max(1, recipe.train.micro_batch or recipe.train.batch // ranks.world)
        self._batches = list(fixed_batches(FeedSource(index, order, spec, recipe.feed), positions, size))
        self._ranks, self._steps = ranks, recipe.model.predictor.steps

    def __call__(self, step: TrainStep) -> dict[str, float]:
        """{loss, accuracy_mean, loss_k01, ...} over all windows, the same on every rank."""
        device = self._ranks.device
        loss_K = torch.zeros(self._steps, dtype=torch.float64, device=device)
        correct_K = torch.zeros(self._steps, dtype=torch.int64, device=device)
        count_K = torch.zeros_like(correct_K)
        for batch in self._batches:
            result = step.evaluate(batch)
            loss_K += result.loss_K
            correct_K += result.correct_K
            count_K += result.count_K
        return scores(StepResult(loss_K, correct_K, count_K), self._ranks, counted=False)
