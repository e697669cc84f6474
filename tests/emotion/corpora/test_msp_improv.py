import math
from pathlib import Path

import numpy as np
import pytest
from made_corpora import msp_improv_block, put_msp_improv, put_text, put_tone

from cpcscale.emotion.corpora import detect_kind, open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Rating
from cpcscale.errors import UserError

ONE = np.array([[2, 4, 3], [3, 4, 5]])


def read(path: Path, **settings) -> Corpus:
    return open_corpus(CorpusConfig(path=str(path), **settings))


def put_turns(folder: Path, *blocks: str, audio: tuple[str, ...] = ("S01A-F01-S-FM01",)) -> Path:
    put_text(folder / "Evaluation.txt", "\n\n".join(blocks) + "\n")
    for turn in audio:
        put_tone(folder / f"session1/S01A/S/MSP-IMPROV-{turn}.wav", (0, 0, 0), 0)
    return folder


def test_a_table_that_names_videos_gives_the_audio_with_speaker_session_and_style(tmp_path):
    corpus = read(put_msp_improv(tmp_path))
    assert (corpus.name, corpus.marks, corpus.scale) == ("msp-improv", (), (1, 5))
    assert len(corpus.utterances) == 2 * 2 * 6
    row = corpus.utterances[1]
    assert row.key == "MSP-IMPROV-S01A-F01-T-FM02"
    assert row.path.endswith("Audio/session1/S01A/T/MSP-IMPROV-S01A-F01-T-FM02.wav")
    assert (row.speaker, row.gender, row.session, row.recording) == ("F01", "female", "session1", "session1-S01A")
    assert [row.style for row in corpus.utterances[:4]] == ["improvised", "improvised", "scripted", "natural"]
    assert [row.category for row in corpus.utterances[:3]] == ["anger", "neutral", "sadness"]
    assert set(corpus.speakers) == {"F01", "M01", "F02", "M02"}


@pytest.mark.parametrize("table", ["Evaluation.txt", "Evalution.txt"])
def test_both_spellings_of_the_table_are_known(tmp_path, table):
    assert detect_kind(CorpusConfig(path=str(put_msp_improv(tmp_path, table=table)))) == "msp-improv"
    assert len(read(tmp_path).utterances) == 24


def test_activation_is_turned_round_for_means_and_workers(tmp_path):
    corpus = read(put_turns(tmp_path, msp_improv_block("S01A-F01-S-FM01", "A", ONE)))
    row = corpus.utterances[0]
    assert row.labels == (3.5, 4.0, 4.0)
    assert row.ratings == (Rating("rater-p0", 4, 4, 3), Rating("rater-p1", 3, 4, 5))
    assert "6 - A" in corpus.notes[0]


@pytest.mark.parametrize("falls", [True, False])
def test_the_direction_of_activation_is_told_from_the_table(tmp_path, falls):
    turned = read(put_msp_improv(tmp_path, sessions=3, falls=falls))
    anger = turned.labels_UP[[row.category == "anger" for row in turned.utterances], 0]
    sadness = turned.labels_UP[[row.category == "sadness" for row in turned.utterances], 0]
    assert anger.min() > sadness.max()
    assert ("turned round" in turned.notes[0]) == falls
    assert "for anger" in turned.notes[0]


def test_both_directions_written_give_the_same_labels(tmp_path):
    falling, rising = (read(put_msp_improv(tmp_path / str(way), sessions=3, falls=way)) for way in (True, False))
    np.testing.assert_allclose(falling.labels_UP, rising.labels_UP, atol=1e-6)
    assert [row.ratings for row in falling.utterances] == [row.ratings for row in rising.utterances]


def test_a_worker_who_left_a_value_out_is_nan_and_a_mean_that_is_nan_drops_the_turn(tmp_path):
    gap = msp_improv_block("S01A-F01-S-FM01", "N", ONE).replace("D:5.000000", "D:NaN")
    none = msp_improv_block("S01A-F01-S-FM02", "N", ONE).replace("D:4.000000 ;", "D:NaN ;")
    corpus = read(put_turns(tmp_path, gap, none, audio=("S01A-F01-S-FM01", "S01A-F01-S-FM02")))
    assert [row.key for row in corpus.utterances] == ["MSP-IMPROV-S01A-F01-S-FM01"]
    assert math.isnan(corpus.utterances[0].ratings[1].dominance)
    assert [tuple(one) for one in corpus.dropped] == [("UTD-IMPROV-S01A-F01-S-FM02", "a mean that is not a number")]


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    block = msp_improv_block("S01A-F01-S-FM01", "N", ONE)
    odd = block.replace("S01A-F01-S-FM01", "Z01")
    corpus = read(put_turns(tmp_path, block, block, odd, audio=("S01A-F01-S-FM01", "S01A-M01-S-MF09")))
    assert corpus.dropped_counts == {
        "a second label line of the turn": 1,
        "a name that is not understood": 1,
        "audio without a label line": 1,
    }
    assert len(corpus.utterances[0].ratings) == 2, "the second line's workers are not the first's"


def test_a_turn_without_audio_names_the_place_that_the_release_has_for_it(tmp_path):
    blocks = [msp_improv_block(f"S01A-F01-S-FM0{number}", "N", ONE) for number in (1, 2)]
    with pytest.raises(UserError, match=r"session1/S01A/S/MSP-IMPROV-S01A-F01-S-FM02\.wav"):
        read(put_turns(tmp_path, *blocks))
    assert read(tmp_path, on_bad="skip").dropped_counts == {"no audio file": 1}
