"""The protocols: which rows each fold trains on, chooses the epoch by (development part), and tests. Pure.

    speakers5   folds of whole speakers (any number of folds, as in speakers10)
    loso        leave one session out where the corpus has sessions, else one speaker
    official    the owner's partitions: one fold, which tests every test part
    random5     folds of utterances: a speaker is in training and test, so every result is marked LEAKY

All but random refuse a split that has a named speaker in two parts. Every choice is keyed by the seed and a name (of a
speaker, or under random of an utterance), so it does not depend on the order of the rows.

Speaker "" means unknown. Under speakers and loso, utterances of unknown speakers are grouped by recording; those
without a recording are left out and counted. Such a voice may still be that of a named speaker: the owner does not say.
Under official and random, they stay where they are and are counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cpcscale.errors import UserError

LEAKY = "LEAKY"
_FOLDED = ("random", "speakers")
_WHOLE = ("loso", "official")


@dataclass(frozen=True, kw_only=True)
class SplitRow:
    """What a protocol needs to know of an utterance. `key` is unique in the corpus; other fields may be "": unknown."""

    key: str
    speaker: str
    session: str = ""
    recording: str = ""
    # train, dev, or a name that begins with test
    partition: str = ""


@dataclass(frozen=True)
class Split:
    """One fold. `train`, `dev` and `test` are the groups in each part, sorted; `*_rows` its row numbers, ascending.

    A group is a speaker, or the unknown speakers of one recording; under official and random only speakers are listed.
    Raises UserError for a group in two parts, unless `leaky`, and for an empty training or development part. A split
    from `inner_splits` has no test part.
    """

    fold: int
    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    train_rows: tuple[int, ...]
    dev_rows: tuple[int, ...]
    test_rows: tuple[int, ...]
    # loso: the session or speaker that is left out
    name: str = ""
    leaky: bool = False

    def __post_init__(self) -> None:
        if not self.train_rows or not self.dev_rows:
            part = "development" if self.train_rows else "training"
            raise UserError(f"the {part} part of fold {self.fold} has no utterance: use a corpus with more speakers")
        if not self.leaky:
            refuse_shared({"training": self.train, "development": self.dev, "test": self.test})

    def rows(self, speakers: Sequence[str] = ()) -> tuple[list[int], list[int], list[int]]:
        """The row numbers of the training, development and test part; `speakers` is not used."""
        return list(self.train_rows), list(self.dev_rows), list(self.test_rows)


@dataclass(frozen=True)
class Folds:
    """All folds of a corpus under a protocol.

    `groups` is the group of each row, used for intervals and paired tests: the speaker; for an unknown speaker the
    recording; else "". `unknown` counts the rows without a speaker; `dropped` lists the rows in no part.
    """

    protocol: str
    marks: tuple[str, ...]
    splits: tuple[Split, ...]
    groups: tuple[str, ...]
    unknown: int
    dropped: tuple[int, ...]


def make_folds(rows: Sequence[SplitRow], protocol: str, *, dev_share: float, seed: int) -> Folds:
    """The folds of the protocol. Each row not dropped is tested exactly once, under official at most once.

    The development part is `dev_share` of the groups not tested; under random, of the utterances; under official, the
    owner's development part if there is one. Raises UserError for an unknown protocol, too few speakers, sessions or
    utterances, missing sessions or partitions, and a named speaker in two parts.

    >>> rows = [SplitRow(key=f"{speaker}{take}", speaker=speaker) for speaker in "abcd" for take in range(2)]
    >>> folds = make_folds(rows, "loso", dev_share=0.25, seed=0)
    >>> [(split.test, split.test_rows) for split in folds.splits][:2]
    [(('a',), (0, 1)), (('b',), (2, 3))]
    """
    kind, count = parse_protocol(protocol)
    groups = speaker_groups(rows)
    match kind:
        case "random":
            made = _random(rows, count, dev_share, seed)
        case "loso":
            made = _loso(rows, groups, dev_share, seed)
        case "official":
            made = _official(rows, groups, dev_share, seed)
        case _:
            parts = speaker_folds([group for group in groups if group], count, seed)
            made = [_of_groups(fold, test, groups, dev_share, seed) for fold, test in enumerate(parts)]
    used = {row for split in made for part in split.rows() for row in part}
    return Folds(
        protocol=protocol,
        marks=(LEAKY,) if kind == "random" else (),
        splits=tuple(made),
        groups=tuple(groups),
        unknown=sum(not row.speaker for row in rows),
        dropped=tuple(row for row in range(len(rows)) if row not in used),
    )


def parse_protocol(name: str) -> tuple[str, int]:
    """(kind, number of folds) of a protocol name; 0 folds if the corpus decides. Raises UserError for another name."""
    if name in _WHOLE:
        return name, 0
    for kind in _FOLDED:
        number = name.removeprefix(kind)
        if name.startswith(kind) and number.isdecimal() and str(int(number)) == number and int(number) >= 2:
            return kind, int(number)
    raise UserError(
        f"protocol={name!r} is unknown: choose speakers5, loso, official or random5 (speakers and random with the "
        "number of folds that you want, 2 or more)"
    )


def inner_splits(split: Split, groups: Sequence[str], folds: int, seed: int) -> tuple[Split, ...]:
    """Splits of the training and development rows of a fold, for a nested search; its test rows are in none.

    `folds=1` gives the split's own training and development part, for systems that take long to train. With more folds,
    each group is in the development part of exactly one, whatever the protocol; rows without a group are left out.
    Raises UserError for fewer groups than folds.
    """
    if folds == 1:
        return (dataclasses.replace(split, fold=0, test=(), test_rows=(), name=""),)
    known = [row for row in split.train_rows + split.dev_rows if groups[row]]
    every = {groups[row] for row in known}
    made = []
    for fold, dev in enumerate(speaker_folds([groups[row] for row in known], folds, f"{seed}/inner/{split.fold}")):
        parts = (_rows_in(groups, every - set(dev), known), _rows_in(groups, dev, known), ())
        made.append(_split(fold, groups, parts))
    return tuple(made)


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


def speaker_groups(rows: Sequence[SplitRow]) -> list[str]:
    """The group of each row: its speaker; if unknown, a name for its recording that no speaker has; else ""."""
    speakers = {row.speaker for row in rows}
    mark = "recording "
    while any(speaker.startswith(mark) for speaker in speakers):
        mark = f"unknown, {mark}"
    return [row.speaker or (mark + row.recording if row.recording else "") for row in rows]


def speaker_folds(groups: Iterable[str], folds: int, key: int | str) -> list[list[str]]:
    """The test groups of each fold, sorted; `groups` has the group of each row.

    Fold sizes differ by at most the rows of the largest group: each group goes to the fold with the fewest rows so far,
    which keeps that bound for any order of the groups (list scheduling, Graham 1966). Raises UserError for fewer groups
    than folds.
    """
    counts = Counter(groups)
    if len(counts) < folds:
        raise UserError(
            f"{len(counts)} speakers cannot fill {folds} folds: each fold tests at least one; use fewer folds"
        )
    held: list[list[str]] = [[] for _ in range(folds)]
    load = [0] * folds
    for group in _keyed_order(counts, f"folds/{key}"):
        lightest = min(range(folds), key=lambda fold: (load[fold], len(held[fold])))
        held[lightest].append(group)
        load[lightest] += counts[group]
    return [sorted(part) for part in held]


def dev_speakers(groups: Collection[str], share: float, seed: int, fold: int) -> list[str]:
    """The groups of the development part, sorted: `share` of them, rounded, at least one.

    At least one group is left to train on. Raises UserError for fewer than two groups.
    """
    distinct = set(groups)
    if len(distinct) < 2:
        raise UserError(
            f"fold {fold} has {len(distinct)} speaker besides its test speakers, and needs one to train on and another "
            "to choose the epoch: use a corpus with more speakers"
        )
    return sorted(_keyed_order(distinct, f"dev/{seed}/{fold}")[: _nearest_count(share, len(distinct))])


def refuse_shared(parts: dict[str, Sequence[str]]) -> None:
    """Raises UserError when two of the named parts share a speaker."""
    seen: dict[str, str] = {}
    for name, speakers in parts.items():
        for speaker in speakers:
            if seen.setdefault(speaker, name) != name:
                raise UserError(
                    f"speaker {speaker!r} is in the {seen[speaker]} and in the {name} part, so the score would not be "
                    "of a new voice: put each speaker into one part"
                )


def _of_groups(
    fold: int, test: Collection[str], groups: Sequence[str], dev_share: float, seed: int, name: str = ""
) -> Split:
    rest = set(groups) - {""} - set(test)
    dev = dev_speakers(rest, dev_share, seed, fold)
    return _split(fold, groups, [_rows_in(groups, part) for part in (rest - set(dev), dev, test)], name=name)


def _loso(rows: Sequence[SplitRow], groups: Sequence[str], dev_share: float, seed: int) -> list[Split]:
    known = [row for row, group in enumerate(groups) if group]
    without = [row for row in known if not rows[row].session]
    if len(without) == len(known):
        sessions = {group: {group} for group in groups if group}
    elif without:
        raise UserError(
            f"{len(without)} of {len(known)} utterances have no session, the first {rows[without[0]].key!r}: loso "
            "takes a session for each, or for none, to leave one speaker out"
        )
    else:
        sessions = {}
        for row in known:
            sessions.setdefault(rows[row].session, set()).add(groups[row])
        owner = {group: session for session, members in sessions.items() for group in members}
        for row in known:
            if owner[groups[row]] != rows[row].session:
                raise UserError(
                    f"speaker {groups[row]!r} is in the sessions {owner[groups[row]]!r} and {rows[row].session!r}: "
                    "with one left out, the voice stays in training; use protocol=speakers5"
                )
    if len(sessions) < 2:
        raise UserError(
            f"loso takes at least 2 sessions or speakers, and this corpus has {len(sessions)}: use a larger corpus"
        )
    return [
        _of_groups(fold, sessions[name], groups, dev_share, seed, name) for fold, name in enumerate(sorted(sessions))
    ]


def _official(rows: Sequence[SplitRow], groups: Sequence[str], dev_share: float, seed: int) -> list[Split]:
    parts: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row.partition not in ("", "train", "dev") and not row.partition.startswith("test"):
            raise UserError(
                f"utterance {row.key!r} has the partition {row.partition!r}: official takes train, dev, and names that "
                "begin with test"
            )
        parts.setdefault(row.partition, []).append(number)
    train, dev = parts.get("train", []), parts.get("dev", [])
    tests = sorted(name for name in parts if name.startswith("test"))
    if not train or not tests:
        raise UserError(
            f"protocol=official: this corpus has no {'test' if train else 'train'} partition; use speakers5 or loso"
        )
    if not dev:
        speakers = {groups[row] for row in train} - {""}
        chosen = dev_speakers(speakers, dev_share, seed, 0)
        # An unknown speaker may be one of the chosen, so its rows are in neither part.
        train, dev = _rows_in(groups, speakers - set(chosen), train), _rows_in(groups, chosen, train)
    # One fit is tested on all test parts.
    tested = [row for name in tests for row in parts[name]]
    return [_split(0, [row.speaker for row in rows], (train, dev, tested))]


def _random(rows: Sequence[SplitRow], folds: int, dev_share: float, seed: int) -> list[Split]:
    number = {row.key: place for place, row in enumerate(rows)}
    if len(number) < len(rows):
        twice = next(key for key, count in Counter(row.key for row in rows).items() if count > 1)
        raise UserError(f"utterance {twice!r} is there twice, and keys must be unique: drop one")
    if len(rows) < max(folds, 3):
        raise UserError(f"{len(rows)} utterances cannot fill protocol=random{folds}: use fewer folds or more data")
    order = [number[key] for key in _keyed_order(number, f"random/{seed}")]
    speakers = [row.speaker for row in rows]
    made = []
    for fold in range(folds):
        # Taken from the test parts of the next folds in turn: two folds share development utterances only if the share
        # is larger than one fold.
        rest = [row for step in range(1, folds) for row in order[(fold + step) % folds :: folds]]
        dev = _nearest_count(dev_share, len(rest))
        made.append(_split(fold, speakers, (rest[dev:], rest[:dev], order[fold::folds]), leaky=True))
    return made


def _split(
    fold: int, names: Sequence[str], parts: Sequence[Iterable[int]], *, name: str = "", leaky: bool = False
) -> Split:
    """`names` is the group of each row, or ""; `parts` are the training, development and test rows."""
    train, dev, test = (tuple(sorted(part)) for part in parts)
    listed = [tuple(sorted({names[row] for row in part} - {""})) for part in (train, dev, test)]
    return Split(fold, listed[0], listed[1], listed[2], train, dev, test, name=name, leaky=leaky)


def _rows_in(groups: Sequence[str], part: Collection[str], among: Iterable[int] | None = None) -> list[int]:
    chosen = set(part)
    return [row for row in (range(len(groups)) if among is None else among) if groups[row] in chosen]


def _nearest_count(share: float, count: int) -> int:
    return min(max(1, round(share * count)), count - 1)


def _keyed_order(names: Iterable[str], key: str) -> list[str]:
    return sorted(names, key=lambda name: (hashlib.sha256(f"{key}/{name}".encode()).digest(), name))
