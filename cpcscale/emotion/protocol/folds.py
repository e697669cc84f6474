"""A corpus under a recipe's protocol: its folds, the share of labels that each trains on, and the marks of both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.protocol.splits import Folds, SplitRow, make_folds
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.selected_on_test import selection_marks


def fold_splits(recipe: EmotionRecipe, corpus: Corpus) -> Folds:
    """The corpus under the recipe's protocol. Raises UserError when it does not fit, or a speaker is on both sides."""
    rows = [
        SplitRow(
            key=one.key, speaker=one.speaker, session=one.session, recording=one.recording, partition=one.partition
        )
        for one in corpus.utterances
    ]
    protocol = recipe.protocol
    folds = make_folds(rows, protocol.split, dev_share=protocol.dev_share, seed=protocol.seed)
    return with_share(folds, [row.key for row in rows], protocol.train_share, protocol.seed)


def marks(recipe: EmotionRecipe, corpus: Corpus, folds: Folds) -> list[str]:
    """What goes with every figure of this recipe on this corpus under this protocol."""
    shares = share_marks(recipe.protocol.train_share)
    return [*corpus.marks, *folds.marks, *recipe.marks, *selection_marks(recipe), *shares]


def share_marks(share: float) -> list[str]:
    """What goes with every figure of less than all labels, as LABELS-0.25."""
    return [] if share == 1 else [f"LABELS-{share:g}"]


def with_share(folds: Folds, keys: Sequence[str], share: float, seed: int) -> Folds:
    """The folds with that share of the utterances of each training and development speaker, at least one of each.

    `keys` has the key of each row. Test parts stay as they are. The draw is keyed by (seed, key), and nested: a share
    holds all that a smaller one holds. Rows without a group are drawn from together.
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
