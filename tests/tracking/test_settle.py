"""Promises of a tracked run whose driver, store or place of files fails: its status is right, and one warning says why.

On a real sqlite store, with drivers that are processes of their own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import pytest

from cpcscale.errors import UserError
from cpcscale.tracking import outbox
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.store import TrackingConfig, connect, sqlite_path, store_uri
from cpcscale.tracking.tracker import Tracker, settle

ROOT = Path(__file__).parents[2]
# A driver that is killed while it works, with a run below its own.
KILLED = """
import os, sys
from cpcscale.tracking.about import About
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker
config, more = TrackingConfig(sys.argv[3], sys.argv[1]), {"tags": {}, "params": {}, "about": About(what="A sweep")}
sweep = Tracker.start(config, kind="sweep", name="s", run_dir=sys.argv[2], **more)
trial = Tracker.start(config, kind="trial", name="t", run_dir=sys.argv[2] + "/t", parent=sweep.run_id, **more)
sweep.log(1, {"loss": 2.0})
assert sweep.flush()
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def config(place: Path, request: pytest.FixtureRequest) -> TrackingConfig:
    """A local store, an experiment of its own for each test."""
    return TrackingConfig(request.node.name, f"sqlite:///{place}/mlflow.db")


def start(config: TrackingConfig, run_dir: Path, kind: str = "pretrain") -> Tracker:
    return Tracker.start(config, kind=kind, name="small", run_dir=str(run_dir), tags={}, params={})


def only_run(config: TrackingConfig) -> TrackedRun:
    (run,) = read_runs(config)
    return run


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_whose_driver_was_killed_ends_at_the_next_start_with_those_below_it(config, tmp_path):
    program = [sys.executable, "-c", KILLED, config.uri, str(tmp_path / "s"), config.experiment]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    assert subprocess.run(program, env=environment, check=False).returncode == -9
    assert {run.kind: run.status for run in read_runs(config, children=True)} == {
        "sweep": "RUNNING",
        "trial": "RUNNING",
    }
    settle(config, str(tmp_path / "s"), "sweep")
    assert {run.kind: run.status for run in read_runs(config, children=True)} == {"sweep": "KILLED", "trial": "KILLED"}
    for run in read_runs(config, children=True):
        note = connect(config).get_run(run.run_id).data.tags["mlflow.note.content"].splitlines()
        assert (note[0].strip(), note[2]) == ("A sweep", "It was stopped before its end.")
    # It goes on in the same run.
    again = start(config, tmp_path / "s", "sweep")
    assert only_run(config).status == "RUNNING"
    again.finish("FINISHED")
    assert only_run(config).status == "FINISHED" and only_run(config).history("loss") == [(1, 2.0)]
    assert "driver" not in json.loads((tmp_path / "s/run.json").read_text())


def test_a_run_whose_driver_lives_or_has_ended_or_may_live_elsewhere_is_left_alone(config, tmp_path):
    settle(config, str(tmp_path / "a"), "pretrain")
    assert not list(tmp_path.iterdir())
    tracker = start(config, tmp_path / "a")
    settle(config, str(tmp_path / "a"), "pretrain")
    assert only_run(config).status == "RUNNING"
    note = json.loads((tmp_path / "a/run.json").read_text())
    (tmp_path / "a/run.json").write_text(json.dumps(note | {"driver": ["another boot", 1, "1"]}))
    settle(config, str(tmp_path / "a"), "pretrain")
    assert only_run(config).status == "RUNNING"
    tracker.finish("FAILED")
    settle(config, str(tmp_path / "a"), "pretrain")
    assert only_run(config).status == "FAILED"
    with pytest.raises(UserError, match="holds a run of pretrain, and this is sweep"):
        settle(config, str(tmp_path / "a"), "sweep")


def test_an_end_that_could_not_be_sent_is_sent_by_the_next_start_as_it_was(config, tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "CLOSE_WAIT_S", 0.0)
    tracker = start(config, tmp_path / "a")
    store = sqlite_path(store_uri(config))
    away = store.rename(tmp_path / "away.db")
    store.mkdir()
    tracker.log(1, {"loss": 3.0})
    tracker.finish("FINISHED", {"ccc_mean": 0.5})
    store.rmdir()
    away.rename(store)
    assert only_run(config).status == "RUNNING"
    settle(config, str(tmp_path / "a"), "pretrain")
    run = only_run(config)
    assert (run.status, run.metrics) == ("FINISHED", {"loss": 3.0, "ccc_mean": 0.5})
    assert not (tmp_path / "a/unsent.json").exists()


def test_a_run_that_cannot_be_described_in_its_folder_has_failed(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        start(config, tmp_path / "file")
    assert only_run(config).status == "FAILED"


@pytest.mark.parametrize("missing", ["the place of files", "a temporary folder"])
def test_files_that_cannot_be_kept_hold_up_nothing_and_come_later(
    config, tmp_path, missing, place, monkeypatch, caplog
):
    tracker = start(config, tmp_path / "a")
    if missing == "the place of files":
        (place / "mlartifacts").touch()
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    tracker.artifact("plan.txt", "a plan")
    tracker.log(1, {"loss": 3.0})
    assert not tracker.flush()
    tracker.artifact("result.json", "{}")
    tracker.finish("FINISHED", {"ccc_mean": 0.5})
    run = only_run(config)
    assert (run.status, run.metrics) == ("FINISHED", {"loss": 3.0, "ccc_mean": 0.5})
    [line] = warnings(caplog)
    assert f"cannot keep files of run {run.run_id}" in line and "\n" not in line

    monkeypatch.setattr(tempfile, "tempdir", None)
    if missing == "the place of files":
        (place / "mlartifacts").unlink()
    settle(config, str(tmp_path / "a"), "pretrain")
    assert (run.artifact("plan.txt"), run.artifact("result.json")) == (b"a plan", b"{}")
    assert only_run(config).status == "FINISHED"
    assert not (tmp_path / "a/unsent.json").exists()


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_a_run_that_is_deleted_while_it_logs_is_one_warning(config, tmp_path, what, caplog):
    tracker = start(config, tmp_path / "a")
    client = mlflow.MlflowClient(config.uri)
    if what == "run":
        client.delete_run(tracker.run_id)
    else:
        client.delete_experiment(client.get_run(tracker.run_id).info.experiment_id)
    for step in range(5):
        tracker.log(step, {"loss": 1.0})
        assert tracker.flush()
    tracker.finish("FINISHED", {"ccc_mean": 0.5})
    [line] = warnings(caplog)
    assert "refuses" in line and "deleted" in line


@pytest.mark.parametrize(
    ("written", "file"),
    [("a%20b/m.db", "a b/m.db"), ("a b/m.db", "a b/m.db"), ("100%25/m.db", "100%/m.db"), ("a%3Fb%23.db", "a?b#.db")],
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_store_is_written_and_read_in_the_one_file_that_its_address_names(
    written, file, relative, tmp_path, monkeypatch
):
    (tmp_path / "50% of it").mkdir()
    monkeypatch.chdir(tmp_path / "50% of it")
    before = "" if relative else f"{tmp_path}/"
    config = TrackingConfig("settle", f"sqlite:///{before}{written}").resolved()
    where = Path.cwd() / file if relative else tmp_path / file
    assert sqlite_path(config.uri) == where == sqlite_path(config.resolved().uri)
    if written.startswith("a%20b"):
        start(config, tmp_path / "a").finish("FINISHED")
        assert where.is_file()
        assert only_run(config).status == "FINISHED"


def test_a_store_in_memory_is_refused():
    with pytest.raises(UserError, match="ends with the process"):
        store_uri(TrackingConfig(uri="sqlite://"))


def test_a_store_is_made_on_a_file_system_without_locks(config, tmp_path, monkeypatch, caplog):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    start(config, tmp_path / "a").finish("FINISHED")
    assert only_run(config).status == "FINISHED"
    assert warnings(caplog) == []
