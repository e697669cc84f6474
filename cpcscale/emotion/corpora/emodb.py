"""EmoDB (Burkhardt et al., Interspeech 2005): 10 German actors, 535 utterances with names such as 03a01Fa.wav.

Seven acted emotions without ratings: labels are stand-ins (see acted_categories.py) on 1 to 5, and the corpus is named
`emodb-proxy`. There are no official partitions, and all speech is scripted. Only second copies of a file are dropped.
"""

from __future__ import annotations

import re

from cpcscale import storage
from cpcscale.emotion.corpora import acted_categories
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance, require_path
from cpcscale.emotion.corpora.csv_table import MANIFEST, path_column
from cpcscale.tables import Table

# The letter of the German emotion word in a file name.
_CATEGORIES = {
    "W": "anger",  # Wut
    "L": "boredom",  # Langeweile
    "E": "disgust",  # Ekel
    "A": "fear",  # Angst
    "F": "happiness",  # Freude
    "T": "sadness",  # Trauer
    "N": "neutral",
}
_FEMALE = frozenset({"08", "09", "13", "14", "16"})
_NAME = re.compile(r"(?P<speaker>\d\d)[ab]\d\d(?P<emotion>[WLEAFTN])[a-z]?")
FORM = acted_categories.NameForm("EmoDB", _NAME, "03a01Fa.wav")


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`, as its owners ship it (`wav/`) or as any tree that keeps the file names.

    If the folder has a `manifest.csv`, its column `path` lists the files of the corpus. Raises UserError
    if no file is named as in EmoDB, or for what `checked` refuses.
    """
    folder = require_path(settings)
    files = storage.list_files(folder)
    listed = files
    if MANIFEST in files:
        table = Table(storage.join(folder, MANIFEST))
        table.require(column := path_column(table))
        listed = [row[column] for row in table.rows()]
    return acted_categories.read_acted(FORM, settings, folder, listed, files, _utterance)


def _utterance(key: str, path: str) -> Utterance | str:
    found = _NAME.fullmatch(key)
    assert found is not None, path
    category = _CATEGORIES[found["emotion"]]
    labels = acted_categories.stand_in_labels(category)
    assert labels is not None, category
    return Utterance(
        key=key,
        path=path,
        speaker=found["speaker"],
        labels=labels,
        language="de",
        gender="female" if found["speaker"] in _FEMALE else "male",
        style="scripted",
        category=category,
    )
