"""One of two nodes is lost, through the real command line: the run goes on with who is left, and no batch changes.

A node that Ray was told to drain, as a cloud does before it takes a machine away, leaves a checkpoint made just then;
one that is lost without a word costs the steps since the last. `pytest -s` says how long each took to the next step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import psutil
import pytest
import ray_nodes
import speech
from commands import CONFIG, WAIT_S, Command, arguments, long

from cpcscale import config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.shards.index import Index
from cpcscale.stream import window
from cpcscale.stream.lanes import PADDING
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window_counts import shard_windows

# Enough steps that a node which is told has left long before the last.
STEPS, LEFT_S = 800, 12


@dataclass
class Nodes:
    """A Ray of two nodes of a core each: the head, where the driver is, and `other`."""

    cluster: Any
    other: Any
    commands: list[Command]

    def run(self, shards: Path, folder: Path, *more: str) -> Command:
        """A run on a worker or two of this Ray."""
        address = {"RAY_ADDRESS": self.cluster.address}
        self.commands.append(Command(shards, folder, "run", "[1,2]", more=more, environment=address))
        return self.commands[-1]

    def drain(self) -> None:
        """What a cloud says of a node that it will take away."""
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.cluster.address]
        command += ["--node-id", self.other.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(LEFT_S)]
        subprocess.run(command, check=True, capture_output=True)

    def working(self) -> bool:
        """Whether the other node has a worker still."""
        raylet, names = psutil.Process(self.other.all_processes["raylet"][0].process.pid), []
        for process in raylet.children():
            with contextlib.suppress(psutil.Error):
                names += process.cmdline()
        return any("RayTrainWorker" in name for name in names)

    def lose(self) -> float:
        """Ends the other node, all at once; when that was."""
        lost_s = time.monotonic()
        self.cluster.remove_node(self.other, allow_graceful=False)
        return lost_s


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    # This process is no driver of it.
    with ray_nodes.cluster(head_cpus=1, connect=False) as cluster:
        nodes = Nodes(cluster, cluster.add_node(num_cpus=1), [])
        yield nodes
        for command in nodes.commands:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.process.pid, signal.SIGKILL)
            command.process.wait()


def until(happened: Callable[[], Any], command: Command) -> Any:
    """What `happened` says once it is something, while the command runs."""
    deadline = time.monotonic() + WAIT_S
    while not (value := happened()):
        assert command.process.poll() is None, command.errors()
        assert time.monotonic() < deadline, command.errors()
        time.sleep(0.01)
    return value


def both_work(command: Command, nodes: Nodes, step: int) -> None:
    """Returns once `step` is made by a worker on each node."""
    command.reach(step)
    assert "2 worker(s)" in command.errors()
    assert nodes.working()


def begun_again(command: Command, lost_s: float) -> tuple[int, float]:
    """(the step from which the run has gone on, seconds from the loss to the next finished step)."""
    line = until(lambda: [each for each in command.errors().splitlines() if "going on from" in each], command)[-1]
    step = command.last_step()
    until(lambda: command.last_step() > step, command)
    return int(line.rpartition("step ")[2].split()[0]), time.monotonic() - lost_s


def planned(shards: Path, *more: str) -> dict[int, list[str]]:
    """The ids of each step of such a run as they follow from the index and the order alone."""
    recipe = config.load(PretrainConfig, CONFIG, [*arguments(shards, shards, "run", 1), *more])
    index = Index.load(str(shards / "train"))
    order = RunOrder(shard_windows(index, recipe.window), recipe.seed, recipe.train.lanes, recipe.train.batch)
    ids: dict[int, list[str]] = {}
    for step in range(recipe.train.steps):
        _, shard_B, ordinal_B = order.rows(step, range(recipe.train.lanes))
        ids[step + 1] = []
        for shard, ordinal in zip(shard_B.tolist(), ordinal_B, strict=True):
            if shard != PADDING:
                rows = index.rows(shard)
                [row], [number] = window.locate(window.count(recipe.window, rows.samples), ordinal[None])
                ids[step + 1].append(f"{rows.table['key'][int(row)].as_py()}#{number}")
    return ids


@long
def test_a_node_taken_away_with_notice_costs_no_step_before_the_notice_and_no_failure(shards, tmp_path, nodes):
    # No checkpoint is due, and no failure allowed.
    more = [f"train.steps={STEPS}", "checkpoint.every_steps=100000", "train.validate_every_steps=100000"]
    command = nodes.run(shards, tmp_path, *more, "max_failures=0")
    both_work(command, nodes, 20)
    nodes.drain()
    [step] = until(lambda: checkpoints.steps(command.run_dir), command)
    assert step >= 20
    # It goes on while the node is there, makes another one before it is not, and drops what comes after that.
    command.reach(step + 3)
    until(lambda: not nodes.working(), command)
    from_step, waited_s = begun_again(command, nodes.lose())
    sys.stderr.write(f"with notice: {waited_s:.1f} s from the loss to the next finished step\n")
    assert from_step > step + 3
    stated = command.stated()
    assert stated["steps"] == STEPS
    assert checkpoints.steps(command.run_dir) == [from_step, STEPS]
    assert "1 worker(s)" in command.errors()
    assert speech.ids(command.ids) == planned(shards, *more)


@long
def test_a_node_lost_without_a_word_costs_the_steps_since_the_last_checkpoint(shards, tmp_path, nodes):
    more = ["train.steps=60", "train.validate_every_steps=60"]
    command = nodes.run(shards, tmp_path, *more, "max_failures=1")
    both_work(command, nodes, 23)
    from_step, waited_s = begun_again(command, nodes.lose())
    sys.stderr.write(f"without: {waited_s:.1f} s from the loss to the next finished step\n")
    assert from_step % 5 == 0 and from_step >= 15
    assert command.stated()["steps"] == 60
    assert "died: starting again from the last checkpoint" in command.errors()
    assert speech.ids(command.ids) == planned(shards, *more)


@long
def test_a_node_lost_past_what_is_allowed_ends_the_run_in_one_line(shards, tmp_path, nodes):
    command = nodes.run(shards, tmp_path, "max_failures=0")
    both_work(command, nodes, 7)
    nodes.lose()
    assert command.process.wait(WAIT_S) == 2, command.errors()
    assert "Traceback" not in command.errors()
    last = command.errors().splitlines()[-1]
    assert last.startswith("cpcscale: error: ") and "max_failures=0" in last
