"""Corpora of acted emotions without ratings: labels are stand-ins, one fixed point for each emotion category.

EmoDB, RAVDESS and CREMA-D have no ratings of activation, valence or dominance; the file name says which emotion the
actor was to portray. Its labels are those of the emotion word in Russell & Mehrabian (1977, J. Research in Personality
11), as quoted in several public code bases; neutral is the middle by convention. The name of such a corpus ends in
`-proxy` and its results are marked PROXY: a few label points show little, least on valence, where a detector of
happiness alone gets a CCC of .91 on EmoDB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cpcscale import audio, storage
from cpcscale.emotion.corpora import copies
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, DroppedRow, Utterance, checked, stem
from cpcscale.errors import UserError
from cpcscale.shards import account

SCALE = (1.0, 5.0)
# Activation, valence (pleasure) and dominance in [-1, 1].
_POINTS = {
    "anger": (0.59, -0.51, 0.25),
    "boredom": (-0.62, -0.65, -0.33),
    "disgust": (0.35, -0.60, 0.11),
    "fear": (0.60, -0.64, -0.43),
    "happiness": (0.51, 0.81, 0.46),
    "neutral": (0.0, 0.0, 0.0),
    "sadness": (-0.27, -0.63, -0.33),
    "surprise": (0.67, 0.40, -0.13),
}


def stand_in_labels(category: str) -> tuple[float, float, float] | None:
    """(activation, valence, dominance) of an emotion category on SCALE, or None if it has no point (calm)."""
    point = _POINTS.get(category)
    if point is None:
        return None
    activation, valence, dominance = (round(3 + 2 * value, 2) for value in point)
    return activation, valence, dominance


@dataclass(frozen=True)
class NameForm:
    """How the files of a corpus are named: the `pattern` of the name without suffix, and an `example`."""

    corpus: str
    pattern: re.Pattern[str]
    example: str

    def matches(self, path: str) -> bool:
        """Whether the file is named so."""
        return bool(self.pattern.fullmatch(stem(path)))

    def differs(self, path: str) -> str:
        """How a name that does not match differs from the form, in words that are equal for equal differences."""
        name, pattern = stem(path), self.pattern.pattern
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return "a name in other upper and lower case"
        found = re.search(pattern, name, re.IGNORECASE)
        return "a name with more before or behind it" if found else "a name of another form"


def read_acted(
    form: NameForm,
    settings: CorpusConfig,
    folder: str,
    listed: Iterable[str],
    files: Sequence[str],
    parse: Callable[[str, str], Utterance | str],
) -> Corpus:
    """The corpus of the audio among `listed` below `folder` whose names have this form; `files` are all files there.

    `parse(key, path)` returns the utterance that a file name stands for, or the reason to drop it. Audio with other
    names is dropped, and a note shows the first. A second copy of a file is dropped: public copies of RAVDESS have
    every file twice, CREMA-D has each as WAV and as MP3. Raises UserError where no name has the form, for two files of
    one name that are no copies, and for what `checked` refuses.
    """
    paths = audio_files(listed)
    others = [path for path in paths if not form.matches(path)]
    unlike = [f"{len(others)} audio files have other names, as {path}, {form.differs(path)}" for path in others[:1]]
    if len(others) == len(paths):
        packed = [f"unpack {name}" for name in files if name.lower().endswith((*account.ARCHIVES, ".tar"))]
        why = "; ".join(["", *unlike, *packed[:1]])
        named = f"named as {form.corpus}'s is ({form.example})"
        raise UserError(f"{folder} holds no audio {named}{why}: check corpus.path, or name the files so")
    utterances: list[Utterance] = []
    dropped = [DroppedRow(path, form.differs(path)) for path in others]
    groups = []
    for key, same in sorted(copies.by_name(filter(form.matches, paths), stem).items()):
        one = parse(key, storage.join(folder, same[0]))
        if isinstance(one, str):
            dropped += [DroppedRow(path, one) for path in same]
        else:
            utterances.append(one)
            groups.append(same)
    second, notes = copies.leave_out(folder, groups)
    notes = (*notes, *(f"{text}: {form.corpus}'s are as {form.example}" for text in unlike))
    corpus = Corpus(f"{form.corpus.lower()}-proxy", ("PROXY",), SCALE, tuple(utterances), (*dropped, *second), notes)
    return checked(corpus, settings, {storage.join(folder, path) for path in files})


def audio_files(files: Iterable[str]) -> list[str]:
    """The names with the suffix of an audio file."""
    return [name for name in files if name.lower().endswith(audio.SUFFIXES)]


def share_named(files: Iterable[str], form: NameForm) -> float:
    """The share of the audio files whose names have this form; 0 without audio."""
    names = audio_files(files)
    return sum(map(form.matches, names)) / max(1, len(names))
