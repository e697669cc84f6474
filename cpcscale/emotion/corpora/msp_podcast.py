"""MSP-Podcast (Lotfian & Busso, IEEE Trans. Affective Computing 2019), any release: segments of podcasts, on 1 to 7.

Labels come from labels_consensus.csv (spelled labels_concensus.csv at least up to release 1.8), else from the JSON file
of that name. Partitions come from Split_Set, else from Partitions.txt: Validation and Development are dev, Test is
test1. Speaker `Unknown` is unknown, and the podcast's number in the file name is the recording. The owners hold back
the labels of Test3. Audio lies in Audios/ or Audio/. Each worker's ratings come from the first of labels_detailed.csv,
labels_detailed.json and labels.txt; if its form is unknown, the corpus has no single ratings, and a note says so.

Dropped: rows without one of the three labels (held back), a second row of a file, and audio without a row.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence

from cpcscale import config, storage
from cpcscale.emotion.corpora import acted_categories, copies, vocabulary
from cpcscale.emotion.corpora.corpus import (
    Corpus,
    CorpusConfig,
    DroppedRow,
    Rating,
    Utterance,
    checked,
    read_text,
    require_path,
    stem,
)
from cpcscale.emotion.corpora.msp_raters import UnknownFormError, ratings_of
from cpcscale.errors import UserError
from cpcscale.tables import Row, Table, TableError, identity

log = logging.getLogger(__name__)

SCALE = (1.0, 7.0)
_CONSENSUS = ("labels_consensus.csv", "labels_concensus.csv", "labels_consensus.json", "labels_concensus.json")
_DETAILED = ("labels_detailed.csv", "labels_detailed.json", "labels.txt")
_LABELS = ("EmoAct", "EmoVal", "EmoDom")
_FOLDERS = ("audios", "audio")
_RECORDING = re.compile(r"MSP-PODCAST_(\d+)_.*", re.IGNORECASE)


def read(settings: CorpusConfig) -> Corpus:
    """The corpus below `corpus.path`, the folder of a release.

    Raises UserError if there is no table or its form is unknown, for an unknown partition, and for what `checked`
    refuses.
    """
    folder = require_path(settings)
    files = storage.list_files(folder)
    tables = _ranked(files, _CONSENSUS)
    if not tables:
        raise UserError(f"{folder} holds no labels_consensus.csv (or .json) of MSP-Podcast: check corpus.path")
    rows = _rows(storage.join(folder, tables[0]))
    partitions = _partitions(folder, files) if any(not row["Split_Set"] for _, row in rows) else {}
    ratings, notes = _ratings(folder, files)
    all_audio = _audio(files)
    # A release may have its table in two forms, as CSV and as JSON, of which the first is used.
    same_form = [name for name in tables if _base(name) == _base(tables[0])]
    second, copy_notes = copies.leave_out(folder, [same_form, *all_audio.values()])
    audio = {name: same[0] for name, same in all_audio.items()}
    utterances: dict[str, Utterance] = {}
    dropped = [*second]
    for name, row in rows:
        key = stem(name)
        labels = tuple(row.number(column, unknown=math.nan) for column in _LABELS)
        if any(math.isnan(value) for value in labels):
            dropped.append(DroppedRow(name, "labels held back"))
        elif key in utterances:
            dropped.append(DroppedRow(name, "a second row of the file"))
        else:
            path = storage.join(folder, audio.get(name, f"Audios/{name}"))
            split = row["Split_Set"] or partitions.get(name, "")
            utterances[key] = _utterance(key, path, row, labels, ratings.get(name, ()), split)
    named = {name for name, _ in rows}
    dropped += [DroppedRow(path, "audio without a row") for name, path in audio.items() if name not in named]
    name = settings.name or "msp-podcast"
    corpus = Corpus(name, (), SCALE, tuple(utterances.values()), tuple(dropped), (*notes, *copy_notes))
    return checked(corpus, settings, {storage.join(folder, name) for name in files})


def recognises(files: Sequence[str]) -> bool:
    """Whether there is a consensus table, in any of its spellings."""
    return bool(_ranked(files, _CONSENSUS))


def _ranked(files: Iterable[str], names: Sequence[str]) -> list[str]:
    """The files with one of these names; earlier names first, then higher folders."""
    found = [name for name in files if _base(name) in names]
    return sorted(found, key=lambda name: (names.index(_base(name)), name.count("/"), name))


def _base(path: str) -> str:
    return path.rpartition("/")[2].lower()


def _audio(files: Iterable[str]) -> dict[str, list[str]]:
    """The paths of each audio file name, those in Audios/ or Audio/ first."""
    named = copies.by_name(acted_categories.audio_files(files), lambda path: path.rpartition("/")[2])
    return {
        name: sorted(same, key=lambda path: not path.lower().rpartition("/")[0].endswith(_FOLDERS))
        for name, same in named.items()
    }


def _rows(file: str) -> list[tuple[str, Row]]:
    """(file name, row) of each row of the consensus table."""
    if file.lower().endswith(".csv"):
        table = Table(file)
        table.require("FileName", *_LABELS)
        return [(row["FileName"], row) for row in table.rows()]
    try:
        tree = config.read_json(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}; unpack the release again") from None
    if not isinstance(tree, dict) or not all(isinstance(row, dict) for row in tree.values()):
        raise UserError(f"{file} is not {{file: {{EmoAct: ...}}}} as MSP-Podcast has it: check corpus.path")
    return [(name, Row(f"{file}: {name}", row)) for name, row in tree.items()]


def _ratings(folder: str, files: Sequence[str]) -> tuple[dict[str, tuple[Rating, ...]], tuple[str, ...]]:
    """(ratings of each file name, notes); if they cannot be read, a note says so, since labels do not need them."""
    detailed = _ranked(files, _DETAILED)
    if not detailed:
        return {}, ()
    try:
        return ratings_of(storage.join(folder, detailed[0])), ()
    except (UnknownFormError, TableError) as error:
        log.warning("no single ratings, so no human ceiling: %s", error)
        return {}, (f"no single ratings: {error}",)


def _partitions(folder: str, files: Sequence[str]) -> dict[str, str]:
    """The partition of each file name by Partitions.txt, whose lines are `partition; file`."""
    tables = _ranked(files, ("partitions.txt",))
    copies.leave_out(folder, [tables])
    fields = [line.split(";") for name in tables[:1] for line in read_text(storage.join(folder, name)).splitlines()]
    return {pair[1].strip(): pair[0].strip() for pair in fields if len(pair) >= 2}


def _utterance(
    key: str,
    path: str,
    row: Row,
    labels: tuple[float, ...],
    ratings: tuple[Rating, ...],
    split: str,
) -> Utterance:
    partition = vocabulary.partition(split)
    if partition is None:
        raise UserError(
            f"{row.place}: {key} has Split_Set={split!r}, which is no partition of any known release: give one of "
            f"{', '.join(vocabulary.PARTITIONS)}"
        )
    activation, valence, dominance = labels
    recording = _RECORDING.fullmatch(key)
    letter = row["EmoClass"].upper()
    return Utterance(
        key=key,
        path=path,
        speaker=identity(row["SpkrID"]),
        labels=(activation, valence, dominance),
        language="en",
        gender=vocabulary.gender(row["Gender"]),
        partition=partition,
        recording=recording[1] if recording else "",
        category=vocabulary.MSP_CATEGORIES.get(letter, letter.lower()),
        ratings=ratings,
    )
