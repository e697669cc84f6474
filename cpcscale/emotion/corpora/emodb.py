"""EmoDB (Burkhardt et al., Interspeech 2005): 10 actors, 7 acted emotions, told by file names such as 03a01Fa.wav.

It has no ratings of activation, valence or dominance. The labels here are a stand-in, one point an emotion: those of
Russell & Mehrabian (1977), mapped linearly from [-1, 1] to [1, 5]. So the corpus is named `emodb-proxy` and carries the
mark PROXY: seven label points say little, on valence least, where a detector of happiness alone gets a CCC of .91.
"""

from __future__ import annotations

import re

from cpcscale import audio, storage
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance, checked, require_path, stem
from cpcscale.emotion.corpora.table import MANIFEST, read_rows
from cpcscale.errors import UserError

NAME = "emodb-proxy"
SCALE = (1.0, 5.0)
# The letter of the German emotion word in a file name: activation, valence, dominance.
LABELS = {
    "W": (4.18, 1.98, 3.50),  # Wut, anger
    "L": (1.76, 1.70, 2.34),  # Langeweile, boredom
    "E": (3.70, 1.80, 3.22),  # Ekel, disgust
    "A": (4.20, 1.72, 2.14),  # Angst, fear
    "F": (4.02, 4.62, 3.92),  # Freude, happiness
    "T": (2.46, 1.74, 2.34),  # Trauer, sadness
    "N": (3.00, 3.00, 3.00),  # neutral
}
_FEMALE = frozenset({"08", "09", "13", "14", "16"})
_NAME = re.compile(r"(?P<speaker>\d\d)[ab]\d\d(?P<emotion>[WLEAFTN])[a-z]?")


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`, as its owners ship it (`wav/`) or as any tree that keeps their file names.

    A `manifest.csv` in the folder, where there is one, says which files belong to it (column `path`). Raises UserError
    when no file is named as EmoDB names them, or for what `checked` refuses.
    """
    folder = require_path(settings)
    paths = _paths(folder)
    if not paths:
        raise UserError(f"{folder} holds no audio named as EmoDB's is (03a01Fa.wav): check corpus.path")
    return checked(Corpus(NAME, ("PROXY",), SCALE, tuple(_utterance(folder, path) for path in paths)))


def recognises(path: str) -> bool:
    """Whether `path` is a folder in which every audio file, and at least one, is named as EmoDB names them."""
    if path.endswith(".csv"):
        return False
    names = [name for name in storage.list_files(path) if name.endswith(audio.SUFFIXES)]
    return bool(names) and all(_NAME.fullmatch(stem(name)) for name in names)


def _paths(folder: str) -> list[str]:
    files = storage.list_files(folder)
    listed = (
        [row["path"] for _, row in read_rows(storage.join(folder, MANIFEST), ("path",))[1]]
        if MANIFEST in files
        else files
    )
    return sorted(name for name in listed if name.endswith(audio.SUFFIXES) and _NAME.fullmatch(stem(name)))


def _utterance(folder: str, path: str) -> Utterance:
    found = _NAME.fullmatch(stem(path))
    assert found is not None, path
    speaker = found["speaker"]
    return Utterance(
        key=stem(path),
        path=storage.join(folder, path),
        speaker=speaker,
        labels=LABELS[found["emotion"]],
        language="de",
        gender="female" if speaker in _FEMALE else "male",
    )
