"""The SLURM script: Ray over an allocation, one command on it, and the end of both. SLURM's own commands are stand-ins.

`srun` runs a step here and `scontrol` names two nodes, so that the two of Ray are processes of this machine; the rest
is what it is on a cluster: the script, Ray with a token, the command, its signals and its status.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from commands import CONFIG, STEPS, WAIT_S, arguments, long, send
from documents import INFRA

SCRIPT = INFRA / "slurm" / "cpcscale.sbatch"
_SRUN = """#!/bin/sh
while :; do case "$1" in --*) shift ;; *) break ;; esac; done
exec "$@"
"""
_SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") printf 'one\\ntwo\\n' ;;
"show job") echo "JobState=$STATE Reason=None" ;;
"requeue "*) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script as SLURM does, with these arguments and environment; its output goes to `out` in tmp_path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    # Sockets have short names only.
    scratch, started = tempfile.mkdtemp(prefix="rs", dir="/tmp"), []

    def start(*command: str, **more: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "CPCSCALE_BIN": str(Path(sys.executable).parent)}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "[one-two]", "SLURM_CPUS_PER_TASK": "1"}
        environment |= {"REQUEUED": str(tmp_path / "requeued"), "STATE": "RUNNING", "RAY_TMPDIR": scratch}
        environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", **more}
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *command],
            env=environment,
            cwd=tmp_path,
            stdout=(tmp_path / "out").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(job)
        return job

    yield start
    for job in started:
        if job.poll() is None:
            tree = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
            send(tree, signal.SIGKILL)
            psutil.wait_procs(tree, timeout=30)
    shutil.rmtree(scratch, ignore_errors=True)


def test_a_job_without_a_command_or_without_ray_says_so_and_starts_nothing(
    batch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert batch().wait(60) == 1
    assert batch("compare", CPCSCALE_BIN=str(tmp_path)).wait(60) != 0
    said = (tmp_path / "out").read_text()
    assert "no command: give a verb" in said
    assert f"no Ray in {tmp_path}" in said


@long
def test_a_job_whose_time_is_up_makes_a_checkpoint_is_queued_again_and_goes_on(
    batch: Callable[..., subprocess.Popen[str]], shards: Path, tmp_path: Path
) -> None:
    # A worker on each of the two nodes, which have a core each.
    command = ["pretrain", CONFIG, *arguments(shards, tmp_path, "run", workers=2), "checkpoint.every_steps=1000"]
    ids = tmp_path / "run.jsonl"
    job = batch(*command)
    deadline = time.monotonic() + WAIT_S
    while not (ids.exists() and len(ids.read_text().splitlines()) > 3):
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.05)
    below = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGTERM)
    assert job.wait(WAIT_S) == 128 + signal.SIGTERM, (tmp_path / "out").read_text()
    assert (tmp_path / "requeued").read_text() == "7\n"
    # Nothing of Ray stays on the nodes.
    assert not psutil.wait_procs(below, timeout=30)[1]

    assert batch(*command).wait(WAIT_S) == 0, (tmp_path / "out").read_text()
    steps = [json.loads(line)["step"] for line in ids.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), "a step was lost, or made twice"
    assert (tmp_path / "requeued").read_text() == "7\n"


@long
def test_a_job_ends_with_the_status_of_its_command_and_is_not_queued_again(
    batch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert batch("pretrain", CONFIG, "workers=99", f"run_dir={tmp_path}/run").wait(WAIT_S) == 2
    assert not (tmp_path / "requeued").exists()
