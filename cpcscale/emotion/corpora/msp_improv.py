"""MSP-Improv (Busso et al., IEEE Trans. Affective Computing 2017): 6 sessions of 2 actors, 8,438 turns.

Labels are the means in Evaluation.txt (Evalution.txt in the release), on 1 to 5. Its activation A is inverted (1 is the
most active, 5 the calmest), so 6 - A is used, for the means and for every rater. The file itself decides: if turns
rated angry have a higher mean A than neutral ones, A is not inverted and is used as it is. A note of the corpus says
which. Naturalness (N) is not used.

The table lists videos, UTD-IMPROV-S01A-F01-S-FM01.avi; the audio is MSP-IMPROV-S01A-F01-S-FM01.wav. The fields are
sentence and target emotion, actor and session, scenario (S and T improvised, R read, P the actors between the takes),
and turn. The speaker is the actor field, as in all published readers; protocol=loso does not depend on that. The owners
define no partitions.

Dropped: turns without one of the three means (NaN; dominance is missing in an early part), a second label line of a
turn, a name that cannot be parsed, and audio without a label line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from cpcscale import storage
from cpcscale.emotion.corpora import acted_categories, copies, vocabulary
from cpcscale.emotion.corpora.corpus import (
    Corpus,
    CorpusConfig,
    DroppedRow,
    Utterance,
    checked,
    merged_ratings,
    read_text,
    require_path,
    stem,
)
from cpcscale.emotion.corpora.msp_label_lines import RatedFile, rated_files
from cpcscale.errors import UserError

SCALE = (1.0, 5.0)
_TABLES = ("evaluation.txt", "evalution.txt")
_NAME = re.compile(
    r"(?:UTD|MSP)-IMPROV-(?P<turn>(?P<scenario>S\d\d[AHSN])-(?P<actor>(?P<gender>[FM])(?P<session>\d\d))"
    r"-(?P<style>[PRST])-\w+)"
)
_STYLES = {"R": "scripted", "S": "improvised", "T": "improvised", "P": "natural"}
# With fewer turns of a class the difference of two means could be chance.
_ENOUGH = 10


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`: Evaluation.txt, and the audio anywhere below, by its name.

    Raises UserError if there is no such table or no turn in it, or for what `checked` refuses.
    """
    folder = require_path(settings)
    files = storage.list_files(folder)
    tables = _tables(files)
    if not tables:
        raise UserError(f"{folder} holds no Evaluation.txt (or Evalution.txt) of MSP-Improv: check corpus.path")
    rated, again = rated_files(read_text(storage.join(folder, tables[0])))
    falls, note = _direction(rated)
    named = [name for name in acted_categories.audio_files(files) if _NAME.fullmatch(stem(name))]
    # The turn without UTD- or MSP-, as the table and the audio have it.
    turns_of = copies.by_name(named, lambda name: stem(name).partition("-IMPROV-")[2])
    audio = {turn: same[0] for turn, same in turns_of.items()}
    second, notes = copies.leave_out(folder, [tables, *turns_of.values()])
    dropped = [*second] + [DroppedRow(name, "a second label line of the turn") for name in again]
    rows = []
    turns = set()
    for name, one in rated.items():
        found = _NAME.fullmatch(name)
        if found is None:
            dropped.append(DroppedRow(name, "a name that is not understood"))
            continue
        turns.add(found["turn"])
        if any(math.isnan(value) for value in one.labels):
            dropped.append(DroppedRow(name, "a mean that is not a number"))
            continue
        rows.append(_utterance(found, one, falls, storage.join(folder, _audio(found, audio))))
    dropped += [DroppedRow(name, "audio without a label line") for turn, name in audio.items() if turn not in turns]
    corpus = Corpus("msp-improv", (), SCALE, tuple(rows), tuple(dropped), (note, *notes))
    return checked(corpus, settings, {storage.join(folder, name) for name in files})


def recognises(files: Sequence[str]) -> bool:
    """Whether there are such a table and audio named as in MSP-Improv."""
    named = any(_NAME.fullmatch(stem(name)) for name in acted_categories.audio_files(files))
    return named and bool(_tables(files))


def _tables(files: Sequence[str]) -> list[str]:
    tables = [name for name in files if name.rpartition("/")[2].lower() in _TABLES]
    return sorted(tables, key=lambda name: (name.count("/"), name))


def _audio(found: re.Match[str], audio: Mapping[str, str]) -> str:
    # The path in the release, for the message about a missing file.
    place = f"session{int(found['session'])}/{found['scenario']}/{found['style']}/MSP-IMPROV-{found['turn']}.wav"
    return audio.get(found["turn"], place)


def _direction(rated: Mapping[str, RatedFile]) -> tuple[bool, str]:
    """(whether A falls from active to calm, the note that says so)."""
    by_class: dict[str, list[float]] = {"A": [], "N": []}
    for one in rated.values():
        if one.letter in by_class and not math.isnan(one.labels[0]):
            by_class[one.letter].append(one.labels[0])
    angry, neutral = by_class["A"], by_class["N"]
    if min(len(angry), len(neutral)) < _ENOUGH:
        return True, "activation is turned round (6 - A), as the release has it: too few turns to see it in the table"
    mean_angry, mean_neutral = sum(angry) / len(angry), sum(neutral) / len(neutral)
    seen = f"mean A is {mean_angry:.2f} for anger and {mean_neutral:.2f} for neutral"
    if mean_angry > mean_neutral:
        return False, f"activation is taken as it stands: {seen}, so 5 is the most active"
    return True, f"activation is turned round (6 - A): {seen}, so 1 is the most active"


def _utterance(found: re.Match[str], rated: RatedFile, falls: bool, path: str) -> Utterance:
    session = f"session{int(found['session'])}"
    activation, valence, dominance = rated.labels
    ratings = merged_ratings(rated.ratings)
    if falls:
        activation = sum(SCALE) - activation
        ratings = tuple(one._replace(activation=sum(SCALE) - one.activation) for one in ratings)
    return Utterance(
        key=f"MSP-IMPROV-{found['turn']}",
        path=path,
        speaker=found["actor"],
        labels=(activation, valence, dominance),
        language="en",
        gender="female" if found["gender"] == "F" else "male",
        recording=f"{session}-{found['scenario']}",
        session=session,
        style=_STYLES[found["style"]],
        category=vocabulary.MSP_CATEGORIES.get(rated.letter, rated.letter.lower()),
        ratings=ratings,
    )
