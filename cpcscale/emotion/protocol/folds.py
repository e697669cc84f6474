"""A corpus under a recipe's protocol: its folds and their marks."""

from __future__ import annotations

import dataclasses

import numpy as np

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.probe_selection import selection_marks
from cpcscale.emotion.protocol.splits import (
    Folds,
    Split,
    SplitRow,
    dev_speakers,
    make_folds,
    share_marks,
    with_label_share,
)
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError

# The number of the fit on all labelled speakers, which tests nobody.
FINAL = -1


def fold_splits(recipe: EmotionRecipe, corpus: Corpus) -> Folds:
    """The folds of the corpus by `recipe.protocol`; row numbers are those of `corpus.utterances`.

    Raises UserError when the protocol does not fit the corpus, a speaker is in two parts of a fold, or no CCC can say
    anything: the labels of a primitive are all the same, or most are outside the stated scale.
    """
    _refuse_senseless_labels(corpus)
    rows = [
        SplitRow(
            key=one.key, speaker=one.speaker, session=one.session, recording=one.recording, partition=one.partition
        )
        for one in corpus.utterances
    ]
    protocol = recipe.protocol
    folds = make_folds(rows, protocol.split, dev_share=protocol.dev_share, seed=protocol.seed)
    return with_label_share(folds, [row.key for row in rows], protocol.train_share, protocol.seed)


def final_split(recipe: EmotionRecipe, corpus: Corpus, folds: Folds) -> Split:
    """The split of the recogniser that is published: all labelled speakers, and nobody to test.

    Under official it is the first fold, so that the recogniser is the very one that was scored.
    """
    if folds.protocol == "official":
        return dataclasses.replace(folds.splits[0], test=(), test_rows=())
    # Where no speaker is known, as under random, utterances are set apart to choose the epoch.
    keys = [utterance.key for utterance in corpus.utterances]
    groups = folds.groups if len(set(folds.groups) - {""}) > 1 else keys
    known = sorted(set(groups) - {""})
    dev = dev_speakers(known, recipe.protocol.dev_share, recipe.protocol.seed, FINAL)
    train = [group for group in known if group not in dev]
    train_rows, dev_rows = (tuple(row for row, group in enumerate(groups) if group in part) for part in (train, dev))
    split = Split(FINAL, tuple(train), tuple(dev), (), train_rows, dev_rows, ())
    one = dataclasses.replace(folds, splits=(split,))
    return with_label_share(one, keys, recipe.protocol.train_share, recipe.protocol.seed).splits[0]


def _refuse_senseless_labels(corpus: Corpus) -> None:
    least, greatest = corpus.scale
    for name, labels_U in zip(PRIMITIVES, corpus.labels_UP.T, strict=True):
        low, high = float(labels_U.min()), float(labels_U.max())
        if not least <= np.median(labels_U) <= greatest:
            raise UserError(
                f"corpus {corpus.name}: most labels of {name} are outside corpus.scale=[{least:g},{greatest:g}], they "
                f"go from {low:g} to {high:g}: pass the scale that they were given on, as corpus.scale=[LEAST,GREATEST]"
            )
        if low == high:
            raise UserError(
                f"corpus {corpus.name}: all {len(labels_U)} labels of {name} are {low:g} (corpus.scale=[{least:g},"
                f"{greatest:g}]), so there is nothing to learn or to score: check the column that they come from"
            )


def marks(recipe: EmotionRecipe, corpus: Corpus, folds: Folds) -> list[str]:
    """The marks (PROXY, LEAKY, LABELS-0.25, ...) shown with every result of this recipe on this corpus."""
    shares = share_marks(recipe.protocol.train_share)
    return [*corpus.marks, *folds.marks, *recipe.marks, *selection_marks(recipe), *shares]
