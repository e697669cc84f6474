"""Chooses the config of an attention head by successive halving on development speakers.

All candidates train for a few epochs, the best quarter trains on, and the best of these to the end: Jamieson and
Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (arXiv 1502.07943), keeping a
quarter instead of a half. heads/svm.py chooses the config of a support vector machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from cpcscale.emotion.heads.training import EpochResult, HeadTraining
from cpcscale.emotion.recipe import EmotionRecipe

# One candidate in so many trains on after each comparison.
_KEPT = 4
# Candidates are compared after these shares of the epochs.
_RUNGS = (0.1, 1 / 3)
# The paper's dropout or more, a slow and a fast rate; on fixed features also coarser frames and a stronger decay.
_RATES, _DROPOUTS, _POOLS, _DECAYS = (3e-4, 1e-3), (0.2, 0.5), (4, 16), (1e-5, 1e-3)


def candidates(recipe: EmotionRecipe) -> list[EmotionRecipe]:
    """The recipes to try: 16 on fixed features, or 4 if the encoder is trained, which takes many times as long.

    Without `fit_search`, the recipe alone.
    """
    if not recipe.fit_search:
        return [recipe]
    head, fit = recipe.recogniser, recipe.fit
    pools, decays = ((head.pool_frames,), (fit.weight_decay,)) if recipe.trains_encoder else (_POOLS, _DECAYS)
    return [
        dataclasses.replace(
            recipe,
            recogniser=dataclasses.replace(head, dropout=dropout, pool_frames=pool),
            fit=dataclasses.replace(fit, learning_rate=rate, weight_decay=decay),
        )
        for rate, dropout, pool, decay in product(_RATES, _DROPOUTS, pools, decays)
    ]


def searched_settings(recipe: EmotionRecipe) -> dict[str, Any]:
    """The values that differ between candidates, by config key."""
    return {
        "fit.learning_rate": recipe.fit.learning_rate,
        "fit.weight_decay": recipe.fit.weight_decay,
        "recogniser.dropout": recipe.recogniser.dropout,
        "recogniser.pool_frames": recipe.recogniser.pool_frames,
    }


def rungs(epochs: int) -> list[int]:
    """The epochs after which candidates are compared: ascending, distinct, before the last."""
    return sorted({rung for share in _RUNGS if 0 < (rung := max(1, round(share * epochs))) < epochs})


def successive_halving(fits: Sequence[HeadTraining], epochs: int) -> Iterator[tuple[int, EpochResult]]:
    """Trains the fits in turns, fewer after each rung, up to `epochs`; yields (index of the fit, its epoch).

    At the end `best_fit` gives the choice. A single fit is just trained. On a tie the earlier fit trains on.
    """
    left = list(range(len(fits)))
    for rung in [*(rungs(epochs) if len(fits) > 1 else ()), epochs]:
        for place in left:
            for epoch in _until(fits[place], rung):
                yield place, epoch
        left = sorted(left, key=lambda place: -_score(fits[place]))[: max(1, len(left) // _KEPT)]


def best_fit(fits: Sequence[HeadTraining]) -> int:
    """The index of the fit whose best epoch has the highest development CCC; on a tie the first."""
    return max(range(len(fits)), key=lambda place: (_score(fits[place]), -place))


def _until(fit: HeadTraining, rung: int) -> Iterator[EpochResult]:
    if len(fit.curve) >= rung:
        return
    for epoch in fit:
        yield epoch
        if epoch.epoch >= rung:
            return


def _score(fit: HeadTraining) -> float:
    return float("-inf") if fit.best is None else fit.best.dev_ccc
