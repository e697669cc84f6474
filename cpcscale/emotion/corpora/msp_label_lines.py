"""Parses the label lines that MSP-Podcast, MSP-Improv and WHiSER (Multimodal Signal Processing laboratory) share.

    MSP-PODCAST_0001_0008.wav; N; A:2.200000; V:4.000000; D:2.600000;
    WORKER0000001; Neutral; Neutral,Confused; A:1.000000; V:4.000000; D:2.000000;

First a line with the means of a file, then a line for each worker (rater). MSP-Improv has N (naturalness) after D.
Values may be NaN.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from cpcscale import tables
from cpcscale.emotion.corpora.corpus import Rating

# The values are at the end of the line: before them, workers may have typed any words and semicolons.
_VALUES = re.compile(r"\bA:\s*(\S+?)\s*;\s*V:\s*(\S+?)\s*;\s*D:\s*(\S+?)\s*(?:;|$)")
_FILE = re.compile(r"(\S+)\.(?:wav|avi|mp4|flac)\s*;\s*(\w)\s*;", re.IGNORECASE)


@dataclass
class RatedFile:
    """A file's class letter, its mean activation, valence and dominance, and its workers' lines."""

    letter: str
    labels: tuple[float, float, float]
    ratings: list[Rating] = field(default_factory=list)


def rated_files(text: str) -> tuple[dict[str, RatedFile], list[str]]:
    """(files of a labels.txt or Evaluation.txt by name without suffix, names that occur again)."""
    files: dict[str, RatedFile] = {}
    again = []
    current: RatedFile | None = None
    for line in text.splitlines():
        if found := _FILE.match(line):
            values = _values(line)
            current = RatedFile(found[2].upper(), values)
            if found[1] in files:
                again.append(found[1])
            else:
                files[found[1]] = current
        elif current is not None and (one := rating(line)):
            current.ratings.append(one)
    return files, again


def rating(line: str) -> Rating | None:
    """The rating in a worker's line, or None for another line."""
    rater, semicolon, rest = line.partition(";")
    if not semicolon or not rater.strip() or not _VALUES.search(rest):
        return None
    return Rating(rater.strip(), *_values(rest))


def number(text: object) -> float:
    """The value as a float; NaN if missing, empty or not a finite number."""
    try:
        return tables.number(str(text))
    except ValueError:
        return math.nan


def _values(line: str) -> tuple[float, float, float]:
    found = _VALUES.findall(line)
    if not found:
        return math.nan, math.nan, math.nan
    activation, valence, dominance = (number(text) for text in found[-1])
    return activation, valence, dominance
