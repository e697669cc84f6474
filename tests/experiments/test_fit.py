"""`cpcscale.fit` makes of a table in memory what `finetune` makes of a corpus, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from made_voices import put_checkpoint, put_corpus
from stores import store

import cpcscale
from cpcscale.cli import main
from cpcscale.errors import UserError

KEYS: dict[str, Any] = {
    "protocol": {"split": "speakers3", "dev_share": 0.25},
    "recogniser": {"heads": 2, "hidden": 16, "dense": 16, "pool_frames": 4},
    "fit": {"epochs": 2, "batch": 6, "learning_rate": 3e-3, "device": "cpu"},
    "svm_search": False,
}
ALONE = """
import sys, pandas, cpcscale
table = pandas.read_csv({table!r})
table["path"] = {folder!r} + "/" + table["path"]
model = cpcscale.fit(table, svm_search=False, protocol={{"split": "speakers3"}})
assert model.scores["ccc"]["mean"] == model.scores["ccc"]["mean"]
print([name for name in ("ray", "mlflow") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    put_corpus(folder / "tones")
    put_checkpoint(folder / "pretrained")
    return folder


@pytest.fixture(scope="module")
def table(place: Path) -> pandas.DataFrame:
    """The corpus in memory, with whole paths."""
    found = pandas.read_csv(place / "tones" / "manifest.csv")
    found["path"] = [str(place / "tones" / name) for name in found["path"]]
    return found


@pytest.mark.parametrize("system", ["functionals", "precpc"])
def test_it_has_the_scores_and_gives_the_predictions_of_the_same_finetune(place, table, system):
    encoder = cpcscale.load(place / "pretrained") if system == "precpc" else None
    config = {
        "system": system,
        "corpus": {"path": str(place / "tones")},
        "encoder": {"checkpoint": str(place / "pretrained")},
        "run_dir": str(place / f"finetune-{system}"),
        "workers": 1,
        "publish": "final",
        "tracking": {"uri": store(place)},
        **{**KEYS, "fit": {**KEYS["fit"], "refit": True}},
    }
    # The folds are drawn by the keys of utterances, which are names in the corpus's folder there.
    named = table.assign(utterance=[Path(path).stem for path in table["path"]])
    model = cpcscale.fit(named, encoder=encoder, **KEYS)
    (place / f"{system}.yaml").write_text(json.dumps(config))
    assert main(["finetune", str(place / f"{system}.yaml")]) == 0
    theirs = cpcscale.load(place / f"finetune-{system}" / "recogniser")
    assert model.system == theirs.system == system
    assert model.scores["ccc"] == pytest.approx(theirs.scores["ccc"], abs=1e-5)
    assert model.scores["learnt_from"] == theirs.scores["learnt_from"] == {"utterances": 36, "speakers": 6}
    for name in ("00", "17"):
        file = place / "tones" / f"{name}.wav"
        assert model.predict(file).unit == pytest.approx(theirs.predict(file).unit, abs=1e-5)


def test_every_form_of_a_table_gives_the_same_and_so_do_two_processes(place, table, monkeypatch):
    monkeypatch.chdir(place / "tones")
    relative = pandas.read_csv("manifest.csv")
    part = relative.assign(file=relative.pop("path"), start=0.0, end=np.nan).set_index(["file", "start", "end"])
    whole = pandas.read_csv("manifest.csv")
    forms = (whole, pyarrow.Table.from_pandas(whole), part)
    found = [cpcscale.fit(form, **KEYS).scores for form in (*forms, Path("manifest.csv"))]
    assert all(each["ccc"] == found[0]["ccc"] for each in found)
    assert [each["corpus"] for each in found] == ["table", "table", "table", "tones"]
    side_by_side = cpcscale.fit(whole, workers=2, **KEYS)
    assert side_by_side.scores["ccc"] == pytest.approx(found[0]["ccc"], abs=1e-6)


@pytest.mark.parametrize("system", ["precpc", "functionals+precpc"])
def test_what_is_saved_is_what_was_fitted(place, table, tmp_path, system):
    model = cpcscale.fit(table, system=system, encoder=place / "pretrained", out=tmp_path / "saved", **KEYS)
    again = cpcscale.load(tmp_path / "saved")
    file = place / "tones" / "01.wav"
    assert again.predict(file).unit == pytest.approx(model.predict(file).unit, abs=1e-6)
    assert again.scores == model.scores
    np.testing.assert_array_equal(
        again.encoder.encode(file).frames, cpcscale.load(place / "pretrained").encode(file).frames
    )
    with pytest.raises(UserError, match="exists: save to another folder"):
        model.save(tmp_path / "saved")
    model.save(tmp_path / "saved", force=True)
    with pytest.raises(UserError, match="exists: name another folder"):
        cpcscale.fit(table, out=tmp_path / "saved", **KEYS)
    with pytest.raises(UserError, match="may have learnt from the speakers of the table"):
        cpcscale.fit(table, encoder=model.encoder, **KEYS)


def test_a_run_is_recorded_where_it_is_asked_for(place, table):
    run_dir = place / "recorded"
    model = cpcscale.fit(table, run_dir=run_dir, tracking={"uri": store(place)}, **KEYS)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["ccc"] == model.scores["ccc"] and len(result["run_id"]) == 32
    assert (run_dir / "predictions.csv").exists() and (run_dir / "recogniser" / "COMPLETE.json").exists()


def test_nothing_is_left_on_the_disk_and_neither_ray_nor_mlflow_is_loaded(place, tmp_path):
    for name in ("here", "tmp", "home"):
        (tmp_path / name).mkdir()
    folder = str(place / "tones")
    code = ALONE.format(table=f"{folder}/manifest.csv", folder=folder)
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home")}
    env["XDG_CACHE_HOME"] = str(tmp_path / "home" / "cache")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and "fit functionals: 4/4 folds" in done.stderr
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["here", "home", "tmp"]


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (lambda table: list(table), {}, "a list is no table: pass a pandas DataFrame"),
        (lambda table: table.drop(columns="valence"), {}, "the table has no column valence"),
        (lambda table: table.assign(valence="high")[3:], {}, "the table row 3, column valence: 'high' is not a number"),
        (lambda table: table.assign(valence=None).set_axis([*"abc"] * 12), {}, "the table row a, column valence: ''"),
        (lambda table: table.assign(valence=[3, "\n"] * 18).to_dict("list"), {}, "the table row 1, column valence: ''"),
        (lambda table: {"path": ["a.wav"], "speaker": []}, {}, "have different lengths: path 1, speaker 0"),
        (lambda table: {"path": ["a", "b", "c"], "speaker": "ann"}, {}, "column speaker of the table is one value"),
        (lambda table: {"path": ["a"], "activation": 3}, {}, "column activation of the table is one value"),
        (lambda table: table.set_index("path", drop=False), {}, "path as a column and in its index"),
        (lambda table: table.assign(path="gone.wav", utterance=range(36)), {}, "gone.wav"),
        (lambda table: table.assign(speaker="ann"), {}, "1 speakers cannot fill 5 folds"),
        (lambda table: table, {"fit": {"epoch": 3}}, r"unknown key fit.epoch \(did you mean fit.epochs\?\)"),
        (lambda table: table, {"protocol": "loso"}, "protocol is a group of keys"),
        (lambda table: table, {"encoder": "pretrained", "system": "functionals"}, "takes no encoder"),
        (lambda table: table, {"system": "precpc"}, "needs encoder.checkpoint=RUN_DIR"),
        (lambda table: table, {"encoder": "nowhere"}, "no pretraining at encoder.checkpoint="),
        (lambda table: table, {"publish": "none"}, "publish=none keeps no recogniser"),
        (lambda table: table, {"speaker_norm": True}, "cannot be applied to one file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(table, change, keys, message):
    with pytest.raises(UserError, match=message) as error:
        cpcscale.fit(change(table), **keys)
    assert "\n" not in str(error.value)
