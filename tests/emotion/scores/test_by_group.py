import json

import numpy as np
import pytest
from made_corpora import put_iemocap

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.scores.by_group import by_trait, traits_of
from cpcscale.emotion.scores.ccc_intervals import ccc_gap, interval, scores

ROWS, SPEAKERS = 96, 16
RNG = np.random.default_rng(0)
TRUTH_UP = RNG.uniform(1, 5, (ROWS, 3))
GUESS_SUP = TRUTH_UP + RNG.normal(0, 1, (2, ROWS, 3))
VOICES = [f"voice{number % SPEAKERS:02}" for number in range(ROWS)]
# Seven women, seven men, and two of whom nothing is said.
GENDER = ["" if voice >= "voice14" else ("female", "male")[int(voice[-2:]) % 2] for voice in VOICES]


def found(gender: list[str], rows: int = ROWS) -> dict:
    return by_trait(TRUTH_UP[:rows], GUESS_SUP[:, :rows], VOICES[:rows], {"gender": gender[:rows]})["gender"]


def test_a_group_is_scored_by_its_own_rows_and_who_is_in_none_is_counted():
    parts = found(GENDER)
    assert parts["missing"] == GENDER.count("") == 12
    assert list(parts["groups"]) == ["female", "male"]
    rows = [row for row, gender in enumerate(GENDER) if gender == "male"]
    male = parts["groups"]["male"]
    assert (male["utterances"], male["speakers"]) == (42, 7)
    assert male["ccc"] == scores(TRUTH_UP[rows], GUESS_SUP[:, rows])
    assert male["interval"] == interval(TRUTH_UP[rows], GUESS_SUP[:, rows], [VOICES[row] for row in rows])


def test_the_gap_is_that_of_the_score_with_its_interval():
    (made,) = found(GENDER)["gaps"]
    expected = ccc_gap(TRUTH_UP, GUESS_SUP, VOICES, GENDER, first="female", second="male")
    assert (made["first"], made["second"], made["speakers"]) == ("female", "male", [7, 7])
    assert made["difference"] == expected.difference and made["interval"] == expected.interval is not None
    assert made["difference"]["mean"] == pytest.approx(
        found(GENDER)["groups"]["female"]["ccc"]["mean"] - found(GENDER)["groups"]["male"]["ccc"]["mean"]
    )


def test_a_group_of_one_speaker_has_no_interval_nor_has_the_gap():
    alone = ["female" if voice == "voice00" else "male" for voice in VOICES]
    parts = found(alone)
    assert parts["groups"]["female"]["speakers"] == 1 and parts["groups"]["female"]["interval"] is None
    assert parts["groups"]["male"]["interval"] is not None
    assert parts["gaps"][0]["interval"] is None


def test_three_groups_have_three_gaps_and_one_has_none():
    third = [("natural", "improvised", "scripted")[row % 3] for row in range(ROWS)]
    pairs = [(one["first"], one["second"]) for one in found(third)["gaps"]]
    assert pairs == [("improvised", "natural"), ("improvised", "scripted"), ("natural", "scripted")]
    assert found(["male"] * ROWS)["gaps"] == []
    assert found([""] * ROWS) == {"missing": ROWS, "groups": {}, "gaps": []}


def test_iemocap_stands_by_gender_and_with_its_improvised_and_scripted_turns_apart(tmp_path):
    corpus = open_corpus(CorpusConfig(path=str(put_iemocap(tmp_path / "iemocap", sessions=5, turns=2))))
    traits = traits_of(corpus.utterances)
    guess_UP = corpus.labels_UP + np.random.default_rng(1).normal(0, 1, corpus.labels_UP.shape)
    parts = by_trait(corpus.labels_UP, guess_UP, corpus.speakers, traits)
    assert {trait: sorted(each["groups"]) for trait, each in parts.items()} == {
        "gender": ["female", "male"],
        "style": ["improvised", "scripted"],
    }
    assert parts["style"]["groups"]["scripted"]["speakers"] == 10
    assert parts["style"]["gaps"][0]["interval"] is not None
    assert json.loads(json.dumps(parts)) == parts
