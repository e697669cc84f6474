"""An encoder is loaded and applied: the frames that a recogniser takes, on one clock, whatever the audio's form."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hf_networks import put_network
from made_voices import put_checkpoint, put_corpus, recipe

import cpcscale
from cpcscale.cli import main
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.inputs import prepare
from cpcscale.errors import UserError
from cpcscale.serve.features import _names
from cpcscale.serve.folder import load_recogniser

RATE = 16_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    put_corpus(folder / "tones")
    put_checkpoint(folder / "pretrained")
    return folder


def speechlike(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def test_its_frames_are_those_that_a_recogniser_takes(place):
    settings = recipe(place / "tones", "precpc", str(place / "pretrained"))
    prepared = prepare(settings, open_corpus(settings.corpus))
    encoder = cpcscale.load(place / "pretrained")
    assert prepared.inputs is not None
    for row in (0, 5):
        found = encoder.encode(prepared.corpus.utterances[row].path)
        np.testing.assert_allclose(found.frames, prepared.inputs[row][0], atol=1e-6)


def test_each_layer_has_its_width_and_both_are_z_and_c_side_by_side(place):
    encoder = cpcscale.load(place / "pretrained")
    file = place / "tones" / "00.wav"
    z, c, both = (encoder.encode(file, layer=layer).frames for layer in ("z", "c", "both"))
    assert encoder.layers == ("c", "z", "both") and [encoder.width(layer) for layer in encoder.layers] == [8, 6, 14]
    np.testing.assert_array_equal(both, np.concatenate([z, c], axis=1))
    with pytest.raises(UserError, match="layer=mix is not one that this encoder gives: use one of c, z, both"):
        encoder.encode(file, layer="mix")


def test_a_file_and_an_array_of_any_form_give_the_same_frames_and_times(place, tmp_path):
    encoder = cpcscale.load(place / "pretrained")
    file = place / "tones" / "03.wav"
    wave, _ = soundfile.read(file, dtype="int16")
    expected = encoder.encode(file)
    assert expected.frames.dtype == np.float32 and len(expected.frames) == len(wave) // 160
    np.testing.assert_allclose(expected.times_s, 0.005 + 0.01 * np.arange(len(wave) // 160))
    for array in (wave, wave.astype(np.float32) / 32768, np.stack([wave, wave], axis=1)):
        np.testing.assert_array_equal(encoder.encode(array, RATE).frames, expected.frames)
    np.testing.assert_array_equal(encoder.encode(file.read_bytes()).frames, expected.frames)
    other = encoder.encode(np.repeat(wave, 3), 48_000)
    assert len(other.frames) == pytest.approx(len(expected.frames), abs=1)
    assert len(encoder.encode(np.sign(speechlike(1)), RATE).frames) == 100, "clipped audio has frames, as it has values"
    for wrong, message in (
        (lambda: encoder.encode(wave), "has no sampling rate of its own"),
        (lambda: encoder.encode(tmp_path / "gone.wav"), "gone.wav"),
        (lambda: encoder.encode(wave[:9], RATE), "too short for speech"),
        (lambda: encoder.encode(np.zeros(RATE), RATE), "every sample is zero"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_long_audio_is_encoded_in_windows_whose_frames_stand_on_one_clock(place):
    """z has a short past, so the seams do not show; c at a seam has at least a quarter of a window of its past."""
    encoder = cpcscale.load(place / "pretrained")
    wave = speechlike(3.33)
    whole = {layer: encoder.encode(wave, RATE, layer) for layer in ("z", "c")}
    encoder.max_s = 0.777
    parts = {layer: encoder.encode(wave, RATE, layer) for layer in ("z", "c")}
    for layer in ("z", "c"):
        np.testing.assert_array_equal(parts[layer].times_s, whole[layer].times_s)
    np.testing.assert_allclose(parts["z"].frames, whole["z"].frames, atol=1e-5)
    # The first window lasts 0.777 s, and the second starts at 0.38 s.
    np.testing.assert_allclose(parts["c"].frames[:57], whole["c"].frames[:57], atol=1e-5)
    assert np.abs(parts["c"].frames - whole["c"].frames).mean() < 0.1 * np.abs(whole["c"].frames).mean()


def test_a_hugging_face_network_has_all_its_hidden_states_on_the_same_clock_through_the_seams(tmp_path):
    encoder = cpcscale.load(put_network(tmp_path / "hf"))
    wave = speechlike(2.5)
    mix, z = encoder.encode(wave, RATE, "mix"), encoder.encode(wave, RATE, "z")
    assert mix.frames.shape == ((len(wave) - 400) // 320 + 1, encoder.width("mix"))
    assert mix.times_s[0] == 200 / RATE and encoder.hop_s == 0.02
    encoder.max_s = 0.9
    np.testing.assert_array_equal(encoder.encode(wave, RATE, "z").times_s, z.times_s)


def test_the_folder_of_a_checkpoint_is_an_encoder_and_no_recogniser(place):
    (checkpoint,) = (place / "pretrained" / "checkpoints").iterdir()
    encoder = cpcscale.load(checkpoint)
    assert isinstance(encoder, cpcscale.Encoder) and "step 1" in repr(encoder)
    for url in (place / "pretrained", checkpoint):
        with pytest.raises(UserError, match="is a pretrained encoder, no recogniser"):
            load_recogniser(str(url))


def test_features_are_written_as_arrays_with_an_index_that_has_their_times(place, tmp_path, capsys):
    out, model = tmp_path / "out", str(place / "pretrained")
    (tmp_path / "text.wav").write_text("this is no audio")
    shutil.copytree(place / "tones", tmp_path / "tones")
    given = [str(tmp_path / "tones" / "0[01].wav"), str(tmp_path / "text.wav"), str(tmp_path / "gone.wav")]
    assert main(["features", model, *given, "--out", str(out), "--layer", "both"]) == 1
    said = capsys.readouterr().err
    assert "text.wav" in said and "2 of 4 files have no features" in said
    rows = list(csv.DictReader((out / "index.csv").open()))
    assert [row["reason"] for row in rows] == ["", "", "unreadable", "missing"]
    expected = cpcscale.load(model).encode(tmp_path / "tones" / "00.wav", layer="both")
    found = np.load(out / rows[0]["npy"])
    assert rows[0]["npy"] == "tones/00.wav.npy"
    np.testing.assert_array_equal(found, expected.frames)
    times_s = float(rows[0]["first_s"]) + float(rows[0]["hop_s"]) * np.arange(int(rows[0]["frames"]))
    np.testing.assert_allclose(times_s, expected.times_s)
    again = [model, str(tmp_path / "tones" / "00.wav"), "--out", str(out)]
    assert main(["features", *again]) == 2 and "--force" in capsys.readouterr().err
    assert main(["features", *again, "--force"]) == 0
    assert len((out / "index.csv").read_text().splitlines()) == 2


def test_features_are_written_as_one_table(place, tmp_path):
    out, model = tmp_path / "out.parquet", str(place / "pretrained")
    assert main(["features", model, f"{place}/tones/0[01].wav", "--out", str(out), "--layer", "z"]) == 0
    table = pq.read_table(out)
    encoder = cpcscale.load(model)
    expected = [encoder.encode(place / "tones" / f"0{number}.wav", layer="z") for number in (0, 1)]
    assert table.schema.metadata[b"layer"] == b"z" and table.column_names == ["file", "time_s", "frame"]
    np.testing.assert_array_equal(
        np.array(table["frame"].to_pylist(), np.float32), np.concatenate([each.frames for each in expected])
    )
    np.testing.assert_allclose(table["time_s"], np.concatenate([each.times_s for each in expected]))
    assert set(table["file"].to_pylist()) == {str(place / "tones" / name) for name in ("00.wav", "01.wav")}


def test_files_of_a_store_and_of_the_disk_have_names_of_their_own():
    assert _names(["s3://bucket/a.wav", "/here/a.wav"]) == {
        "s3://bucket/a.wav": "s3/bucket/a.wav.npy",
        "/here/a.wav": "here/a.wav.npy",
    }


def test_features_refuses_what_it_cannot_do_in_one_line(place, tmp_path, tmp_path_factory, capsys):
    model, file = str(place / "pretrained"), str(place / "tones" / "00.wav")
    given = tmp_path_factory.mktemp("given")
    empty, shards, folder = given / "empty.txt", given / "set", given / "folder.parquet"
    empty.write_text("")
    shards.mkdir()
    (shards / "index.json").write_text("{}")
    (shards / "shard-000000.tar").write_text("")
    folder.mkdir()
    for words, message in (
        ([str(tmp_path), file, "--out", str(tmp_path / "x")], "no recogniser at"),
        ([model, file, "--out", str(tmp_path / "x"), "--layer", "mix"], "layer=mix is not one"),
        ([model, str(place / "pretrained"), "--out", str(tmp_path / "x")], "no audio at"),
        ([model, file, "--out", file], "exists"),
        ([model, f"@{empty}", "--out", str(tmp_path / "x")], "names no file"),
        ([model, str(shards), "--out", str(tmp_path / "x")], "is a shard set"),
        ([model, file, "--out", str(folder), "--force"], "is a folder"),
    ):
        assert main(["features", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
