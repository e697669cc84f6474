"""The driver of a sweep killed or stopped, through the real command line and Ray: the same command goes on.

`cpcscale sweep` over MFCC of the made tones, two trials at a time, is killed with SIGKILL twice, or asked to stop by
SIGTERM, while trials run. What was over is not run again, and MLflow shows one sweep and each of its trials once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import psutil
import pytest
import yaml
from commands import WAIT_S, long
from made_voices import put_corpus
from sweeps import family, settings

from cpcscale import config as configs
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.experiments.sweep.journal import Journal, TrialRecord

TRIALS = 4
MARK = "CPCSCALE_DRILL"


class Drill:
    """One sweep in a folder, started as a command as often as it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        put_corpus(folder / "tones")
        self.config = settings(folder, epochs=15, trials=TRIALS, workers=2, search="optuna", grace_epochs=5)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(configs.to_dict(self.config)))
        self.starts = 0

    def start(self) -> subprocess.Popen[str]:
        """The command, in a process group of its own."""
        self.starts += 1
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "cpcscale", "sweep", str(self.folder / "sweep.yaml"), "--json"]
        with self.out.open("w") as out, self.err.open("w") as err:
            return subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                cwd=self.folder,
                env=environment | {MARK: str(self.folder)},
                start_new_session=True,
                text=True,
            )

    @property
    def out(self) -> Path:
        return self.folder / f"{self.starts}.out"

    @property
    def err(self) -> Path:
        return self.folder / f"{self.starts}.err"

    def records(self) -> dict[int, TrialRecord]:
        """The trials on record."""
        journal = Journal(self.config.run_dir)
        journal.read()
        return journal.records

    def over(self) -> dict[int, TrialRecord]:
        return {number: record for number, record in self.records().items() if record.is_over}

    def reach(self, process: subprocess.Popen[str], over: int) -> None:
        """Returns once so many trials are over and another one is under way."""
        deadline = time.monotonic() + WAIT_S
        while len(self.over()) < over or len(self.records()) == len(self.over()):
            assert process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL to the driver alone: what it had started finds out by itself."""
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stated(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.wait(WAIT_S) == 0, self.err.read_text()
        return json.loads(self.out.read_text().splitlines()[-1])

    def living(self) -> list[psutil.Process]:
        """What lives of all that was started here."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
        return found

    def check(self, result: dict[str, Any], before: dict[int, TrialRecord]) -> None:
        """It is the whole sweep; the trials `before` were not run again, those under way have their values still."""
        assert result["trials"] == len(result["results"]) == TRIALS
        for number, record in before.items():
            row = result["results"][number]
            assert row["values"] == record.values
            if record.is_over:
                assert row["seconds"] == round(record.seconds, 3), "it was run again"
        parent, trials, folds = family(self.config)
        assert parent.run_id == result["run_id"]
        assert [trial.name for trial in trials] == [f"trial-{number:04d}" for number in range(TRIALS)]
        assert len(folds) == result["folds"] and {fold.parent for fold in folds} == {
            trials[result["best_trial"]].run_id
        }
        assert {run.status for run in (parent, *trials, *folds)} == {"FINISHED"}
        for trial, row in zip(trials, result["results"], strict=True):
            assert [step for step, _ in trial.history("inner_ccc")] == list(range(1, row["epochs"] + 1))
            assert trial.metrics["inner_ccc"] == pytest.approx(row["inner_ccc"])
        left = {path.name for path in Path(self.config.run_dir).iterdir()}
        assert left == {"best.yaml", "ledger", "result.json", "run.json", "trials.csv"}


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    drill = Drill(tmp_path)
    yield drill
    commands.send(drill.living(), signal.SIGKILL)


def test_the_config_of_the_drill_is_one_that_a_user_can_write(drill):
    assert configs.load(SweepConfig, str(drill.folder / "sweep.yaml")) == drill.config


def test_a_sweep_whose_driver_is_killed_goes_on_and_is_tracked_once(drill):
    process = drill.start()
    drill.reach(process, over=2)
    drill.kill(process)
    before = drill.records()
    result = drill.stated(drill.start())
    assert f"{TRIALS} trials, " in drill.err.read_text() and " of them done before" in drill.err.read_text()
    assert "Traceback" not in drill.err.read_text()
    drill.check(result, before)


@long
@pytest.mark.parametrize("over", [0, 1, TRIALS - 1])
def test_a_sweep_whose_driver_is_killed_anywhere_and_again_is_whole_in_the_end(drill, over):
    before: dict[int, TrialRecord] = {}
    for more in (over, min(over + 1, TRIALS - 1)):
        process = drill.start()
        drill.reach(process, over=more)
        drill.kill(process)
        assert before.items() <= {n: r for n, r in drill.over().items() if n in before}.items()
        before = drill.over()
    drill.check(drill.stated(drill.start()), before)


@long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_asked_to_stop_leaves_one_that_goes_on(drill, number):
    process = drill.start()
    drill.reach(process, over=1)
    process.send_signal(number)
    assert process.wait(WAIT_S) == 128 + number, drill.err.read_text()
    assert "Traceback" not in drill.err.read_text()
    assert drill.err.read_text().splitlines()[-1].startswith("cpcscale: stopped; the same command ")
    assert drill.out.read_text() == ""
    parent, trials, _ = family(drill.config)
    assert parent.status == "KILLED" and {trial.status for trial in trials} <= {"FINISHED", "KILLED"}
    assert {path.name for path in Path(drill.config.run_dir).iterdir()} == {
        "ledger",
        "run.json",
        "sweep.json",
        "trials",
    }
    before = drill.records()
    drill.check(drill.stated(drill.start()), before)


@long
def test_a_second_driver_is_refused_while_the_first_one_lives(drill):
    first = drill.start()
    drill.reach(first, over=0)
    second = drill.start()
    assert second.wait(WAIT_S) == 2
    assert f"is held by pid {first.pid} on " in drill.err.read_text()
    drill.starts -= 1
    drill.check(drill.stated(first), {})
