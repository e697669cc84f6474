"""Several corpora as one, to train on the first and test on the others. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from cpcscale.emotion.corpora.corpus import Corpus, Utterance

UNIT_SCALE = (-1.0, 1.0)


def joined(corpora: Mapping[str, Corpus], train: str) -> Corpus:
    """All utterances of these corpora, for the protocol `official`: `train` to train and choose by, the others tested.

    Labels are on [-1, 1], each corpus by its own stated scale. Keys, speakers and recordings have the name of their
    corpus before them, as two corpora may use one name for different people; each tested corpus is the partition
    `test NAME`. Marks are those of any of them.
    """
    return Corpus(
        name=f"{train} to {', '.join(name for name in corpora if name != train)}",
        marks=tuple(dict.fromkeys(mark for corpus in corpora.values() for mark in corpus.marks)),
        scale=UNIT_SCALE,
        utterances=tuple(row for name, corpus in corpora.items() for row in _renamed(name, corpus, name == train)),
        dropped=tuple(one for corpus in corpora.values() for one in corpus.dropped),
    )


def key_in(name: str, key: str) -> str:
    """The key that an utterance of the corpus `name` has in a joined one."""
    return f"{name}/{key}"


def _renamed(name: str, corpus: Corpus, trained: bool) -> Iterator[Utterance]:
    labels_UP = corpus.to_unit(corpus.labels_UP).tolist()
    for row, (activation, valence, dominance) in zip(corpus.utterances, labels_UP, strict=True):
        yield dataclasses.replace(
            row,
            key=key_in(name, row.key),
            labels=(activation, valence, dominance),
            speaker=f"{name}/{row.speaker}" if row.speaker else "",
            recording=f"{name}/{row.recording}" if row.recording else "",
            session="",
            partition="train" if trained else f"test {name}",
        )
