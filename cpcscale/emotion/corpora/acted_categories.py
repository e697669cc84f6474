"""Corpora of acted emotions without ratings: labels are stand-ins, one fixed point for each emotion category.

EmoDB, RAVDESS and CREMA-D have no ratings of activation, valence or dominance; the file name says which emotion the
actor was to portray. Its labels are those of the emotion word in Russell & Mehrabian (1977, J. Research in Personality
11), as quoted in several public code bases; neutral is the middle by convention. The name of such a corpus ends in
`-proxy` and its results are marked PROXY: a few label points show little, least on valence, where a detector of
happiness alone gets a CCC of .91 on EmoDB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from cpcscale import audio, storage
from cpcscale.emotion.corpora import copies
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, DroppedRow, Utterance, checked, stem

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


def read_acted(
    name: str,
    settings: CorpusConfig,
    folder: str,
    paths: Iterable[str],
    files: Iterable[str],
    parse: Callable[[str, str], Utterance | str],
) -> Corpus:
    """The corpus `name` from the audio `paths` below `folder`; `files` are all files there.

    `parse(key, path)` returns the utterance that a file name stands for, or the reason to drop it. A second copy of a
    file is dropped: public copies of RAVDESS have every file twice, CREMA-D has each as WAV and as MP3. Raises
    UserError for two files of one name that are no copies, and for what `checked` refuses.
    """
    utterances: list[Utterance] = []
    dropped: list[DroppedRow] = []
    groups = []
    for key, same in sorted(copies.by_name(paths, stem).items()):
        one = parse(key, storage.join(folder, same[0]))
        if isinstance(one, str):
            dropped += [DroppedRow(path, one) for path in same]
        else:
            utterances.append(one)
            groups.append(same)
    second, notes = copies.leave_out(folder, groups)
    listed = {storage.join(folder, path) for path in files}
    corpus = Corpus(f"{name}-proxy", ("PROXY",), SCALE, tuple(utterances), (*dropped, *second), notes)
    return checked(corpus, settings, listed)


def audio_files(files: Iterable[str]) -> list[str]:
    """The names with the suffix of an audio file."""
    return [name for name in files if name.lower().endswith(audio.SUFFIXES)]


def all_match(files: Iterable[str], form: re.Pattern[str]) -> bool:
    """Whether there are audio files, and the stems of all match this form."""
    names = audio_files(files)
    return bool(names) and all(form.fullmatch(stem(name)) for name in names)
