"""`cpcscale pretrain` of the quickstart's config with a tiny network, as a user runs it: stopped, killed, read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import speech
from stores import store

from cpcscale import config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks

CONFIG = str(Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart.yaml")
STEPS, EVERY = 60, 5
# How far the loss of a run that was disturbed may be from that of an undisturbed one. Another number of workers adds up
# in another order, and what is left of that grows with the updates: to 1.3e-5 after so many of them on one kind of CPU,
# to less than 1e-5 on others.
TOLERANCE = 5e-5
# Drills that take long for what they tell beside their neighbours: `make drills` has them.
long = pytest.mark.skipif("CPCSCALE_DRILLS" not in os.environ, reason="a long drill: set CPCSCALE_DRILLS=1")
WAIT_S = 300


def arguments(shards: Path, folder: Path, name: str, workers: int | str, feed: str = "threads") -> list[str]:
    """The overrides of a run `name`: the same for every start of it but the workers and their feed."""
    places = [f"data.shards={shards}", f"run_dir={folder / name}", f"train.log_window_ids={folder / name}.jsonl"]
    # Long batches, so that there is time to kill between two steps.
    tiny = [key for key in speech.TINY if not key.startswith("train.batch")]
    cadence = [f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "train.validate_every_steps=30"]
    # A model that MLflow keeps takes seconds: the test of the tutorial has one.
    return [f"workers={workers}", f"feed.kind={feed}", "publish=none", *places, *tiny, *cadence]


def undisturbed(shards: Path, folder: Path) -> tuple[dict[str, Any], dict[int, float]]:
    """(summary, loss by step) of a run `whole` of the same config in this process, without Ray."""
    recipe, watcher = (
        config.load(PretrainConfig, CONFIG, arguments(shards, folder, "whole", workers=1)),
        speech.Watcher(),
    )
    summary = pretrain(recipe, speech.data(shards, validate=True), recipe.run_dir, Ranks.current(), watcher)
    return summary, watcher.losses


class Command:
    """One `cpcscale pretrain --json` in a process group of its own, its output in files; `more` arguments come last.

    On a Ray of its own, unless `environment` names another by RAY_ADDRESS.
    """

    def __init__(
        self,
        shards: Path,
        folder: Path,
        name: str,
        workers: int | str,
        feed: str = "threads",
        more: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = folder / name
        self._output = folder / f"{name}-{workers}-{time.monotonic_ns()}"
        overrides = [*arguments(shards, folder, name, workers, feed), *more]
        self.ids = next(Path(each.partition("=")[2]) for each in reversed(overrides) if "log_window_ids" in each)
        command = [sys.executable, "-m", "cpcscale", "pretrain", CONFIG, *overrides]
        merged = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        merged |= {"MLFLOW_TRACKING_URI": store(folder), **(environment or {})}
        with self._output.with_suffix(".out").open("w") as out, self._output.with_suffix(".err").open("w") as error:
            self.process = subprocess.Popen(
                [*command, "--json"], stdout=out, stderr=error, cwd=folder, env=merged, start_new_session=True
            )

    def reach(self, step: int) -> None:
        """Returns once the ids of `step` are written."""
        deadline = time.monotonic() + WAIT_S
        while not (self.ids.exists() and f'"step": {step},' in self.ids.read_text()):
            assert self.process.poll() is None, f"ended before step {step}: {self.errors()}"
            assert time.monotonic() < deadline, f"no step {step}: {self.errors()}"
            time.sleep(0.01)

    def tree(self) -> list[psutil.Process]:
        """The command and every process below it."""
        command = psutil.Process(self.process.pid)
        return [command, *command.children(recursive=True)]

    def kill_after(self, step: int) -> None:
        """SIGKILL to the command, its group and everything below it, once the ids of `step` are written."""
        self.reach(step)
        tree = self.tree()
        os.killpg(self.process.pid, signal.SIGKILL)
        send(tree, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(tree[1:], timeout=30)

    def stated(self) -> dict[str, Any]:
        """The JSON object that ends the output of a command that ends well."""
        assert self.process.wait(WAIT_S) == 0, self.errors()
        return json.loads(self.output().splitlines()[-1])

    def output(self) -> str:
        return self._output.with_suffix(".out").read_text()

    def errors(self) -> str:
        return self._output.with_suffix(".err").read_text()[-3000:]

    def last_step(self) -> int:
        """The last step among the ids."""
        return json.loads(self.ids.read_text().splitlines()[-1])["step"]


def send(tree: Sequence[psutil.Process], number: signal.Signals) -> None:
    """The signal to each of these that lives."""
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
