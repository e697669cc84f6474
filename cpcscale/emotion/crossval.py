"""Speaker-disjoint cross-validation of one system: folds that can run anywhere, and what they come to together.

The epoch of a fold is chosen on its development speakers; its test speakers are heard once, after that. No Ray, no
MLflow: `run_fold` is a function of the recipe, the corpus and the fold.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.features import Prepared, Source, open_source, prepare
from cpcscale.emotion.fit import Epoch, Examples, Fit, key, predict, seeded
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.score import interval, mean_of_folds, scores
from cpcscale.emotion.splits import Split, splits
from cpcscale.objective.ccc import PRIMITIVES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldResult:
    """One fold's test predictions, `guess_UP` in the corpus's units for the utterances `test_rows`, and how it went."""

    split: Split
    train_utterances: int
    dev_utterances: int
    test_rows: tuple[int, ...]
    guess_UP: np.ndarray
    curve: tuple[Epoch, ...]
    best_epoch: int
    updates: int
    dev_ccc: float
    seconds: float


@dataclass(frozen=True)
class FinetuneResult:
    """What result.json holds; `ccc` and `interval` are of all test predictions pooled, the primary figures."""

    system: str
    corpus: str
    protocol: str
    marks: list[str]
    seed: int
    utterances: int
    speakers: int
    ccc: dict[str, float]
    ccc_mean_of_folds: dict[str, float]
    interval: dict[str, list[float]] | None
    folds: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    seconds: float
    predictions_csv: str = ""  # a file of its own, not part of as_dict
    run_id: str = ""  # of the tracked run, where there is one
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # digests of what it was computed from

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as result.json has them."""
        values = dataclasses.asdict(self)
        del values["predictions_csv"]
        return values


def fold_splits(recipe: EmotionRecipe, corpus: Corpus) -> list[Split]:
    """The splits of the recipe's protocol, one a fold. Raises UserError when the corpus has too few speakers."""
    protocol = recipe.protocol
    return splits(corpus.speakers, protocol.folds, protocol.dev_share, protocol.seed)


def start_fit(recipe: EmotionRecipe, corpus: Corpus, prepared: Prepared, split: Split) -> tuple[Source, Fit]:
    """A fit on the training part of a fold, not begun, and the source of its inputs. Hears no test utterance."""
    train, dev, _ = split.rows(corpus.speakers)
    source = open_source(recipe, corpus, prepared, split)
    seed = key(recipe.seed, f"fold/{split.fold}")
    with seeded(seed, "weights"):
        network = source.network(train)
    known, held = (Examples(source.inputs(rows), corpus.to_unit(corpus.labels_UP[rows])) for rows in (train, dev))
    return source, Fit(network, known, held, recipe.fit, seed=seed, encoder_rate=recipe.encoder_rate)


def run_fold(recipe: EmotionRecipe, corpus: Corpus, fold: int, prepared: Prepared | None = None) -> FoldResult:
    """Trains, chooses the epoch and scores one fold. `prepared` saves reading the audio where a caller has it.

    Raises UserError for bad audio, a missing checkpoint or a fit that diverges.
    """
    started = time.monotonic()
    split = fold_splits(recipe, corpus)[fold]
    train, dev, test = split.rows(corpus.speakers)
    curve: tuple[Epoch, ...] = ()
    best: Epoch | None = None
    if recipe.system == "mean":
        guess_UP = np.tile(corpus.labels_UP[train].mean(axis=0), (len(test), 1))
    else:
        source, fit = start_fit(recipe, corpus, prepared or prepare(recipe, corpus), split)
        for epoch in fit:
            _log_epoch(fold, epoch)
        guess_UP = corpus.from_unit(predict(fit.finish(), source.inputs(test), fit.device))
        curve, best = tuple(fit.curve), fit.best
    return FoldResult(
        split=split,
        train_utterances=len(train),
        dev_utterances=len(dev),
        test_rows=tuple(test),
        guess_UP=guess_UP,
        curve=curve,
        best_epoch=best.epoch if best else 0,
        updates=curve[-1].updates if curve else 0,
        dev_ccc=best.dev_ccc if best else 0.0,
        seconds=time.monotonic() - started,
    )


def combine(recipe: EmotionRecipe, corpus: Corpus, folds: Sequence[FoldResult]) -> FinetuneResult:
    """The run's figures from all of its folds, in any order. Every utterance is tested in exactly one fold."""
    folds = sorted(folds, key=lambda fold: fold.split.fold)
    count = len(corpus.utterances)
    guess_UP, tested = np.zeros((count, len(PRIMITIVES))), np.full(count, -1)
    for fold in folds:
        rows = list(fold.test_rows)
        assert (tested[rows] == -1).all(), "an utterance is tested twice"
        guess_UP[rows], tested[rows] = fold.guess_UP, fold.split.fold
    assert (tested >= 0).all(), "an utterance is not tested"
    truth_UP = corpus.labels_UP
    tables = [_fold_table(fold, truth_UP) for fold in folds]
    return FinetuneResult(
        system=recipe.system,
        corpus=corpus.name,
        protocol=recipe.protocol.name,
        marks=list(corpus.marks),
        seed=recipe.seed,
        utterances=count,
        speakers=len(set(corpus.speakers)),
        ccc=scores(truth_UP, guess_UP),
        ccc_mean_of_folds=mean_of_folds([table["ccc"] for table in tables]),
        interval=interval(truth_UP, guess_UP, corpus.speakers),
        folds=tables,
        curves=[_curve_row(fold, epoch) for fold in folds for epoch in fold.curve],
        seconds=sum(fold.seconds for fold in folds),
        predictions_csv=_predictions(corpus, guess_UP, tested),
    )


def _fold_table(fold: FoldResult, truth_UP: np.ndarray) -> dict[str, Any]:
    return {
        "fold": fold.split.fold,
        "test_speakers": list(fold.split.test),
        "dev_speakers": list(fold.split.dev),
        "train_utterances": fold.train_utterances,
        "dev_utterances": fold.dev_utterances,
        "test_utterances": len(fold.test_rows),
        "best_epoch": fold.best_epoch,
        "updates": fold.updates,
        "dev_ccc": fold.dev_ccc,
        "ccc": scores(truth_UP[list(fold.test_rows)], fold.guess_UP),
        "seconds": fold.seconds,
    }


def _curve_row(fold: FoldResult, epoch: Epoch) -> dict[str, Any]:
    return {"fold": fold.split.fold, "epoch": epoch.epoch, "train_loss": epoch.train_loss, "dev_ccc": epoch.dev_ccc}


def _predictions(corpus: Corpus, guess_UP: np.ndarray, tested: np.ndarray) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["utterance", "speaker", "fold", *PRIMITIVES, *(f"{name}_hat" for name in PRIMITIVES)])
    for row, utterance in enumerate(corpus.utterances):
        guesses = [f"{value:.6f}" for value in guess_UP[row]]
        writer.writerow([utterance.key, utterance.speaker, tested[row], *utterance.labels, *guesses])
    return out.getvalue()


def _log_epoch(fold: int, epoch: Epoch) -> None:
    log.info("fold %d epoch %d: loss %.3f, dev CCC %.3f", fold, epoch.epoch, epoch.train_loss, epoch.dev_ccc)
