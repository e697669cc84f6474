"""Cross-validation of one system under one protocol: folds that can run anywhere; finetune_result.py joins them.

What is chosen of a fold (the epoch, or the config of a support vector machine) is chosen on speakers of its training
part; what it tests is heard once, after that. No Ray, no MLflow: `run_fold` is a function of the recipe, what was
prepared and the fold.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale.emotion.batching import key, predict, seeded
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.heads.attention import learnt_mix
from cpcscale.emotion.heads.halving import best_of, candidates, halve, settings
from cpcscale.emotion.heads.svm import GRID, Regressor, choose, classify
from cpcscale.emotion.heads.training import EpochResult, HeadTraining, TrainingExamples
from cpcscale.emotion.inputs import FoldInputs, PreparedCorpus, fold_inputs
from cpcscale.emotion.protocol.splits import Folds, Split
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.train.ranks import Ranks

log = logging.getLogger(__name__)

# guess_UP of a fold's test rows, in the corpus's units, from what they sound like.
_Guess = Callable[[FoldInputs], np.ndarray]


@dataclass(frozen=True)
class FoldResult:
    """One fold's test predictions, `guess_UP` in the corpus's units for the rows that its split tests, and how it went.

    `chosen` is what was chosen on training speakers, `classes_U` the categories guessed, where they were asked for, and
    `conditions` what is said of the same rows degraded, as guess_UP, by the name of the condition.
    """

    split: Split
    guess_UP: np.ndarray
    seconds: float = 0.0
    curve: tuple[EpochResult, ...] = ()
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes_U: tuple[str, ...] = ()
    conditions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def start_fit(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> tuple[FoldInputs, HeadTraining]:
    """A fit on the training part of a fold, not begun, and the source of its inputs. Hears no test utterance."""
    source = fold_inputs(recipe, prepared, split)
    return source, _fits([recipe], prepared.corpus, source, split)[0]


def run_fold(recipe: EmotionRecipe, prepared: PreparedCorpus, fold: int, ranks: Ranks | None = None) -> FoldResult:
    """Trains, chooses and scores one fold. The `ranks`, all of which call this, share the recogniser's batches.

    Raises UserError for bad audio, a missing checkpoint or a fit that diverges.
    """
    started = time.monotonic()
    corpus, folds = prepared.corpus, prepared.folds
    split = folds.splits[fold]
    curve: tuple[EpochResult, ...] = ()
    chosen: dict[str, Any] = {}
    classes: list[str] = []
    if recipe.regressor == "mean":
        guess_UP = np.tile(corpus.labels_UP[list(split.train_rows)].mean(axis=0), (len(split.test_rows), 1))
        conditions = dict.fromkeys(recipe.test_conditions, guess_UP)
    else:
        source = fold_inputs(recipe, prepared, split)
        if recipe.regressor == "svr":
            guess, chosen = _regressed(recipe, corpus, source, folds, split)
        else:
            guess, curve, chosen = _trained(recipe, corpus, source, split, ranks)
        guess_UP = guess(source)
        conditions = {name: guess(source.hearing(other)) for name, other in prepared.conditions.items()}
        if recipe.classify:
            classes = _classified(recipe, corpus, source, folds, split)
    return FoldResult(split, guess_UP, time.monotonic() - started, curve, chosen, tuple(classes), conditions)


def _fits(
    recipes: Sequence[EmotionRecipe], corpus: Corpus, source: FoldInputs, split: Split, ranks: Ranks | None = None
) -> list[HeadTraining]:
    """A fit for each recipe, over inputs that they share, not begun."""

    def examples(rows: Sequence[int]) -> TrainingExamples:
        names = [corpus.utterances[row].key for row in rows]
        truth_UP = corpus.to_unit(corpus.labels_UP[list(rows)])
        return TrainingExamples(source.inputs(rows), truth_UP, names, source.shares(rows))

    seed = key(recipes[0].seed, f"fold/{split.fold}")
    known, held = examples(split.train_rows), examples(split.dev_rows)
    fits = []
    for recipe in recipes:
        with seeded(seed, "weights"):
            network = source.network(recipe.recogniser)
        fits.append(
            HeadTraining(network, known, held, recipe.fit, seed=seed, encoder_rate=recipe.encoder_rate, ranks=ranks)
        )
    return fits


def _trained(
    recipe: EmotionRecipe, corpus: Corpus, source: FoldInputs, split: Split, ranks: Ranks | None
) -> tuple[_Guess, tuple[EpochResult, ...], dict[str, Any]]:
    """The recogniser at its best epoch as a predictor of the test rows, its curve, and that epoch with what else was
    chosen."""
    recipes = candidates(recipe)
    fits = _fits(recipes, corpus, source, split, ranks)
    for place, epoch in halve(fits, recipe.fit.epochs):
        _log_epoch(split.fold, place, epoch)
    place = best_of(fits)
    fit = fits[place]
    network, rows = fit.finish(), split.test_rows
    assert fit.best is not None

    def guess(heard: FoldInputs) -> np.ndarray:
        return corpus.from_unit(predict(network, heard.inputs(rows), fit.device, fit.ranks, heard.shares(rows)))

    mix = learnt_mix(network)
    chosen = {"epoch": fit.best.epoch, "dev_ccc": fit.best.dev_ccc} | ({"mix": mix} if mix else {})
    chosen |= settings(recipes[place]) if len(fits) > 1 else {}
    return guess, tuple(fit.curve), chosen


def _regressed(
    recipe: EmotionRecipe, corpus: Corpus, source: FoldInputs, folds: Folds, split: Split
) -> tuple[_Guess, dict[str, Any]]:
    """A support vector regression on both the training and the development part, as a predictor of the test rows, and
    its config."""
    known = sorted(split.train_rows + split.dev_rows)
    x_UF, truth_UP = source.vectors(known), corpus.to_unit(corpus.labels_UP[known])
    grid = GRID if recipe.svm_search else (recipe.svm,)
    voices = [folds.groups[row] for row in known]
    settings = choose(x_UF, truth_UP, voices, grid, key=_inner_key(recipe, split))
    machine = Regressor(settings).fit(x_UF, truth_UP)
    return lambda heard: corpus.from_unit(machine.predict(heard.vectors(split.test_rows))), dataclasses.asdict(settings)


def _classified(recipe: EmotionRecipe, corpus: Corpus, source: FoldInputs, folds: Folds, split: Split) -> list[str]:
    """The category guessed for each test row; "" where the corpus names none for it."""
    known = sorted(split.train_rows + split.dev_rows)
    names, voices = [corpus.utterances[row].category for row in known], [folds.groups[row] for row in known]
    guesses = classify(
        source.vectors(known),
        names,
        voices,
        source.vectors(split.test_rows),
        GRID if recipe.svm_search else (recipe.svm,),
        key=_inner_key(recipe, split),
    )
    return [
        guess if corpus.utterances[row].category else "" for row, guess in zip(split.test_rows, guesses, strict=True)
    ]


def _inner_key(recipe: EmotionRecipe, split: Split) -> str:
    return f"{recipe.protocol.seed}/inner/{split.fold}"


def _log_epoch(fold: int, place: int, epoch: EpochResult) -> None:
    line = "fold %d config %d epoch %d: loss %.3f, dev CCC %.3f"
    log.info(line, fold, place, epoch.epoch, epoch.train_loss, epoch.dev_ccc)
