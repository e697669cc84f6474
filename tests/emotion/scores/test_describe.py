import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from made_corpora import put_emodb, put_iemocap, put_msp_podcast
from made_voices import put_corpus

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Rating, Utterance
from cpcscale.emotion.scores.ccc import ccc
from cpcscale.emotion.scores.describe import describe, durations, header_lengths, human_ceiling, label_figures


def rated(*rows: tuple[Rating, ...]) -> Corpus:
    """A corpus whose labels are the means of its external raters."""
    utterances = []
    for at, ratings in enumerate(rows):
        values = [one[1:4] for one in ratings if not one.self_report] or [(3, 3, 3)]
        activation, valence, dominance = np.mean(values, axis=0)
        utterances.append(Utterance(str(at), f"{at}.wav", "s", (activation, valence, dominance), ratings=ratings))
    return Corpus("c", (), (1.0, 5.0), tuple(utterances))


def one(rater: str, value: float, **more) -> Rating:
    return Rating(rater, value, value, value, **more)


def test_a_corpus_is_described_in_plain_values(tmp_path):
    corpus = open_corpus(CorpusConfig(path=str(put_iemocap(tmp_path, sessions=2, turns=3))))
    facts = describe(corpus)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["utterances"] == 24
    assert facts["speakers"] == {"Ses01F": 6, "Ses01M": 6, "Ses02F": 6, "Ses02M": 6}
    assert facts["gender"] == {"female": 12, "male": 12}
    assert facts["sessions"] == {"Session1": 12, "Session2": 12}
    assert facts["styles"] == {"improvised": 12, "scripted": 12}
    assert facts["recordings"] == 4
    assert sum(facts["categories"].values()) == 24
    matrix_PP = np.array(facts["correlation"])
    np.testing.assert_allclose(matrix_PP, np.corrcoef(corpus.labels_UP, rowvar=False))
    assert facts["human"]["label_is_mean"] == {"activation": 1.0, "valence": 1.0, "dominance": 1.0}
    assert 24 * 0.3 <= facts["duration_s"]["total"] <= 24 * 0.5


def test_unknown_speakers_partitions_and_what_was_dropped_are_counted(tmp_path):
    put_msp_podcast(tmp_path, podcasts=5)
    (tmp_path / "Audios" / "MSP-PODCAST_0001_0000.wav").unlink()
    facts = describe(open_corpus(CorpusConfig(path=str(tmp_path), on_bad="skip")))
    assert (facts["unknown_speaker"], len(facts["speakers"])) == (5, 5)
    assert facts["partitions"] == {"dev": 3, "test1": 3, "test2": 3, "train": 5}
    assert facts["dropped"] == {"no audio file": 1}
    assert facts["human"]["others"] == 2


def test_a_proxy_has_no_human_ceiling_and_says_its_marks(tmp_path):
    facts = describe(open_corpus(CorpusConfig(path=str(put_emodb(tmp_path)))))
    assert (facts["human"], facts["marks"]) == (None, ["PROXY"])


def test_constant_labels_have_no_correlation_and_no_shape():
    utterances = tuple(Utterance(str(at), "x.wav", "s", (3.0, float(at), 5.0 - at)) for at in range(1, 5))
    facts = describe(Corpus("c", (), (1.0, 5.0), utterances))
    assert facts["correlation"][0] == [None, None, None]
    assert facts["correlation"][1] == [None, pytest.approx(1), pytest.approx(-1)]
    assert facts["labels"]["activation"]["skewness"] is None
    assert facts["duration_s"]["unreadable"] == 4
    json.dumps(facts, allow_nan=False)


@given(st.lists(st.floats(0, 6), min_size=1, max_size=60))
def test_every_label_is_in_one_bin_or_outside_the_scale(labels):
    figures = label_figures(np.array(labels), (1.0, 5.0))
    inside = sum(figures["histogram"]["counts"])
    assert inside + figures["below_scale"] + figures["above_scale"] == len(labels)
    assert figures["least"] - 1e-9 <= figures["mean"] <= figures["greatest"] + 1e-9
    assert len(figures["histogram"]["edges"]) == len(figures["histogram"]["counts"]) + 1


def test_moments_are_those_of_a_known_sample():
    figures = label_figures(np.array([1.0, 1.0, 1.0, 5.0]), (1.0, 5.0))
    assert (figures["mean"], figures["deviation"]) == (2.0, pytest.approx(math.sqrt(3)))
    assert figures["skewness"] == pytest.approx(2 / math.sqrt(3))
    assert figures["excess_kurtosis"] == pytest.approx(7 / 3 - 3)
    assert figures["histogram"]["edges"] == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
    assert figures["histogram"]["counts"] == [3, 0, 0, 0, 0, 0, 0, 1]


def test_files_that_are_missing_empty_or_no_audio_are_counted_not_fatal(tmp_path):
    folder = put_emodb(tmp_path)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no audio")
    good = sorted(str(path) for path in folder.glob("wav/*.wav"))
    lengths = header_lengths([*good, *(str(tmp_path / name) for name in ("empty.wav", "text.wav", "nowhere.wav"))])
    figures = durations(lengths, [(path, None) for path in lengths])
    assert figures["unreadable"] == 3
    assert 0.3 <= figures["least"] <= figures["mean"] <= figures["greatest"] <= 0.5
    nowhere = str(tmp_path / "nowhere.wav")
    assert durations(lengths, [(nowhere, None)])["mean"] is None
    parts = durations(lengths, [(good[0], (0.1, 0.2)), (good[0], None), (nowhere, (0.0, 1.0))])
    assert parts["least"] == pytest.approx(0.1)
    assert parts["unreadable"] == 1


def test_raters_who_all_agree_have_a_ceiling_of_one():
    human = human_ceiling(rated(*(tuple(one(rater, value) for rater in "abc") for value in (1, 2, 4, 5))))
    assert human is not None
    assert human["ccc"]["activation"] == pytest.approx(1)
    assert human["pairs"]["activation"] == 12
    assert (human["raters"], human["raters_an_utterance"], human["others"]) == (3, 3, 2)


values_UR = st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=6), min_size=3, max_size=12)


@given(values_UR)
def test_the_ceiling_is_the_ccc_of_each_rater_against_the_mean_of_the_others(values):
    corpus = rated(*(tuple(one(f"w{at}", value) for at, value in enumerate(row)) for row in values))
    human = human_ceiling(corpus)
    assert human is not None
    least = 2 if 2 * sum(len(row) >= 3 for row in values) >= len(values) else 1
    pairs = [
        (value, np.mean(row[:at] + row[at + 1 :])) for row in values if len(row) > least for at, value in enumerate(row)
    ]
    assert (human["others"], human["pairs"]["valence"]) == (least, len(pairs))
    assert human["ccc"]["valence"] == pytest.approx(float(ccc(*np.array(pairs).T)), abs=1e-9)


def test_a_value_that_a_rater_left_out_takes_no_part_in_that_primitive_alone():
    rows = [tuple(one(rater, value) for rater in "abc") for value in (1, 2, 4)]
    rows[0] = (*rows[0][:2], Rating("c", 1, 1, math.nan))
    human = human_ceiling(rated(*rows))
    assert human is not None
    assert human["pairs"] == {"activation": 9, "valence": 9, "dominance": 6}


def test_self_reports_are_not_the_ceiling():
    external = [tuple(one(rater, value) for rater in "abc") for value in (1, 2, 4)]
    with_own = [(*row, one("F1", 5, self_report=True)) for row in external]
    assert human_ceiling(rated(*with_own)) == human_ceiling(rated(*external))
    assert human_ceiling(rated((one("F1", 2, self_report=True),))) is None


def test_two_raters_an_utterance_are_compared_with_each_other():
    human = human_ceiling(rated(*((one("a", value), one("b", value + 1)) for value in (1, 2, 3, 4))))
    assert human is not None
    assert (human["others"], human["pairs"]["activation"]) == (1, 8)


def test_labels_whose_columns_are_mixed_up_are_seen():
    rows = [(Rating("a", 1, 2, 3), Rating("b", 1, 4, 3)), (Rating("a", 5, 2, 4), Rating("b", 5, 2, 4))]
    right = rated(*rows)
    mixed = Corpus(
        "c",
        (),
        right.scale,
        tuple(
            Utterance(row.key, row.path, "s", (row.labels[1], row.labels[0], row.labels[2]), ratings=row.ratings)
            for row in right.utterances
        ),
    )
    seen = human_ceiling(mixed)
    assert seen is not None
    assert seen["label_is_mean"] == {"activation": 0.0, "valence": 0.0, "dominance": 1.0}


def test_audio_that_a_fine_tuning_refuses_is_named_before(tmp_path):
    folder = put_corpus(tmp_path / "tones")
    whole = Path(folder, "04.wav").read_bytes()
    soundfile.write(Path(folder, "02.wav"), np.zeros(16_000), 16_000)
    Path(folder, "03.wav").write_bytes(whole[: len(whole) // 2])
    found = describe(open_corpus(CorpusConfig(path=str(folder))))["unusable"]
    assert found["causes"] == {"silent": 1, "cut": 1}
    assert found["first"] == f"{folder}/02.wav: every sample is zero"
    assert found["decoded"] == found["files"] == 36


def test_parts_that_a_fine_tuning_refuses_are_named_before(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(80_000) / 9), 16_000)
    soundfile.write(tmp_path / "b.wav", np.r_[np.sin(np.arange(40_000) / 9), np.zeros(40_000)], 16_000)
    rows = ["a.wav,0,5.05", "a.wav,1,6.5", "b.wav,0,2", "b.wav,3,4"]
    table = "path,start,end,speaker,activation,valence,dominance\n" + "".join(f"{row},s,1,2,3\n" for row in rows)
    (tmp_path / "t.csv").write_text(table)
    found = describe(open_corpus(CorpusConfig(path=str(tmp_path / "t.csv"))))["unusable"]
    assert found["causes"] == {"outside": 1, "silent": 1} and found["decoded"] == found["files"] == 2
    assert found["first"] == f"{tmp_path}/a.wav: it is 1 s to 6.5 s of a file of 5.000 s"
