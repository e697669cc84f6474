"""One of two workers killed at a random step, through the real command line: the run ends as if nothing had happened.

`CPCSCALE_KILLS=20 pytest -s` kills so many runs, one after the other; a line for each says how long it took from the
kill to the next finished step.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import commands
import mlflow
import psutil
import pytest
import speech
from commands import STEPS, TOLERANCE, WAIT_S, Command, long

RUNS = int(os.environ.get("CPCSCALE_KILLS", "1"))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[int, list[str]]]:
    """(summary, ids by step) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    summary, _ = commands.undisturbed(shards, folder)
    return summary, speech.ids(folder / "whole.jsonl")


def workers(command: Command) -> list[psutil.Process]:
    """The workers of Ray Train below the command."""
    return [process for process in command.tree() if "RayTrainWorker" in " ".join(process.cmdline())]


def next_step_s(command: Command, killed_s: float) -> float:
    """Seconds from the kill to the next step that is finished by others than those who were there."""
    lines = command.ids.read_text()
    deadline = time.monotonic() + WAIT_S
    # Whoever goes on drops the steps behind the checkpoint first.
    while (now := command.ids.read_text()) == lines or len(now) < len(lines):
        lines = now if len(now) < len(lines) else lines
        assert command.process.poll() is None or "going on from" in command.errors(), command.errors()
        assert time.monotonic() < deadline, command.errors()
        time.sleep(0.01)
    return time.monotonic() - killed_s


@long
@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_whose_worker_is_killed_goes_on_and_ends_with_the_undisturbed_batches_and_loss(
    shards, tmp_path, whole, number
):
    undisturbed, ids = whole
    chance = random.Random(number)
    step = chance.randint(1, STEPS - 15)
    command = Command(shards, tmp_path, "run", workers="[1,2]")
    command.reach(step)
    victims = workers(command)
    assert len(victims) == 2
    chance.choice(victims).send_signal(signal.SIGKILL)
    waited_s = next_step_s(command, time.monotonic())
    disturbed = command.stated()
    sys.stderr.write(f"kill {number}: at step {step} or later, {waited_s:.1f} s to the next finished step\n")
    assert "died: starting again from the last checkpoint" in command.errors()
    assert speech.ids(tmp_path / "run.jsonl") == ids
    assert disturbed["loss"] == pytest.approx(undisturbed["loss"], abs=TOLERANCE)
    assert disturbed["heldout"]["loss"] == pytest.approx(undisturbed["heldout"]["loss"], abs=TOLERANCE)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(disturbed["run_id"], "loss")
    assert [record.step for record in history] == list(range(1, STEPS + 1))
