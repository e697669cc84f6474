"""Two live drivers on one run, through the real command line and Ray: the one that is overtaken adds nothing more.

The first is stopped in mid-run with all its processes, as a machine that hangs; a second start is refused, one with
--take-over takes the run; then the first wakes up and goes on until it learns of that, while the second starts its
workers and trains to the end. An undisturbed run says what has to come out.
"""

from __future__ import annotations

import json
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
import speech
from commands import EVERY, STEPS, TOLERANCE, WAIT_S, Command, long

from cpcscale.runs.checkpoint_files import parse_folder_name
from cpcscale.runs.ledger import Ledger

pytestmark = long
STOP = 23


@dataclass
class Drill:
    folder: Path
    undisturbed: dict[str, Any]
    losses: dict[int, float]
    stated: dict[str, Any]
    first: Command
    second: Command
    refused: Command
    # The number of the entry by which the second took the run.
    taken: int


@pytest.fixture(scope="module")
def drill(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("two")
    undisturbed, losses = commands.undisturbed(shards, folder)
    first = Command(shards, folder, "run", workers=2)
    first.reach(STOP)
    stopped = first.tree()
    try:
        commands.send(stopped, signal.SIGSTOP)
        refused = Command(shards, folder, "run", workers=1)
        assert refused.process.wait(WAIT_S) == 2, refused.errors()
        more = ["--take-over", f"train.log_window_ids={folder}/second.jsonl"]
        second = Command(shards, folder, "run", workers=1, more=more)
        taken = number_of(second, folder / "run")
        commands.send(stopped, signal.SIGCONT)
        first.process.wait(WAIT_S)
        _, living = psutil.wait_procs(stopped[1:], timeout=60)
        assert not living
        yield Drill(folder, undisturbed, losses, second.stated(), first, second, refused, taken)
    finally:
        commands.send(stopped, signal.SIGKILL)


def number_of(command: Command, run: Path) -> int:
    """The number of the entry by which this command took the run, once it did."""
    deadline = time.monotonic() + WAIT_S
    while (state := Ledger(str(run)).head()).holder.pid != command.process.pid:
        assert command.process.poll() is None, command.errors()
        assert time.monotonic() < deadline, command.errors()
        time.sleep(0.1)
    return state.number


def test_a_second_start_is_refused_with_who_holds_the_run_and_the_way_out(drill):
    [line] = drill.refused.errors().splitlines()
    assert line.startswith("cpcscale: error: ")
    assert f"is held by pid {drill.first.process.pid} on " in line
    assert "give --take-over" in line


def test_the_driver_that_was_overtaken_ends_in_one_line_that_names_the_other(drill):
    assert drill.first.process.returncode == 2
    assert drill.first.output() == ""
    *notes, last = drill.first.errors().splitlines()
    assert last.startswith("cpcscale: error: ")
    assert f"was taken over by pid {drill.second.process.pid} on " in last
    assert "Traceback" not in drill.first.errors()
    assert not [line for line in notes if "error" in line]


def test_it_adds_nothing_to_the_run_after_that(drill):
    run = drill.folder / "run"
    begun = Ledger(str(run)).head()
    entries = sorted((run / "ledger").glob("*.json"))
    holders = {json.loads(path.read_text().splitlines()[0])["state"]["holder"]["pid"] for path in entries}
    assert holders == {drill.second.process.pid}
    assert {parse_folder_name(each.folder)[1] for each in begun.checkpoints} == {drill.taken + 1}


def test_only_valid_checkpoints_and_nothing_half_written_is_in_the_folder(drill):
    run = drill.folder / "run"
    assert [step for step, _ in checkpoints.whole(run)] == checkpoints.steps(run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {name for _, name in checkpoints.whole(run)}
    assert {path.name for path in run.iterdir()} == {"checkpoints", "ledger", "run.json"}
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("alive-")]
    assert Path(drill.stated["checkpoint"]).name == checkpoints.whole(run)[-1][1]


def test_the_second_goes_on_from_the_last_checkpoint_of_the_first_and_ends_like_an_undisturbed_run(drill):
    at = next(line for line in drill.second.errors().splitlines() if "going on from" in line)
    begun = int(at.rpartition("step ")[2].split()[0])
    assert begun in (STOP // EVERY * EVERY, STOP // EVERY * EVERY - EVERY)
    for name in ("loss", "accuracy_mean", "audio_s"):
        assert drill.stated[name] == pytest.approx(drill.undisturbed[name], abs=TOLERANCE), name
    expected = speech.ids(drill.folder / "whole.jsonl")
    first = speech.ids(drill.first.ids)
    second = {line["step"]: line["ids"] for line in map(json.loads, drill.second.ids.read_text().splitlines())}
    assert list(second) == list(range(begun + 1, STEPS + 1))
    assert {step: ids for step, ids in first.items() if step <= begun} | second == expected
    assert first.items() <= expected.items()


def test_the_tracked_run_holds_every_step_once_and_says_that_it_finished(drill):
    client = mlflow.MlflowClient(f"sqlite:///{drill.folder}/mlflow.db")
    run = client.get_run(drill.stated["run_id"])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [record.step for record in history] == list(range(1, STEPS + 1))
    losses = [drill.losses[record.step] for record in history]
    assert [record.value for record in history] == pytest.approx(losses, abs=TOLERANCE)
