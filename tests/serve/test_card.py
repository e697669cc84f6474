"""The card says what a recogniser may be used for, and its intervals have its values."""

from __future__ import annotations

import numpy as np
import pytest
from saved_recognisers import put_recogniser
from trees import noise

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.fitted import FittedRecogniser, MeanHead
from cpcscale.emotion.held_out import HeldOut
from cpcscale.serve.card import licence_marks
from cpcscale.serve.folder import SavedRecogniser
from cpcscale.serve.recogniser import Recogniser


@pytest.mark.parametrize(
    ("licence", "marks"),
    [
        ("CC0-1.0", []),
        ("CC BY-SA 3.0", []),
        ("unknown", []),
        ("commercial use is permitted", []),
        ("for academic use only", ["RESEARCH-ONLY"]),
        ("not for commercial use", ["NON-COMMERCIAL"]),
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


def test_a_value_outside_the_scale_is_in_its_interval(tmp_path):
    draw = np.random.default_rng(0)
    errors, speakers = draw.normal(0, 0.1, (30, 3)), [f"speaker {row % 6}" for row in range(30)]
    held_out = HeldOut.of(errors, errors * 2, np.zeros(0), speakers, 0)
    fitted = FittedRecogniser("mean", None, MeanHead(np.array([1.4, 0.0, -1.4])), 10.0, (1.0, 5.0))
    # With the level of syllables, for one that stays the same is no speech.
    wave = (noise(1.0) * (1 + 0.8 * np.sin(np.arange(16_000) / 400))).astype(np.int16)
    one = Recogniser(SavedRecogniser(fitted, {}, held_out)).predict(wave, 16_000)
    assert one.activation > 5 >= one.interval("activation")[0] and one.interval("activation")[1] == one.activation
    assert one.dominance < 1 <= one.interval("dominance")[1] and one.interval("dominance")[0] == one.dominance
    low, high = one.interval("valence")
    assert 1 < low < one.valence < high < 5


def test_the_card_lists_them_and_what_is_held_of_the_corpus(tmp_path):
    put_recogniser(tmp_path / "one", 0.5, licences={"corpus tones": "CC BY 4.0"}, training_rows=7)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "- corpus tones: CC BY 4.0" in card and "contains 7" in card and "head=ridge keeps none" in card
