"""What every corpus is once its adapter has read it: a name, its marks, a label scale and one row an utterance."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.objective.ccc import PRIMITIVES

log = logging.getLogger(__name__)

KINDS = ("auto", "csv", "emodb")


@dataclass(kw_only=True)
class CorpusConfig:
    """Which labelled data; `open_corpus` reads it."""

    kind: str = "auto"  # csv, emodb, or auto: emodb when its folder is told by its file names, else csv
    path: str = ""  # folder of the corpus, or the CSV file itself; local or s3://
    name: str = ""  # csv: what tables call it; empty: the name of its folder
    scale: list[float] = field(default_factory=lambda: [1.0, 5.0])  # csv: the least and the greatest label possible
    max_s: float = 10.0  # seconds of each utterance that are used, from its start

    def __post_init__(self) -> None:
        config.choose("corpus.kind", self.kind, KINDS)
        config.at_least(0.1, **{"corpus.max_s": self.max_s})
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise UserError(f"corpus.scale={self.scale} is not [least, greatest], for example [1, 5]")


@dataclass(frozen=True)
class Utterance:
    """One row: `key` is unique in the corpus, `labels` are activation, valence and dominance in the corpus's units."""

    key: str
    path: str
    speaker: str
    labels: tuple[float, float, float]
    language: str = ""
    gender: str = ""


@dataclass(frozen=True)
class Corpus:
    """A labelled data set. `marks` (MADE, PROXY, ...) go with every figure that comes from it."""

    name: str
    marks: tuple[str, ...]
    scale: tuple[float, float]
    utterances: tuple[Utterance, ...]

    @cached_property
    def labels_UP(self) -> np.ndarray:
        """float64 [U, 3] in the corpus's own units, columns as PRIMITIVES."""
        return np.array([row.labels for row in self.utterances], np.float64).reshape(-1, len(PRIMITIVES))

    @cached_property
    def speakers(self) -> list[str]:
        """The speaker of each utterance."""
        return [row.speaker for row in self.utterances]

    @cached_property
    def digest(self) -> str:
        """sha256 of what the rows say (not of where the audio lies)."""
        rows = [(row.key, row.speaker, row.labels) for row in self.utterances]
        return hashlib.sha256(json.dumps([self.name, self.scale, rows]).encode()).hexdigest()

    def to_unit(self, labels_UP: np.ndarray) -> np.ndarray:
        """Labels in the corpus's units on [-1, 1], by the stated scale and never by the data."""
        least, greatest = self.scale
        return (labels_UP - least) / (greatest - least) * 2 - 1

    def from_unit(self, labels_UP: np.ndarray) -> np.ndarray:
        """The inverse of `to_unit`."""
        least, greatest = self.scale
        return (labels_UP + 1) / 2 * (greatest - least) + least


def checked(corpus: Corpus) -> Corpus:
    """The same corpus. Raises UserError when it is empty, has a key twice or names local audio that is not there.

    Labels outside the stated scale are counted in a log line and kept as they are.
    """
    if not corpus.utterances:
        raise UserError(f"corpus {corpus.name} has no utterance: check corpus.path")
    keys: set[str] = set()
    for row in corpus.utterances:
        if row.key in keys:
            raise UserError(f"corpus {corpus.name} has utterance {row.key!r} twice: give each row an id of its own")
        keys.add(row.key)
    _refuse_missing(corpus.name, [row.path for row in corpus.utterances])
    least, greatest = corpus.scale
    outside = int(((corpus.labels_UP < least) | (corpus.labels_UP > greatest)).any(axis=1).sum())
    if outside:
        log.warning(
            "%s: %d of %d utterances have a label outside corpus.scale [%g, %g]; they are used as they are",
            *(corpus.name, outside, len(corpus.utterances), least, greatest),
        )
    return corpus


def _refuse_missing(name: str, paths: Sequence[str]) -> None:
    # Files in an object store are found missing when they are read: asking for each would take longer than reading it.
    local = [path for url in paths if (path := storage.local_path(url)) is not None]
    missing = [path for path in local if not path.is_file()]
    if missing:
        raise UserError(
            f"corpus {name}: {len(missing)} of {len(paths)} audio files are not where the table says, the first "
            f"{missing[0]}: paths are relative to the folder of the table"
        )


def require_path(settings: CorpusConfig) -> str:
    """`corpus.path`, absolute. Raises UserError when it is not given or there is nothing."""
    if not settings.path:
        raise UserError("corpus.path is not set: pass corpus.path=FOLDER, the folder of a labelled corpus")
    if not storage.exists(settings.path):
        raise UserError(f"no corpus at corpus.path={settings.path}: pass corpus.path=FOLDER with the one you have")
    return storage.absolute(settings.path)


def folder_of(path: str) -> str:
    """The folder that `path` stands in, for local paths and URLs alike."""
    return path.rstrip("/").rpartition("/")[0] or "/"


def stem(path: str) -> str:
    """The file name of a path or URL without folder and suffix."""
    return Path(path.rpartition("/")[2]).stem
