"""The config of a trained recogniser, chosen among several by successive halving on development speakers.

All candidates train for a few epochs, the better quarter goes on, and the best of these to the end: Jamieson and
Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (arXiv 1502.07943), with a quarter
kept in place of a half. A support vector regression is chosen in classic.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from cpcscale.emotion.heads.training import EpochResult, HeadTraining
from cpcscale.emotion.recipe import EmotionRecipe

_KEPT = 4  # one in so many goes on
_RUNGS = (0.1, 1 / 3)  # shares of the epochs after which candidates are compared
# The paper's dropout or more, a slow and a fast rate; over features that stay also coarser frames and a heavier decay.
_RATES, _DROPOUTS, _POOLS, _DECAYS = (3e-4, 1e-3), (0.2, 0.5), (4, 16), (1e-5, 1e-3)


def candidates(recipe: EmotionRecipe) -> list[EmotionRecipe]:
    """The recipes to try: 16 over features that stay, 4 where the encoder is trained, which takes many times as long.

    Without `fit_search` the recipe alone.
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


def settings(recipe: EmotionRecipe) -> dict[str, Any]:
    """What tells a candidate from the others, by config key."""
    return {
        "fit.learning_rate": recipe.fit.learning_rate,
        "fit.weight_decay": recipe.fit.weight_decay,
        "recogniser.dropout": recipe.recogniser.dropout,
        "recogniser.pool_frames": recipe.recogniser.pool_frames,
    }


def rungs(epochs: int) -> list[int]:
    """The epochs after which candidates are compared: distinct, rising, before the last."""
    return sorted({rung for share in _RUNGS if 0 < (rung := max(1, round(share * epochs))) < epochs})


def halve(fits: Sequence[HeadTraining], epochs: int) -> Iterator[tuple[int, EpochResult]]:
    """Trains them in turns up to `epochs`, fewer from rung to rung; yields each epoch with its fit's place.

    After it, the fit with the greatest development CCC at any epoch is the choice, see `best_of`. A single fit is just
    trained. Of equals the first goes on.
    """
    left = list(range(len(fits)))
    for rung in [*(rungs(epochs) if len(fits) > 1 else ()), epochs]:
        for place in left:
            for epoch in _until(fits[place], rung):
                yield place, epoch
        left = sorted(left, key=lambda place: -_score(fits[place]))[: max(1, len(left) // _KEPT)]


def best_of(fits: Sequence[HeadTraining]) -> int:
    """The place of the fit whose best epoch has the greatest development CCC; of equals the first."""
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
