import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_corpora import MSP_NEW, MSP_OLD, put_msp_podcast, put_text, put_tone

from cpcscale.emotion.corpora import detect_kind, open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Rating
from cpcscale.emotion.corpora.msp_label_lines import number, rated_files
from cpcscale.errors import UserError


def read(path: Path, **settings) -> Corpus:
    return open_corpus(CorpusConfig(path=str(path), **settings))


def test_rows_are_on_the_owners_scale_with_their_podcast_and_partition(tmp_path):
    corpus = read(put_msp_podcast(tmp_path))
    assert (corpus.name, corpus.marks, corpus.scale) == ("msp-podcast", (), (1, 7))
    assert len(corpus.utterances) == 30
    row = corpus.utterances[3]
    assert (row.key, row.recording, row.speaker, row.gender) == ("MSP-PODCAST_0002_0000", "0002", "1", "male")
    assert row.path.endswith("Audios/MSP-PODCAST_0002_0000.wav")
    assert [row.partition for row in corpus.utterances[::3]] == 2 * ["train", "train", "dev", "test1", "test2"]
    assert {row.category for row in corpus.utterances} >= {"anger", "surprise", "no-agreement"}
    assert read(tmp_path, name="msp-podcast-1.11").name == "msp-podcast-1.11"


@pytest.mark.parametrize("consensus", ["labels_concensus.csv", "labels_consensus.json", "labels_concensus.json"])
def test_every_spelling_and_form_of_the_table_is_the_same_corpus(tmp_path, consensus):
    usual = read(put_msp_podcast(tmp_path / "usual", podcasts=4))
    put_msp_podcast(tmp_path / "other", podcasts=4, consensus=consensus, audio="Audio")
    assert detect_kind(CorpusConfig(path=str(tmp_path / "other"))) == "msp-podcast"
    other = read(tmp_path / "other")
    assert other.digest == usual.digest
    assert [row.ratings for row in other.utterances] == [row.ratings for row in usual.utterances]


def test_old_and_new_partition_names_are_one(tmp_path):
    old = read(put_msp_podcast(tmp_path / "old", splits=MSP_OLD))
    assert old.digest == read(put_msp_podcast(tmp_path / "new", splits=MSP_NEW)).digest
    plain = read(put_msp_podcast(tmp_path / "plain", splits=("train", "dev", "Test", "Test2")))
    assert [row.partition for row in plain.utterances[:12:3]] == ["train", "dev", "test1", "test2"]


def test_a_partition_that_no_release_has_is_refused(tmp_path):
    put_msp_podcast(tmp_path, splits=("Train", "Holdout"))
    with pytest.raises(UserError, match=r"MSP-PODCAST_0002_0000 has Split_Set='Holdout', which is no partition"):
        read(tmp_path)


@pytest.mark.parametrize("column", ["empty", "absent"])
def test_partitions_txt_is_read_where_the_table_says_none(tmp_path, column):
    whole = read(put_msp_podcast(tmp_path, podcasts=5))
    path = tmp_path / "Labels" / "labels_consensus.csv"
    lines = [line.rpartition(",") for line in path.read_text().splitlines()]
    put_text(tmp_path / "Partitions.txt", "".join(f"{split}; {row.split(',')[0]}\n" for row, _, split in lines[1:]))
    kept = [f"{row}," if column == "empty" else row for row, _, _ in lines]
    path.write_text("\n".join([f"{lines[0][0]},Split_Set" if column == "empty" else kept[0], *kept[1:]]) + "\n")
    assert read(tmp_path).digest == whole.digest


def test_unknown_is_no_speaker_and_no_gender(tmp_path):
    corpus = read(put_msp_podcast(tmp_path, podcasts=2, segments=3))
    assert corpus.speakers == ["0", "0", "", "1", "1", ""]
    assert [row.gender for row in corpus.utterances] == ["female", "female", "", "male", "male", ""]


def test_rows_whose_labels_are_held_back_and_audio_without_a_row_are_counted(tmp_path):
    put_msp_podcast(tmp_path, podcasts=2)
    path = tmp_path / "Labels" / "labels_consensus.csv"
    path.write_text(path.read_text() + "MSP-PODCAST_test3_0001.wav,,,,,Unknown,Unknown,Test3\n")
    for segment in (1, 2, 3):
        put_tone(tmp_path / "Audios" / f"MSP-PODCAST_test3_{segment:04}.wav", (0, 0, 0), segment)
    corpus = read(tmp_path)
    assert len(corpus.utterances) == 6
    assert corpus.dropped_counts == {"audio without a row": 2, "labels held back": 1}


def test_test3_with_labels_is_a_partition_without_a_podcast(tmp_path):
    put_msp_podcast(tmp_path, podcasts=1, segments=1)
    path = tmp_path / "Labels" / "labels_consensus.csv"
    path.write_text(path.read_text() + "MSP-PODCAST_test3_0001.wav,N,4,4,4,Unknown,Unknown,Test3\n")
    put_tone(tmp_path / "Audios" / "MSP-PODCAST_test3_0001.wav", (0, 0, 0), 1)
    row = read(tmp_path).utterances[1]
    assert (row.partition, row.recording, row.speaker) == ("test3", "", "")


def test_a_second_row_of_a_file_is_left_out(tmp_path):
    put_msp_podcast(tmp_path, podcasts=1, segments=2)
    path = tmp_path / "Labels" / "labels_consensus.csv"
    path.write_text(path.read_text() + "MSP-PODCAST_0001_0000.wav,N,1,1,1,9,Male,Test1\n")
    corpus = read(tmp_path)
    assert corpus.dropped_counts == {"a second row of the file": 1}
    assert corpus.utterances[0].speaker == "0"


def test_a_segment_without_audio_stops_or_is_left_out_as_the_config_says(tmp_path):
    put_msp_podcast(tmp_path, podcasts=2)
    (tmp_path / "Audios" / "MSP-PODCAST_0001_0001.wav").unlink()
    with pytest.raises(UserError, match=r"1 of 6 audio files .*Audios/MSP-PODCAST_0001_0001\.wav"):
        read(tmp_path)
    assert read(tmp_path, on_bad="skip").dropped_counts == {"no audio file": 1}


@pytest.mark.parametrize("detailed", ["labels_detailed.csv", "columns.csv", "labels_detailed.json", "labels.txt"])
def test_every_form_of_the_detailed_labels_gives_the_same_ratings(tmp_path, detailed):
    corpus = read(put_msp_podcast(tmp_path, podcasts=6, detailed=detailed))
    assert all(len(row.ratings) == 5 for row in corpus.utterances)
    assert all(one.rater.startswith("WORKER") for row in corpus.utterances for one in row.ratings)
    means_UP = [np.mean([one[1:4] for one in row.ratings], axis=0) for row in corpus.utterances]
    np.testing.assert_allclose(means_UP, corpus.labels_UP, atol=1e-6)


def test_a_release_without_detailed_labels_has_no_ratings(tmp_path):
    assert {row.ratings for row in read(put_msp_podcast(tmp_path, detailed="")).utterances} == {()}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("labels_detailed.csv", "FileName,Vote\nMSP-PODCAST_0001_0000.wav,N\n", "neither a column EmoDetail"),
        ("labels_detailed.json", json.dumps({"MSP-PODCAST_0001_0000.wav": ["N"]}), "is not {file: {worker: "),
        ("labels_detailed.csv", "FileName,Worker,EmoAct,EmoVal,EmoDom\na.wav,w,3,5,2,1\n", "csv line 2 has 6 cells"),
        (
            "labels_detailed.csv",
            "FileName,Worker,EmoAct,EmoVal,EmoDom\na.wav,w,3_5,2,1\n",
            "column EmoAct: '3_5' is no",
        ),
    ],
)
def test_detailed_labels_of_no_known_form_cost_the_ratings_and_not_the_corpus(tmp_path, caplog, name, text, words):
    whole = read(put_msp_podcast(tmp_path, podcasts=1, detailed=""))
    put_text(tmp_path / "Labels" / name, text)
    corpus = read(tmp_path)
    assert corpus.digest == whole.digest
    assert {row.ratings for row in corpus.utterances} == {()}
    assert words in corpus.notes[0]
    assert words in caplog.text


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a.wav": [1]}'])
def test_a_json_table_of_another_form_is_refused_in_one_line(tmp_path, text):
    put_text(tmp_path / "labels_consensus.json", text)
    with pytest.raises(UserError, match=r"labels_consensus\.json is not") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_label_that_is_not_understood_is_an_error_and_no_label_that_was_held_back(tmp_path):
    put_msp_podcast(tmp_path, podcasts=1)
    (table,) = tmp_path.rglob("labels_con*.csv")
    lines = table.read_text().splitlines()
    header = lines[0].split(",")
    for text, harm in (("'3,5' is not a number: decimals", '"3,5"'), ("'3_5' is not a number", "3_5")):
        cells = next(csv.reader([lines[1]]))
        cells[header.index("EmoVal")] = harm
        table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
        with pytest.raises(UserError, match=rf"csv line 2, column EmoVal: {text}"):
            read(tmp_path)


def test_what_is_no_finite_number_is_no_label():
    assert number("3.5") == 3.5
    assert all(math.isnan(number(text)) for text in ("", "NaN", "inf", "-inf", "high", None))


def test_the_owners_own_lines_are_read_with_what_workers_typed():
    files, again = rated_files(
        "006-040.1-2_13.wav; H; A:4.200000; V:4.800000; D:5.000000;\n"
        "WORKER00014325; Sad; Sad,Concerned; A:2.000000; V:4.000000; D:4.000000;\n"
        "WORKER00014332; Other-a; A:1; V:1; D:1; Happy; A:4.000000; V:6.000000; D:NaN;\n"
        "not a worker's line\n\n"
    )
    assert again == []
    rated = files["006-040.1-2_13"]
    assert (rated.letter, rated.labels) == ("H", (4.2, 4.8, 5.0))
    assert rated.ratings[0] == Rating("WORKER00014325", 2, 4, 4)
    assert rated.ratings[1][:3] == ("WORKER00014332", 4, 6)
    assert len(rated.ratings) == 2
