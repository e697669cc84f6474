"""One spelling for what the owners of corpora spell in many ways: emotion classes, partitions, genders, speakers."""

from __future__ import annotations

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
# Raters whose majority fell on no class still gave the utterance its place in the three dimensions.
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
# The letters that the Multimodal Signal Processing laboratory (MSP-Podcast, MSP-Improv) has for its classes.
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
_GENDERS = {"m": "male", "f": "female", "male": "male", "female": "female", "unknown": "", "nan": "", "na": ""}
_NOBODY = frozenset({"", "unknown", "nan"})


def category(text: str) -> str:
    """The emotion class in one spelling (angry, ang -> anger); a word that is not known stays, in small letters."""
    word = text.strip().lower()
    return _CATEGORIES.get(word, word)


def partition(text: str) -> str | None:
    """train, dev, test1, test2 or test3 for any of the owners' names; "" for none given (NA); None for another word."""
    word = text.strip().lower().replace(" ", "").replace("_", "")
    return "" if word in ("", "na", "nan", "none") else _PARTITIONS.get(word)


def gender(text: str) -> str:
    """female or male; "" for Unknown; another word stays, in small letters."""
    word = text.strip().lower()
    return _GENDERS.get(word, word)


def speaker(text: str) -> str:
    """The speaker's name, "" for nobody: `Unknown` is no speaker."""
    name = text.strip()
    return "" if name.lower() in _NOBODY else name
