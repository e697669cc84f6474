"""How long a cross-validated run will take on this machine, by a trial of its own parts on a few utterances."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import fold_splits, start_fit
from cpcscale.emotion.encoders.networks import open_encoder, pretrained_on
from cpcscale.emotion.heads.halving import candidates, epochs_in_all
from cpcscale.emotion.heads.svm import GRID, INNER_FOLDS, Regressor
from cpcscale.emotion.inputs import PreparedCorpus, fold_inputs, prepare
from cpcscale.emotion.protocol.splits import Split
from cpcscale.emotion.recipe import EmotionRecipe

TRIED = 16  # utterances
_STEPS = 3  # of minicpc's pretraining, beyond the first, which pays for its start


def estimate_s(recipe: EmotionRecipe, corpus: Corpus, workers: int = 1) -> float:
    """Seconds that all folds of this recipe take, `workers` of them at a time, from a trial of seconds to a minute.

    Measured are reading and features of TRIED utterances, drawn by their keys; an epoch of the recogniser on them, or
    one support vector regression of the fold's size; and a few steps of minicpc's pretraining. The cache of audio and
    features is not looked at: what it holds already is quicker. Nothing is written but below a temporary folder.
    Raises UserError as the run itself would.
    """
    if recipe.regressor == "mean":
        return 0.0
    folds = fold_splits(recipe, corpus).splits
    rounds = -(-len(folds) // max(1, workers))
    with tempfile.TemporaryDirectory(prefix="estimate-") as folder, contextlib.redirect_stderr(io.StringIO()):
        tried = dataclasses.replace(recipe, fit_search=False, audio_cache=AudioCacheConfig(path=folder))
        shared_s, prepared = _timed(lambda: prepare(tried, _few(corpus)))
        more = len(corpus.utterances) / len(prepared.corpus.utterances)
        return shared_s * more + rounds * _fold_s(recipe, tried, prepared, folds[0])


def _fold_s(recipe: EmotionRecipe, tried: EmotionRecipe, prepared: PreparedCorpus, fold: Split) -> float:
    few = prepared.corpus
    pretraining_s = _pretraining_s(tried, few, fold) if recipe.system == "minicpc" else 0.0
    if recipe.system == "minicpc":
        # What it hears afterwards costs what an untrained network of its kind costs.
        tried = dataclasses.replace(tried, system="random")
        prepared = prepare(tried, few)
    rows = tuple(range(len(few.utterances)))
    split = Split(0, (), (), (), rows[:-2], rows[-2:], (), leaky=True)
    known = len(fold.train_rows) + len(fold.dev_rows)
    if recipe.regressor == "svr":
        heard_s, x_UF = _timed(lambda: fold_inputs(tried, prepared, split).vectors(rows))
        share = (known + len(fold.test_rows)) / len(rows)
        return pretraining_s + heard_s * share + _svr_s(recipe, known, x_UF.shape[1])
    _, fit = start_fit(tried, prepared, split)
    epoch_s, _ = _timed(lambda: next(iter(fit)))
    # Development rows cost a third, without a gradient: counted as trained on, they make up for the test rows.
    epochs = epochs_in_all(len(candidates(recipe)), recipe.fit.epochs)
    return pretraining_s + epoch_s * epochs * known / len(rows)


def _svr_s(recipe: EmotionRecipe, rows: int, width: int) -> float:
    """The search and the last fit. A support vector machine's time grows with about the square of its rows."""
    rng = np.random.default_rng(0)
    x_UF, truth_UP = rng.normal(0, 1, (rows, width)), rng.uniform(-1, 1, (rows, 3))
    once_s, _ = _timed(lambda: Regressor(recipe.svm).fit(x_UF, truth_UP).predict(x_UF[: rows // INNER_FOLDS]))
    searches = 2 if recipe.classify else 1
    tried = len(GRID) if recipe.svm_search else 0
    return once_s * searches * (1 + tried * INNER_FOLDS * (1 - 1 / INNER_FOLDS) ** 2)


def _pretraining_s(tried: EmotionRecipe, few: Corpus, fold: Split) -> float:
    known, _ = open_encoder(tried)
    train = tried.pretraining.train

    def after(steps: int) -> float:
        # One lane: few utterances have no windows for many, and an update costs the same.
        some_train = dataclasses.replace(train, steps=steps, lanes=1)
        pretraining = dataclasses.replace(tried.pretraining, train=some_train)
        some = dataclasses.replace(tried, pretraining=pretraining)
        return _timed(lambda: pretrained_on(some, few, known, range(len(few.utterances))))[0]

    first_s = after(1)
    step_s = max(after(1 + _STEPS) - first_s, 0.0) / _STEPS
    # An utterance is a window at least; few are more.
    windows = len(fold.train_rows) + len(fold.dev_rows)
    return first_s + step_s * (train.steps or train.epochs * windows / train.batch)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.monotonic()
    made = work()
    return time.monotonic() - started, made


def _few(corpus: Corpus) -> Corpus:
    """TRIED utterances in an order that their keys give, whatever order the owner lists them in."""

    def place(row: int) -> str:
        return hashlib.sha256(corpus.utterances[row].key.encode()).hexdigest()

    rows = sorted(range(len(corpus.utterances)), key=place)[:TRIED]
    return dataclasses.replace(corpus, utterances=tuple(corpus.utterances[row] for row in rows))
