"""Runs one fold of a cross-validation; finetune_result.py joins the folds.

Every choice (the epoch, or the config of a support vector machine) is made on speakers that the fold does not test; the
test utterances are predicted once, after that. No Ray, no MLflow: the result of `run_fold` depends on its arguments
alone, so folds can run anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale.emotion.batching import derive_seed, predict, seeded
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.fitted import CPU, FittedClassifier, FittedRecogniser, MeanHead, VectorHead
from cpcscale.emotion.heads import ridge
from cpcscale.emotion.heads.attention import learnt_mix
from cpcscale.emotion.heads.blocks import BlockScale
from cpcscale.emotion.heads.halving import best_fit, candidates, searched_settings, successive_halving
from cpcscale.emotion.heads.svm import COMPONENTS_GRID, GRID, Classifier, SVMConfig, chosen_classifier
from cpcscale.emotion.heads.training import EpochResult, HeadTraining, TrainingExamples
from cpcscale.emotion.heads.vectors import Regressor, Settings, choose_regressor_config
from cpcscale.emotion.held_out import Reference
from cpcscale.emotion.inputs import FoldInputs, FusedInputs, PreparedCorpus, fold_inputs
from cpcscale.emotion.protocol.folds import FINAL, final_split
from cpcscale.emotion.protocol.splits import Folds, Split
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.train.ranks import Ranks

log = logging.getLogger(__name__)

# Predicts the test rows of a fold, guess_UP in the corpus's units, from clean or degraded inputs.
_Guess = Callable[["FoldInputs | FusedInputs"], np.ndarray]


@dataclass(frozen=True)
class FoldResult:
    """The result of one fold: `guess_UP`, the predictions of its test rows in the corpus's units.

    `chosen` is what was chosen on the other speakers. `classes_U` are the predicted categories, if asked for.
    `conditions` has the predictions of the same rows under each test condition, as guess_UP. `recogniser` made them, if
    it is kept, and `distance_U` says how unlike its training they are. `calibration` is of the development rows, by the
    same procedure without them, where they stand for speakers that it does not know.
    """

    split: Split
    guess_UP: np.ndarray
    seconds: float = 0.0
    curve: tuple[EpochResult, ...] = ()
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes_U: tuple[str, ...] = ()
    conditions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    recogniser: FittedRecogniser | None = None
    distance_U: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    calibration: FoldResult | None = None


def start_fit(recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> tuple[FoldInputs, HeadTraining]:
    """(the inputs of a fold, an untrained fit on its training part); uses no test utterance."""
    source = fold_inputs(recipe, prepared, split)
    assert isinstance(source, FoldInputs)
    return source, _fits([recipe], prepared.corpus, source, split)[0]


def run_fold(
    recipe: EmotionRecipe,
    prepared: PreparedCorpus,
    fold: int,
    ranks: Ranks | None = None,
    *,
    keep: bool = False,
    publish: bool = False,
) -> FoldResult:
    """Trains one fold and predicts its test rows. All `ranks` call this and divide the recogniser's batches.

    The fold FINAL is of all labelled speakers and tests nobody. With `keep` the result has the recogniser, with
    `publish` what the intervals of the published one rest on.

    Raises UserError for unusable audio, a missing checkpoint or a loss that is not finite.
    """
    corpus, folds = prepared.corpus, prepared.folds
    if fold != FINAL:
        return _run_split(recipe, prepared, folds.splits[fold], ranks, keep=keep, publish=publish)
    split = final_split(recipe, corpus, folds)
    result = _run_split(recipe, prepared, split, ranks, keep=keep, publish=publish)
    if folds.protocol == "official" and publish:
        # The test part is for figures alone: intervals come from the owner's development part.
        apart = dataclasses.replace(split, test=split.dev, test_rows=split.dev_rows, leaky=True)
        without = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, refit=False), classify=False)
        alone = dataclasses.replace(prepared, conditions={})
        result = dataclasses.replace(result, calibration=_run_split(without, alone, apart, ranks, publish=True))
    # Under official the final split is that of fold 0, by which its fit is keyed.
    return dataclasses.replace(result, split=dataclasses.replace(split, fold=FINAL))


def _run_split(
    recipe: EmotionRecipe,
    prepared: PreparedCorpus,
    split: Split,
    ranks: Ranks | None,
    *,
    keep: bool = False,
    publish: bool = False,
) -> FoldResult:
    started = time.monotonic()
    corpus, folds = prepared.corpus, prepared.folds
    curve: tuple[EpochResult, ...] = ()
    chosen: dict[str, Any] = {}
    classes: list[str] = []
    distance_U = np.zeros(0)
    if recipe.regressor == "mean":
        known = known_rows(split) if recipe.fit.refit else list(split.train_rows)
        mean_P = corpus.labels_UP[known].mean(axis=0)
        recogniser = FittedRecogniser(
            recipe.system, None, MeanHead(corpus.to_unit(mean_P)), recipe.corpus.max_s, corpus.scale
        )
        guess_UP = np.tile(mean_P, (len(split.test_rows), 1))
        conditions = dict.fromkeys(recipe.test_conditions, guess_UP)
    else:
        source = fold_inputs(recipe, prepared, split)
        if recipe.regressor != "attention":
            guess, recogniser, chosen = _train_on_vectors(recipe, corpus, source, folds, split)
        else:
            assert isinstance(source, FoldInputs), "the attention head has frames of one system"
            guess, recogniser, curve, chosen = _train_head(recipe, corpus, source, split, ranks)
        guess_UP = guess(source) if split.test_rows else np.zeros((0, len(PRIMITIVES)))
        degraded = prepared.conditions if split.test_rows else {}
        conditions = {name: guess(source.with_audio(other)) for name, other in degraded.items()}
        if recipe.classify and (split.test_rows or keep):
            classifier = _train_classifier(recipe, corpus, source, folds, split)
            fitted = FittedClassifier(
                classifier.support_vectors, classifier.classes, recipe.vector_readout, classifier.scale
            )
            recogniser = dataclasses.replace(recogniser, classifier=fitted)
            classes = _classes(corpus, classifier, source, split)
        if (keep or publish) and not recipe.speaker_norm:
            recogniser, distance_U = _with_reference(recogniser, source, split)
    kept = recogniser.on(CPU) if keep else None
    spent = time.monotonic() - started
    return FoldResult(split, guess_UP, spent, curve, chosen, tuple(classes), conditions, kept, distance_U)


def known_rows(split: Split) -> list[int]:
    """The rows that a recogniser is fitted to once all is chosen; never one that is tested."""
    return sorted({*split.train_rows, *split.dev_rows} - set(split.test_rows))


def _with_reference(
    recogniser: FittedRecogniser, source: FoldInputs | FusedInputs, split: Split
) -> tuple[FittedRecogniser, np.ndarray]:
    """(the recogniser, knowing what it has learnt from; how unlike that the test rows are)."""
    features, known = recogniser.features, known_rows(split)
    assert features is not None
    reference = Reference.of(source.means(features, known))
    distances = [reference.distance(mean_F) for mean_F in source.means(features, split.test_rows)]
    return dataclasses.replace(recogniser, reference=reference), np.array(distances)


def _fits(
    recipes: Sequence[EmotionRecipe], corpus: Corpus, source: FoldInputs, split: Split, ranks: Ranks | None = None
) -> list[HeadTraining]:
    """An untrained fit for each recipe; they share their inputs."""
    known, held = (_examples(corpus, source, rows) for rows in (split.train_rows, split.dev_rows))
    return [_fit(recipe, source, split, known, held, ranks) for recipe in recipes]


def _fit(
    recipe: EmotionRecipe,
    source: FoldInputs,
    split: Split,
    known: TrainingExamples,
    held: TrainingExamples | None,
    ranks: Ranks | None,
    epochs: int = 0,
) -> HeadTraining:
    seed = derive_seed(recipe.seed, f"fold/{split.fold}")
    with seeded(seed, "weights"):
        network = source.network(recipe.recogniser)
    rate = recipe.definition.encoder_rate(recipe)
    return HeadTraining(network, known, held, recipe.fit, seed=seed, epochs=epochs, encoder_rate=rate, ranks=ranks)


def _examples(corpus: Corpus, source: FoldInputs, rows: Sequence[int]) -> TrainingExamples:
    names = [corpus.utterances[row].key for row in rows]
    truth_UP = corpus.to_unit(corpus.labels_UP[list(rows)])
    return TrainingExamples(source.inputs(rows), truth_UP, names, source.shares(rows))


def _train_head(
    recipe: EmotionRecipe, corpus: Corpus, source: FoldInputs, split: Split, ranks: Ranks | None
) -> tuple[_Guess, FittedRecogniser, tuple[EpochResult, ...], dict[str, Any]]:
    """Trains the attention head: (predictor of the test rows, recogniser, curve, what was chosen)."""
    recipes = candidates(recipe)
    fits = _fits(recipes, corpus, source, split, ranks)
    for place, epoch in successive_halving(fits, recipe.fit.epochs):
        _log_epoch(split.fold, place, epoch)
    place = best_fit(fits)
    fit = fits[place]
    curve, best, rows = tuple(fit.curve), fit.best, split.test_rows
    assert best is not None
    if recipe.fit.refit:
        # Anew on the development speakers too, for as many epochs, as the final recogniser is fitted.
        known = known_rows(split)
        anew = source.trained_on(known)
        fit = _fit(recipes[place], anew, split, _examples(corpus, anew, known), None, ranks, best.epoch)
        for _ in fit:
            pass
    network = fit.finish()

    def guess(inputs: FoldInputs | FusedInputs) -> np.ndarray:
        assert isinstance(inputs, FoldInputs)
        return corpus.from_unit(predict(network, inputs.inputs(rows), fit.device, fit.ranks, inputs.shares(rows)))

    mix = learnt_mix(network)
    chosen = {"epoch": best.epoch, "dev_ccc": best.dev_ccc} | ({"mix": mix} if mix else {})
    chosen |= searched_settings(recipes[place]) if len(fits) > 1 else {}
    of_network = FittedRecogniser.of_network
    recogniser = of_network(recipe.system, source.features, network, max_s=recipe.corpus.max_s, scale=corpus.scale)
    return guess, recogniser, curve, chosen


def _train_on_vectors(
    recipe: EmotionRecipe, corpus: Corpus, source: FoldInputs | FusedInputs, folds: Folds, split: Split
) -> tuple[_Guess, FittedRecogniser, dict[str, Any]]:
    """Fits a regression on training and development rows: (predictor of the test rows, recogniser, config)."""
    known = known_rows(split)
    x_UF, truth_UP = source.vectors(known), corpus.to_unit(corpus.labels_UP[known])
    reduced = any(block.reduced for block in source.blocks)
    grid: Sequence[Settings] = ridge.COMPONENTS_GRID if reduced else ridge.GRID
    if recipe.regressor == "svr":
        grid = _svm_grid(recipe, reduced)
    speakers = [folds.groups[row] for row in known]
    settings = choose_regressor_config(
        x_UF, truth_UP, speakers, grid, key=_inner_key(recipe, split), blocks=source.blocks
    )
    scale = BlockScale.of(x_UF, source.blocks, settings.components)
    machine = Regressor(settings, scale).fit(x_UF, truth_UP)
    head = VectorHead(recipe.regressor, machine.fitted, recipe.vector_readout, scale)
    recogniser = FittedRecogniser(recipe.system, source.features, head, recipe.corpus.max_s, corpus.scale)

    def guess(inputs: FoldInputs | FusedInputs) -> np.ndarray:
        return corpus.from_unit(machine.predict(inputs.vectors(split.test_rows)))

    return guess, recogniser, {key: value for key, value in vars(settings).items() if reduced or key != "components"}


def _svm_grid(recipe: EmotionRecipe, reduced: bool) -> Sequence[SVMConfig]:
    """The configs among which one is chosen; `reduced`: of principal components."""
    if not recipe.svm_search:
        return (recipe.svm,)
    return COMPONENTS_GRID if reduced else GRID


def _train_classifier(
    recipe: EmotionRecipe, corpus: Corpus, source: FoldInputs | FusedInputs, folds: Folds, split: Split
) -> Classifier:
    """A classifier of the corpus's categories, fitted on training and development rows."""
    known = known_rows(split)
    names, speakers = [corpus.utterances[row].category for row in known], [folds.groups[row] for row in known]
    grid = _svm_grid(recipe, any(block.reduced for block in source.blocks))
    key = _inner_key(recipe, split)
    return chosen_classifier(source.vectors(known), names, speakers, grid, key=key, blocks=source.blocks)


def _classes(corpus: Corpus, classifier: Classifier, source: FoldInputs | FusedInputs, split: Split) -> list[str]:
    """The predicted category of each test row; "" if the corpus has none for it."""
    if not split.test_rows:
        return []
    guesses = classifier.predict(source.vectors(split.test_rows))
    named = [corpus.utterances[row].category for row in split.test_rows]
    return [str(guess) if name else "" for name, guess in zip(named, guesses, strict=True)]


def _inner_key(recipe: EmotionRecipe, split: Split) -> str:
    return f"{recipe.protocol.seed}/inner/{split.fold}"


def _log_epoch(fold: int, place: int, epoch: EpochResult) -> None:
    line = "fold %d config %d epoch %d: loss %.3f, dev CCC %.3f"
    log.info(line, fold, place, epoch.epoch, epoch.train_loss, epoch.dev_ccc)
