"""What every corpus is once its adapter has read it: a name, its marks, a label scale and one row an utterance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpcscale import config, storage
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

KINDS = ("auto", "csv", "emodb", "iemocap", "msp-podcast", "msp-improv", "ravdess", "crema-d")
NO_AUDIO = "no audio file"
AGAIN = "a second copy of its file"


@dataclass(kw_only=True)
class CorpusConfig:
    """Which labelled data; `open_corpus` reads it."""

    kind: str = "auto"  # csv, emodb, iemocap, ...; auto: told by what the folder holds, csv when by nothing else
    path: str = ""  # folder of the corpus as its owners ship it, or the CSV file itself; local or s3://
    # The shard set that `cpcscale pack` made of the corpus, local or s3://: the audio is read from there, and of `path`
    # only the labels. Empty: from the audio files.
    shards: str = field(default="", metadata=config.PLACE)
    name: str = field(
        default="", metadata=config.PLACE
    )  # csv, msp-podcast: what tables call it; empty: the name of the CSV's folder, or the kind
    scale: list[float] = field(default_factory=lambda: [1.0, 5.0])  # csv: the least and the greatest label possible
    max_s: float = 10.0  # a longer utterance is heard in overlapping windows of so many seconds
    # Of an audio file that is missing, empty or unreadable: stop with one line, or skip its row, counted and named.
    on_bad: str = "stop"

    def __post_init__(self) -> None:
        config.check_choice("corpus.kind", self.kind, KINDS)
        config.check_choice("corpus.on_bad", self.on_bad, ("stop", "skip"))
        config.at_least(0.1, **{"corpus.max_s": self.max_s})
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise UserError(f"corpus.scale={self.scale} is not [least, greatest], for example [1, 5]")


class Rating(NamedTuple):
    """What one rater gave one utterance, in the corpus's units; NaN where the rater left a primitive out.

    A `self_report` is the speaker's own: the owners leave it out of the label, and so does the human ceiling.
    """

    rater: str
    activation: float
    valence: float
    dominance: float
    self_report: bool = False


class DroppedRow(NamedTuple):
    """A row or file of the owners that is not in the corpus, and why, in the words that the counts are kept by."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row: `key` is unique in the corpus, `labels` are activation, valence and dominance in the corpus's units.

    "" is what the owners do not say. `speaker`: they do not know who speaks. `partition`: train, dev, test1, test2 or
    test3. `recording`: what it was cut from (podcast, dialogue). `session`: for leave-one-session-out. `style`:
    improvised, scripted or natural. `category`: the emotion class in the spelling of wording.py.
    """

    key: str
    path: str
    speaker: str
    labels: tuple[float, float, float]
    language: str = ""
    gender: str = ""
    partition: str = ""
    recording: str = ""
    session: str = ""
    style: str = ""
    category: str = ""
    ratings: tuple[Rating, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """A labelled data set. `marks` (MADE, PROXY, ...) go with every figure that comes from it.

    `dropped` is what the owners ship and the adapter did not take. `notes` are sentences about what the adapter had to
    decide, for `corpus describe`. `shards`: the set that has the audio, instead of the files at the utterances' paths.
    """

    name: str
    marks: tuple[str, ...]
    scale: tuple[float, float]
    utterances: tuple[Utterance, ...]
    dropped: tuple[DroppedRow, ...] = ()
    notes: tuple[str, ...] = ()
    shards: str = ""

    @cached_property
    def labels_UP(self) -> np.ndarray:
        """float64 [U, 3] in the corpus's own units, columns as PRIMITIVES."""
        return np.array([row.labels for row in self.utterances], np.float64).reshape(-1, len(PRIMITIVES))

    @cached_property
    def speakers(self) -> list[str]:
        """The speaker of each utterance, "" where it is not known."""
        return [row.speaker for row in self.utterances]

    @cached_property
    def dropped_counts(self) -> dict[str, int]:
        """How many were left out for each reason, the commonest first."""
        return dict(Counter(one.why for one in self.dropped).most_common())

    @cached_property
    def outside_U(self) -> np.ndarray:
        """bool [U]: whether a label of the utterance lies outside the stated scale. Such labels are never clipped."""
        least, greatest = self.scale
        outside_UP = (self.labels_UP < least) | (self.labels_UP > greatest)
        return np.asarray(outside_UP.any(axis=1))

    @cached_property
    def digest(self) -> str:
        """sha256 of what the rows say (not of where the audio lies, and not of the single ratings)."""
        names = [one.name for one in dataclasses.fields(Utterance) if one.name not in ("path", "ratings")]
        rows = [[getattr(row, name) for name in names] for row in self.utterances]
        return hashlib.sha256(json.dumps([self.name, self.scale, names, rows]).encode()).hexdigest()

    def to_unit(self, labels_UP: np.ndarray) -> np.ndarray:
        """Labels in the corpus's units on [-1, 1], by the stated scale and never by the data."""
        least, greatest = self.scale
        return (labels_UP - least) / (greatest - least) * 2 - 1

    def from_unit(self, labels_UP: np.ndarray) -> np.ndarray:
        """The inverse of `to_unit`."""
        least, greatest = self.scale
        return (labels_UP + 1) / 2 * (greatest - least) + least


def checked(corpus: Corpus, settings: CorpusConfig, listed: Collection[str] | None = None) -> Corpus:
    """The same corpus without rows whose audio is missing, where `corpus.on_bad=skip`.

    `listed` holds the paths of all files that are there, for an adapter that has listed them; without it local files
    are looked for, and those of an object store are found missing when they are read. Raises UserError when the corpus
    is empty, has a key twice, or audio is missing and `corpus.on_bad=stop`. What was dropped is logged by reason, and
    so are labels outside the stated scale, which are kept as they are.
    """
    if settings.shards:
        # Which of them lack an utterance is told when their index is read.
        corpus = dataclasses.replace(corpus, shards=storage.absolute(settings.shards))
    else:
        corpus = _without_missing(corpus, settings.on_bad, listed)
    if not corpus.utterances:
        raise UserError(f"corpus {corpus.name} has no utterance{_because(corpus)}: check corpus.path")
    keys = Counter(row.key for row in corpus.utterances)
    if len(keys) < len(corpus.utterances):
        raise UserError(
            f"corpus {corpus.name} has utterance {keys.most_common(1)[0][0]!r} twice: give each row an id of its own"
        )
    if corpus.dropped:
        log.warning("%s: %d utterances; left out%s", corpus.name, len(corpus.utterances), _because(corpus))
    if outside := int(corpus.outside_U.sum()):
        log.warning(
            "%s: %d of %d utterances have a label outside corpus.scale [%g, %g]; they are used as they are",
            *(corpus.name, outside, len(corpus.utterances), *corpus.scale),
        )
    return corpus


def without(corpus: Corpus, bad: Sequence[DroppedRow]) -> Corpus:
    """The corpus less the utterances that `bad` names, which join `dropped`, a log line each."""
    for one in bad:
        log.warning("%s: %s is left out: %s", corpus.name, one.key, one.why)
    gone = {one.key for one in bad}
    kept = tuple(row for row in corpus.utterances if row.key not in gone)
    return dataclasses.replace(corpus, utterances=kept, dropped=(*corpus.dropped, *bad))


def _without_missing(corpus: Corpus, on_bad: str, listed: Collection[str] | None) -> Corpus:
    missing = [row for row in corpus.utterances if _is_missing(row.path, listed)]
    if not missing:
        return corpus
    if on_bad == "skip":
        return without(corpus, [DroppedRow(row.key, NO_AUDIO) for row in missing])
    raise UserError(
        f"corpus {corpus.name}: {len(missing)} of {len(corpus.utterances)} audio files are not where the labels say, "
        f"the first {missing[0].path}: put them there, or pass corpus.on_bad=skip to go on without them"
    )


def _is_missing(url: str, listed: Collection[str] | None) -> bool:
    if listed is not None:
        return url not in listed
    # Asking an object store for each file would take longer than reading it.
    local = storage.local_path(url)
    return local is not None and not local.is_file()


def _because(corpus: Corpus) -> str:
    counts = ", ".join(f"{count} {why}" for why, count in corpus.dropped_counts.items())
    return f" ({counts})" if counts else ""


def merged_ratings(ratings: Iterable[Rating]) -> tuple[Rating, ...]:
    """One rating a rater, in the order of first appearance; of a rater who is there twice the mean.

    Some releases hold a rater's line more than once.
    """
    by_rater: dict[tuple[str, bool], list[Rating]] = {}
    for one in ratings:
        by_rater.setdefault((one.rater, one.self_report), []).append(one)
    return tuple(same[0] if len(same) == 1 else _mean_rating(same) for same in by_rater.values())


def _mean_rating(same: Sequence[Rating]) -> Rating:
    def mean(values: Iterable[float]) -> float:
        given = [value for value in values if not math.isnan(value)]
        return sum(given) / len(given) if given else math.nan

    return same[0]._replace(
        activation=mean(one.activation for one in same),
        valence=mean(one.valence for one in same),
        dominance=mean(one.dominance for one in same),
    )


def require_path(settings: CorpusConfig) -> str:
    """`corpus.path`, absolute. Raises UserError when it is not given or there is nothing."""
    if not settings.path:
        raise UserError("corpus.path is not set: pass corpus.path=FOLDER, the folder of a labelled corpus")
    if not storage.exists(settings.path):
        raise UserError(f"no corpus at corpus.path={settings.path}: pass corpus.path=FOLDER with the one you have")
    return storage.absolute(settings.path)


def read_text(url: str) -> str:
    """A label file as text, with its line ends as they are; bytes that are not UTF-8 become U+FFFD.

    Raters wrote comments in whatever encoding they had, and no field that is used holds more than ASCII.
    """
    return storage.read(url).decode("utf-8-sig", errors="replace")


def folder_of(path: str) -> str:
    """The folder that `path` stands in, for local paths and URLs alike."""
    return path.rstrip("/").rpartition("/")[0] or "/"


def stem(path: str) -> str:
    """The file name of a path or URL without folder and suffix."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name
