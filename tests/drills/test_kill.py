"""The whole run killed, through the real command line and Ray: it goes on as if nothing had happened.

`cpcscale pretrain configs/pretrain/quickstart.yaml` with a tiny network loses one of its two workers, goes on, and is
then killed as a whole; it ends with three workers that are fed by actors. An undisturbed run of the same config, in
this process and without Ray, says what has to come out: final losses agree to TOLERANCE, batches exactly.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import commands
import mlflow
import pytest
import speech
from commands import EVERY, STEPS, TOLERANCE, WAIT_S, Command, long

from cpcscale.runs.ledger import Ledger

# A worker is killed at the first step, the whole run at the second.
WORKER, ALL = 8, 27
STATED = {
    "steps",
    "loss",
    "accuracy_mean",
    "accuracy_chance",
    "audio_s",
    "audio_s_per_s",
    "data_wait_share",
    "run_id",
    "checkpoint",
}


@dataclass
class Drill:
    folder: Path
    undisturbed: dict[str, Any]
    # Loss by step of the undisturbed run.
    losses: dict[int, float]
    disturbed: dict[str, Any]
    # The last step that the killed run had done, and the MLflow run it belonged to.
    killed_at: int
    run_id: str
    restarted: str
    notes: str


@pytest.fixture(scope="module")
def drill(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    folder = tmp_path_factory.mktemp("kill")
    undisturbed, losses = commands.undisturbed(shards, folder)
    killed = Command(shards, folder, "killed", workers=2)
    killed.reach(WORKER)
    worker = next(each for each in killed.tree() if "RayTrainWorker" in " ".join(each.cmdline()))
    worker.send_signal(signal.SIGKILL)
    killed.kill_after(ALL)
    killed_at, run_id = killed.last_step(), json.loads((killed.run_dir / "run.json").read_text())["run_id"]
    last = Command(shards, folder, "killed", workers=3, feed="actors")
    disturbed = last.stated()
    return Drill(folder, undisturbed, losses, disturbed, killed_at, run_id, killed.errors(), last.errors())


def test_the_drill_killed_a_worker_and_then_all_in_mid_run(drill):
    assert "starting again" in drill.restarted and "going on from" in drill.restarted
    assert ALL <= drill.killed_at < STEPS


def test_a_run_killed_twice_ends_with_the_loss_of_an_undisturbed_one(drill):
    for name in ("loss", "accuracy_mean", "audio_s"):
        assert drill.disturbed[name] == pytest.approx(drill.undisturbed[name], abs=TOLERANCE), name
    for name in ("heldout", "unseen"):
        assert drill.disturbed[name]["loss"] == pytest.approx(drill.undisturbed[name]["loss"], abs=TOLERANCE)


def test_every_batch_is_the_same_with_two_workers_and_three_fed_by_actors(drill):
    expected = speech.ids(drill.folder / "whole.jsonl")
    assert len(expected) == STEPS
    assert speech.ids(drill.folder / "killed.jsonl") == expected


def test_it_goes_on_from_the_last_checkpoint_and_says_so(drill):
    step = drill.killed_at // EVERY * EVERY
    assert any(
        f"going on from {drill.folder}/killed/checkpoints/step-{each:08d}" in drill.notes
        for each in (step, step - EVERY)
    )


def test_the_last_line_of_output_has_the_keys_that_scripts_rely_on(drill):
    summary = drill.disturbed
    assert set(summary) >= STATED
    assert summary["steps"] == STEPS
    assert summary["accuracy_chance"] == pytest.approx(1 / 9)
    assert Path(summary["checkpoint"], "COMPLETE.json").is_file()
    assert 0 <= summary["data_wait_share"] <= 1
    assert summary["audio_s_per_s"] > 0


def test_one_mlflow_run_goes_on_and_holds_every_step_once(drill):
    assert drill.run_id == drill.disturbed["run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{drill.folder}/mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name == "cpcscale"]
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (drill.disturbed["run_id"], "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    # Also the steps that a killed driver never heard of: the checkpoint carries them.
    assert [record.step for record in history] == list(range(1, STEPS + 1))
    losses = [drill.losses[record.step] for record in history]
    assert [record.value for record in history] == pytest.approx(losses, abs=TOLERANCE)


def test_nothing_of_ray_or_of_torn_writes_stays_in_the_run_folder(drill):
    run = drill.folder / "killed"
    assert {path.name for path in run.iterdir()} == {"checkpoints", "ledger", "run.json"}
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("alive-*"))
    assert [step for step, _ in checkpoints.whole(run)] == checkpoints.steps(run)


@long
def test_a_run_that_is_interrupted_is_given_back_with_nothing_half_written(shards, tmp_path):
    command = Command(shards, tmp_path, "run", workers=1)
    command.reach(EVERY + 2)
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(WAIT_S) == 130
    assert command.errors().splitlines()[-1] == "cpcscale: stopped; the same command goes on from the last checkpoint"
    run = command.run_dir
    assert not Ledger(str(run)).head().held
    assert [step for step, _ in checkpoints.whole(run)] == checkpoints.steps(run) != []
    assert {path.name for path in (run / "checkpoints").iterdir()} == {name for _, name in checkpoints.whole(run)}
    assert {path.name for path in run.iterdir()} == {"checkpoints", "ledger", "run.json"}
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("alive-")]
