"""The card says what a recogniser may be used for."""

from __future__ import annotations

import pytest
from saved_recognisers import put_recogniser

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.serve.card import licence_marks


@pytest.mark.parametrize(
    ("licence", "marks"),
    [
        ("CC0-1.0", []),
        ("CC BY-SA 3.0", []),
        ("unknown", []),
        ("CC BY-NC-SA 4.0", ["NON-COMMERCIAL"]),
        ("for non-commercial use", ["NON-COMMERCIAL"]),
        ("research only (a release form)", ["RESEARCH-ONLY"]),
    ],
)
def test_a_licence_that_limits_use_is_a_mark(licence, marks):
    assert licence_marks({"corpus": "CC0-1.0", "features": licence}) == marks


def test_the_licence_of_a_corpus_is_its_owners_or_what_a_person_states(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "manifest.csv").write_text("path,speaker,activation,valence,dominance\na.wav,ann,4,2,3\n")
    assert open_corpus(CorpusConfig(path=str(tmp_path))).licence == "unknown"
    stated = open_corpus(CorpusConfig(path=str(tmp_path), licence="CC BY 4.0"))
    assert stated.licence == "CC BY 4.0" and stated.digest == open_corpus(CorpusConfig(path=str(tmp_path))).digest


def test_the_card_lists_them_and_what_is_held_of_the_corpus(tmp_path):
    put_recogniser(tmp_path / "one", 0.5, licences={"corpus tones": "CC BY 4.0"}, training_rows=7)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "- corpus tones: CC BY 4.0" in card and "contains 7" in card and "head=ridge keeps none" in card
