"""IEMOCAP (Busso et al., Language Resources and Evaluation 2008): 5 sessions of 2 actors, 151 dialogues, 10,039 turns.

Labels are the means over the external raters in SessionN/dialog/EmoEvaluation/<dialogue>.txt, on 1 to 5; the brackets
there are valence, activation, dominance, in this order. The owners define no partitions: results are by
leave-one-session-out. The speaker is the session with the letter in the last field of the turn's name: Ses01F_impro01_
M000 is the man of session 1; the F after Ses01 says who wore the markers. Dialogues are improvised or scripted.

Each rater's values come from the A- lines, or from the Attribute and Self-evaluation files for raters without such
lines. Ratings by the actors themselves (A-F1, A-M1, ...) are marked as self-reports.

Every turn with a label is used, also of class xxx (no agreement), since its activation, valence and dominance are
valid. Dropped: a second label line of a turn, a label line that cannot be parsed, and audio without a label line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cpcscale import storage
from cpcscale.emotion.corpora import acted_categories, copies, vocabulary
from cpcscale.emotion.corpora.corpus import (
    Corpus,
    CorpusConfig,
    DroppedRow,
    Rating,
    Utterance,
    checked,
    merged_ratings,
    read_text,
    require_path,
    stem,
)
from cpcscale.errors import UserError

SCALE = (1.0, 5.0)
_EVALUATION = re.compile(r"(?P<root>.*/|)Session\d/dialog/EmoEvaluation/(?P<dialogue>Ses\d\d[FM]_[^/]+)\.txt")
_OF_RATER = re.compile(
    r"(.*/|)Session\d/dialog/EmoEvaluation/(Attribute|Self-evaluation)/Ses[^/]+_(?P<rater>[efm]\d+)_atr\.txt", re.I
)
_TURN = re.compile(r"(?P<dialogue>Ses(?P<session>\d\d)[FM]_(?P<script>impro|script)\w*)_(?P<gender>[FM])[^_]+")
_AUDIO = re.compile(r"(.*/|)Session\d/sentences/wav/.*")
_NUMBER = r"([-+\d.eE]+)"
_LABEL = re.compile(rf"\[.*?\]\s+(\S+)\s+(\S+)\s+\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]")
_RATER = re.compile(r"A-(?P<rater>[EFM]\d+)\s*:(?P<values>.*)")
_RATED = re.compile(r"(?P<turn>Ses\S+)\s*:(?P<values>.*)")
_VALUE = re.compile(r"\b(act|val|dom)\s+(\d+(?:\.\d+)?)")


@dataclass
class _Turn:
    category: str
    labels: tuple[float, float, float]
    ratings: list[Rating] = field(default_factory=list)


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`, the folder with Session1 to Session5 (or some of them), or one above it.

    Raises UserError if there is no such folder or no label file, or for what `checked` refuses.
    """
    folder = require_path(settings)
    files = storage.list_files(folder)
    evaluations = [found for name in files if (found := _EVALUATION.fullmatch(name))]
    if not evaluations:
        raise UserError(f"{folder} holds no SessionN/dialog/EmoEvaluation/Ses*.txt of IEMOCAP: check corpus.path")
    turns: dict[str, _Turn] = {}
    roots: dict[str, str] = {}
    dropped: list[DroppedRow] = []
    for found in evaluations:
        text = read_text(storage.join(folder, found.string))
        new, left_out = _evaluated(text, found.string, turns)
        turns |= new
        dropped += left_out
        roots |= dict.fromkeys(new, found["root"])
    for name in files:
        if (found := _OF_RATER.fullmatch(name)) is not None:
            _add_ratings(turns, found["rater"].upper(), read_text(storage.join(folder, name)))
    audio = [name for name in acted_categories.audio_files(files) if _AUDIO.fullmatch(name)]
    dropped += [DroppedRow(name, "audio without a label line") for name in audio if stem(name) not in turns]
    rows = tuple(_utterance(key, turn, storage.join(folder, roots[key]).rstrip("/")) for key, turn in turns.items())
    taken = {row.path for row in rows}
    groups = [
        sorted(same, key=lambda name: storage.join(folder, name) not in taken)
        for key, same in copies.by_name(audio, stem).items()
        if key in turns
    ]
    second, notes = copies.leave_out(folder, groups)
    corpus = Corpus("iemocap", (), SCALE, rows, (*dropped, *second), notes)
    return checked(corpus, settings, {storage.join(folder, name) for name in files})


def recognises(files: Sequence[str]) -> bool:
    """Whether there is a label file at the place where IEMOCAP has them."""
    return any(_EVALUATION.fullmatch(name) for name in files)


def _evaluated(text: str, name: str, before: dict[str, _Turn]) -> tuple[dict[str, _Turn], list[DroppedRow]]:
    """(the turns of one EmoEvaluation file with their ratings, dropped lines); turns in `before` count as second."""
    turns: dict[str, _Turn] = {}
    dropped = []
    turn: _Turn | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("["):
            turn = None
            found = _LABEL.match(line)
            if found is None or not _TURN.fullmatch(found[1]):
                dropped.append(DroppedRow(f"{name} line {number}", "a label line that is not understood"))
            elif found[1] in turns or found[1] in before:
                dropped.append(DroppedRow(found[1], "a second label line of the turn"))
            else:
                valence, activation, dominance = (float(found[place]) for place in (3, 4, 5))
                turn = turns[found[1]] = _Turn(vocabulary.category(found[2]), (activation, valence, dominance))
        elif turn is not None and (rated := _RATER.match(line)):
            turn.ratings.append(_rating(rated["rater"], rated["values"]))
    return turns, dropped


def _add_ratings(turns: dict[str, _Turn], rater: str, text: str) -> None:
    """Adds the values of an attribute file to the turns that have no line of this rater yet."""
    for found in _rated(text):
        turn = turns.get(found["turn"])
        if turn is not None and all(one.rater != rater for one in turn.ratings):
            turn.ratings.append(_rating(rater, found["values"]))


def _rated(text: str) -> Iterator[re.Match[str]]:
    return (found for line in text.splitlines() if (found := _RATED.match(line.strip())))


def _rating(rater: str, values: str) -> Rating:
    # A missing value becomes NaN; the rater's remarks in brackets after the values are ignored.
    given = {name: float(value) for name, value in _VALUE.findall(values.partition("(")[0])}
    activation, valence, dominance = (given.get(name, math.nan) for name in ("act", "val", "dom"))
    return Rating(rater, activation, valence, dominance, self_report=not rater.startswith("E"))


def _utterance(key: str, turn: _Turn, root: str) -> Utterance:
    found = _TURN.fullmatch(key)
    assert found is not None, key
    session = f"Session{int(found['session'])}"
    return Utterance(
        key=key,
        path=storage.join(root, session, "sentences", "wav", found["dialogue"], f"{key}.wav"),
        speaker=f"Ses{found['session']}{found['gender']}",
        labels=turn.labels,
        language="en",
        gender="female" if found["gender"] == "F" else "male",
        recording=found["dialogue"],
        session=session,
        style="improvised" if found["script"] == "impro" else "scripted",
        category=turn.category,
        ratings=merged_ratings(turn.ratings),
    )
