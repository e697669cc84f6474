"""Labelled corpora: one adapter a file, each turning what its owners ship into one Corpus."""

from __future__ import annotations

from cpcscale.emotion.corpora import emodb, table
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, require_path


def open_corpus(settings: CorpusConfig) -> Corpus:
    """The corpus that `settings` names, checked. Raises UserError for whatever its adapter refuses."""
    match settings.kind:
        case "emodb":
            return emodb.read(settings)
        case "csv":
            return table.read(settings)
        case _:
            return emodb.read(settings) if emodb.recognises(require_path(settings)) else table.read(settings)
