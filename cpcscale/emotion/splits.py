"""Who is in which fold: speaker-disjoint by construction. Pure.

Every choice is keyed by (seed, speaker), so it does not depend on the order of the rows. Two folds differ by at most
the utterances of the largest speaker: each speaker goes to the fold that is lightest so far, which for any order of the
speakers keeps that bound (list scheduling, Graham 1966).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cpcscale.errors import UserError


@dataclass(frozen=True)
class Split:
    """The speakers of one fold, each part sorted. Raises UserError for a speaker in two parts, or an empty part."""

    fold: int
    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        refuse_shared({"training": self.train, "development": self.dev, "test": self.test})

    def rows(self, speakers: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
        """The row numbers of the training, development and test part, for the speaker of each row."""
        parts = (frozenset(self.train), frozenset(self.dev), frozenset(self.test))
        train, dev, test = ([row for row, speaker in enumerate(speakers) if speaker in part] for part in parts)
        return train, dev, test


def splits(speakers: Sequence[str], folds: int, dev_share: float, seed: int) -> list[Split]:
    """One Split a fold, for the speaker of each row; each speaker is tested in exactly one.

    Raises UserError when there are fewer speakers than folds, or too few left to train on and choose by.
    """
    counts = Counter(speakers)
    made = []
    for fold, test in enumerate(speaker_folds(speakers, folds, seed)):
        rest = sorted(set(counts) - set(test))
        dev = dev_speakers(rest, dev_share, seed, fold)
        made.append(Split(fold, tuple(sorted(set(rest) - set(dev))), tuple(dev), tuple(test)))
    return made


def speaker_folds(speakers: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    """The test speakers of each fold, sorted, for the speaker of each row. Raises UserError for too few speakers."""
    counts = Counter(speakers)
    if folds < 2:
        raise UserError(f"protocol.folds={folds}: at least 2, or nothing is left to train on")
    if len(counts) < folds:
        raise UserError(
            f"{len(counts)} speakers cannot fill protocol.folds={folds}: every fold tests its own; lower it"
        )
    test: list[list[str]] = [[] for _ in range(folds)]
    load = [0] * folds
    for speaker in _keyed_order(counts, f"folds/{seed}"):
        lightest = min(range(folds), key=lambda fold: (load[fold], len(test[fold])))
        test[lightest].append(speaker)
        load[lightest] += counts[speaker]
    return [sorted(part) for part in test]


def dev_speakers(speakers: Sequence[str], share: float, seed: int, fold: int) -> list[str]:
    """The speakers, sorted, that choose the epoch: the nearest whole number to `share` of them, at least one.

    At least one is left to train on; raises UserError when there are not two.
    """
    distinct = set(speakers)
    if len(distinct) < 2:
        raise UserError(
            f"fold {fold} has {len(distinct)} speaker besides its test speakers, and needs one to train on and another "
            "to choose the epoch: use a corpus with more speakers"
        )
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    return sorted(_keyed_order(distinct, f"dev/{seed}/{fold}")[:count])


def refuse_shared(parts: dict[str, Sequence[str]]) -> None:
    """Raises UserError when a part has no speaker, or two of the named parts share one."""
    seen: dict[str, str] = {}
    for name, speakers in parts.items():
        if not speakers:
            raise UserError(f"the {name} part of a split has no speaker")
        for speaker in speakers:
            if seen.setdefault(speaker, name) != name:
                raise UserError(
                    f"speaker {speaker!r} is in the {seen[speaker]} and in the {name} part: a score on a known voice "
                    "says nothing about new ones; give each speaker one part"
                )


def _keyed_order(speakers: Counter[str] | set[str], key: str) -> list[str]:
    return sorted(speakers, key=lambda speaker: (hashlib.sha256(f"{key}/{speaker}".encode()).digest(), speaker))
