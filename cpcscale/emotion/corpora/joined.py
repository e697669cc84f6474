"""Joins corpora into one, to train on one of them and test on the others. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from cpcscale.emotion.corpora.corpus import Corpus, Utterance

UNIT_SCALE = (-1.0, 1.0)


def join_corpora(corpora: Mapping[str, Corpus], train: str) -> Corpus:
    """All utterances of these corpora, for the protocol `official`: corpus `train` is trained on, the others tested.

    Labels are mapped to [-1, 1] by each corpus's own stated scale. Keys, speakers and recordings are prefixed by the
    name of their corpus, because two corpora may use one name for different people. Each tested corpus is the partition
    `test NAME`. The marks are those of all corpora together.
    """
    return Corpus(
        name=f"{train} to {', '.join(name for name in corpora if name != train)}",
        marks=tuple(dict.fromkeys(mark for corpus in corpora.values() for mark in corpus.marks)),
        scale=UNIT_SCALE,
        utterances=tuple(row for name, corpus in corpora.items() for row in _renamed(name, corpus, name == train)),
        dropped=tuple(one for corpus in corpora.values() for one in corpus.dropped),
        licence="; ".join(dict.fromkeys(corpus.licence for corpus in corpora.values())),
    )


def joined_key(name: str, key: str) -> str:
    """The key in a joined corpus of an utterance from the corpus `name`."""
    return f"{name}/{key}"


def _renamed(name: str, corpus: Corpus, trained: bool) -> Iterator[Utterance]:
    labels_UP = corpus.to_unit(corpus.labels_UP).tolist()
    for row, (activation, valence, dominance) in zip(corpus.utterances, labels_UP, strict=True):
        yield dataclasses.replace(
            row,
            key=joined_key(name, row.key),
            labels=(activation, valence, dominance),
            speaker=f"{name}/{row.speaker}" if row.speaker else "",
            recording=f"{name}/{row.recording}" if row.recording else "",
            session="",
            partition="train" if trained else f"test {name}",
        )
