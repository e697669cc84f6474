"""Promises of a run folder's note: a copy never writes to the first one's MLflow run. On a real sqlite store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stores import store

from cpcscale.errors import UserError
from cpcscale.tracking import run_note
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return TrackingConfig("notes", store(tmp_path))


def start(config: TrackingConfig, run_dir: Path, kind: str = "pretrain") -> Tracker:
    return Tracker.start(config, kind=kind, name="small", run_dir=str(run_dir), tags={}, params={})


def test_a_copied_folder_becomes_a_run_of_its_own_that_names_its_origin(config: TrackingConfig, tmp_path: Path) -> None:
    first = start(config, tmp_path / "a")
    first.log(1, {"loss": 4.0})
    first.finish("FINISHED")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = start(config, tmp_path / "b")
    copy.log(1, {"loss": 9.0})
    copy.log(2, {"loss": 8.0})
    copy.finish("KILLED")

    runs = {run.run_id: run for run in read_runs(config)}
    assert set(runs) == {first.run_id, copy.run_id} and first.run_id != copy.run_id
    assert runs[first.run_id].history("loss") == [(1, 4.0)] and runs[first.run_id].status == "FINISHED"
    assert runs[copy.run_id].history("loss") == [(1, 9.0), (2, 8.0)]
    assert runs[copy.run_id].tag("copied_from") == first.run_id
    # Each goes on in its own run from now on.
    assert start(config, tmp_path / "b").run_id == copy.run_id
    assert start(config, tmp_path / "a").run_id == first.run_id


def test_a_moved_or_linked_folder_goes_on_in_its_run(config: TrackingConfig, tmp_path: Path) -> None:
    first = start(config, tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert start(config, tmp_path / "link").run_id == first.run_id
    (tmp_path / "link").unlink()
    (tmp_path / "a").rename(tmp_path / "c")
    assert start(config, tmp_path / "c").run_id == first.run_id
    assert json.loads((tmp_path / "c/run.json").read_text())["place"] == str(tmp_path / "c")


def test_a_copy_from_another_machine_is_a_run_of_its_own(config: TrackingConfig, tmp_path: Path) -> None:
    first = start(config, tmp_path / "a")
    note = json.loads((tmp_path / "a/run.json").read_text())
    (tmp_path / "a/run.json").write_text(json.dumps(note | {"place": "/elsewhere/a", "host": "another"}))
    assert start(config, tmp_path / "a").run_id != first.run_id


@pytest.mark.parametrize("kinds", [("pretrain", "finetune"), ("finetune", "pretrain"), ("sweep", "evaluate")])
def test_a_folder_of_another_kind_is_refused_and_stays_as_it_is(
    config: TrackingConfig, tmp_path: Path, kinds: tuple[str, str]
) -> None:
    first = start(config, tmp_path / "a", kinds[0])
    before = (tmp_path / "a/run.json").read_bytes()
    with pytest.raises(UserError, match=f"holds a run of {kinds[0]}, and this is {kinds[1]}: name another run_dir"):
        start(config, tmp_path / "a", kinds[1])
    assert (tmp_path / "a/run.json").read_bytes() == before
    assert start(config, tmp_path / "a", kinds[0]).run_id == first.run_id


def test_a_folder_that_was_noted_in_another_spelling_is_the_same_folder(tmp_path: Path) -> None:
    run_note.write(str(tmp_path), "7", "pretrain", "small", "notes")
    note = json.loads((tmp_path / "run.json").read_text())
    for place in (f"{tmp_path}/", f"/{tmp_path}", f"file://{tmp_path}/x/.."):
        (tmp_path / "run.json").write_text(json.dumps(note | {"place": place}))
        assert run_note.read_own(str(tmp_path), "pretrain") == ("7", {})
        assert run_note.read_own(f"{tmp_path}//", "pretrain") == ("7", {})
