"""SIGTERM to a verb at work, and what a run does not survive: one line and its status, and nothing left behind.

A pretraining makes a checkpoint of the step under way first; the same command goes on from there as if nothing had
happened. `MARK` in the environment tells the processes that a verb has started from those of others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoints
import commands
import mlflow
import psutil
import pytest
import speech
from commands import STEPS, TOLERANCE, WAIT_S, Command, long

from cpcscale.bench.object_store import run_object_store
from cpcscale.errors import Terminated
from cpcscale.runs.ledger import Ledger
from cpcscale.shards.adoption.adopt import exclude_from
from cpcscale.signals import handlers_restored

MARK = "CPCSCALE_DRILL"
# Processes of Ray need some seconds to notice that their driver is gone.
LEAVE_S = 60
STOPPED = "cpcscale: stopped; the same command goes on from the last checkpoint"


@dataclass
class Place:
    """A folder, and what was started in it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {MARK: str(self.folder)}

    def pretrain(self, shards: Path, workers: int | str, *more: str) -> Command:
        return Command(shards, self.folder, "run", workers, more=more, environment=self.environment)

    def verb(self, *arguments: str) -> subprocess.Popen[str]:
        """`cpcscale` with these arguments, its output in pipes."""
        merged = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | self.environment
        command = [sys.executable, "-m", "cpcscale", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=merged
        )

    def processes(self, word: str = "") -> list[psutil.Process]:
        """What lives of all that was started here, at any depth; only what has `word` in its command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def left(self) -> list[psutil.Process]:
        """What lives still when there was time to end."""
        deadline = time.monotonic() + LEAVE_S
        while (living := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return living


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    commands.send(place.processes(), signal.SIGKILL)


def until(happened: Callable[[], Any], process: subprocess.Popen[Any]) -> Any:
    """What `happened` says once it is something, while the process runs."""
    deadline = time.monotonic() + WAIT_S
    while not (value := happened()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def given_back(run: Path) -> bool:
    """Whether nobody holds the run and nothing in its folder is half-written."""
    names = {path.name for path in run.iterdir()}
    asides = [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("alive-")]
    whole = [step for step, _ in checkpoints.whole(run)] == checkpoints.steps(run)
    return names <= {"checkpoints", "ledger", "run.json"} and not asides and whole and not Ledger(str(run)).head().held


def status_of(folder: Path) -> list[str]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name == "cpcscale"]
    return [run.info.status for run in client.search_runs([experiment.experiment_id])]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[int, list[str]]]:
    """(summary, ids by step) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    summary, _ = commands.undisturbed(shards, folder)
    return summary, speech.ids(folder / "whole.jsonl")


def test_a_run_that_is_asked_to_stop_ends_behind_a_checkpoint_of_its_last_step_and_goes_on_as_undisturbed(
    shards, place, whole
):
    # No checkpoint is due before the end.
    rare = "checkpoint.every_steps=1000"
    command = place.pretrain(shards, 2, rare)
    command.reach(17)
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(WAIT_S) == 143, command.errors()
    step = command.last_step()
    assert 17 <= step < STEPS
    *_, last = command.errors().splitlines()
    done = f"stopped after step {step} of {STEPS}, with a checkpoint of it"
    assert last == f"cpcscale: {done}; the same command goes on from the last checkpoint"
    assert "asked to stop (SIGTERM): making a checkpoint, 60 s at most" in command.errors()
    assert command.output() == ""
    assert checkpoints.steps(command.run_dir) == [step]
    assert given_back(command.run_dir)
    assert status_of(place.folder) == ["KILLED"]
    assert not place.left()
    again = place.pretrain(shards, 1, rare)
    stated = again.stated()
    assert f"step-{step:08d}" in again.errors()
    undisturbed, ids = whole
    assert speech.ids(again.ids) == ids
    for name in ("loss", "accuracy_mean", "audio_s"):
        assert stated[name] == pytest.approx(undisturbed[name], abs=TOLERANCE), name
    assert status_of(place.folder) == ["FINISHED"]


# What exists when it is sent: Ray is on its way, or the run is taken and its workers are on theirs.
@pytest.mark.parametrize("when", ["Ray starts", pytest.param("workers start", marks=long)])
def test_a_run_asked_to_stop_before_any_worker_works_ends_at_once_with_nothing_half_written(shards, place, when):
    command = place.pretrain(shards, 1)
    if when == "Ray starts":
        until(lambda: place.processes("gcs_server"), command.process)
    else:
        until(lambda: place.processes("TrainController"), command.process)
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(WAIT_S) == 143, command.errors()
    assert command.errors().splitlines()[-1] == STOPPED
    assert "Traceback" not in command.errors()
    assert not command.ids.exists()
    if when == "Ray starts":
        assert not command.run_dir.exists()
    else:
        assert given_back(command.run_dir)
        assert checkpoints.steps(command.run_dir) == []
        assert status_of(place.folder) == ["KILLED"]
    assert not place.left()


@long
@pytest.mark.parametrize("how", ["a second SIGTERM", "stop_grace_s"])
def test_workers_that_hang_hold_up_no_end(shards, place, how):
    command = place.pretrain(shards, 1, f"stop_grace_s={1 if how == 'stop_grace_s' else 1000}")
    command.reach(7)
    # It can make no checkpoint now.
    commands.send(place.processes("RayTrainWorker"), signal.SIGSTOP)
    command.process.send_signal(signal.SIGTERM)
    until(lambda: "asked to stop (SIGTERM)" in command.errors(), command.process)
    if how == "a second SIGTERM":
        command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(WAIT_S) == 143, command.errors()
    assert command.errors().splitlines()[-1] == STOPPED
    assert given_back(command.run_dir)
    assert not place.left()


@long
def test_a_bench_that_is_asked_to_stop_takes_its_store_with_it(place):
    config = str(Path(commands.CONFIG).parents[1] / "bench" / "feed.yaml")
    speech_of = Path(__file__).parents[1] / "data" / "speech"
    bench = place.verb("bench", "feed", config, f"audio={speech_of}", "hours=1")
    until(lambda: place.processes("weed"), bench)
    bench.send_signal(signal.SIGTERM)
    out, error = bench.communicate(timeout=WAIT_S)
    assert (bench.returncode, out) == (143, "")
    assert error.splitlines()[-1] == "cpcscale: stopped; the same command begins again"
    assert "Traceback" not in error
    assert not place.left()


def test_a_store_whose_start_is_stopped_leaves_no_server(tmp_path):
    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with handlers_restored(signal.SIGALRM, meanwhile=stop), pytest.raises(Terminated):
        # Its process is there within milliseconds, and answers after half a second or more.
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with run_object_store(tmp_path):
            time.sleep(10)
    assert not [each for each in psutil.process_iter(["cmdline"]) if f"-dir={tmp_path}" in (each.info["cmdline"] or ())]


@pytest.mark.parametrize("ray", [(), pytest.param(("--ray",), marks=long)])
def test_a_pack_that_is_asked_to_stop_goes_on_where_it_was(place, ray):
    source = Path(__file__).parents[1] / "data" / "speech"
    arguments = ["pack", *ray, str(source), str(place.folder / "set"), "shard_mb=1"]
    pack = place.verb(*arguments)
    until(lambda: list(place.folder.glob("set/train/shard-*.tar")), pack)
    pack.send_signal(signal.SIGTERM)
    out, error = pack.communicate(timeout=WAIT_S)
    assert (pack.returncode, out) == (143, ""), error
    assert error.splitlines()[-1] == "cpcscale: stopped; the same command goes on where it was"
    assert "Traceback" not in error
    assert not place.left()
    made = {path: path.stat().st_mtime_ns for path in place.folder.glob("set/train/shard-*.tar")}
    assert made and not (place.folder / "set" / "train" / "index.json").exists()
    again = place.verb(*arguments)
    assert again.communicate(timeout=WAIT_S) and again.returncode == 0
    assert (place.folder / "set" / "train" / "index.json").exists()
    assert {path: path.stat().st_mtime_ns for path in made} == made


@long
def test_a_worker_that_dies_past_what_is_allowed_ends_the_run_in_one_line_that_names_it(shards, place):
    command = place.pretrain(shards, 2, "max_failures=0")
    command.reach(8)
    worker = place.processes("RayTrainWorker")[0]
    worker.send_signal(signal.SIGKILL)
    assert command.process.wait(WAIT_S) == 2, command.errors()
    *_, last = command.errors().splitlines()
    assert last.startswith("cpcscale: error: worker ")
    assert "died, past max_failures=0: " in last
    assert last.endswith("; the same command goes on from the last checkpoint")
    assert "starting again" not in command.errors()
    assert "Traceback" not in command.errors()
    assert command.output() == ""
    assert given_back(command.run_dir)
    assert status_of(place.folder) == ["FAILED"]
    assert not place.left()


@long
def test_an_index_that_was_changed_meanwhile_is_not_taken_over_by_a_start_after_a_death_but_by_the_next_command(
    shards, place, whole
):
    own = Path(shutil.copytree(shards, place.folder / "shards"))
    command = place.pretrain(own, 1)
    command.reach(8)
    _, ids = whole
    coming = sorted({name.partition("#")[0] for name in ids[STEPS][:3]})
    exclude_from(str(own / "train"), coming)
    commands.send(place.processes("RayTrainWorker"), signal.SIGKILL)
    assert command.process.wait(WAIT_S) == 2, command.errors()
    *_, last = command.errors().splitlines()
    assert last == (
        f"cpcscale: error: the index at {own / 'train'} has changed since this run was started: start the "
        "same command again to use the new version"
    )
    assert "Traceback" not in command.errors()
    assert given_back(command.run_dir)
    again = place.pretrain(own, 1)
    assert again.stated()["steps"] == STEPS
    assert speech.ids(again.ids) == ids, "excluded windows keep their places"


@long
def test_a_terminal_that_is_closed_is_a_request_to_stop_that_leaves_the_workers_time_for_a_checkpoint(shards, place):
    command = place.pretrain(shards, 2, "checkpoint.every_steps=1000")
    command.reach(17)
    # To all of the command's group, as a shell does.
    os.killpg(command.process.pid, signal.SIGHUP)
    assert command.process.wait(WAIT_S) == 143, command.errors()
    assert "asked to stop (SIGHUP): making a checkpoint" in command.errors()
    assert checkpoints.steps(command.run_dir) == [command.last_step()]
    assert given_back(command.run_dir)
    assert status_of(place.folder) == ["KILLED"]
    assert not place.left()
