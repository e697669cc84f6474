"""RAVDESS (Livingstone & Russo, PLoS ONE 2018): 24 actors, names such as 03-01-06-01-02-01-12.wav.

The seven numbers are modality, channel (01 speech, 02 song), emotion, intensity, statement, repetition and actor (odd:
male). Acted emotions without ratings: labels are stand-ins (see acted_categories.py) on 1 to 5, and the corpus is named
`ravdess-proxy`. There are no official partitions, and all speech is scripted.

Dropped: song, `calm` (which has no stand-in point; so 192 of 1,440 speech files), and second copies of a file.
"""

from __future__ import annotations

import re

from cpcscale import storage
from cpcscale.emotion.corpora import acted_categories
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance, require_path

_CATEGORIES = {
    "01": "neutral",
    "02": "calm",
    "03": "happiness",
    "04": "sadness",
    "05": "anger",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
_NAME = re.compile(r"0[1-3]-(?P<channel>0[12])-(?P<emotion>0[1-8])-0[12]-0[12]-0[12]-(?P<actor>[0-2]\d)")
FORM = acted_categories.NameForm("RAVDESS", _NAME, "03-01-06-01-02-01-12.wav")


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`: `Actor_01/` to `Actor_24/`, or any tree that keeps the file names.

    Raises UserError if no file is named as in RAVDESS, or for what `checked` refuses.
    """
    folder = require_path(settings)
    files = storage.list_files(folder)
    return acted_categories.read_acted(FORM, settings, folder, files, files, _utterance)


def _utterance(key: str, path: str) -> Utterance | str:
    found = _NAME.fullmatch(key)
    assert found is not None, path
    if found["channel"] == "02":
        return "song, not speech"
    category = _CATEGORIES[found["emotion"]]
    labels = acted_categories.stand_in_labels(category)
    if labels is None:
        return f"no stand-in label for {category}"
    return Utterance(
        key=key,
        path=path,
        speaker=found["actor"],
        labels=labels,
        language="en",
        gender="male" if int(found["actor"]) % 2 else "female",
        style="scripted",
        category=category,
    )
