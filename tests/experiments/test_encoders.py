"""The encoder in a recogniser is taken for another one: it gives what its checkpoint gives, and hides nothing of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_voices import TINY, put_checkpoint, put_corpus, recipe
from stores import store

import cpcscale
from cpcscale import config
from cpcscale.cli import main
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.encoders.networks import encoder_digest, features_digest
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.errors import UserError
from cpcscale.experiments.encoders import kept_of, open_encoder, open_encoders
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.serve.folder import FOLDER, SCORES

KEYS = {"protocol": {"split": "speakers3"}, "svm_search": False, "head": "ridge"}
LICENCE = "one, 1 h, CC BY 4.0\ntwo, 2 h, CC0-1.0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a pretraining, and the recogniser `mine` on it."""
    folder = tmp_path_factory.mktemp("encoders")
    put_corpus(folder / "tones")
    put_checkpoint(folder / "pretrained")
    fitted(folder, str(folder / "pretrained"), out=folder / "mine", **{"encoder.licence": LICENCE})
    return folder


def fitted(folder: Path, encoder: str, **keys: object) -> cpcscale.Recogniser:
    return cpcscale.fit(folder / "tones" / "manifest.csv", encoder=encoder, **{**KEYS, **keys})


def taking(folder: Path, checkpoint: object, system: str = "precpc", **encoder: object):
    made = recipe(folder / "tones", system, str(checkpoint))
    return dataclasses.replace(made, encoder=dataclasses.replace(made.encoder, **encoder))


def test_the_encoder_of_a_recogniser_gives_the_z_and_c_of_its_checkpoint(place):
    of_recogniser, of_checkpoint = cpcscale.load(place / "mine").encoder, cpcscale.load(place / "pretrained")
    file = place / "tones" / "03.wav"
    for layer in ("z", "c"):
        np.testing.assert_array_equal(
            of_recogniser.encode(file, layer=layer).frames, of_checkpoint.encode(file, layer=layer).frames
        )
    assert (of_recogniser.source["step"], of_recogniser.source["fingerprint"]) == (1, "f" * 64)


def test_fine_tuning_on_a_recogniser_is_fine_tuning_on_the_checkpoint_that_it_was_made_of(place):
    found = [open_encoder(taking(place, checkpoint)) for checkpoint in (place / "pretrained", place / "mine")]
    (one, of_checkpoint), (other, of_recogniser) = found
    # One cache serves both.
    assert features_digest(one, "c", "corpus") == features_digest(other, "c", "corpus")
    assert encoder_digest(other) == encoder_digest(open_encoder(taking(place, place / "mine"))[0])
    for key in ("fingerprint", "step", "chosen", "audio_s"):
        assert of_recogniser[key] == of_checkpoint[key]
    assert of_recogniser["url"] == str(place / "mine") and of_recogniser["licence"] == LICENCE
    first, second = (fitted(place, str(place / name)) for name in ("pretrained", "mine"))
    assert first.scores["ccc"] == second.scores["ccc"]
    assert second.scores["licences"]["audio that the encoder was pretrained on"] == LICENCE
    file = place / "tones" / "01.wav"
    assert first.predict(file).unit == second.predict(file).unit


@pytest.mark.parametrize("system", ["random", "minicpc"])
def test_systems_that_take_its_architecture_take_that_of_the_checkpoint(place, system):
    (one, _), (other, _) = (open_encoder(taking(place, place / name, system)) for name in ("pretrained", "mine"))
    assert one.config == other.config == TINY
    assert encoder_digest(one.untrained(3)) == encoder_digest(other.untrained(3))


def test_the_recogniser_of_a_recogniser_is_an_encoder_for_others_too(place, tmp_path):
    fitted(place, str(place / "mine"), out=tmp_path / "second", system="precpc+functionals")
    network, source = open_encoder(taking(place, tmp_path / "second"))
    assert features_digest(network, "c", "corpus") == features_digest(
        open_encoder(taking(place, place / "pretrained"))[0], "c", "corpus"
    )
    assert source["licence"] == LICENCE and source["step"] == 1


def test_a_released_one_and_those_of_mlflow_are_taken_by_their_names_alone(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(tmp_path / "runs"))
    for url, name in ((place / "pretrained", "encoder"), (place / "mine", "mine")):
        assert main(["register", str(url), "--name", name, "--alias", "champion"]) == 0
    names = ("emotion-small", "models:/encoder@champion", "models:/mine/1")
    found = open_encoders({name: taking(place, name) for name in names})
    assert [source["url"] for _, source in found.values()] == [*names]
    expected = open_encoder(taking(place, place / "pretrained"))[0]
    for name in names[1:]:
        assert features_digest(found[name][0], "c", "corpus") == features_digest(expected, "c", "corpus")
    model = fitted(place, "emotion-small")
    assert model.scores["encoder"]["fingerprint"] == cpcscale.load("emotion-small").scores["encoder"]["fingerprint"]


def test_the_command_line_takes_a_name_and_keeps_it_in_the_record(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config.load(FinetuneConfig, None, ["encoder.checkpoint=emotion-small", f"run_dir={tmp_path}/run"])
    assert settings.encoder.checkpoint == "emotion-small"
    made = {**KEYS, "corpus": {"path": str(place / "tones")}, "workers": 1, "tracking": {"uri": store(tmp_path)}}
    Path("config.json").write_text(json.dumps(made))
    assert main(["finetune", "config.json", "encoder.checkpoint=emotion-small", "run_dir=run"]) == 0
    chosen = cpcscale.load("emotion-small").scores["encoder"]["chosen"]
    assert json.loads(Path("run/result.json").read_text())["encoder_chosen"] == chosen


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("functionals", "system=functionals has no encoder"),
        ("precpc+random", r"system=precpc\+random has 2 networks"),
        ("random", "does not say that its encoder is as a pretraining left it"),
    ],
)
def test_without_one_network_that_a_pretraining_made_it_is_refused_in_one_line(place, tmp_path, system, message):
    encoder = None if system == "functionals" else str(place / "pretrained")
    fitted(place, encoder, system=system, out=tmp_path / "other")
    with pytest.raises(UserError, match=message) as refused:
        open_encoder(taking(place, tmp_path / "other"))
    assert "\n" not in str(refused.value)
    if system != "random":
        with pytest.raises(UserError, match=message):
            _ = cpcscale.load(tmp_path / "other").encoder


def test_an_encoder_that_was_trained_on_labels_is_refused(place, tmp_path):
    small = {"recogniser": {"heads": 2, "hidden": 16, "dense": 16, "pool_frames": 4}, "head": "attention"}
    quick = {"fit": {"epochs": 1, "batch": 6, "device": "cpu"}, "encoder.frozen": False}
    fitted(place, str(place / "pretrained"), out=tmp_path / "trained", **small, **quick)
    with pytest.raises(UserError, match="it may know the speakers of tones"):
        open_encoder(taking(place, tmp_path / "trained"))


def test_a_damaged_one_is_refused_in_one_line(place, tmp_path):
    shutil.copytree(place / "mine", tmp_path / "torn")
    (tmp_path / "torn" / SCORES).write_text("{}")
    with pytest.raises(UserError, match="torn"):
        open_encoder(taking(place, tmp_path / "torn"))
    scores = json.loads((place / "mine" / SCORES).read_text())
    for number, damaged in enumerate(({"step": "x"}, {"probe_set": ["x"]}, {"probe_set": {"corpus": "tones"}})):
        files = FOLDER.read_files(str(place / "mine"))
        files[SCORES] = json.dumps(scores | {"encoder": scores["encoder"] | damaged}).encode()
        FOLDER.write(str(tmp_path / str(number)), files)
        with pytest.raises(UserError, match="is no recogniser"):
            open_encoder(taking(place, tmp_path / str(number)))


def test_how_a_checkpoint_was_chosen_goes_with_the_recogniser(place):
    corpus = open_corpus(taking(place, "x").corpus)
    probe_set = {"corpus": corpus.name, "corpus_digest": corpus.digest, "speakers": ["voice1"], "marks": []}
    source = {"url": "run", "step": 1, "chosen": "best by probe", "probe_set": probe_set}
    ours, others = taking(place, "x"), taking(place, "x", selected_on_test=True)
    kept = kept_of(ours, corpus, source)
    assert kept["frozen"] and "url" not in kept and "marks" not in kept["probe_set"]
    said = kept_of(others, corpus, {"url": "run", "chosen": "newest"})
    for known, by in ((kept, "its probe"), (said, "figures"), (kept_of(ours, corpus, said), "figures")):
        with pytest.raises(UserError, match=f"was chosen by {by} on all speakers of corpus tones"):
            refuse_selected(ours, corpus, {"url": "mine", **known})
    assert "probe_set" not in kept_of(ours, corpus, {**source, "chosen": "newest"})
    assert kept_of(taking(place, "x", "random"), corpus, source) == {}
    assert SYSTEMS["precpc"].takes_weights
