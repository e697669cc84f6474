"""Jobs as `ray job submit` sends them to a running Ray: stopped, sent again, refused, their driver killed.

The project folder has the jobs and configs alone, and the package is installed, as on a cluster's nodes. An undisturbed
run of the same config, in this process and without Ray, says what has to come out.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import commands
import mlflow
import psutil
import pytest
import ray_heads
import speech
from commands import STEPS, arguments, long
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from ray_heads import Head, Job

from cpcscale.cluster import session
from cpcscale.errors import UserError
from cpcscale.runs.ledger import Ledger

STOP = 17
CONFIG = "configs/pretrain/quickstart.yaml"


@dataclass
class Place:
    """A Ray, a project folder to submit from, and a folder for runs."""

    head: Head
    project: Path
    folder: Path

    def pretrain(self, shards: Path, name: str, *more: str, stop_wait_s: int = 60) -> Job:
        entrypoint = ["python", "jobs/pretrain.py", CONFIG, *arguments(shards, self.folder, name, 1), *more]
        # Ray merges these with what cpcscale asks for its workers, one of which is the same.
        own = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db", "MALLOC_ARENA_MAX": "2"}
        return Job(self.head, self.project, entrypoint, own | {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s)})

    def ids(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def statuses(self) -> list[str]:
        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        [experiment] = [each for each in client.search_experiments() if each.name == "cpcscale"]
        return [run.info.status for run in client.search_runs([experiment.experiment_id])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("jobs")
    with ray_heads.head(cpus=1) as head:
        yield Place(head, ray_heads.project(folder / "project"), folder)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, list[str]]]:
    """(summary, ids by step) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    summary, _ = commands.undisturbed(shards, folder)
    return summary, speech.ids(folder / "whole.jsonl")


@dataclass
class Drill:
    """A job that was stopped, and one of the same command after it."""

    run: Path
    stopped: str
    lines: list[str]
    step: int
    made: list[int]
    held: bool
    statuses: list[list[str]]
    again: Job
    ended: str


@pytest.fixture(scope="module")
def drill(place: Place, shards: Path) -> Drill:
    # No checkpoint is due before the end.
    rare = "checkpoint.every_steps=1000"
    first = place.pretrain(shards, "run", rare)
    first.reach(place.ids("run"), STOP)
    first.stop()
    stopped = first.ended()
    run, step = place.folder / "run", len(speech.ids(place.ids("run")))
    made, held, statuses = checkpoints.steps(run), Ledger(str(run)).head().held, place.statuses()
    again = place.pretrain(shards, "run", rare, "--json")
    ended = again.ended()
    return Drill(run, stopped, first.lines(), step, made, held, [statuses, place.statuses()], again, ended)


@long
def test_a_job_that_is_stopped_leaves_a_checkpoint_made_just_then_and_says_so(drill):
    assert drill.stopped == "STOPPED"
    assert STOP <= drill.step < STEPS
    assert drill.made == [drill.step]
    assert not drill.held
    done = f"stopped after step {drill.step} of {STEPS}, with a checkpoint of it"
    assert drill.lines[-1] == f"cpcscale: {done}; the same command goes on from the last checkpoint"
    assert "pretrain: asked to stop (SIGTERM): making a checkpoint, 60 s at most" in drill.lines
    assert "Traceback" not in "\n".join(drill.lines)
    assert not [line for line in drill.lines if "Ray kills this job" in line]


@long
def test_the_same_job_again_goes_on_from_there_and_ends_as_an_undisturbed_run(drill, place, whole):
    assert drill.ended == "SUCCEEDED", drill.again.streamed()[-3000:]
    assert drill.again.submitted.returncode == 0
    assert any(f"going on from {drill.run}/checkpoints/step-{drill.step:08d}" in line for line in drill.again.lines())
    undisturbed, ids = whole
    assert speech.ids(place.ids("run")) == ids
    stated = drill.again.result()
    for name in ("loss", "accuracy_mean", "audio_s"):
        assert stated[name] == pytest.approx(undisturbed[name], abs=1e-5), name
    assert drill.statuses == [["KILLED"], ["FINISHED"]]
    client = mlflow.MlflowClient(f"sqlite:///{place.folder}/mlflow.db")
    history = client.get_metric_history(stated["run_id"], "loss")
    assert [record.step for record in history] == list(range(1, STEPS + 1))


@long
def test_what_a_job_says_is_seen_by_who_submitted_it(drill):
    streamed = drill.again.streamed().splitlines()
    assert any(line.startswith(f"pretrain: {STEPS}/{STEPS} steps, loss ") for line in streamed)
    assert [line for line in streamed if line in drill.again.lines()] == drill.again.lines()


def test_a_users_mistake_fails_the_job_with_one_line_and_our_status(place):
    # By the command of the package, on a config of the user's own that the working directory ships.
    (place.project / "mine.yaml").write_text("train:\n  step: 3\n")
    job = Job(place.head, place.project, ["cpcscale", "pretrain", "mine.yaml"])
    assert job.ended() == "FAILED"
    assert (job.info().driver_exit_code, job.submitted.returncode) == (2, 1)
    [line] = [line for line in job.lines() if line.startswith("cpcscale: ")]
    assert line == job.lines()[-1]
    assert line == "cpcscale: error: mine.yaml: unknown key train.step (did you mean train.steps?)"
    assert line in job.info().message
    assert "Traceback" not in "\n".join(job.lines())


def test_how_long_a_stopped_job_has_is_read_from_its_environment_and_what_is_no_number_is_refused(monkeypatch):
    for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    assert session.stop_wait_s() == math.inf, "no job has no such limit"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert session.stop_wait_s() == JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    assert session.stop_wait_s() == 60
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "a minute")
    with pytest.raises(UserError, match="RAY_JOB_STOP_WAIT_TIME_S=a minute is not a whole number"):
        session.stop_wait_s()


@long
@pytest.mark.parametrize("how", ["its driver is killed", "Ray gives it no time to stop"])
def test_a_job_that_ends_without_a_word_leaves_nothing_at_work_and_the_same_command_goes_on(
    place, whole, shards, how, tmp_path
):
    here = Place(place.head, place.project, tmp_path)
    job = here.pretrain(shards, "run", stop_wait_s=0)
    job.reach(here.ids("run"), STOP)
    tree = [process for node in place.head.nodes for process in node.workers()]
    assert tree
    if how == "its driver is killed":
        job.driver().send_signal(signal.SIGKILL)
        assert job.ended() == "FAILED"
        assert job.info().driver_exit_code == 128 + signal.SIGKILL
    else:
        job.stop()
        assert job.ended() == "STOPPED"
    assert any("Ray kills this job 0 s after it is asked to stop" in line for line in job.lines())
    _, living = psutil.wait_procs(tree, timeout=60)
    assert not living
    step = here.ids("run").read_text().count("\n")
    before = checkpoints.steps(tmp_path / "run")
    time.sleep(2)
    assert (here.ids("run").read_text().count("\n"), checkpoints.steps(tmp_path / "run")) == (step, before)
    again = here.pretrain(shards, "run", "--json")
    assert again.ended() == "SUCCEEDED", again.streamed()[-3000:]
    undisturbed, ids = whole
    assert speech.ids(here.ids("run")) == ids
    assert again.result()["loss"] == pytest.approx(undisturbed["loss"], abs=1e-5)
    assert here.statuses() == ["FINISHED"]
