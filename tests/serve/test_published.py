"""A published recogniser is taken away and applied: from Python, from the command line, and when it is damaged."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import soundfile
from made_voices import put_checkpoint, put_corpus
from stores import store

import cpcscale
from cpcscale.cli import main
from cpcscale.errors import UserError
from cpcscale.serve.folder import CONFIG, MODEL
from cpcscale.storage.marked_folder import MARKER
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig

RATE = 16_000


def arguments(folder: Path, system: str, *more: str) -> list[str]:
    config = {
        "system": system,
        "corpus": {"path": str(folder / "tones")},
        "protocol": {"split": "speakers3", "dev_share": 0.25},
        "encoder": {"checkpoint": str(folder / "pretrained")},
        "recogniser": {"heads": 2, "hidden": 16, "dense": 16, "pool_frames": 4},
        "fit": {"epochs": 2, "batch": 6, "learning_rate": 3e-3, "device": "cpu", "refit": True},
        "run_dir": str(folder / system),
        "workers": 1,
        "tracking": {"uri": store(folder)},
    }
    (folder / f"{system}.yaml").write_text(json.dumps(config))
    return ["finetune", str(folder / f"{system}.yaml"), *more]


def beats(kind: type = np.float64) -> np.ndarray:
    """A second of a tone that comes and goes, which is no speech, but might be sobs."""
    time_S = np.arange(RATE) / RATE
    return (np.sin(2 * np.pi * 440 * time_S) * (1 + np.sin(2 * np.pi * 4 * time_S)) / 9).astype(kind)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the published run `precpc`, its folds kept too."""
    folder = tmp_path_factory.mktemp("published")
    put_corpus(folder / "tones")
    put_checkpoint(folder / "pretrained")
    assert main(arguments(folder, "precpc", "publish=folds")) == 0
    return folder


def test_the_recognisers_of_the_folds_give_the_predictions_of_the_folds(place):
    check_folds(place, "precpc")


def check_folds(place: Path, system: str) -> None:
    rows = list(csv.DictReader((place / system / "predictions.csv").open()))
    for fold in range(3):
        model = cpcscale.load(place / system / "recogniser" / f"fold-{fold}")
        tested = [row for row in rows if row["fold"] == str(fold)]
        found = model.predict_many(sorted((place / "tones").glob(f"{row['utterance']}*"))[0] for row in tested)
        for row, one in zip(tested, found, strict=True):
            assert one.activation == pytest.approx(float(row["activation_hat"]), abs=1e-5)
            assert one.dominance == pytest.approx(float(row["dominance_hat"]), abs=1e-5)


def test_a_file_an_array_and_any_form_of_it_give_the_same(place, tmp_path):
    model = cpcscale.load(place / "precpc" / "recogniser")
    file = place / "tones" / "03.wav"
    wave, rate = soundfile.read(file, dtype="int16")
    of_file = model.predict(file)
    assert model.scale == (1.0, 5.0) and model.system == "precpc" and model.marks == ()
    assert of_file.seconds == pytest.approx(len(wave) / RATE)
    for array in (wave, wave.astype(np.float32) / 32768, np.stack([wave, wave], axis=1)):
        assert model.predict(array, rate).unit == pytest.approx(of_file.unit, abs=1e-5)
    soundfile.write(tmp_path / "same.flac", wave, RATE)
    assert model.predict(tmp_path / "same.flac").unit == of_file.unit
    assert of_file.valence == pytest.approx((of_file.unit[1] + 1) * 2 + 1)
    # As many samples at another rate come through the resampler of `pack`.
    assert model.predict(np.repeat(wave, 3), 48_000).seconds == pytest.approx(of_file.seconds, abs=0.01)


def test_a_value_has_an_interval_and_the_folder_tells_no_speaker(place):
    folder = place / "precpc" / "recogniser"
    model = cpcscale.load(folder)
    one = model.predict(place / "tones" / "03.wav")
    assert model.interval_level == 0.8
    for name in ("activation", "valence", "dominance"):
        low, high = one.interval(name)
        assert 1 <= low <= np.clip(getattr(one, name), 1, 5) <= high <= 5 and low < high
    assert one.row()["valence_low"] == round(one.interval("valence")[0], 4) and one.row()["flags"] == "non_speech"
    with pytest.raises(UserError, match="did you mean valence"):
        one.interval("valance")
    card = (folder / "README.md").read_text()
    assert "at least 80% of the labels lie in it" in card and "corpus tones: unknown" in card
    names = {path.name for path in (place / "tones").iterdir()}
    residuals = (folder / "residuals.safetensors").read_bytes()
    assert not any(name.encode() in residuals for name in names)


def test_fit_puts_the_recogniser_where_it_is_asked_for_and_it_doubts_audio_unlike_its_own(place, tmp_path, capsys):
    command = ["recogniser", "fit", *arguments(place, "mfcc", "head=ridge")[1:]]
    assert main([*command, f"out={tmp_path}/mine"]) == 0
    assert "head ridge" in capsys.readouterr().out
    scores = json.loads((tmp_path / "mine" / "scores.json").read_text())
    assert scores["training_rows"] == 0
    model = cpcscale.load(tmp_path / "mine")
    assert model.predict(place / "tones" / "00.wav").flags == ("non_speech",)
    clicks = np.where(np.arange(RATE) % 4000 == 0, 30_000, 0).astype(np.int16)
    assert model.predict(clicks, RATE).flags[-1] == "unlike_training"
    assert main([*command, f"out={tmp_path}/mine"]) == 0
    capsys.readouterr()
    shutil.copytree(place / "precpc" / "recogniser", tmp_path / "other")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    for wrong, message in (
        ([], "needs one out=FOLDER"),
        ([f"out={tmp_path}/other"], "holds another recogniser"),
        # Before anything is fitted.
        ([f"out={tmp_path}/taken", "run_dir=/proc/none"], "holds other files"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_what_is_no_speech_has_a_reason_and_no_value(place, tmp_path):
    model = cpcscale.load(place / "precpc" / "recogniser")
    (tmp_path / "text.wav").write_text("this is no audio")
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "short.wav", np.ones(3) * 0.1, RATE)
    names = ["text.wav", "silence.wav", "short.wav", "gone.wav"]
    found = model.predict_many([tmp_path / name for name in names])
    assert [one.reason for one in found] == ["unreadable", "silent", "short", "missing"]
    assert all(np.isnan(one.activation) for one in found)
    table = found.to_pandas()
    assert list(table["reason"]) == [one.reason for one in found] and table["activation"].isna().all()
    with pytest.raises(UserError, match="no file at"):
        model.predict(tmp_path / "gone.wav")
    with pytest.raises(UserError, match="a list is no audio"):
        model.predict([0.1, 0.2])
    with pytest.raises(UserError, match="pass it, as rate=16000"):
        model.predict(np.zeros(10))
    for array, rate in (
        (np.zeros(10, np.int64), RATE),
        (np.zeros((2, RATE), np.float32), RATE),
        (np.zeros(9), 1 << 40),
    ):
        with pytest.raises(UserError, match="is no audio"):
            model.predict(array, rate)
    assert model.predict(np.full(RATE, np.nan), RATE).reason and model.predict(np.zeros(0), RATE).reason
    assert np.isfinite(model.predict(beats(np.float16), RATE).unit).all()


def test_what_has_flags_has_a_value_and_with_strict_none(place, tmp_path, capsys):
    model = cpcscale.load(place / "precpc" / "recogniser")
    found = model.predict(beats(), RATE)
    assert found.reason == "" and found.flags[:2] == ("non_speech", "bandwidth") and found.speech_share == 0
    strict = model.predict(beats(), RATE, strict=True)
    assert strict.reason == " ".join(found.flags) and strict.flags == found.flags
    assert np.isnan([strict.activation, *strict.unit, *strict.interval("valence")]).all()
    # A level that stays the same has neither.
    tone = model.predict(np.sin(np.arange(RATE) / 9), RATE)
    assert tone.reason == "no_speech" and tone.flags == () and np.isnan(tone.valence) and tone.seconds == 1
    soundfile.write(tmp_path / "loud.wav", (beats(np.float32) * 20).clip(-1, 1), RATE)
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(RATE) / 9) / 2, RATE)
    command = ["predict", str(place / "precpc" / "recogniser"), str(tmp_path)]
    assert main(command) == 1
    loud, tone = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert loud["flags"].split()[:3] == ["non_speech", "clipped", "level"] and loud["reason"] == "" and loud["valence"]
    assert tone["reason"] == "no_speech" and tone["speech_share"] == "0.0" and tone["flags"] == tone["valence"] == ""
    assert main([*command, "--strict"]) == 1
    loud, _ = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert loud["reason"] == loud["flags"] and loud["valence"] == ""


def test_the_card_says_how_far_other_levels_and_the_telephone_shift_the_values(place):
    scores = cpcscale.load(place / "precpc" / "recogniser").scores
    assert scores["shift"].keys() == {"gain+12", "gain-12", "telephone"}
    mean, deviation = scores["shift"]["gain+12"]["activation"]
    card = (place / "precpc" / "recogniser" / "README.md").read_text()
    assert f"| 12 dB louder | {mean:+.2f} ± {deviation:.2f} |" in card and deviation > 0


def test_the_command_prints_a_row_a_file_and_its_status_says_whether_all_have_a_value(place, tmp_path, capsys):
    model = str(place / "precpc" / "recogniser")
    assert main(["predict", model, str(place / "tones")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(list((place / "tones").glob("*.wav"))) and {row["reason"] for row in rows} == {""}
    (tmp_path / "list.txt").write_text(f"{place}/tones/00.wav\n{tmp_path}/gone.wav\n")
    assert main(["predict", model, f"@{tmp_path}/list.txt", f"{place}/tones/0[12].wav", "--json"]) == 1
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(row["file"]).name for row in found] == ["00.wav", "gone.wav", "01.wav", "02.wav"]
    assert found[1]["activation"] is None and found[1]["reason"] == "missing"
    assert "1 of 4 files have no value" in captured.err
    (tmp_path / "self.txt").write_text(f"@{tmp_path}/self.txt\n")
    (tmp_path / "latin.txt").write_bytes("ä.wav".encode("latin-1"))
    (tmp_path / "folder.wav").mkdir()
    assert main(["predict", model, str(tmp_path / "list.txt"), str(tmp_path / "folder.wav"), "--json"]) == 1
    assert [json.loads(line)["reason"] for line in capsys.readouterr().out.splitlines()] == ["unreadable"] * 2
    out = tmp_path / "out.csv"
    assert main(["predict", model, f"{place}/tones/00.wav", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2
    for wrong, message in (
        ([model, f"{place}/tones/00.wav", "--out", str(out)], "exists"),
        ([str(place / "precpc"), f"{place}/tones/00.wav"], "its recogniser is in it"),
        ([model, str(place / "pretrained")], "no audio at"),
        ([model, f"{place}/tones/x*.wav"], "no file fits the pattern"),
        ([model, f"{place}/tones/x**.wav"], "is no pattern"),
        ([model, f"@{tmp_path}/self.txt"], "names another list"),
        ([model, f"@{tmp_path}/latin.txt"], "is no list of files in UTF-8"),
        ([model, f"@{tmp_path}/none.txt"], "none.txt"),
    ):
        assert main(["predict", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_recogniser_says_what_it_is_and_whether_it_is_whole(place, tmp_path, capsys):
    assert main(["recogniser", "show", str(place / "precpc" / "recogniser")]) == 0
    said = capsys.readouterr().out
    assert "36 utterances of 6 speakers" in said and "on speakers that it did not know" in said
    copy = shutil.copytree(place / "precpc" / "recogniser", tmp_path / "copy")
    assert main(["recogniser", "verify", str(copy)]) == 0
    data = bytearray((copy / MODEL).read_bytes())
    data[-1] ^= 1
    (copy / MODEL).write_bytes(data)
    assert main(["recogniser", "verify", str(copy)]) == 1
    assert "model.safetensors does not match the hash" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model\.safetensors does not match .*: copy it again, or fit it again"):
        cpcscale.load(copy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: (place / MARKER).unlink(), "no recogniser at .*: name the folder of one"),
        (lambda place: (place / CONFIG).unlink(), "config.json is missing"),
        (lambda place: (place / MARKER).write_text('{"format": 2, "files": {}}'), "format 2, this cpcscale reads 1"),
        (lambda place: (place / MARKER).write_text("[" * 9999), "is damaged"),
    ],
    ids=["marker", "config", "newer", "brackets"],
)
def test_a_folder_that_is_torn_or_newer_is_one_line(place, tmp_path, spoil, message):
    copy = Path(shutil.copytree(place / "precpc" / "recogniser", tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(UserError, match=message) as error:
        cpcscale.load(copy)
    assert "\n" not in str(error.value)


def test_a_run_that_kept_none_says_how_to_have_one_and_the_same_command_makes_it(place, capsys):
    assert main(arguments(place, "functionals", "svm_search=false")) == 0
    with pytest.raises(UserError, match="kept no recogniser: run `cpcscale finetune CONFIG publish=final"):
        cpcscale.load(place / "functionals")
    assert main(arguments(place, "functionals", "svm_search=false", "publish=final")) == 0
    capsys.readouterr()
    assert cpcscale.load(place / "functionals" / "recogniser").predict(place / "tones" / "00.wav").reason == ""
    assert not (place / "functionals" / "recogniser" / "fold-0").exists()
    assert main(arguments(place, "functionals", "svm_search=false", "publish=folds")) == 0
    check_folds(place, "functionals")
    assert main(arguments(place, "functionals", "speaker_norm=true", "publish=final")) == 2
    assert "cannot be applied to one file" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_shows_in_mlflow_what_it_is_its_data_and_a_model_for_each_recogniser_it_kept(place):
    (run,) = [each for each in read_runs(TrackingConfig(uri=store(place))) if each.name == "precpc"]
    client = mlflow.MlflowClient(store(place))
    seen = client.get_run(run.run_id)
    assert seen.info.run_name == "precpc-seed0 on tones, speakers3"
    what, where, came = seen.data.tags["mlflow.note.content"].splitlines()
    assert "precpc" in what and "36 utterances of 6 speakers" in what and str(place / "precpc") in where
    assert came.startswith("CCC on speakers it did not know: activation ")
    tones, pretrained = sorted(
        (each.dataset for each in seen.inputs.dataset_inputs), key=lambda data: data.name != "tones"
    )
    assert (tones.name, pretrained.digest) == ("tones", "f" * 36)
    assert pretrained.name.startswith(f"pretraining of {place}/pretrained")
    models = [client.get_logged_model(each.model_id) for each in seen.outputs.model_outputs]
    assert sorted(each.name for each in models) == ["recogniser", *(f"recogniser-fold-{fold}" for fold in range(3))]
    (whole,) = [each for each in models if each.name == "recogniser"]
    assert {metric.dataset_name for metric in whole.metrics} == {"tones"}
    # A fold's model has the figures of its own test speakers, which are others for each.
    result = json.loads((place / "precpc" / "result.json").read_text())
    found = {each.name: {metric.key: metric.value for metric in each.metrics} for each in models}
    for fold in result["folds"]:
        name = f"fold{fold['fold']}_ccc_"
        assert found[f"recogniser-fold-{fold['fold']}"] == {f"{name}{key}": each for key, each in fold["ccc"].items()}
    assert found["recogniser"] == {f"ccc_{key}": each for key, each in result["ccc"].items()}
    assert seen.data.metrics["ccc_mean"] == result["ccc"]["mean"]
    wave = (place / "tones" / "03.wav").read_bytes()
    (row,) = mlflow.pyfunc.load_model(whole.artifact_location).predict({"audio": [wave]})
    of_file = cpcscale.load(place / "precpc" / "recogniser").predict(place / "tones" / "03.wav").row()
    assert row["activation"] == of_file["activation"] and row["end_s"] == of_file["end_s"]
    assert not list(place.rglob("mlruns"))


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, cpcscale; print([name for name in ('torch', 'ray', 'numpy', 'mlflow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
