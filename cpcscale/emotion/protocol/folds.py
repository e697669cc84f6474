"""A corpus under a recipe's protocol: its folds and their marks."""

from __future__ import annotations

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.probe_selection import selection_marks
from cpcscale.emotion.protocol.splits import Folds, SplitRow, make_folds, share_marks, with_share
from cpcscale.emotion.recipe import EmotionRecipe


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
