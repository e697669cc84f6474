"""Promises of the MLflow door, on a real sqlite store and a real tracking server that can be taken away."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_server import Server, free_port

from cpcscale.errors import UserError
from cpcscale.tracking import outbox
from cpcscale.tracking.about import About, DataInput, source_tags
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.store import StoreError, TrackingConfig, connect
from cpcscale.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def config(place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TrackingConfig:
    """A local store, an experiment of its own for each test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return TrackingConfig(request.node.name, f"sqlite:///{place}/mlflow.db")


def start(config: TrackingConfig, run_dir: Path | None = None, **other: object) -> Tracker:
    settings = {"kind": "pretrain", "name": "small", "tags": {}, "params": {}} | other
    return Tracker.start(config, run_dir=str(run_dir) if run_dir else None, **settings)  # type: ignore[arg-type]


def only_run(config: TrackingConfig) -> TrackedRun:
    (run,) = read_runs(config)
    return run


def steps(run: TrackedRun, key: str) -> list[int]:
    return [step for step, _ in run.history(key)]


def test_a_tracker_that_may_not_any_more_sends_nothing_and_keeps_nothing(
    config: TrackingConfig, tmp_path: Path
) -> None:
    may = [True]
    tracker = start(config, tmp_path, allowed=lambda: may[0])
    tracker.log(1, {"loss": 4.0})
    assert tracker.flush()
    may[0] = False
    tracker.log(2, {"loss": 3.0})
    tracker.artifact("plan.txt", "late")
    assert not tracker.flush()
    assert steps(only_run(config), "loss") == [1]
    assert only_run(config).artifact("plan.txt") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_a_run_started_again_goes_on_in_the_same_run_and_logs_no_step_twice(
    config: TrackingConfig, tmp_path: Path
) -> None:
    first = start(config, tmp_path)
    for step in range(1, 21):
        first.log(step, {"loss": 4 - step / 10, **({"heldout_loss": 4.0} if step == 10 else {})})
    first.artifact("notes/plan.txt", "first")
    assert first.flush()

    second = start(config, tmp_path)  # from the checkpoint of step 15: it logs 16 .. 20 once more
    assert second.run_id == first.run_id
    assert only_run(config).status == "RUNNING"
    for step in range(16, 31):
        second.log(step, {"loss": 4 - step / 10, **({"heldout_loss": 3.0} if step % 10 == 0 else {})})
    second.artifact("notes/plan.txt", b"second")
    second.finish("FINISHED", {"loss": 1.0, "audio_s_per_s": 120.0})

    run = only_run(config)
    assert run.status == "FINISHED"
    assert steps(run, "loss") == list(range(1, 31))
    # Step 20 had come through for `loss` only: the key that was missing is added.
    assert run.history("heldout_loss") == [(10, 4.0), (20, 3.0), (30, 3.0)]
    assert run.history("audio_s_per_s") == [(30, 120.0)]
    assert run.artifact("notes/plan.txt") == b"second"
    assert run.artifact("notes/none.txt") is None


def test_a_better_summary_of_a_run_gone_on_with_becomes_its_last_value(config: TrackingConfig, tmp_path: Path) -> None:
    start(config, tmp_path, kind="sweep").finish("FINISHED", {"inner_ccc": 0.3})
    start(config, tmp_path, kind="sweep").finish("FINISHED", {"inner_ccc": 0.4})
    start(config, tmp_path, kind="sweep").finish("FINISHED", {"inner_ccc": 0.4})
    assert only_run(config).history("inner_ccc") == [(0, 0.3), (1, 0.4)]


def test_a_run_that_the_store_has_no_more_is_made_anew(config: TrackingConfig, tmp_path: Path) -> None:
    gone = {"run_id": "0" * 32, "kind": "pretrain"}
    (tmp_path / "run.json").write_text(json.dumps(gone))
    tracker = start(config, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["run_id"] == tracker.run_id != gone["run_id"]
    (tmp_path / "run.json").write_text("torn")
    assert start(config, tmp_path).run_id != tracker.run_id


def test_secrets_are_never_stored(config: TrackingConfig, place: Path, tmp_path: Path) -> None:
    tags = {"cpcscale.source": "https://ann:hunter2@host/repository"}
    params = {"data": "s3://key:hunter2@bucket", "aws_secret_access_key": "hunter2", "nested": {"password": "hunter2"}}
    start(config, tmp_path, tags=tags, params=params).finish("FINISHED")
    run = only_run(config)
    assert run.params == {"data": "s3://***@bucket", "aws_secret_access_key": "***", "nested": "{'password': '***'}"}
    assert run.tag("source") == "https://***@host/repository"
    files = [path for folder in (place, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not any(b"hunter2" in path.read_bytes() for path in files)


def test_a_parameter_keeps_its_first_value_and_the_change_is_named(config: TrackingConfig, tmp_path: Path) -> None:
    start(config, tmp_path, params={"workers": 2, "long": "x" * 9000, "none": None})
    start(config, tmp_path, params={"workers": 1, "long": "x" * 9000, "new": 3})
    run = only_run(config)
    assert run.params == {"workers": "2", "long": "x" * 6000, "none": "None", "new": "3"}
    assert run.tag("changed") == "workers"


def test_children_are_left_out_and_counted(config: TrackingConfig) -> None:
    parent = start(config, kind="sweep")
    for _ in range(2):
        start(config, kind="trial", parent=parent.run_id)
    assert only_run(config).children == 2
    assert sorted(run.kind for run in read_runs(config, children=True)) == ["sweep", "trial", "trial"]


def test_values_that_are_not_finite_come_back_as_they_were(config: TrackingConfig) -> None:
    tracker = start(config)
    tracker.log(1, {"loss": float("inf"), "other": float("nan")})
    tracker.finish("FAILED")
    run = only_run(config)
    assert run.history("loss") == [(1, float("inf"))]
    assert str(run.metrics["other"]) == "nan"


def test_a_store_that_goes_away_stops_nothing_and_gets_the_records_later(
    server: Server,
    remote: TrackingConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tracker = start(remote, tmp_path, params={"empty": "", "none": None}, tags={"cpcscale.empty": ""})
    tracker.log(1, {"loss": 3.0})
    assert tracker.flush()
    with server.away(), caplog.at_level(logging.WARNING, "cpcscale"):
        for step in range(2, 3000):
            tracker.log(step, {"loss": 3.0 - step / 1000})
        tracker.artifact("result.json", "{}")
        assert not tracker.flush()
        assert not tracker.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    tracker.finish("FINISHED", {"ccc_mean": 0.5})
    assert capfd.readouterr().out == ""
    run = only_run(remote)
    assert (run.status, run.metrics["ccc_mean"], run.artifact("result.json")) == ("FINISHED", 0.5, b"{}")
    assert steps(run, "loss") == list(range(1, 3000))
    assert not (tmp_path / "unsent.json").exists()


def test_what_a_process_could_not_send_is_sent_by_the_next(
    server: Server, remote: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "CLOSE_WAIT_S", 0.0)
    first = start(remote, tmp_path)
    with server.away():
        for step in range(1, 11):
            first.log(step, {"loss": float(step)})
        first.artifact("plan.bin", b"\x00\xff")
        first.finish("FAILED")
        assert (tmp_path / "unsent.json").exists()
        with pytest.raises(StoreError):
            start(remote, tmp_path)
    second = start(remote, tmp_path)
    assert second.run_id == first.run_id
    second.log(10, {"loss": 10.0})
    second.log(11, {"loss": 11.0})
    second.finish("FINISHED")
    run = only_run(remote)
    assert steps(run, "loss") == list(range(1, 12))
    assert run.artifact("plan.bin") == b"\x00\xff"
    assert run.status == "FINISHED"
    assert not (tmp_path / "unsent.json").exists()


def test_a_queue_that_is_too_long_is_thinned_not_torn(
    server: Server, remote: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "QUEUE_VALUES", 100)
    tracker = start(remote)
    with server.away():
        for step in range(1000):
            tracker.log(step, {"loss": 1.0})
    assert tracker.flush() or tracker._outbox.send()
    kept = steps(only_run(remote), "loss")
    assert 50 <= len(kept) <= 100
    assert kept == list(range(0, 1000, 16))


def test_a_record_that_the_store_refuses_does_not_hold_up_the_others(
    config: TrackingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(config)
    with caplog.at_level(logging.WARNING, "cpcscale"):
        tracker.log(1, {"not a legal name!": 1.0})
        assert tracker.flush()
        tracker.log(2, {"loss": 1.0})
        assert tracker.flush()
    assert "refuses" in caplog.text
    assert steps(only_run(config), "loss") == [2]


def test_a_store_that_goes_with_the_job_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder, words in (("_ray_pkg_0123", "job's temporary folder"), ("kept", "")):
        caplog.clear()
        (tmp_path / folder).mkdir()
        store = TrackingConfig(uri=f"sqlite:///{tmp_path}/{folder}/mlflow.db")
        Tracker.start(store, kind="finetune", name="r", run_dir=None, tags={}, params={}).finish("FINISHED")
        assert words in caplog.text and bool(words) == ("MLFLOW_TRACKING_URI" in caplog.text)


def test_an_unusable_store_is_one_line_for_the_user(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a data base")
    uris = [f"http://ann:hunter2@127.0.0.1:{free_port()}", str(tmp_path), f"sqlite:///{tmp_path}/text.db", "ftp://host"]
    for uri in uris:
        with pytest.raises(UserError, match="tracking store") as caught:
            start(TrackingConfig(uri=uri))
        assert "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="experiment"):
        TrackingConfig(experiment=" ")


def test_the_environment_names_the_store_and_the_config_outranks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert TrackingConfig().resolved().uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert TrackingConfig().resolved().uri == "http://host:5000"
    assert TrackingConfig(uri="sqlite:///other.db").resolved().uri == f"sqlite:///{tmp_path}/other.db"


def test_reading_an_empty_store_is_one_line_and_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tracked runs.*cpcscale pretrain") as caught:
        read_runs(TrackingConfig(uri=f"sqlite:///{tmp_path}/none/mlflow.db"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_two_processes_that_make_one_store_do_not_race(tmp_path: Path) -> None:
    code = (
        "from cpcscale.tracking.tracker import *\n"
        "Tracker.start(TrackingConfig(), kind='trial', name='a', run_dir=None, tags={}, params={}).finish('FINISHED')"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1])}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0), ("", 0)]
    assert len(read_runs(TrackingConfig(uri=f"sqlite:///{tmp_path}/runs/mlflow.db"))) == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_the_environment_is_described_without_secrets() -> None:
    tags = source_tags()
    assert {"cpcscale.python", "cpcscale.platform", "cpcscale.torch", "cpcscale.ray"} <= set(tags)
    assert re.fullmatch(r"[0-9a-f]{40}", tags.get("cpcscale.git_commit", "0" * 40))
    assert tags.get("cpcscale.git_dirty", "true") in ("true", "false")
    assert not any(sys.prefix in value for value in tags.values())


def test_the_pages_of_mlflow_show_what_a_run_is_and_what_came_of_it(config: TrackingConfig, tmp_path: Path) -> None:
    data = DataInput("tones", "d" * 64, "/data/tones", "training", {"utterances": 36})
    about = About("mean on tones", "Fine-tuning of mean on tones", (data,))
    client = connect(config)
    client.create_experiment(config.experiment)
    for _ in range(2):
        tracker = start(config, tmp_path / "here", about=about)
        run = client.get_run(tracker.run_id)
        assert run.data.tags["mlflow.note.content"].splitlines()[2] == "It runs."
        tracker.outcome("CCC 0.5")
        tracker.finish("FINISHED")
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "mean on tones (here)" and only_run(config).name == "small"
    what, where, came = run.data.tags["mlflow.note.content"].splitlines()
    assert (what.strip(), came) == ("Fine-tuning of mean on tones", "CCC 0.5") and str(tmp_path / "here") in where
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("tones", "d" * 36)
    kind = client.get_experiment_by_name(config.experiment).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
