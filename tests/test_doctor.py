"""Promises of `cpcscale doctor`: a line for each thing that a run rests on, ok or with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from object_store import ObjectStore

from cpcscale import machine
from cpcscale.cli import main

NAMES = ["cores", "memory", "temporary", "audio", "versions", "GPU", "Ray", "run_dir", "MLflow", "cache"]
PRETRAIN = str(Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_machine_that_can_do_all_is_ten_lines_with_ok_and_nothing_stays(tmp_path, capsys):
    run_dir = tmp_path / "runs" / "new"
    assert main(["doctor", f"run_dir={run_dir}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in NAMES]
    said = dict(zip(NAMES, lines, strict=True))
    assert f" {machine.usable_cores()}" in said["cores"]
    assert "started and ended here" in said["Ray"]
    assert "created once" in said["run_dir"]
    assert not run_dir.exists()
    # The run that it wrote to the tracking store is deleted.
    assert main(["compare", f"uri=sqlite:///{tmp_path}/mlflow.db"]) == 2
    assert "no tracked runs" in capsys.readouterr().err


def test_each_thing_that_fails_has_its_way_out_and_the_rest_is_tried_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr("cpcscale.cluster.session._ANSWERS_WITHIN_S", 0.1)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    asked = ["doctor", "--json", PRETRAIN, f"run_dir={tmp_path}/file/run", "tracking.uri=ftp://x"]
    assert main([*asked, "train.precision=fp16", "data.shards=x"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found) == NAMES
    ways_out = {"GPU": "use fp32", "Ray": "unset RAY_ADDRESS", "run_dir": "check", "MLflow": "write sqlite:///"}
    assert {name for name in NAMES if not found[name]["ok"]} == {*ways_out, "cache"}
    assert all(way in found[name]["text"] for name, way in ways_out.items())
    assert "set feed.cache.folder to a folder" in found["cache"]["text"]


def test_a_store_is_tried_where_the_config_has_it(s3: ObjectStore, capsys, tmp_path, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cpcscale.doctor._ray", lambda: "")
    asked = ["doctor", PRETRAIN, f"run_dir={s3.base}/doctor/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "written, read, listed and created once" in said
    assert "this clock " in said
    assert "it may take 50 GB" in said


def test_a_config_that_no_verb_takes_is_refused_before_anything_is_tried(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("run_dir: x\nencodings: 3\n")
    assert main(["doctor", str(tmp_path / "my.yaml")]) == 2
    assert "unknown key encodings" in capsys.readouterr().err


def test_memory_is_that_of_the_smallest_group_above(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_groups", lambda controller: [tmp_path / "job", tmp_path])
    (tmp_path / "job").mkdir()
    whole = machine.usable_memory()
    (tmp_path / "job" / "memory.max").write_text("max\n")
    assert machine.usable_memory() == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.usable_memory() == 1_000_000
