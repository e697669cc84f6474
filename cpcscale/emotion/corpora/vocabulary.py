"""One spelling for emotion classes, partitions and genders, which corpora spell in many ways."""

from __future__ import annotations

from cpcscale.tables import is_unknown

PARTITIONS = ("train", "dev", "test1", "test2", "test3")

_PARTITIONS = {
    "train": "train",
    "training": "train",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "development": "dev",
    "dev": "dev",
    "test": "test1",
    "test1": "test1",
    "test2": "test2",
    "test3": "test3",
}
# No class has a majority of the raters; the utterance still has ratings of its three dimensions.
NO_AGREEMENT = "no-agreement"
_CATEGORIES = {
    "angry": "anger",
    "ang": "anger",
    "happy": "happiness",
    "hap": "happiness",
    "joy": "happiness",
    "sad": "sadness",
    "neu": "neutral",
    "exc": "excitement",
    "excited": "excitement",
    "fru": "frustration",
    "frustrated": "frustration",
    "fea": "fear",
    "fearful": "fear",
    "sur": "surprise",
    "surprised": "surprise",
    "dis": "disgust",
    "disgusted": "disgust",
    "bored": "boredom",
    "oth": "other",
    "xxx": NO_AGREEMENT,
}
# The class letters in MSP-Podcast and MSP-Improv.
MSP_CATEGORIES = {
    "A": "anger",
    "S": "sadness",
    "H": "happiness",
    "U": "surprise",
    "F": "fear",
    "D": "disgust",
    "C": "contempt",
    "N": "neutral",
    "O": "other",
    "X": NO_AGREEMENT,
}
_GENDERS = {"m": "male", "f": "female"}


def category(text: str) -> str:
    """The emotion class in one spelling (angry, ang -> anger); an unknown word stays, in lower case."""
    word = text.strip().lower()
    return _CATEGORIES.get(word, word)


def partition(text: str) -> str | None:
    """train, dev, test1, test2 or test3 for an owner's name of it; "" if not known; None for another word."""
    word = text.strip().lower().replace(" ", "").replace("_", "")
    return "" if is_unknown(text) else _PARTITIONS.get(word)


def gender(text: str) -> str:
    """female or male; "" if not known; another word stays, in lower case."""
    word = text.strip().lower()
    return "" if is_unknown(word) else _GENDERS.get(word, word)
