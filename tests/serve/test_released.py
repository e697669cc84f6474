"""The recogniser that the package brings is found by its name alone, wherever a model is taken."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saved_recognisers import put_recogniser
from stores import store

import cpcscale
from cpcscale.cli import main
from cpcscale.errors import UserError
from cpcscale.released import folder, names
from cpcscale.serve.folder import verify_recogniser

ROOT = Path(__file__).parents[2]
SPEECH = str(ROOT / "tests" / "data" / "speech" / "asterisk_en" / "agent-alreadyon.opus")
NAME = "emotion-small"
HERE = Path(folder(NAME))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder that has nothing, and where nobody looks for the project."""
    monkeypatch.chdir(tmp_path)


def test_it_says_three_finite_values_of_real_speech_and_intervals_where_it_has_any():
    model = cpcscale.load(NAME)
    one = model.predict(SPEECH)
    assert one.reason == "" and np.isfinite(one.unit).all()
    assert np.isfinite(one.interval("valence")).all() == (model.interval_level > 0)
    assert model.system == "precpc" and model.encoder.encode(SPEECH).frames.std() > 0


def test_each_is_whole_small_and_holds_nothing_of_the_speakers_of_its_corpus():
    assert NAME in names()
    for each in names():
        files = list(Path(folder(each)).iterdir())
        assert sum(file.stat().st_size for file in files) <= 8_000_000
        assert verify_recogniser(folder(each))["ok"]
        assert json.loads((Path(folder(each)) / "scores.json").read_text())["training_rows"] == 0


def texts(value: Any) -> Iterator[str]:
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            yield from texts(each)
        elif isinstance(each, str):
            yield each


def test_its_files_name_the_sources_and_licences_and_no_place_on_the_machine_that_made_it():
    scores = json.loads((HERE / "scores.json").read_text())
    assert "CC0-1.0" in scores["licences"]["corpus emodb-proxy"]
    sources = scores["licences"]["audio that the encoder was pretrained on"].splitlines()
    card = (HERE / "README.md").read_text()
    assert len(sources) > 1 and all(f"\n  - {each}\n" in card for each in sources)
    for name in ("scores.json", "config.json"):
        assert not any(text.startswith(("/", "s3://")) for text in texts(json.loads((HERE / name).read_text())))


def test_every_verb_that_takes_a_model_takes_the_name(capsys):
    assert main(["predict", NAME, SPEECH]) == 0
    [row] = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(row["valence"]) == pytest.approx(cpcscale.load(NAME).predict(SPEECH).valence, abs=1e-4)
    for what in ("show", "verify"):
        assert main(["recogniser", what, NAME, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["path"] == str(HERE)
    assert main(["features", NAME, SPEECH, "--out", "frames"]) == 0
    np.testing.assert_array_equal(
        np.load("frames/agent-alreadyon.opus.npy"), cpcscale.load(NAME).encoder.encode(SPEECH).frames
    )


def test_it_can_be_registered_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(tmp_path / "runs"))
    assert main(["register", NAME, "--name", "mine", "--alias", "champion"]) == 0
    assert cpcscale.load("models:/mine@champion").digest == cpcscale.load(NAME).digest


def test_a_folder_of_that_name_is_named_as_a_path_and_the_bare_name_says_that_it_is_not_meant(tmp_path, caplog):
    put_recogniser(tmp_path / NAME, 0.5)
    for place in (f"./{NAME}", Path(NAME), tmp_path / NAME):
        assert cpcscale.load(place).system == "mean"
    assert caplog.text == ""
    assert cpcscale.load(NAME).system == "precpc"
    assert f"write ./{NAME} for the folder of that name here" in caplog.text


def test_a_name_that_is_nearly_one_is_told_the_released_names_in_one_line(capsys):
    for words in (
        ["predict", "emotion-smal", SPEECH],
        ["recogniser", "show", "emotion-smal"],
        ["features", "emotion-smal", SPEECH, "--out", "frames"],
        ["register", "emotion-smal", "--name", "mine"],
        ["finetune", str(ROOT / "configs/finetune/quickstart.yaml"), "encoder.checkpoint=emotion-smal"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "no model emotion-smal (did you mean emotion-small?): released are emotion-small" in error
        assert error.count("\n") == 1
    Path("emotion-smal").mkdir()
    with pytest.raises(UserError, match="no recogniser at emotion-smal"):
        cpcscale.load("emotion-smal")
