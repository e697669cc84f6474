"""Every job of `jobs/` as `ray job submit` sends it to a running Ray: the result of the same verb without one, and the
long ones stopped and sent again. Pretraining has drills of its own, in test_job_submit.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import ray_heads
import sweeps
import yaml
from commands import WAIT_S, long
from made_voices import put_corpus, recipe
from ray_heads import Head, Job
from trees import corpus, promised

from cpcscale import config as configs
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.experiments.evaluate.config import EvaluateConfig
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.experiments.many_runs_config import ReproduceConfig
from cpcscale.experiments.sweep.journal import Journal
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig

SPEECH = ray_heads.ROOT / "tests" / "data" / "speech"
# What is said of one run alone: its names, its places and its times.
OWN = {"seconds", "run_id", "run_dir", "target", "shards", "tracking", "identity"}


@dataclass
class Place:
    """A Ray, the project folder that jobs are submitted from, which holds their configs, and one for what they make."""

    head: Head
    project: Path
    folder: Path

    def job(self, verb: str, arguments: list[str], name: str = "") -> Job:
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "MLFLOW_TRACKING_URI": self.tracking(name or verb).uri}
        return Job(self.head, self.project, ["python", f"jobs/{verb}.py", *arguments, "--json"], environment)

    def by_hand(self, verb: str, arguments: list[str]) -> dict[str, Any]:
        """What the verb prints in a process that starts a Ray of its own."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-m", "cpcscale", verb, *arguments, "--json"],
            cwd=self.project,
            env=environment | {"MLFLOW_TRACKING_URI": self.tracking(f"{verb}-by-hand").uri},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def tracking(self, name: str) -> TrackingConfig:
        return TrackingConfig(uri=f"sqlite:///{self.folder}/{name}.db")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("jobs")
    project = ray_heads.project(folder / "project")
    put_corpus(folder / "tones")
    pack(str(corpus(folder / "audio")), str(folder / "packed"), PackConfig(shard_mb=0.12))
    parts = {field.name: getattr(recipe(folder / "tones", "precpc"), field.name) for field in fields(EmotionRecipe)}
    several = {"systems": ["functionals", "mfcc"], "workers": 1, "svm_search": False}
    written = {
        "finetune": FinetuneConfig(**parts | {"system": "mfcc"}),
        "evaluate": EvaluateConfig(**parts | several, kind="learning", seeds=[0, 1], shares=[0.5, 1.0]),
        "reproduce": ReproduceConfig(**parts | several, seeds=[0], reference="functionals"),
        "sweep": sweeps.settings(folder, epochs=15, trials=4, workers=2, search="random", scheduler="none"),
    }
    for verb, config in written.items():
        text = yaml.safe_dump({name: part for name, part in configs.to_dict(config).items() if name != "tracking"})
        (project / f"{verb}.yaml").write_text(text)
    with ray_heads.head(cpus=2) as head:
        yield Place(head, project, folder)


def plain(stated: Any) -> Any:
    """What is not of one run alone."""
    if isinstance(stated, dict):
        return {name: plain(value) for name, value in stated.items() if name not in OWN}
    return [plain(value) for value in stated] if isinstance(stated, list) else stated


def arguments(place: Place, verb: str, name: str) -> list[str]:
    """Those of the verb, for what lies and comes under `name`."""
    target = place.folder / name
    match verb:
        case "pack":
            return [str(place.folder / "audio"), str(target), "shard_mb=0.12"]
        case "index" | "audit":
            return [str(place.folder / "packed" / "train")]
        case "bench":
            return ["feed", "configs/bench/feed.yaml", f"audio={SPEECH}", "hours=0.05", "runs=1"]
        case _:
            return [f"{verb}.yaml", f"run_dir={target}"]


@long
@pytest.mark.parametrize("verb", ["pack", "index", "audit", "finetune", "evaluate", "reproduce", "sweep"])
def test_a_job_says_what_the_verb_says_that_starts_a_ray_of_its_own(place, verb):
    job = place.job(verb, arguments(place, verb, f"{verb}-job"))
    assert job.ended() == "SUCCEEDED", job.streamed()[-3000:]
    assert job.submitted.returncode == 0
    assert "Traceback" not in job.streamed()
    assert plain(job.result()) == plain(place.by_hand(verb, arguments(place, verb, f"{verb}-by-hand")))
    if verb in ("finetune", "evaluate", "reproduce", "sweep"):
        assert {run.status for run in read_runs(place.tracking(verb), children=True)} == {"FINISHED"}


@long
def test_a_bench_job_ends_with_its_figures(place):
    job = place.job("bench", arguments(place, "bench", "bench"))
    assert job.ended() == "SUCCEEDED", job.streamed()[-3000:]
    assert min(job.result()["audio_s_per_s"].values()) > 0


def stopped(job: Job) -> None:
    job.stop()
    assert job.ended() == "STOPPED"
    assert job.lines()[-1].startswith("cpcscale: stopped"), job.streamed()[-3000:]
    assert "Traceback" not in job.streamed()


@long
def test_a_pack_that_is_stopped_and_sent_again_makes_the_same_bytes(place):
    target = place.folder / "stopped-pack"
    command = [str(SPEECH), str(target), "shard_mb=1", "heldout_share=0.05"]
    first = place.job("pack", command)
    first.until(lambda: list(target.rglob("*.tar")))
    stopped(first)
    assert not list(target.rglob("index.json")), "the set is not whole, so it is none yet"
    again = place.job("pack", command)
    assert again.ended() == "SUCCEEDED", again.streamed()[-3000:]
    whole = place.folder / "whole-pack"
    place.by_hand("pack", [command[0], str(whole), *command[2:]])
    assert promised(target) == promised(whole)


@long
def test_a_sweep_that_is_stopped_and_sent_again_keeps_the_trials_that_were_over(place):
    run_dir = place.folder / "stopped-sweep"
    command = ["sweep.yaml", f"run_dir={run_dir}", "trials=6"]

    def over() -> dict[int, float]:
        journal = Journal(str(run_dir))
        journal.read()
        return {number: round(record.seconds, 3) for number, record in journal.records.items() if record.is_over}

    first = place.job("sweep", command, "stopped-sweep")
    first.until(over)
    stopped(first)
    kept = over()
    again = place.job("sweep", command, "stopped-sweep")
    assert again.ended() == "SUCCEEDED", again.streamed()[-3000:]
    rows = again.result()["results"]
    assert len(rows) == 6
    assert {number: rows[number]["seconds"] for number in kept} == kept, "they were run again"
    runs = read_runs(place.tracking("stopped-sweep"), children=True)
    assert [run.status for run in runs if run.kind == "sweep"] == ["FINISHED"]


@long
def test_an_evaluation_that_is_stopped_and_sent_again_goes_on_with_the_runs_that_are_left(place):
    run_dir = place.folder / "stopped-evaluate"
    command = ["evaluate.yaml", f"run_dir={run_dir}", "seeds=[0,1,2]"]
    first = place.job("evaluate", command, "stopped-evaluate")
    first.until(lambda: list(run_dir.glob("*/result.json")))
    stopped(first)
    done = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/result.json")}
    assert done
    again = place.job("evaluate", command, "stopped-evaluate")
    assert again.ended() == "SUCCEEDED", again.streamed()[-3000:]
    assert {path: path.stat().st_mtime_ns for path in done} == done, "they were run again"
    assert plain(again.result()) == plain(place.by_hand("evaluate", [*command[:1], *command[2:], "run_dir=whole"]))
