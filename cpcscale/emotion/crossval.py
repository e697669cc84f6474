"""Cross-validation of one system under one protocol: folds that can run anywhere, and what they come to together.

What is chosen of a fold (the epoch, or the config of a support vector machine) is chosen on speakers of its training
part; what it tests is heard once, after that. No Ray, no MLflow: `run_fold` is a function of the recipe, what was
prepared and the fold.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale.emotion.classic import GRID, Regressor, choose, classify
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.features import Prepared, Source, open_source
from cpcscale.emotion.fit import Epoch, Examples, Fit
from cpcscale.emotion.halving import best_of, candidates, halve, settings
from cpcscale.emotion.labelled import share_marks, with_share
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.recogniser import learnt_mix
from cpcscale.emotion.rows import key, predict, seeded
from cpcscale.emotion.score import (
    agreement,
    bootstrap_interval,
    by_group,
    change,
    interval,
    mean_of_folds,
    scores,
    unweighted_average_recall,
)
from cpcscale.emotion.selection import selection_marks
from cpcscale.emotion.splits import Folds, Row, Split, make_folds
from cpcscale.emotion.traits import by_trait, traits_of
from cpcscale.objective.ccc import PRIMITIVES
from cpcscale.train.ranks import Ranks

log = logging.getLogger(__name__)

# guess_UP of a fold's test rows, in the corpus's units, from what they sound like.
_Guess = Callable[[Source], np.ndarray]


@dataclass(frozen=True)
class FoldResult:
    """One fold's test predictions, `guess_UP` in the corpus's units for the rows that its split tests, and how it went.

    `chosen` is what was chosen on training speakers, `classes_U` the categories guessed, where they were asked for, and
    `conditions` what is said of the same rows degraded, as guess_UP, by the name of the condition.
    """

    split: Split
    guess_UP: np.ndarray
    seconds: float = 0.0
    curve: tuple[Epoch, ...] = ()
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes_U: tuple[str, ...] = ()
    conditions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneResult:
    """What result.json holds; `ccc` and its intervals are of all test predictions pooled, the primary figures.

    Under `official` they are those of the owner's first test part; `ccc_by_part` has all parts. `interval` is the
    primary one; `bootstrap` is shown beside it. `unknown` counts utterances without a speaker, `dropped` what of the
    corpus was left out and why. `recall` is the unweighted average recall of the categories, where it was asked for.
    """

    system: str
    corpus: str
    protocol: str
    marks: list[str]
    seed: int
    utterances: int
    speakers: int
    unknown: int
    dropped: dict[str, int]
    ccc: dict[str, float]
    ccc_by_part: dict[str, dict[str, float]]
    ccc_mean_of_folds: dict[str, float]
    interval: dict[str, list[float]] | None
    bootstrap: dict[str, list[float]] | None
    agreement: dict[str, dict[str, float]]
    recall: float | None
    folds: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    seconds: float
    encoder_chosen: str = ""  # how the checkpoint was: newest, best by loss, best by probe, or by name
    groups: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # CCC by gender and style: traits.py
    # By name: `ccc` and `interval` under a condition of robustness.py, `change` from the clean ones, `change_interval`.
    conditions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    predictions_csv: str = ""  # a file of its own, not part of as_dict
    run_id: str = ""  # of the tracked run, where there is one
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # digests of what it was computed from

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as result.json has them."""
        values = dataclasses.asdict(self)
        del values["predictions_csv"]
        return values


def fold_splits(recipe: EmotionRecipe, corpus: Corpus) -> Folds:
    """The corpus under the recipe's protocol. Raises UserError when it does not fit, or a speaker is on both sides."""
    rows = [
        Row(key=one.key, speaker=one.speaker, session=one.session, recording=one.recording, partition=one.partition)
        for one in corpus.utterances
    ]
    protocol = recipe.protocol
    folds = make_folds(rows, protocol.split, dev_share=protocol.dev_share, seed=protocol.seed)
    return with_share(folds, [row.key for row in rows], protocol.train_share, protocol.seed)


def marks(recipe: EmotionRecipe, corpus: Corpus, folds: Folds) -> list[str]:
    """What goes with every figure of this recipe on this corpus under this protocol."""
    shares = share_marks(recipe.protocol.train_share)
    return [*corpus.marks, *folds.marks, *recipe.marks, *selection_marks(recipe), *shares]


def start_fit(recipe: EmotionRecipe, prepared: Prepared, split: Split) -> tuple[Source, Fit]:
    """A fit on the training part of a fold, not begun, and the source of its inputs. Hears no test utterance."""
    source = open_source(recipe, prepared, split)
    return source, _fits([recipe], prepared.corpus, source, split)[0]


def run_fold(recipe: EmotionRecipe, prepared: Prepared, fold: int, ranks: Ranks | None = None) -> FoldResult:
    """Trains, chooses and scores one fold. The `ranks`, all of which call this, share the recogniser's batches.

    Raises UserError for bad audio, a missing checkpoint or a fit that diverges.
    """
    started = time.monotonic()
    corpus, folds = prepared.corpus, fold_splits(recipe, prepared.corpus)
    split = folds.splits[fold]
    curve: tuple[Epoch, ...] = ()
    chosen: dict[str, Any] = {}
    classes: list[str] = []
    if recipe.regressor == "mean":
        guess_UP = np.tile(corpus.labels_UP[list(split.train_rows)].mean(axis=0), (len(split.test_rows), 1))
        conditions = dict.fromkeys(recipe.test_conditions, guess_UP)
    else:
        source = open_source(recipe, prepared, split)
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
    recipes: Sequence[EmotionRecipe], corpus: Corpus, source: Source, split: Split, ranks: Ranks | None = None
) -> list[Fit]:
    """A fit for each recipe, over inputs that they share, not begun."""

    def examples(rows: Sequence[int]) -> Examples:
        names = [corpus.utterances[row].key for row in rows]
        truth_UP = corpus.to_unit(corpus.labels_UP[list(rows)])
        return Examples(source.inputs(rows), truth_UP, names, source.shares(rows))

    seed = key(recipes[0].seed, f"fold/{split.fold}")
    known, held = examples(split.train_rows), examples(split.dev_rows)
    fits = []
    for recipe in recipes:
        with seeded(seed, "weights"):
            network = source.network(split.train_rows, recipe.recogniser)
        fits.append(Fit(network, known, held, recipe.fit, seed=seed, encoder_rate=recipe.encoder_rate, ranks=ranks))
    return fits


def _trained(
    recipe: EmotionRecipe, corpus: Corpus, source: Source, split: Split, ranks: Ranks | None
) -> tuple[_Guess, tuple[Epoch, ...], dict[str, Any]]:
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

    def guess(heard: Source) -> np.ndarray:
        return corpus.from_unit(predict(network, heard.inputs(rows), fit.device, fit.ranks, heard.shares(rows)))

    mix = learnt_mix(network)
    chosen = {"epoch": fit.best.epoch, "dev_ccc": fit.best.dev_ccc} | ({"mix": mix} if mix else {})
    chosen |= settings(recipes[place]) if len(fits) > 1 else {}
    return guess, tuple(fit.curve), chosen


def _regressed(
    recipe: EmotionRecipe, corpus: Corpus, source: Source, folds: Folds, split: Split
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


def _classified(recipe: EmotionRecipe, corpus: Corpus, source: Source, folds: Folds, split: Split) -> list[str]:
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


def combine(recipe: EmotionRecipe, corpus: Corpus, results: Sequence[FoldResult]) -> FinetuneResult:
    """The run's figures from all of its folds, in any order. No utterance is tested in two of them."""
    results, folds = sorted(results, key=lambda result: result.split.fold), fold_splits(recipe, corpus)
    count, truth_UP = len(corpus.utterances), corpus.labels_UP
    guess_UP, tested_U = np.full((count, len(PRIMITIVES)), np.nan), np.full(count, -1)
    classes = [""] * count
    for result in results:
        rows = list(result.split.test_rows)
        assert (tested_U[rows] == -1).all(), "an utterance is tested twice"
        guess_UP[rows], tested_U[rows] = result.guess_UP, result.split.fold
        for row, name in zip(rows, result.classes_U, strict=False):
            classes[row] = name
    parts = [one.partition if folds.protocol == "official" else "" for one in corpus.utterances]
    tested = np.flatnonzero(tested_U >= 0)
    first = min(parts[row] for row in tested)
    judged = np.array([row for row in tested if parts[row] == first])
    known, guess = truth_UP[judged], guess_UP[judged]
    voices = [folds.groups[row] for row in judged]
    tables = [_fold_table(result, truth_UP) for result in results]
    degraded = {name: _all_rows(results, name, count) for name in recipe.test_conditions}
    lost = {"no speaker and no recording": len(folds.dropped)} if folds.dropped else {}
    return FinetuneResult(
        system=recipe.system,
        corpus=corpus.name,
        protocol=folds.protocol,
        marks=marks(recipe, corpus, folds),
        seed=recipe.seed,
        utterances=len(judged),
        speakers=len(set(voices)),
        unknown=folds.unknown,
        dropped=corpus.dropped_counts | lost,
        ccc=scores(known, guess),
        ccc_by_part={
            str(part): figures
            for part, figures in by_group(truth_UP[tested], guess_UP[tested], [parts[row] for row in tested]).items()
        },
        ccc_mean_of_folds=mean_of_folds([table["ccc"] for table in tables]),
        interval=interval(known, guess, voices),
        bootstrap=bootstrap_interval(known, guess, voices, seed=recipe.protocol.seed),
        agreement=agreement(known, guess),
        recall=_recall(corpus, classes, judged),
        folds=tables,
        curves=[_curve_row(result, epoch) for result in results for epoch in result.curve],
        seconds=sum(result.seconds for result in results),
        groups=by_trait(known, guess, voices, traits_of([corpus.utterances[row] for row in judged])),
        conditions={name: _condition(known, guess, other[judged], voices) for name, other in degraded.items()},
        predictions_csv=_predictions(corpus, guess_UP, tested_U, classes, degraded),
    )


def _all_rows(results: Sequence[FoldResult], condition: str, count: int) -> np.ndarray:
    """guess_UP [count, P] under a condition, NaN where nothing was tested."""
    guess_UP = np.full((count, len(PRIMITIVES)), np.nan)
    for result in results:
        guess_UP[list(result.split.test_rows)] = result.conditions[condition]
    return guess_UP


def _condition(truth_UP: np.ndarray, clean: np.ndarray, degraded: np.ndarray, voices: Sequence[str]) -> dict[str, Any]:
    difference, bounds = change(truth_UP, clean, degraded, voices)
    return {
        "ccc": scores(truth_UP, degraded),
        "interval": interval(truth_UP, degraded, voices),
        "change": difference,
        "change_interval": bounds,
    }


def _recall(corpus: Corpus, classes: Sequence[str], judged: np.ndarray) -> float | None:
    rows = [row for row in judged.tolist() if classes[row]]
    if not rows:
        return None
    return unweighted_average_recall([corpus.utterances[row].category for row in rows], [classes[row] for row in rows])


def _fold_table(result: FoldResult, truth_UP: np.ndarray) -> dict[str, Any]:
    split = result.split
    return {
        "fold": split.fold,
        "name": split.name,
        "test_speakers": list(split.test),
        "dev_speakers": list(split.dev),
        "train_utterances": len(split.train_rows),
        "dev_utterances": len(split.dev_rows),
        "test_utterances": len(split.test_rows),
        "chosen": result.chosen,
        "updates": result.curve[-1].updates if result.curve else 0,
        "ccc": scores(truth_UP[list(split.test_rows)], result.guess_UP),
        "seconds": result.seconds,
    }


def _curve_row(result: FoldResult, epoch: Epoch) -> dict[str, Any]:
    values = {name: getattr(epoch, name) for name in ("epoch", "train_loss", "dev_ccc")}
    return {"fold": result.split.fold, **values}


def _predictions(
    corpus: Corpus,
    guess_UP: np.ndarray,
    tested_U: np.ndarray,
    classes: Sequence[str],
    degraded: Mapping[str, np.ndarray],
) -> str:
    """A row for each utterance that was tested; with `category` and `category_hat` where categories were guessed, and
    `PRIMITIVE_hat@CONDITION` for what was said of it degraded."""
    named = any(classes)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["utterance", "speaker", "fold", *PRIMITIVES, *(f"{name}_hat" for name in PRIMITIVES)]
    of_conditions = [f"{name}_hat@{condition}" for condition in degraded for name in PRIMITIVES]
    writer.writerow([*columns, *(("category", "category_hat") if named else ()), *of_conditions])
    for row in np.flatnonzero(tested_U >= 0).tolist():
        utterance = corpus.utterances[row]
        guesses = [f"{value:.6f}" for value in guess_UP[row]]
        words = (utterance.category, classes[row]) if named else ()
        more = [f"{value:.6f}" for other_UP in degraded.values() for value in other_UP[row]]
        writer.writerow([utterance.key, utterance.speaker, tested_U[row], *utterance.labels, *guesses, *words, *more])
    return out.getvalue()


def _log_epoch(fold: int, place: int, epoch: Epoch) -> None:
    line = "fold %d config %d epoch %d: loss %.3f, dev CCC %.3f"
    log.info(line, fold, place, epoch.epoch, epoch.train_loss, epoch.dev_ccc)
