"""Labelled corpora: one adapter a file, each turning what its owners ship into one Corpus."""

from __future__ import annotations

import dataclasses
import logging

from cpcscale import storage
from cpcscale.emotion.corpora import crema_d, csv_table, emodb, iemocap, msp_improv, msp_podcast, ravdess
from cpcscale.emotion.corpora.acted_categories import share_named
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, is_file, require_path
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

# What the owners of corpora give them under.
_LICENCES = {
    "emodb": "CC0-1.0",
    "crema-d": "ODbL-1.0",
    "ravdess": "CC BY-NC-SA 4.0",
    "iemocap": "research only (release form of SAIL, University of Southern California)",
    "msp-podcast": "research only (academic licence of UT Dallas)",
    "msp-improv": "research only (academic licence of UT Dallas)",
}


def open_corpus(settings: CorpusConfig) -> Corpus:
    """The corpus that `settings` names, read by its adapter. Raises UserError for whatever the adapter refuses.

    >>> import pathlib, tempfile
    >>> table = "path,speaker,activation,valence,dominance\\na.wav,ann,4,2,3\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pathlib.Path(folder, "a.wav").touch()
    ...     _ = pathlib.Path(folder, "manifest.csv").write_text(table)
    ...     print(open_corpus(CorpusConfig(path=folder)).labels_UP)
    [[4. 2. 3.]]
    """
    kind = detect_kind(settings) if settings.kind == "auto" else settings.kind
    licence = settings.licence or _LICENCES.get(kind, Corpus.licence)
    return dataclasses.replace(_read(kind, settings), licence=licence)


def _read(kind: str, settings: CorpusConfig) -> Corpus:
    match kind:
        case "iemocap":
            return iemocap.read(settings)
        case "msp-podcast":
            return msp_podcast.read(settings)
        case "msp-improv":
            return msp_improv.read(settings)
        case "emodb":
            return emodb.read(settings)
        case "ravdess":
            return ravdess.read(settings)
        case "crema-d":
            return crema_d.read(settings)
        case _:
            return csv_table.read(settings)


def detect_kind(settings: CorpusConfig) -> str:
    """The kind of the corpus at `corpus.path`, recognised by the names of its files; csv if they fit no other.

    A `manifest.csv` with ratings makes it csv, whatever the audio is called. Raises UserError if the path is missing,
    and if only some files have the names of a corpus and there is no table of ratings.
    """
    path = require_path(settings)
    if is_file(path):
        return "csv"
    files = storage.list_files(path)
    if csv_table.MANIFEST in files and csv_table.has_ratings(path, csv_table.MANIFEST):
        return "csv"
    for kind, adapter in (
        ("iemocap", iemocap),
        ("msp-podcast", msp_podcast),
        ("msp-improv", msp_improv),
    ):
        if adapter.recognises(files):
            log.info("%s is read as %s", path, kind)
            return kind
    shares = {
        kind: share_named(files, acted.FORM)
        for kind, acted in (("emodb", emodb), ("ravdess", ravdess), ("crema-d", crema_d))
    }
    kind = max(shares, key=lambda kind: shares[kind])
    if shares[kind] == 1:
        log.info("%s is read as %s", path, kind)
        return kind
    if shares[kind] and not any(csv_table.has_ratings(path, name) for name in csv_table.tables_of(files)):
        raise UserError(
            f"{path} holds no table of ratings, and {shares[kind]:.1%} of its audio files are named as those of {kind}"
            f": pass corpus.kind={kind} to use these; `cpcscale corpus describe` then counts the others"
        )
    return "csv"
