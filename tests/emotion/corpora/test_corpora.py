import json
import logging
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import KINDS, Corpus, CorpusConfig, Rating, merged_ratings
from cpcscale.errors import UserError

DATA = Path(__file__).parents[2] / "data"
HEADER = "path,speaker,activation,valence,dominance"


def put_audio(path: Path, seconds: float = 0.5, rate_hz: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(int(seconds * rate_hz)) / 20), rate_hz)


def put_table(folder: Path, *rows: str, header: str = HEADER, name: str = "manifest.csv") -> Path:
    """A folder with this table and an audio file for each row."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    for row in rows:
        if row.split(",")[0]:
            put_audio(folder / row.split(",")[0])
    return folder


def read(path: Path | str, **settings) -> Corpus:
    return open_corpus(CorpusConfig(path=str(path), **settings))


def test_a_plain_table_gives_its_rows_in_its_units(tmp_path):
    folder = put_table(
        tmp_path / "my_set",
        "a/1.wav,ann,1,2.5,5,u1,de,female",
        "b/2.wav,bob,3,3,3,,,",
        header=HEADER + ",utterance,language,gender",
    )
    corpus = read(folder)
    assert (corpus.name, corpus.marks, corpus.scale) == ("my-set", (), (1, 5))
    assert [row.key for row in corpus.utterances] == ["u1", "b/2"]
    assert (corpus.utterances[0].language, corpus.utterances[0].gender) == ("de", "female")
    assert corpus.speakers == ["ann", "bob"]
    np.testing.assert_array_equal(corpus.labels_UP, [[1, 2.5, 5], [3, 3, 3]])
    assert read(folder, name="other").name == "other"


def test_a_table_may_say_partition_recording_session_style_and_category(tmp_path):
    folder = put_table(
        tmp_path / "s",
        "1.wav,ann,1,2,3,Validation,call 7,Session1,Scripted,Angry,F",
        "2.wav,bob,1,2,3,,,,,,",
        header=HEADER + ",partition,recording,session,style,category,gender",
    )
    first, second = read(folder).utterances
    assert (first.partition, first.recording, first.session) == ("dev", "call 7", "Session1")
    assert (first.style, first.category, first.gender) == ("scripted", "anger", "female")
    assert {second.partition, second.recording, second.session, second.style, second.category, second.gender} == {""}


def test_an_empty_speaker_and_unknown_are_no_speaker(tmp_path):
    folder = put_table(tmp_path / "s", "1.wav,,1,2,3", "2.wav,Unknown,1,2,3", "3.wav,unity,1,2,3")
    assert read(folder).speakers == ["", "", "unity"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.tsv", "path\tspeaker\tactivation\tvalence\tdominance\n1.wav\tann\t4\t2\t3\n"),
        ("X.CSV", f"{HEADER}\n1.wav,ann,4,2,3\n"),
        ("excel.csv", "\ufeff\ufeff" + f"{HEADER}\r\n1.wav,ann,4,2,3\r\n;;;;\r\n".replace(",", ";")),
        ("mac.csv", "path, speaker, activation, valence, dominance\r1.wav, ann, 4, 2, 3\r"),
        ("metadata.jsonl", '{"file_name": "1.wav", "speaker": "ann", "activation": 4, "valence": 2.0, "dominance": 3}'),
        ("labels", f"{HEADER.replace('path', 'file')}\n1.wav,ann,4,2,3"),
    ],
)
def test_a_table_is_read_whatever_its_form_and_name(tmp_path, name, text):
    put_audio(tmp_path / "1.wav")
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    for path in (tmp_path / name, tmp_path) if name != "labels" else (tmp_path / name,):
        (row,) = read(path).utterances
        assert (row.key, row.path, row.speaker, row.labels) == ("1", f"{tmp_path}/1.wav", "ann", (4, 2, 3))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("auto", "csv")])
def test_a_file_where_a_kind_wants_a_folder_is_one_line_that_says_what_to_write(tmp_path, kind):
    table = put_table(tmp_path / "s", "1.wav,ann,4,2,3") / "manifest.csv"
    with pytest.raises(UserError, match=rf"corpus\.kind={kind} reads the folder .* pass corpus\.kind=csv"):
        read(table, kind=kind)


def test_speakers_and_sessions_have_one_spelling_and_unknown_is_none(tmp_path):
    words = ["1", "1.0", "None", "NULL", "N/A", "<NA>", "Mu\u0308", "M\u00fc", "2.5"]
    rows = (f"{at}.wav,{word},1,2,3,{word},{word}" for at, word in enumerate(words))
    corpus = read(put_table(tmp_path / "s", *rows, header=HEADER + ",session,recording"))
    expected = ["1", "1", "", "", "", "", "M\u00fc", "M\u00fc", "2.5"]
    assert corpus.speakers == expected
    assert [row.session for row in corpus.utterances] == [row.recording for row in corpus.utterances] == expected


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_audio_is_found_in_whichever_form_its_accents_are_written(tmp_path, on_disk, in_table):
    name = unicodedata.normalize(on_disk, "J\u00f6/M\u00fcller.wav")
    put_audio(tmp_path / "s" / name)
    (tmp_path / "s" / "t.csv").write_text(f"{HEADER}\n{unicodedata.normalize(in_table, name)},a,1,2,3\n", "utf-8")
    (row,) = read(tmp_path / "s").utterances
    assert (row.path, row.key) == (f"{tmp_path}/s/{name}", "J\u00f6/M\u00fcller")


def test_a_row_may_be_a_part_of_its_file(tmp_path):
    folder = put_table(
        tmp_path / "s",
        "long.wav,a,1,2,3,0,0 days 00:00:01.500000",
        "long.wav,b,3,2,1,1.5,NaT",
        "long.wav,c,3,3,3,0 days,NaT",
        header=HEADER.replace("path", "file") + ",start,end",
    )
    corpus = read(folder)
    assert [(row.key, row.segment) for row in corpus.utterances] == [
        ("long 0.0-1.5", (0.0, 1.5)),
        ("long 1.5-inf", (1.5, math.inf)),
        ("long", None),
    ]
    other = (folder / "manifest.csv").read_text().replace("01.500000", "01.400000")
    (folder / "manifest.csv").write_text(other)
    assert read(folder).digest != corpus.digest


def test_a_row_of_a_nemo_manifest_is_its_part_of_the_file(tmp_path):
    put_audio(tmp_path / "long.wav")
    labels = {"audio_filepath": "long.wav", "activation": 1, "valence": 2, "dominance": 3}
    parts = [{"offset": 0.5, "duration": 1.0}, {"offset": None, "duration": 0.25}, {"offset": 2}, {"duration": None}]
    rows = [labels | part | {"speaker": f"s{at}"} for at, part in enumerate(parts)]
    (tmp_path / "nemo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read(tmp_path)
    assert [row.segment for row in corpus.utterances] == [(0.5, 1.5), (0.0, 0.25), (2.0, math.inf), None]
    assert corpus.notes == ()


@pytest.mark.parametrize("other", ["007", "Anna"], ids=["zeros", "case"])
def test_two_spellings_of_one_speaker_are_told(tmp_path, caplog, other):
    one = {"007": "7", "Anna": "anna"}[other]
    corpus = read(put_table(tmp_path / "s", f"1.wav,{one},1,2,3", f"2.wav,{other},1,2,3", "3.wav,0,1,2,3"))
    assert corpus.speakers == [one, other, "0"]
    assert f"{one!r} and {other!r} count as two speakers" in caplog.text
    caplog.clear()
    read(put_table(tmp_path / "t", "1.wav,10,1,2,3", "2.wav,1,1,2,3", "3.wav,,1,2,3", "4.wav,0,1,2,3"))
    assert "two speakers" not in caplog.text


def test_columns_that_are_not_used_are_told(tmp_path):
    corpus = read(put_table(tmp_path / "s", "1.wav,a,1,2,3,,9,x", header=HEADER + ",,arousal,text"))
    assert corpus.notes == ("columns that are not used: arousal, text",)


def test_a_table_is_found_by_its_file_or_its_folder(tmp_path):
    folder = put_table(tmp_path / "set", "1.wav,ann,1,2,3", name="labels.csv")
    assert read(folder).utterances == read(folder / "labels.csv").utterances
    put_table(folder, "2.wav,bob,1,2,3", name="more.csv")
    with pytest.raises(UserError, match=r"2 tables \(labels\.csv, more\.csv\).*FILE\.csv"):
        read(folder)


def test_labels_are_scaled_by_the_stated_range_and_come_back(tmp_path):
    corpus = read(put_table(tmp_path / "s", "1.wav,a,1,4,7"), scale=[1.0, 7.0])
    np.testing.assert_allclose(corpus.to_unit(corpus.labels_UP), [[-1, 0, 1]])
    np.testing.assert_allclose(corpus.from_unit(corpus.to_unit(corpus.labels_UP)), corpus.labels_UP)


def test_labels_outside_the_scale_are_counted_and_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        corpus = read(put_table(tmp_path / "s", "1.wav,a,0,4,7", "2.wav,a,2,2,2"))
    assert "1 of 2 utterances have a label outside" in caplog.text
    assert corpus.outside_U.tolist() == [True, False]
    np.testing.assert_array_equal(corpus.labels_UP[0], [0, 4, 7])


def test_the_digest_follows_the_rows_and_not_the_place(tmp_path):
    header = HEADER + ",partition,recording,session,style,category,gender,language"

    def digest(place: str, row: str) -> str:
        (tmp_path / place).mkdir(parents=True)
        return read(put_table(tmp_path / place / "s", row, header=header)).digest

    first = digest("here", "1.wav,a,1,2,3,train,r,s,scripted,anger,male,en")
    assert first == digest("elsewhere", "1.wav,a,1,2,3,train,r,s,scripted,anger,male,en")
    others = [
        "2.wav,a,1,2,3,train,r,s,scripted,anger,male,en",
        "1.wav,b,1,2,3,train,r,s,scripted,anger,male,en",
        "1.wav,a,1,2,4,train,r,s,scripted,anger,male,en",
        "1.wav,a,1,2,3,dev,r,s,scripted,anger,male,en",
        "1.wav,a,1,2,3,train,q,s,scripted,anger,male,en",
        "1.wav,a,1,2,3,train,r,q,scripted,anger,male,en",
        "1.wav,a,1,2,3,train,r,s,improvised,anger,male,en",
        "1.wav,a,1,2,3,train,r,s,scripted,fear,male,en",
        "1.wav,a,1,2,3,train,r,s,scripted,anger,female,en",
    ]
    assert len({first, *(digest(str(at), row) for at, row in enumerate(others))}) == 1 + len(others)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,speaker,activation,dominance", "1.wav,a,1,2", "no column valence: .*has path, speaker, activation"),
        ("clip,who", "1.wav,a", "no column path, speaker, activation, valence, dominance"),
        (HEADER, "1.wav,a,1,high,3", r"s/manifest\.csv line 2, column valence: 'high' is not a number"),
        (HEADER, "1.wav,a,1,2,nan", "line 2, column dominance: 'nan' is not a number"),
        (HEADER, "1.wav,a,1,2,", "line 2, column dominance: '' is not a number"),
        (HEADER, "1.wav,a,1,2", "line 2 has 4 cells, and the header has 5"),
        (HEADER, "1.wav,a,3,5,2,0,3,1", "line 2 has 8 cells, and the header has 5: write decimals with a point"),
        (HEADER, '1.wav,a,"3,5",2,3', "line 2, column activation: '3,5' is not a number: decimals have a point"),
        (HEADER, "1.wav,a,3_5,2,3", "line 2, column activation: '3_5' is not a number"),
        (HEADER + ",valence", "1.wav,a,1,2,3,4", "line 1 has two columns `valence`"),
        (HEADER, ",a,1,2,3", "line 2, column path: '' is no path"),
        (HEADER + ",partition", "1.wav,a,1,2,3,fold7", "line 2, column partition: 'fold7' is not one of train, dev, t"),
        (HEADER + ",start", "1.wav,a,1,2,3,0", "has a column start: name the part of the file"),
        (HEADER + ",offset", "1.wav,a,1,2,3,0", "has a column offset: name the part of the file"),
        (HEADER + ",offset,duration", "1.wav,a,1,2,3,4,0", "line 2, column duration: '0' is not above 0"),
        (HEADER + ",offset,duration", "1.wav,a,1,2,3,x,1", "line 2, column offset: 'x' is not a time in seconds"),
        (HEADER + ",start,end", "1.wav,a,1,2,3,4,4.0", "line 2, column end: '4.0' is not after start=4"),
        (HEADER + ",start,end", "1.wav,a,1,2,3,-1,4", "line 2, column start: '-1' is not a time in seconds"),
        (HEADER + ",start,end", "1.wav,a,1,2,3,,4", "line 2, column start: '' is not a time in seconds"),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_place(tmp_path, header, row, message):
    with pytest.raises(UserError, match=message) as error:
        read(put_table(tmp_path / "s", row, header=header))
    assert "\n" not in str(error.value)


def test_missing_audio_is_counted_and_the_first_named(tmp_path):
    folder = put_table(tmp_path / "s", "1.wav,a,1,2,3", "2.wav,a,1,2,3")
    (folder / "2.wav").unlink()
    (folder / "x").mkdir()
    put_audio(folder / "x" / "2.WAV")
    with pytest.raises(
        UserError, match=r"1 of 2 audio files .* first .*2\.wav; the nearest is x/2\.WAV, which differs"
    ):
        read(folder)


def test_missing_audio_can_be_skipped_with_a_line_each_and_a_count(tmp_path, caplog):
    folder = put_table(tmp_path / "s", "1.wav,a,1,2,3", "2.wav,a,1,2,3", "3.wav,a,1,2,3")
    (folder / "1.wav").rename(folder / "1.mp3")
    (folder / "3.wav").unlink()
    with caplog.at_level(logging.WARNING):
        corpus = read(folder, on_bad="skip")
    assert [row.key for row in corpus.utterances] == ["2"]
    assert [(one.key, one.why) for one in corpus.dropped] == [("1", "no audio file"), ("3", "no audio file")]
    assert corpus.dropped_counts == {"no audio file": 2}
    assert "1 is left out: no audio file; the nearest is 1.mp3, which differs in its suffix" in caplog.text
    assert "3 is left out: no audio file" in caplog.text
    assert "1 utterances; left out (2 no audio file)" in caplog.text


def test_a_corpus_that_loses_all_of_its_audio_is_refused_with_the_reason(tmp_path):
    folder = put_table(tmp_path / "s", "1.wav,a,1,2,3")
    (folder / "1.wav").unlink()
    with pytest.raises(UserError, match=r"no utterance \(1 no audio file\)"):
        read(folder, on_bad="skip")


def test_a_rater_who_is_there_twice_counts_once():
    twice = [Rating("w1", 1, 2, math.nan), Rating("w2", 5, 5, 5), Rating("w1", 3, 2, 4)]
    assert merged_ratings(twice) == (Rating("w1", 2, 2, 4), Rating("w2", 5, 5, 5))


def test_a_missing_path_an_empty_folder_an_empty_table_and_a_double_id_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"pass corpus\.path=FOLDER"):
        read("")
    with pytest.raises(UserError, match=r"no corpus at corpus\.path=.*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no CSV, TSV or JSON lines file"):
        read(tmp_path)
    with pytest.raises(UserError, match="no utterance"):
        read(put_table(tmp_path / "empty"))
    with pytest.raises(UserError, match="'1' twice"):
        read(put_table(tmp_path / "s", "1.wav,a,1,2,3", "1.wav,a,1,2,3"))


def test_a_table_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "manifest.csv").write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(UserError, match=r"manifest\.csv line 1 is not a table in UTF-8"):
        read(tmp_path)


def test_bad_settings_are_refused():
    for settings, message in (
        ({"kind": "emo-db"}, "did you mean emodb"),
        ({"scale": [5.0, 1.0]}, "least, greatest"),
        ({"max_s": 0.0}, "max_s"),
        ({"on_bad": "warn"}, "on_bad='warn' is not one of stop, skip"),
    ):
        with pytest.raises(UserError, match=message):
            CorpusConfig(**settings)


def test_the_made_corpus_says_that_it_is_made():
    corpus = read(DATA / "made_emotion")
    assert (corpus.name, corpus.marks) == ("made-emotion", ("MADE",))
    assert len(set(corpus.speakers)) >= 12
    assert "MADE" in read(DATA / "made_emotion", name="in-house", kind="csv").marks
