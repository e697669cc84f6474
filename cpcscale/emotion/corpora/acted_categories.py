"""Corpora of acted categories: every file is told by its name, and its labels are a stand-in, one point an emotion.

EmoDB, RAVDESS and CREMA-D have no ratings of activation, valence or dominance. Here the emotion that the actor was to
portray is placed where Russell & Mehrabian (1977, J. Research in Personality 11) place its word, as several public code
bases quote them; neutral is the middle by convention. Such a corpus has a name that ends in `-proxy` and carries the
mark PROXY: a handful of label points say little, on valence least, where a detector of happiness alone gets a CCC of
.91 on EmoDB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from cpcscale import audio, storage
from cpcscale.emotion.corpora.corpus import AGAIN, Corpus, CorpusConfig, DroppedRow, Utterance, checked, stem

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


def stand_in(category: str) -> tuple[float, float, float] | None:
    """Activation, valence and dominance of an emotion word on SCALE, or None for one without a point (calm)."""
    point = _POINTS.get(category)
    if point is None:
        return None
    activation, valence, dominance = (round(3 + 2 * value, 2) for value in point)
    return activation, valence, dominance


def gather(
    name: str,
    settings: CorpusConfig,
    folder: str,
    paths: Iterable[str],
    files: Iterable[str],
    told: Callable[[str, str], Utterance | str],
) -> Corpus:
    """The corpus `name` of the audio `paths` below `folder`, of which `files` are there.

    `told(key, path)` is the utterance that a file name stands for, or the words why it is none. A second copy of a name
    is left out: public copies of RAVDESS hold every file twice, CREMA-D has each as WAV and as MP3. Raises UserError
    for what `checked` refuses.
    """
    utterances: dict[str, Utterance] = {}
    dropped = []
    # Of two copies the one that lost nothing.
    for path in sorted(paths, key=lambda path: (not path.lower().endswith((".wav", ".flac")), path)):
        key = stem(path)
        one = told(key, storage.join(folder, path))
        if isinstance(one, str):
            dropped.append(DroppedRow(path, one))
        elif key in utterances:
            dropped.append(DroppedRow(path, AGAIN))
        else:
            utterances[key] = one
    rows = tuple(utterances[key] for key in sorted(utterances))
    listed = {storage.join(folder, path) for path in files}
    return checked(Corpus(f"{name}-proxy", ("PROXY",), SCALE, rows, tuple(dropped)), settings, listed)


def audio_files(files: Iterable[str]) -> list[str]:
    """Those of the names that are audio by their suffix."""
    return [name for name in files if name.lower().endswith(audio.SUFFIXES)]


def all_named(files: Iterable[str], form: re.Pattern[str]) -> bool:
    """Whether every audio file among the names, and at least one, has a stem of this form."""
    names = audio_files(files)
    return bool(names) and all(form.fullmatch(stem(name)) for name in names)
