import math
from pathlib import Path

import numpy as np
import pytest
from made_corpora import IEMOCAP_HEAD, iemocap_block, put_iemocap, put_text, put_tone

from cpcscale.emotion.corpora import detect_kind, open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Rating
from cpcscale.errors import UserError

# As the release has them: a label with its raters' lines, then one of the class xxx.
REAL = (
    IEMOCAP_HEAD
    + """[6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.0000, 3.5000]
C-E2:	Neutral;	()
C-E3:	Neutral;	()
C-E4:	Neutral;	()
C-F1:	Neutral;	(curious)
A-E3:	val 3; act 2; dom  2;	()
A-E4:	val 2; act 2; dom  5;	(mildly aggravated but staying polite, attitude)
A-F1:	val 3; act 2; dom  1;	()

[19.2900 - 20.7875]	Ses01F_impro01_M003	xxx	[2.5000, 3.0000, 4.0000]
C-E2:	Neutral;	()
C-F1:	Neutral; Anger;	()
A-E3:	val 3; act 3; dom  ;	()
A-E4:	val 2; act 3;	(act 1; dom 1)
A-M1:	val 2; act 3; dom  2;	()

"""
)


def put_real(folder: Path, text: str = REAL) -> Path:
    put_text(folder / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt", text)
    for turn in ("F000", "M003"):
        put_tone(folder / f"Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_{turn}.wav", (0, 0, 0), 0)
    return folder


def read(path: Path, **settings) -> Corpus:
    return open_corpus(CorpusConfig(path=str(path), **settings))


def raters(corpus: Corpus) -> list[list[str]]:
    """The ratings of each utterance as text, in which a value that is missing equals itself."""
    return [[str(one) for one in row.ratings] for row in corpus.utterances]


def test_the_brackets_are_valence_activation_dominance(tmp_path):
    corpus = read(put_real(tmp_path))
    assert (corpus.name, corpus.marks, corpus.scale) == ("iemocap", (), (1, 5))
    np.testing.assert_array_equal(corpus.labels_UP, [[2.0, 2.5, 3.5], [3.0, 2.5, 4.0]])


def test_the_speaker_is_the_session_with_the_last_letter_of_the_turn(tmp_path):
    first, second = read(put_real(tmp_path)).utterances
    assert (first.speaker, first.gender) == ("Ses01F", "female")
    assert (second.speaker, second.gender) == ("Ses01M", "male"), "the F after Ses01 is who wore the markers"


def test_a_turn_without_majority_is_kept_with_its_labels(tmp_path):
    corpus = read(put_real(tmp_path))
    assert [row.category for row in corpus.utterances] == ["neutral", "no-agreement"]
    assert corpus.dropped == ()


def test_ratings_are_by_rater_with_what_is_missing_as_nan_and_comments_unread(tmp_path):
    first, second = read(put_real(tmp_path)).utterances
    assert first.ratings == (
        Rating("E3", activation=2, valence=3, dominance=2),
        Rating("E4", activation=2, valence=2, dominance=5),
        Rating("F1", activation=2, valence=3, dominance=1, self_report=True),
    )
    assert [one.rater for one in second.ratings] == ["E3", "E4", "M1"]
    assert [one.activation for one in second.ratings] == [3, 3, 3]
    assert [math.isnan(one.dominance) for one in second.ratings] == [True, True, False]


def test_attribute_files_add_raters_and_do_not_count_one_twice(tmp_path):
    folder = put_real(tmp_path) / "Session1" / "dialog" / "EmoEvaluation"
    put_text(folder / "Attribute" / "Ses01F_impro01_e3_atr.txt", "Ses01F_impro01_F000 :act 5; :val 5; :dom 5; \n")
    put_text(folder / "Attribute" / "Ses01F_impro01_e2_atr.txt", "Ses01F_impro01_F000 :act 4; :val 3; :dom; \n")
    put_text(folder / "Self-evaluation" / "Ses01F_impro01_m1_atr.txt", "Ses01F_impro01_F000 :act 1; :val 1; :dom 1; \n")
    put_text(folder / "Categorical" / "Ses01F_impro01_e2_cat.txt", "Ses01F_impro01_F000 :Neutral state; \n")
    corpus = read(tmp_path)
    ratings = {one.rater: one for one in corpus.utterances[0].ratings}
    assert list(ratings) == ["E3", "E4", "F1", "E2", "M1"]
    assert ratings["E3"].activation == 2, "the line of the dialogue's own file stands"
    assert ratings["E2"][1:3] == (4, 3) and math.isnan(ratings["E2"].dominance)
    assert ratings["M1"].self_report and not ratings["E2"].self_report
    assert len(corpus.utterances) == 2, "the raters' files hold no labels"


def test_dialogues_are_recordings_of_a_session_improvised_or_scripted(tmp_path):
    corpus = read(put_iemocap(tmp_path, sessions=5, turns=2))
    assert len(corpus.utterances) == 5 * 2 * 2 * 2
    assert {row.session for row in corpus.utterances} == {f"Session{number}" for number in range(1, 6)}
    assert len(set(corpus.speakers)) == 10
    styles = {row.recording: row.style for row in corpus.utterances if row.session == "Session3"}
    assert styles == {"Ses03F_impro01": "improvised", "Ses03M_script01_1": "scripted"}
    assert {row.partition for row in corpus.utterances} == {""}
    assert all(len([one for one in row.ratings if not one.self_report]) == 2 for row in corpus.utterances)


def test_every_session_has_its_own_two_speakers(tmp_path):
    corpus = read(put_iemocap(tmp_path, sessions=3))
    by_session: dict[str, set[str]] = {}
    for row in corpus.utterances:
        by_session.setdefault(row.session, set()).add(row.speaker)
    assert all(len(speakers) == 2 for speakers in by_session.values())
    assert len(set().union(*by_session.values())) == 6


def test_the_release_is_found_from_a_folder_above_and_a_part_of_it_is_a_corpus(tmp_path):
    put_iemocap(tmp_path / "IEMOCAP_full_release", sessions=2)
    whole = read(tmp_path, kind="auto")
    assert whole.digest == read(tmp_path / "IEMOCAP_full_release").digest
    assert all(Path(row.path).is_file() for row in whole.utterances)
    for path in sorted((tmp_path / "IEMOCAP_full_release" / "Session1").rglob("*.txt")):
        path.unlink()
    part = read(tmp_path)
    assert {row.session for row in part.utterances} == {"Session2"}
    assert part.dropped_counts == {"audio without a label line": 12}


def test_a_turn_without_audio_stops_or_is_left_out_as_the_config_says(tmp_path):
    put_iemocap(tmp_path)
    gone = tmp_path / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F001.wav"
    gone.unlink()
    with pytest.raises(UserError, match=r"1 of 24 audio files .* first .*Ses02F_impro01_F001\.wav.*on_bad=skip"):
        read(tmp_path)
    corpus = read(tmp_path, on_bad="skip")
    assert len(corpus.utterances) == 23
    assert [(one.key, one.why) for one in corpus.dropped] == [("Ses02F_impro01_F001", "no audio file")]


def test_of_two_label_lines_of_a_turn_the_first_counts(tmp_path):
    again = iemocap_block("Ses01F_impro01_F000", "ang", np.array([[5, 5, 5], [5, 5, 5]]))
    once = read(put_real(tmp_path / "once"))
    corpus = read(put_real(tmp_path / "twice", REAL + again))
    assert corpus.digest == once.digest
    assert raters(corpus) == raters(once), "the raters of the second line are nobody's"
    assert corpus.dropped_counts == {"a second label line of the turn": 1}


@pytest.mark.parametrize(
    "line", ["[1 - 2]\tSes01F_impro01_F001\tneu\t[2.5, , 3]", "[1 - 2]\tOther_F001\tneu\t[2, 3, 4]"]
)
def test_a_label_line_that_is_not_understood_is_counted_with_its_place(tmp_path, line):
    without = read(put_real(tmp_path / "without"))
    corpus = read(put_real(tmp_path / "with", f"{REAL}{line}\nA-E3:\tval 5; act 5; dom  5;\t()\n"))
    assert corpus.dropped_counts == {"a label line that is not understood": 1}
    assert corpus.dropped[0].key.endswith("Ses01F_impro01.txt line 19")
    assert raters(corpus) == raters(without), "the rater's line below it is nobody's"


def test_comments_in_another_encoding_do_no_harm(tmp_path):
    put_real(tmp_path)
    path = tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    path.write_bytes(REAL.replace("curious", "clich\u00e9").encode("latin-1"))
    assert len(read(tmp_path).utterances) == 2


def test_iemocap_is_told_by_its_folders(tmp_path):
    assert detect_kind(CorpusConfig(path=str(put_iemocap(tmp_path, sessions=1)))) == "iemocap"
