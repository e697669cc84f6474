"""Promises about files of one name: a copy is left out and named, another signal is never taken in silence."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from made_corpora import put_crema_d, put_emodb, put_iemocap, put_msp_improv, put_msp_podcast, put_ravdess
from trees import noise

from cpcscale import audio
from cpcscale.emotion.audio.from_shards import locate
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.copies import SECOND_COPY
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.rows import ShardEntry

CORPORA = {
    "emodb": (put_emodb, "wav"),
    "ravdess": (put_ravdess, "Actor_01"),
    "crema-d": (put_crema_d, "AudioWAV"),
    "iemocap": (put_iemocap, "Session1/sentences/wav/Ses01F_impro01"),
    "msp-podcast": (put_msp_podcast, "Audios"),
    "msp-improv": (put_msp_improv, "Audio"),
}


def read(path: Path) -> Corpus:
    return open_corpus(CorpusConfig(path=str(path)))


def put_beside(root: Path, folder: str, beside: str, change) -> int:
    """Writes a changed copy of each file of `folder` into `beside`, which sorts before it; returns how many."""
    files = sorted((root / folder).rglob("*.wav"))
    for path in files:
        wave, rate_hz = soundfile.read(path)
        other = root / beside / path.relative_to(root / folder)
        other.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(other, change(wave), rate_hz)
    return len(files)


@pytest.mark.parametrize("kind", CORPORA)
def test_another_signal_under_the_names_of_the_speech_is_refused_with_both_paths(kind, tmp_path):
    put, folder = CORPORA[kind]
    put(tmp_path)
    beside = folder.replace("/wav/", "/wav/EGG/") if kind == "iemocap" else "EGG"
    # The envelope of speech without its fine structure, as a laryngograph has it.
    put_beside(tmp_path, folder, beside, lambda wave: np.abs(wave) - np.abs(wave).mean())
    with pytest.raises(UserError, match=r"EGG.* have one name and are not the same: they correlate by 0\.") as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).count(str(tmp_path)) >= 3
    assert "name the folder of those that are meant as corpus.path" in str(error.value)


@pytest.mark.parametrize("kind", CORPORA)
def test_copies_are_the_corpus_once_and_a_note_names_what_is_used(kind, tmp_path):
    put, folder = CORPORA[kind]
    once = read(put(tmp_path))
    beside = folder.replace("/wav/", "/wav/again/") if kind == "iemocap" else "again"
    count = put_beside(tmp_path, folder, beside, lambda wave: wave)
    twice = read(tmp_path)
    assert twice.digest == once.digest
    # Calm, which has no label, is dropped as such.
    calm = kind == "ravdess"
    assert twice.dropped_counts.pop(SECOND_COPY) == count - calm
    (note,) = set(twice.notes) - set(once.notes)
    assert f"copies are left out ({count - calm}): of " in note and note.endswith(".wav, the first is used")


def test_a_coded_copy_of_other_length_or_level_is_a_copy_and_another_take_is_none(tmp_path):
    put_crema_d(tmp_path, actors=1)
    put_beside(tmp_path, "AudioWAV", "copy", lambda wave: np.concatenate([np.zeros(1105), wave * 0.5]))
    assert read(tmp_path).dropped_counts == {SECOND_COPY: 6}
    put_beside(tmp_path, "AudioWAV", "copy", lambda wave: wave[::-1])
    with pytest.raises(UserError, match="they correlate by"):
        read(tmp_path)
    put_beside(tmp_path, "AudioWAV", "copy", lambda wave: wave[: len(wave) // 3])
    with pytest.raises(UserError, match=r"they last 0\.\d+ s and 0\.\d+ s"):
        read(tmp_path)
    put_beside(tmp_path, "AudioWAV", "copy", lambda wave: wave * 0)
    with pytest.raises(UserError, match="one is silent"):
        read(tmp_path)


def test_two_label_tables_of_one_name_that_differ_are_refused(tmp_path):
    put_msp_podcast(tmp_path, podcasts=2)
    table = tmp_path / "Labels" / "labels_consensus.csv"
    (tmp_path / "old" / "Labels").mkdir(parents=True)
    other = tmp_path / "old" / "Labels" / "labels_consensus.csv"
    other.write_text(table.read_text())
    assert len(read(tmp_path).utterances) == 6
    other.write_text(table.read_text().replace("Female", "Male"))
    with pytest.raises(UserError, match=r"labels_consensus\.csv have one name and are not the same"):
        read(tmp_path)
    put_crema_d(tmp_path / "crema")
    (tmp_path / "crema" / "sub").mkdir()
    (tmp_path / "crema" / "sub" / "VideoDemographics.csv").write_text("ActorID,Sex\n1001,Male\n")
    with pytest.raises(UserError, match=r"VideoDemographics\.csv have one name"):
        read(tmp_path / "crema")


def test_a_key_that_two_tars_of_a_set_have_is_refused_where_their_audio_differs(tmp_path):
    entries = []
    for number, seed in enumerate((0, 0, 1)):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.wav").write_bytes(audio.encode(noise(1.0, seed), "wav"))
        packed = pack(str(tmp_path / f"{number}"), str(tmp_path / f"s{number}"), PackConfig())
        index = packed.splits["train"]
        entries.append((index, index.rows(0).table))
    rows = [Utterance("a", "/elsewhere/a.wav", "s", (3, 3, 3))]

    def joined(*numbers: int) -> Index:
        made = []
        for at in numbers:
            shard = entries[at][0].shards.to_pylist()[0]
            made.append(ShardEntry(f"{at}.tar", shard["sha256"], shard["bytes"], entries[at][1]))
        return Index.of(str(tmp_path), made)

    assert locate(joined(0, 1), rows)[0] is not None
    with pytest.raises(UserError, match=r"a is a in 0\.tar and in 2\.tar of .*, with other audio"):
        locate(joined(0, 1, 2), rows)
