"""Models of runs whose store is elsewhere: sent when it answers again, fetched through it, and what is not sent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow_server import Server
from saved_recognisers import model_of, put_recogniser, support_vectors

from cpcscale.serve.folder import load_recogniser
from cpcscale.tracking import outbox
from cpcscale.tracking.registry import opened
from cpcscale.tracking.store import TrackingConfig, connect
from cpcscale.tracking.tracker import Tracker


def start(config: TrackingConfig, run_dir: Path) -> Tracker:
    return Tracker.start(config, kind="finetune", name="small", run_dir=str(run_dir), tags={}, params={})


def test_a_model_that_the_store_could_not_take_is_sent_by_the_next_process_and_read_back(
    remote: TrackingConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "CLOSE_WAIT_S", 0.5)
    model = model_of(put_recogniser(tmp_path / "recogniser", 0.5))
    first = start(remote, tmp_path)
    with server.away():
        first.model(model)
        first.tag("late", "kept")
        first.finish("FINISHED")
    assert json.loads((tmp_path / "unsent.json").read_text())["models"]
    second = start(remote, tmp_path)
    second.model(model)
    second.finish("FINISHED")
    run = connect(remote).get_run(second.run_id)
    (made,) = run.outputs.model_outputs
    assert run.data.tags["cpcscale.late"] == "kept"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", remote.uri)
    with opened(f"models:/{made.model_id}") as folder:
        assert load_recogniser(folder).scores["ccc"]["mean"] == 0.5
    assert not Path(folder).exists()


def test_rows_of_training_data_and_what_a_licence_limits_do_not_leave_this_machine_by_a_run(
    remote: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(remote, tmp_path)
    tracker.model(model_of(put_recogniser(tmp_path / "recogniser", 0.5, support_vectors())))
    limited = model_of(put_recogniser(tmp_path / "limited", 0.5, marks=["PROXY", "NON-COMMERCIAL"]))
    tracker.model(replace(limited, name="limited"))
    tracker.finish("FINISHED")
    assert connect(remote).get_run(tracker.run_id).outputs.model_outputs == []
    assert "holds 3 rows of training data" in caplog.text and "says how it can be" in caplog.text
    assert "limited is marked NON-COMMERCIAL, and" in caplog.text
    assert not (tmp_path / "unsent.json").exists()
