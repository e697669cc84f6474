"""A process of Ray killed under a pretraining, or its driver: one line and its status, and the same command goes on.

The mailbox and the dashboard are no such loss: the run goes on without a word, and nothing of it is missing.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import commands
import mlflow
import psutil
import pytest
import speech
from commands import STEPS, TOLERANCE, WAIT_S, Command, long

# What is killed: the start of a process's command line, and what the line says of it.
LOST = {"gcs_server": "Ray's gcs_server", "raylet": "Ray's raylet"}
GOES_ON = "died under this command, maybe for lack of memory; the same command goes on from the last checkpoint"


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict, dict]:
    """(summary, loss by step, ids by step) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    summary, losses = commands.undisturbed(shards, folder)
    return summary, losses, speech.ids(folder / "whole.jsonl")


def kill(command: Command, name: str) -> None:
    """SIGKILL to the process of the command's own Ray with this name, which lives."""
    [found] = [each for each in command.tree()[1:] if any(name in part for part in each.cmdline()[:3])]
    found.send_signal(signal.SIGKILL)


def tracked(folder: Path) -> tuple[str, list[tuple[int, float]]]:
    """(status, loss by step) of the one tracked run."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name == "cpcscale"]
    [run] = client.search_runs([experiment.experiment_id])
    return run.info.status, [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")]


def ends_like(command: Command, whole: tuple[dict[str, Any], dict, dict], folder: Path) -> None:
    """Asserts that the command ends as an undisturbed run, with each step once in its tracked run."""
    summary, losses, ids = whole
    stated = command.stated()
    assert speech.ids(command.ids) == ids
    assert stated["loss"] == pytest.approx(summary["loss"], abs=TOLERANCE)
    status, history = tracked(folder)
    assert status == "FINISHED"
    assert [step for step, _ in history] == list(range(1, STEPS + 1))
    assert [value for _, value in history] == pytest.approx(list(losses.values()), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["gcs_server", pytest.param("raylet", marks=long)])
def test_the_death_of_what_ray_cannot_do_without_is_one_line_and_a_failed_run(name, shards, tmp_path):
    command = Command(shards, tmp_path, "run", 1)
    command.reach(7)
    tree = command.tree()
    kill(command, name)
    assert command.process.wait(WAIT_S) == 2, command.errors()
    assert command.errors().splitlines()[-1] == f"cpcscale: error: {LOST[name]} {GOES_ON}"
    assert "Traceback" not in command.errors()
    assert command.output() == ""
    assert tracked(tmp_path)[0] == "FAILED"
    _, living = psutil.wait_procs(tree[1:], timeout=60)
    assert not living


@long
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_same_command_goes_on_after_it_as_undisturbed(name, shards, tmp_path, whole):
    command = Command(shards, tmp_path, "run", 2)
    command.reach(17)
    kill(command, name)
    assert command.process.wait(WAIT_S) == 2, command.errors()
    ends_like(Command(shards, tmp_path, "run", 1), whole, tmp_path)


@long
@pytest.mark.parametrize("name", ["ray::Mailbox", "dashboard.py"])
def test_the_death_of_the_mailbox_or_the_dashboard_does_not_end_a_run(name, shards, tmp_path, whole):
    command = Command(shards, tmp_path, "run", 2)
    command.reach(17)
    kill(command, name)
    ends_like(command, whole, tmp_path)
    assert "Traceback" not in command.errors()


@long
def test_a_driver_that_was_killed_leaves_no_run_that_says_running(shards, tmp_path, whole):
    Command(shards, tmp_path, "run", 2).kill_after(17)
    assert tracked(tmp_path)[0] == "RUNNING"
    refused = Command(shards, tmp_path, "run", 1, more=["seed=1"])
    assert refused.process.wait(WAIT_S) == 2
    assert "was trained with seed" in refused.errors()
    assert tracked(tmp_path)[0] == "KILLED"
    ends_like(Command(shards, tmp_path, "run", 1), whole, tmp_path)
