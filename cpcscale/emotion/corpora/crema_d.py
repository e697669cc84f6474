"""CREMA-D (Cao et al., IEEE Trans. Affective Computing 2014): 91 actors, names such as 1001_DFA_ANG_XX.wav.

The fields are actor, sentence, emotion and intensity. The category is the emotion that the actor was to portray, not
the one that the crowd perceived. There are no ratings of activation, valence or dominance: labels are stand-ins (see
acted_categories.py) on 1 to 5, and the corpus is named `crema-d-proxy`. There are no official partitions, and all
speech is scripted. The gender comes from VideoDemographics.csv, if that file is there.

Dropped: second copies of a file (the owners ship each as WAV and as MP3; the WAV is used).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from cpcscale import storage
from cpcscale.emotion.corpora import acted_categories, copies, vocabulary
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance, require_path
from cpcscale.tables import Table

_NAME = re.compile(r"(?P<actor>1\d{3})_[A-Z]{3}_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?:LO|MD|HI|XX|X)")
FORM = acted_categories.NameForm("CREMA-D", _NAME, "1001_DFA_ANG_XX.wav")
_ACTORS = "VideoDemographics.csv"


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`: `AudioWAV/`, or any tree that keeps the file names.

    Raises UserError if no file is named as in CREMA-D, or for what `checked` refuses.
    """
    folder = require_path(settings)
    files = storage.list_files(folder)
    parse = functools.partial(_utterance, genders=_genders(folder, files))
    return acted_categories.read_acted(FORM, settings, folder, files, files, parse)


def _genders(folder: str, files: Sequence[str]) -> dict[str, str]:
    tables = [name for name in files if name.rpartition("/")[2] == _ACTORS]
    if not tables:
        return {}
    copies.leave_out(folder, [tables])
    table = Table(storage.join(folder, tables[0]))
    table.require("ActorID", "Sex")
    return {row["ActorID"]: vocabulary.gender(row["Sex"]) for row in table.rows()}


def _utterance(key: str, path: str, genders: dict[str, str]) -> Utterance | str:
    found = _NAME.fullmatch(key)
    assert found is not None, path
    category = vocabulary.category(found["emotion"])
    labels = acted_categories.stand_in_labels(category)
    assert labels is not None, category
    return Utterance(
        key=key,
        path=path,
        speaker=found["actor"],
        labels=labels,
        language="en",
        gender=genders.get(found["actor"], ""),
        style="scripted",
        category=category,
    )
