from pathlib import Path

import numpy as np
import pytest
import soundfile
from made_corpora import put_crema_d, put_emodb, put_ravdess, put_tone

from cpcscale.emotion.corpora import detect_kind, open_corpus
from cpcscale.emotion.corpora.acted_categories import stand_in_labels
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig
from cpcscale.errors import UserError


def read(path: Path, **settings) -> Corpus:
    return open_corpus(CorpusConfig(path=str(path), **settings))


@pytest.mark.parametrize("kind", ["auto", "emodb"])
def test_emodb_is_read_from_its_file_names_as_a_proxy(tmp_path, kind):
    corpus = read(put_emodb(tmp_path), kind=kind)
    assert (corpus.name, corpus.marks, corpus.scale) == ("emodb-proxy", ("PROXY",), (1, 5))
    assert corpus.speakers == ["03", "03", "08", "16"]
    assert [row.gender for row in corpus.utterances] == ["male", "male", "female", "female"]
    assert [row.category for row in corpus.utterances] == ["happiness", "anger", "neutral", "sadness"]
    np.testing.assert_array_equal(
        corpus.labels_UP, [[4.02, 4.62, 3.92], [4.18, 1.98, 3.50], [3, 3, 3], [2.46, 1.74, 2.34]]
    )


def test_emodb_with_a_manifest_is_the_same_corpus_and_a_file_that_is_gone_is_missed(tmp_path):
    names = [path.stem for path in put_emodb(tmp_path / "plain").glob("wav/*.wav")]
    for name in names:
        put_tone(tmp_path / "listed" / "audio" / f"{name}.flac", (0, 0, 0), 0)
    rows = [f"audio/{name}.flac,emodb_{name[:2]},anger" for name in names]
    (tmp_path / "listed" / "manifest.csv").write_text("\n".join(["path,speaker,emotion", *rows]))
    assert read(tmp_path / "listed").digest == read(tmp_path / "plain").digest
    (tmp_path / "listed" / "audio" / f"{names[0]}.flac").unlink()
    with pytest.raises(UserError, match="1 of 4 audio files"):
        read(tmp_path / "listed")
    assert read(tmp_path / "listed", on_bad="skip").dropped_counts == {"no audio file": 1}


def test_ravdess_is_a_proxy_without_its_calm_and_its_songs(tmp_path):
    corpus = read(put_ravdess(tmp_path, actors=2, song=True))
    assert (corpus.name, corpus.marks, corpus.scale) == ("ravdess-proxy", ("PROXY",), (1, 5))
    assert corpus.dropped_counts == {"no stand-in label for calm": 2, "song, not speech": 2}
    assert len(corpus.utterances) == 14
    assert {row.speaker: row.gender for row in corpus.utterances} == {"01": "male", "02": "female"}
    by_key = {row.key: row for row in corpus.utterances}
    surprised = by_key["03-01-08-01-02-01-02"]
    assert (surprised.category, surprised.labels) == ("surprise", (4.34, 3.8, 2.74))
    assert surprised.path.endswith("Actor_02/03-01-08-01-02-01-02.wav")


def test_a_public_copy_of_ravdess_that_holds_every_file_twice_is_the_corpus_once(tmp_path):
    once = read(put_ravdess(tmp_path / "once"))
    put_ravdess(tmp_path / "twice")
    put_ravdess(tmp_path / "twice" / "audio_speech_actors_01-24")
    twice = read(tmp_path / "twice")
    assert twice.digest == once.digest
    assert twice.dropped_counts["a second copy of its file"] == 14


def test_crema_d_takes_the_actors_gender_from_the_owners_table(tmp_path):
    corpus = read(put_crema_d(tmp_path))
    assert (corpus.name, corpus.marks) == ("crema-d-proxy", ("PROXY",))
    assert {row.speaker: row.gender for row in corpus.utterances} == {"1001": "male", "1002": "female"}
    assert [row.category for row in corpus.utterances[:6]] == [
        *("anger", "disgust", "fear", "happiness", "neutral", "sadness")
    ]
    (tmp_path / "VideoDemographics.csv").unlink()
    assert {row.gender for row in read(tmp_path).utterances} == {""}


def test_of_the_two_copies_that_crema_d_ships_the_lossless_one_is_used(tmp_path):
    put_crema_d(tmp_path, actors=1)
    for path in sorted(tmp_path.glob("AudioWAV/*.wav")):
        wave, rate_hz = soundfile.read(path)
        copy = tmp_path / "AudioMP3" / f"{path.stem}.mp3"
        copy.parent.mkdir(exist_ok=True)
        soundfile.write(copy, wave, rate_hz, format="MP3")
    corpus = read(tmp_path)
    assert len(corpus.utterances) == 6
    assert all(row.path.endswith(".wav") for row in corpus.utterances)
    assert corpus.dropped_counts == {"a second copy of its file": 6}


def test_one_emotion_has_one_point_in_all_acted_corpora(tmp_path):
    points: dict[str, set] = {}
    for corpus in (
        read(put_emodb(tmp_path / "e")),
        read(put_ravdess(tmp_path / "r")),
        read(put_crema_d(tmp_path / "c")),
    ):
        for row in corpus.utterances:
            points.setdefault(row.category, set()).add(row.labels)
    assert len(points) == 7
    assert all(len(labels) == 1 for labels in points.values())


def test_stand_in_points_are_on_the_scale_and_in_its_order():
    anger, sadness, happiness = stand_in_labels("anger"), stand_in_labels("sadness"), stand_in_labels("happiness")
    assert anger is not None and sadness is not None and happiness is not None
    assert anger[0] > sadness[0], "anger is the more active"
    assert happiness[1] > anger[1], "happiness is the more pleasant"
    assert anger[2] > sadness[2], "anger is the more dominant"
    assert stand_in_labels("neutral") == (3, 3, 3)
    assert stand_in_labels("calm") is None


@pytest.mark.parametrize(("put", "kind"), [(put_emodb, "emodb"), (put_ravdess, "ravdess"), (put_crema_d, "crema-d")])
def test_an_acted_corpus_is_told_by_its_file_names_alone_and_one_stray_name_is_asked_about(tmp_path, put, kind):
    whole = len(read(put(tmp_path)).utterances)
    assert detect_kind(CorpusConfig(path=str(tmp_path))) == kind
    put_tone(tmp_path / "hello.wav", (0, 0, 0), 0)
    with pytest.raises(UserError, match=rf"9\d\.\d%|8\d\.\d% of its audio files are named as those of {kind}: pass"):
        read(tmp_path)
    corpus = read(tmp_path, kind=kind)
    assert (len(corpus.utterances), corpus.dropped_counts.get("a name of another form")) == (whole, 1)
    (tmp_path / "manifest.csv").write_text("path,speaker,activation,valence,dominance\nhello.wav,one,2,4,3\n")
    assert detect_kind(CorpusConfig(path=str(tmp_path))) == "csv"


@pytest.mark.parametrize(
    ("kind", "put", "change", "why"),
    [
        ("emodb", put_emodb, lambda name: f"{name}xx", "a name with more before or behind it"),
        ("emodb", put_emodb, str.upper, "a name in other upper and lower case"),
        ("emodb", put_emodb, lambda name: f"emodb_{name}", "a name with more before or behind it"),
        ("ravdess", put_ravdess, lambda name: f"Actor_{name} (1)", "a name with more before or behind it"),
        ("ravdess", put_ravdess, lambda name: name.replace("-", "_"), "a name of another form"),
        ("crema-d", put_crema_d, str.lower, "a name in other upper and lower case"),
        ("crema-d", put_crema_d, lambda name: f"{name}_denoised", "a name with more before or behind it"),
    ],
)
def test_audio_with_other_names_is_counted_by_why_and_shown_beside_the_form(tmp_path, kind, put, change, why):
    put(tmp_path)
    first = sorted(tmp_path.rglob("*.wav"))[0]
    first = first.rename(first.with_name(f"{change(first.stem)}.WAV"))
    corpus = read(tmp_path, kind=kind)
    assert corpus.dropped_counts[why] == 1
    assert first.name in corpus.notes[-1] and why in corpus.notes[-1] and "'s are as " in corpus.notes[-1]
    # All of them: the message says how they differ.
    for path in tmp_path.rglob("*.wav"):
        path.rename(path.with_name(f"{change(path.stem)}.wav"))
    with pytest.raises(UserError, match=rf"holds no audio named as .* have other names, as .*{why}") as error:
        read(tmp_path, kind=kind)
    assert "\n" not in str(error.value)


def test_a_suffix_in_capitals_is_a_suffix_and_an_archive_that_was_not_unpacked_is_named(tmp_path):
    put_crema_d(tmp_path)
    for path in sorted(tmp_path.rglob("*.wav")):
        path.rename(path.with_suffix(".WAV"))
    assert len(read(tmp_path).utterances) == 12
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "AudioWAV.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"holds no audio named as CREMA-D's.*; unpack AudioWAV\.zip"):
        read(tmp_path / "zipped", kind="crema-d")


def test_a_manifest_with_ratings_outweighs_what_file_names_tell(tmp_path):
    put_ravdess(tmp_path, actors=1)
    (tmp_path / "manifest.csv").write_text(
        "path,speaker,activation,valence,dominance\nActor_01/03-01-02-01-02-01-01.wav,one,2,4,3\n"
    )
    corpus = read(tmp_path)
    assert corpus.marks == ()
    assert corpus.labels_UP.tolist() == [[2, 4, 3]]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("emodb", r"no audio named as EmoDB's is \(03a01Fa\.wav\)"),
        ("ravdess", r"no audio named as RAVDESS's is \(03-01-06-01-02-01-12\.wav\)"),
        ("crema-d", r"no audio named as CREMA-D's is \(1001_DFA_ANG_XX\.wav\)"),
        ("iemocap", r"no SessionN/dialog/EmoEvaluation/Ses\*\.txt"),
        ("msp-podcast", r"no labels_consensus\.csv"),
        ("msp-improv", r"no Evaluation\.txt"),
    ],
)
def test_a_folder_that_is_another_corpus_is_refused_with_what_was_looked_for(tmp_path, kind, words):
    put_tone(tmp_path / "hello.wav", (0, 0, 0), 0)
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, kind=kind)
    assert "\n" not in str(error.value)
