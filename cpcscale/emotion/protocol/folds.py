"""A corpus under a recipe's protocol: its folds and their marks."""

from __future__ import annotations

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.probe_selection import selection_marks
from cpcscale.emotion.protocol.splits import Folds, SplitRow, make_folds, share_marks, with_label_share
from cpcscale.emotion.recipe import EmotionRecipe


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
