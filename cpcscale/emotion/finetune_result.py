"""Joins the folds of a cross-validation into the figures of result.json and the rows of predictions.csv."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import FoldResult, known_rows
from cpcscale.emotion.heads.training import EpochResult
from cpcscale.emotion.held_out import HeldOut
from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.emotion.probe_selection import SELECTED_ON_TEST
from cpcscale.emotion.protocol.folds import FINAL, marks
from cpcscale.emotion.protocol.splits import LEAKY
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.by_group import by_trait, traits_of
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.ccc_intervals import (
    agreement,
    bootstrap_interval,
    by_group,
    ccc_change,
    interval,
    mean_of_folds,
    scores,
    unweighted_average_recall,
)


@dataclass(frozen=True)
class FinetuneResult:
    """The content of result.json. `ccc` and its intervals, the primary figures, are over all test predictions pooled.

    Under `official`, they are for the owner's first test part; `ccc_by_part` has all parts. `interval` is the primary
    interval; `bootstrap` is shown beside it. `unknown` counts utterances without a speaker; `dropped` counts what was
    left out of the corpus, by reason. `recall` is the unweighted average recall of the categories, if asked for.
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
    # how the checkpoint was chosen: newest, best by loss, best by probe, or by name
    encoder_chosen: str = ""
    # CCC by gender and style, see scores/by_group.py
    groups: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    # by test condition: its `ccc` and `interval`, the `change` from clean audio, and `change_interval`
    conditions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    # the text of predictions.csv, not part of as_dict
    predictions_csv: str = ""
    # id of the tracked run, if there is one
    run_id: str = ""
    # the system and which of its features it has, where there are several
    shown: str = ""
    # digests of the config and data that it was computed from
    identity: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The values of result.json."""
        values = dataclasses.asdict(self)
        del values["predictions_csv"]
        return values


def combine_folds(recipe: EmotionRecipe, prepared: PreparedCorpus, results: Sequence[FoldResult]) -> FinetuneResult:
    """The result of a run from all its folds, in any order."""
    results = sorted(results, key=lambda result: result.split.fold)
    corpus, folds = prepared.corpus, prepared.folds
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
    speakers = [folds.groups[row] for row in judged]
    tables = [_fold_table(result, truth_UP) for result in results]
    degraded = {name: _all_rows(results, name, count) for name in recipe.test_conditions}
    lost = {"no speaker and no recording": len(folds.dropped)} if folds.dropped else {}
    return FinetuneResult(
        system=recipe.system,
        shown=recipe.definition.shown(recipe),
        corpus=corpus.name,
        protocol=folds.protocol,
        marks=marks(recipe, corpus, folds),
        seed=recipe.seed,
        utterances=len(judged),
        speakers=len(set(speakers)),
        unknown=folds.unknown,
        dropped=corpus.dropped_counts | lost,
        ccc=scores(known, guess),
        ccc_by_part={
            str(part): figures
            for part, figures in by_group(truth_UP[tested], guess_UP[tested], [parts[row] for row in tested]).items()
        },
        ccc_mean_of_folds=mean_of_folds([table["ccc"] for table in tables]),
        interval=interval(known, guess, speakers),
        bootstrap=bootstrap_interval(known, guess, speakers, seed=recipe.protocol.seed),
        agreement=agreement(known, guess),
        recall=_recall(corpus, classes, judged),
        folds=tables,
        curves=[_curve_row(result, epoch) for result in results for epoch in result.curve],
        seconds=sum(result.seconds for result in results),
        groups=by_trait(known, guess, speakers, traits_of([corpus.utterances[row] for row in judged])),
        conditions={name: _condition(known, guess, other[judged], speakers) for name, other in degraded.items()},
        predictions_csv=_predictions(corpus, guess_UP, tested_U, classes, degraded),
    )


# Marks of results whose folds had learnt something of test speakers: their errors are not those of new speakers.
_KNOWN = {LEAKY, "SPEAKER-ADAPTED", "TRANSDUCTIVE", SELECTED_ON_TEST}


def held_out(recipe: EmotionRecipe, prepared: PreparedCorpus, results: Sequence[FoldResult]) -> HeldOut | None:
    """What the intervals of the published recogniser rest on: the test rows, or the calibration rows under official.

    None where the folds knew something of the speakers that they tested (_KNOWN), and for too few speakers.
    """
    corpus, folds = prepared.corpus, prepared.folds
    if _KNOWN & set(marks(recipe, corpus, folds)):
        return None
    apart = [each.calibration for each in results if each.calibration is not None]
    judged = apart or [each for each in results if each.split.fold != FINAL]
    rows = [row for each in judged for row in each.split.test_rows]
    constant_UP = np.concatenate(
        [np.tile(corpus.labels_UP[known_rows(each.split)].mean(axis=0), (len(each.guess_UP), 1)) for each in judged]
    )
    truth_UP = corpus.to_unit(corpus.labels_UP[rows])
    return HeldOut.of(
        truth_UP - corpus.to_unit(np.concatenate([each.guess_UP for each in judged])),
        truth_UP - corpus.to_unit(constant_UP),
        np.concatenate([each.distance_U for each in judged]),
        [folds.groups[row] for row in rows],
        recipe.seed,
    )


def _all_rows(results: Sequence[FoldResult], condition: str, count: int) -> np.ndarray:
    """Predictions [count, P] under a condition, NaN for rows not tested."""
    guess_UP = np.full((count, len(PRIMITIVES)), np.nan)
    for result in results:
        guess_UP[list(result.split.test_rows)] = result.conditions[condition]
    return guess_UP


def _condition(
    truth_UP: np.ndarray, clean: np.ndarray, degraded: np.ndarray, speakers: Sequence[str]
) -> dict[str, Any]:
    difference, bounds = ccc_change(truth_UP, clean, degraded, speakers)
    return {
        "ccc": scores(truth_UP, degraded),
        "interval": interval(truth_UP, degraded, speakers),
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


def _curve_row(result: FoldResult, epoch: EpochResult) -> dict[str, Any]:
    values = {name: getattr(epoch, name) for name in ("epoch", "train_loss", "dev_ccc")}
    return {"fold": result.split.fold, **values}


def _predictions(
    corpus: Corpus,
    guess_UP: np.ndarray,
    tested_U: np.ndarray,
    classes: Sequence[str],
    degraded: Mapping[str, np.ndarray],
) -> str:
    """predictions.csv: a row for each tested utterance; `category` and `category_hat` if categories were predicted.

    `PRIMITIVE_hat@CONDITION` is the prediction from its degraded audio.
    """
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
