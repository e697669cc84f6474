"""The Corpus that every adapter returns: a name, marks, a label scale and one row an utterance."""

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
from cpcscale.tables import nearest_name

log = logging.getLogger(__name__)

KINDS = ("auto", "csv", "emodb", "iemocap", "msp-podcast", "msp-improv", "ravdess", "crema-d")
NO_AUDIO = "no audio file"


@dataclass(kw_only=True)
class CorpusConfig:
    """Which labelled corpus to use; `open_corpus` reads it."""

    # csv, emodb, iemocap, ...; auto: recognised by the files in the folder, else csv
    kind: str = "auto"
    # folder of the corpus as its owners ship it, or a table of your own; local or s3://
    path: str = ""
    # the shard set that `cpcscale pack` made of the corpus, local or s3://: audio is read from there, and only the
    # labels from `path`. Empty: audio is read from the files
    shards: str = field(default="", metadata=config.PLACE)
    # csv, msp-podcast: the name in tables; empty: the name of the CSV's folder, or the kind
    name: str = field(default="", metadata=config.PLACE)
    # csv: the least and the greatest possible label
    scale: list[float] = field(default_factory=lambda: [1.0, 5.0])
    # a longer utterance is cut into overlapping windows of so many seconds
    max_s: float = 10.0
    # if an audio file is missing, empty or unreadable. stop: end with one line. skip: leave out its row, with a log
    # line
    on_bad: str = "stop"
    # what it may be used under, for the card of a recogniser; empty: what its owners say, if its kind is known
    licence: str = field(default="", metadata=config.PLACE)

    def __post_init__(self) -> None:
        config.check_choice("corpus.kind", self.kind, KINDS)
        config.check_choice("corpus.on_bad", self.on_bad, ("stop", "skip"))
        config.at_least(0.1, **{"corpus.max_s": self.max_s})
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise UserError(f"corpus.scale={self.scale} is not [least, greatest], for example [1, 5]")


class Rating(NamedTuple):
    """One rater's rating of one utterance, in the corpus's units; NaN for a primitive that was not rated.

    `self_report`: the rater is the speaker. Such ratings count neither in the owners' labels nor in `human_ceiling`.
    """

    rater: str
    activation: float
    valence: float
    dominance: float
    self_report: bool = False


class DroppedRow(NamedTuple):
    """A row or file that the adapter left out of the corpus, and why; equal reasons are counted together."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row: `key` is unique in the corpus, `labels` are activation, valence and dominance in the corpus's units.

    "" means that the owners do not say, also for an unknown speaker. `partition`: train, dev, test1, test2 or test3.
    `recording`: what it was cut from (podcast, dialogue). `session`: for leave-one-session-out. `style`: improvised,
    scripted or natural. `category`: the emotion class, as spelled in vocabulary.py. `segment`: the part of the file
    that it is, as (start, end) in seconds; the end may be infinite.
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
    segment: tuple[float, float] | None = None


@dataclass(frozen=True)
class Corpus:
    """A labelled corpus. `marks` (MADE, PROXY, ...) are shown with every result on it.

    `dropped` lists rows and files that the adapter left out. `notes` are sentences about decisions of the adapter, for
    `corpus describe`. `shards`: the shard set with the audio, if it is not read from the files at the utterances'
    paths.
    """

    name: str
    marks: tuple[str, ...]
    scale: tuple[float, float]
    utterances: tuple[Utterance, ...]
    dropped: tuple[DroppedRow, ...] = ()
    notes: tuple[str, ...] = ()
    shards: str = ""
    licence: str = "unknown"

    @cached_property
    def labels_UP(self) -> np.ndarray:
        """The labels, float64 [U, 3], in the corpus's own units; columns in the order of PRIMITIVES."""
        return np.array([row.labels for row in self.utterances], np.float64).reshape(-1, len(PRIMITIVES))

    @cached_property
    def speakers(self) -> list[str]:
        """The speaker of each utterance, "" if unknown."""
        return [row.speaker for row in self.utterances]

    @cached_property
    def dropped_counts(self) -> dict[str, int]:
        """How many rows and files were left out for each reason, the most frequent first."""
        return dict(Counter(one.why for one in self.dropped).most_common())

    @cached_property
    def outside_U(self) -> np.ndarray:
        """Whether each utterance has a label outside the stated scale, bool [U]. Such labels are never clipped."""
        least, greatest = self.scale
        outside_UP = (self.labels_UP < least) | (self.labels_UP > greatest)
        return np.asarray(outside_UP.any(axis=1))

    @cached_property
    def digest(self) -> str:
        """sha256 of the name, scale and rows, without paths and single ratings."""
        names = [one.name for one in dataclasses.fields(Utterance) if one.name not in ("path", "ratings", "segment")]
        rows = [[*(getattr(row, name) for name in names), *(row.segment or ())] for row in self.utterances]
        return hashlib.sha256(json.dumps([self.name, self.scale, names, rows]).encode()).hexdigest()

    def to_unit(self, labels_UP: np.ndarray) -> np.ndarray:
        """Maps labels from the corpus's units to [-1, 1], by the stated scale, never by the data."""
        least, greatest = self.scale
        return (labels_UP - least) / (greatest - least) * 2 - 1

    def from_unit(self, labels_UP: np.ndarray) -> np.ndarray:
        """The inverse of `to_unit`."""
        return in_units(labels_UP, self.scale)


def in_units(unit_UP: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Values on [-1, 1] on the scale (least, greatest) of a corpus."""
    least, greatest = scale
    return (unit_UP + 1) / 2 * (greatest - least) + least


def checked(corpus: Corpus, settings: CorpusConfig, listed: Collection[str] | None = None) -> Corpus:
    """Checks a corpus and returns it; with `corpus.on_bad=skip`, without the rows whose audio is missing.

    `listed` has the paths of all files, if the adapter listed them. Without it, local files are looked up, and missing
    files in an object store are found only when read. Raises UserError when the corpus is empty, has a key twice, or
    audio is missing and `corpus.on_bad=stop`. Logs what was dropped, by reason, and the number of labels outside the
    stated scale, which are kept as they are.
    """
    if settings.shards:
        # Utterances missing in the shards are found when their index is read.
        corpus = dataclasses.replace(corpus, shards=storage.absolute(settings.shards))
    else:
        corpus = _without_missing(corpus, settings, listed)
    if not corpus.utterances:
        raise UserError(f"corpus {corpus.name} has no utterance{_because(corpus)}: check corpus.path")
    keys = Counter(row.key for row in corpus.utterances)
    if len(keys) < len(corpus.utterances):
        raise UserError(
            f"corpus {corpus.name} has utterance {keys.most_common(1)[0][0]!r} twice: give each row an id of its own"
        )
    if corpus.dropped:
        log.warning("%s: %d utterances; left out%s", corpus.name, len(corpus.utterances), _because(corpus))
    if two := _like_speakers(corpus.speakers):
        log.warning(
            "%s: %r and %r count as two speakers: write one name for one person, or folds share the person",
            *(corpus.name, *two),
        )
    if outside := int(corpus.outside_U.sum()):
        log.warning(
            "%s: %d of %d utterances have a label outside corpus.scale [%g, %g]; they are used as they are",
            *(corpus.name, outside, len(corpus.utterances), *corpus.scale),
        )
    return corpus


def _like_speakers(speakers: Iterable[str]) -> tuple[str, str] | None:
    """The first two names of speakers that differ in case or zeros at the start alone, as 7 and 007; None without."""
    known: dict[str, str] = {}
    for speaker in dict.fromkeys(filter(None, speakers)):
        other = known.setdefault((speaker.lstrip("0") or "0").casefold(), speaker)
        if other != speaker:
            return other, speaker
    return None


def drop_utterances(corpus: Corpus, bad: Sequence[DroppedRow], of_first: str = "") -> Corpus:
    """The corpus without the utterances in `bad`, which are added to `dropped` and logged, a line each.

    `of_first` is what else there is to say of the first.
    """
    for one in bad:
        log.warning("%s: %s is left out: %s%s", corpus.name, one.key, one.why, of_first if one is bad[0] else "")
    gone = {one.key for one in bad}
    kept = tuple(row for row in corpus.utterances if row.key not in gone)
    return dataclasses.replace(corpus, utterances=kept, dropped=(*corpus.dropped, *bad))


def _without_missing(corpus: Corpus, settings: CorpusConfig, listed: Collection[str] | None) -> Corpus:
    missing = [row for row in corpus.utterances if _is_missing(row.path, listed)]
    if not missing:
        return corpus
    # A table in memory lies in no folder.
    nearest = _nearest(missing[0].path, settings.path, listed) if settings.path else ""
    if settings.on_bad == "skip":
        return drop_utterances(corpus, [DroppedRow(row.key, NO_AUDIO) for row in missing], nearest)
    raise UserError(
        f"corpus {corpus.name}: {len(missing)} of {len(corpus.utterances)} audio files are not where the labels say, "
        f"the first {missing[0].path}{nearest}: put them there, or pass corpus.on_bad=skip to go on without them"
    )


def _nearest(url: str, path: str, listed: Collection[str] | None) -> str:
    """What `nearest_name` says of a missing file of the corpus at `path`, if it should lie in its folder."""
    folder = storage.absolute(path)
    folder = folder_of(folder) if is_file(folder) else folder
    if not url.startswith(f"{folder}/"):
        return ""
    below = len(folder) + 1
    return nearest_name(url[below:], [name[below:] for name in listed] if listed else storage.list_files(folder))


def _is_missing(url: str, listed: Collection[str] | None) -> bool:
    if listed is not None:
        return url not in listed
    # Asking an object store for each file would take longer than reading it.
    return storage.local_path(url) is not None and not is_file(url)


def _because(corpus: Corpus) -> str:
    counts = ", ".join(f"{count} {why}" for why, count in corpus.dropped_counts.items())
    return f" ({counts})" if counts else ""


def merged_ratings(ratings: Iterable[Rating]) -> tuple[Rating, ...]:
    """One rating for each rater, in order of first appearance; the mean if a rater has several.

    Some releases have a rater's line more than once.
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
    """`corpus.path`, absolute. Raises UserError if it is not set or not there, or a file where a folder is needed."""
    if not settings.path:
        raise UserError("corpus.path is not set: pass corpus.path=FOLDER, the folder of a labelled corpus")
    path = storage.absolute(settings.path)
    if not storage.exists(path):
        raise UserError(
            f"no corpus at corpus.path={settings.path}: pass corpus.path=FOLDER, the folder of a labelled corpus, or a "
            "table that is there, such as my.csv"
        )
    if settings.kind not in ("auto", "csv") and is_file(path):
        raise UserError(
            f"corpus.kind={settings.kind} reads the folder of the corpus as its owners ship it, and corpus.path={path} "
            "is a file: pass corpus.kind=csv to read it as a table, or name the folder"
        )
    return path


def is_file(url: str) -> bool:
    """Whether there is a file, not a folder, at `url`."""
    try:
        storage.size(url)
    except storage.NotFoundError:
        return False
    return True


def read_text(url: str) -> str:
    """A label file as text, with its line ends unchanged; bytes that are not UTF-8 become U+FFFD.

    Raters' comments are in various encodings; the fields that are used are ASCII.
    """
    return storage.read(url).decode(errors="replace").lstrip("\ufeff")


def folder_of(path: str) -> str:
    """The parent folder of a local path or URL."""
    return storage.absolute(path).rpartition("/")[0] or "/"


def stem(path: str) -> str:
    """The file name of a local path or URL, without folder and suffix."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name
