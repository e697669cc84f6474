"""Two and four real Ray nodes, each by a `ray start` of its own: one is killed and another one added under training.

Where this machine allows it they stand in network namespaces with addresses of their own. The run is a job that nobody
touches: it goes on with the nodes that are left, takes the new one in, and no batch changes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import mlflow
import pytest
import ray_heads
import speech
from commands import CONFIG, WAIT_S, arguments, long
from ray_heads import Head, Job

from cpcscale import config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks

# So many steps by the number of nodes that the new one is in long before the last.
STEPS = {2: 1500, 4: 800}
# Another number of workers adds up in another order. Each update is the same to 1e-5, but what is left grows with the
# updates: so near for so many of them, and to the end within this. That a restart is exact is test_worker_death's.
EXACT, DRIFT = 50, 0.02


def begun_with(job: Job) -> list[int]:
    """With how many workers the run has begun and gone on so far, in order."""
    lines = [line for line in job.streamed().splitlines() if " worker(s)" in line]
    return [int(line.partition(" worker(s)")[0].rpartition(" ")[2]) for line in lines]


def working(head: Head) -> int:
    """How many nodes have a worker."""
    return sum(bool(node.workers()) for node in head.nodes)


def steps_of(ids: Path) -> int:
    """How many steps have their ids written; what a restart does again is taken out first."""
    return ids.read_text().count("\n")


def undisturbed(shards: Path, folder: Path, more: list[str]) -> tuple[dict[int, list[str]], dict[int, float]]:
    """(ids, loss) of each step of the same run in this process, without Ray."""
    recipe = config.load(PretrainConfig, CONFIG, [*arguments(shards, folder, "whole", 1), *more])
    watcher = speech.Watcher()
    pretrain(recipe, speech.data(shards, validate=True), recipe.run_dir, Ranks.current(), watcher)
    return speech.ids(folder / "whole.jsonl"), watcher.losses


@long
@pytest.mark.parametrize("nodes", STEPS)
def test_a_node_killed_and_another_added_under_training_change_no_batch_and_need_no_hand(nodes, shards, tmp_path):
    project = ray_heads.project(tmp_path / "project")
    steps = STEPS[nodes]
    more = [f"train.steps={steps}", "checkpoint.every_steps=25", f"train.validate_every_steps={steps}"]
    more += ["max_failures=1", "grow_every_s=2"]
    ids = tmp_path / "run.jsonl"
    # A core each: a node has room for one worker.
    with ray_heads.head(cpus=1, most_nodes=nodes + 1) as head:
        others = [head.add(cpus=1) for _ in range(nodes - 1)]
        run = arguments(shards, tmp_path, "run", f"[1,{nodes}]")
        entrypoint = ["python", "jobs/pretrain.py", "configs/pretrain/quickstart.yaml", *run, *more]
        tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
        job = Job(head, project, entrypoint, tracking)
        job.reach(ids, 60)
        # What a job prints reaches those who follow it later.
        job.until(lambda: begun_with(job) == [nodes])
        assert working(head) == nodes
        others[-1].kill()
        lost_s = time.monotonic()
        job.until(lambda: begun_with(job)[-1] == nodes - 1)
        step = steps_of(ids)
        job.until(lambda: steps_of(ids) > step)
        sys.stderr.write(f"{nodes} nodes, one killed: {time.monotonic() - lost_s:.1f} s to the next finished step\n")
        added_s = time.monotonic()
        head.add(cpus=1)
        job.until(lambda: begun_with(job)[-1] == nodes)
        step = steps_of(ids)
        job.until(lambda: steps_of(ids) > step)
        sys.stderr.write(f"another added: {time.monotonic() - added_s:.1f} s to the next step of {nodes} workers\n")
        assert working(head) == nodes
        assert job.ended() == "SUCCEEDED", job.streamed()[-3000:]
        assert begun_with(job) == [nodes, nodes - 1, nodes]
    expected, losses = undisturbed(shards, tmp_path, more)
    assert speech.ids(ids) == expected
    client = mlflow.MlflowClient(tracking["MLFLOW_TRACKING_URI"])
    [experiment] = [each for each in client.search_experiments() if each.name == "cpcscale"]
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "loss")
    assert [record.step for record in history] == list(range(1, steps + 1))
    found, expected_losses = [record.value for record in history], list(losses.values())
    assert found[:EXACT] == pytest.approx(expected_losses[:EXACT], abs=1e-5)
    assert found == pytest.approx(expected_losses, abs=DRIFT)


@long
def test_a_start_without_room_waits_for_the_node_that_comes_later(shards, tmp_path):
    project = ray_heads.project(tmp_path / "project")
    with ray_heads.head(cpus=1, most_nodes=2) as head:
        entrypoint = ["python", "jobs/pretrain.py", "configs/pretrain/quickstart.yaml"]
        entrypoint += [*arguments(shards, tmp_path, "run", 2), f"start_wait_s={WAIT_S}"]
        job = Job(head, project, entrypoint, {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"})
        job.until(lambda: f"waiting {WAIT_S} s at most for other nodes (start_wait_s)" in job.streamed())
        head.add(cpus=1)
        assert job.ended() == "SUCCEEDED", job.streamed()[-3000:]
        assert begun_with(job) == [2]
