"""The folds of a corpus under a recipe's protocol, with the share of labels it trains on, and the marks of results."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.protocol.splits import Folds, SplitRow, make_folds
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.selected_on_test import selection_marks


def fold_splits(recipe: EmotionRecipe, corpus: Corpus) -> Folds:
    """The folds of the corpus by `recipe.protocol`; row numbers are those of `corpus.utterances`.

    Raises UserError when the protocol does not fit the corpus, or a speaker is in two parts of a fold.
    """
    rows = [
        SplitRow(
            key=one.key, speaker=one.speaker, session=one.session, recording=one.recording, partition=one.partition
        )
        for one in corpus.utterances
    ]
    protocol = recipe.protocol
    folds = make_folds(rows, protocol.split, dev_share=protocol.dev_share, seed=protocol.seed)
    return with_label_share(folds, [row.key for row in rows], protocol.train_share, protocol.seed)


def marks(recipe: EmotionRecipe, corpus: Corpus, folds: Folds) -> list[str]:
    """The marks (PROXY, LEAKY, LABELS-0.25, ...) shown with every result of this recipe on this corpus."""
    shares = share_marks(recipe.protocol.train_share)
    return [*corpus.marks, *folds.marks, *recipe.marks, *selection_marks(recipe), *shares]


def share_marks(share: float) -> list[str]:
    """The mark of results trained on less than all labels, such as LABELS-0.25."""
    return [] if share == 1 else [f"LABELS-{share:g}"]


def with_label_share(folds: Folds, keys: Sequence[str], share: float, seed: int) -> Folds:
    """The same folds with only a share of the utterances of each training and development speaker, at least one each.

    `keys` are the utterances' keys. Test parts stay whole. The choice depends on (seed, key) alone and is nested: a
    larger share contains a smaller one. Rows without a group are treated as one speaker.
    """
    if share == 1:
        return folds

    def drawn(rows: Sequence[int]) -> tuple[int, ...]:
        of_group: dict[str, list[int]] = {}
        for row in rows:
            of_group.setdefault(folds.groups[row], []).append(row)
        return tuple(sorted(row for mine in of_group.values() for row in _first(mine, keys, share, seed)))

    parts = [(drawn(split.train_rows), drawn(split.dev_rows)) for split in folds.splits]
    splits = [
        dataclasses.replace(split, train_rows=train, dev_rows=dev)
        for split, (train, dev) in zip(folds.splits, parts, strict=True)
    ]
    return dataclasses.replace(folds, splits=tuple(splits))


def _first(rows: Sequence[int], keys: Sequence[str], share: float, seed: int) -> list[int]:
    order = sorted(rows, key=lambda row: hashlib.sha256(f"labelled/{seed}/{keys[row]}".encode()).digest())
    return order[: max(1, round(share * len(rows)))]
