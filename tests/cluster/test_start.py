"""Promises of Ray's start: any real machine starts it, and a cluster that does not answer is one line at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from commands import long
from trees import noise, write_tree

from cpcscale import machine
from cpcscale.cluster import session
from cpcscale.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; sys.path.pop(0); from cpcscale.cli import main; sys.exit(main(sys.argv[1:]))"


def packed(
    source: Path, target: Path, folder: Path, before: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """`cpcscale pack --ray` as a process of its own in `folder`."""
    plain = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONSAFEPATH")}
    command = [*before, sys.executable, "-c", PROGRAM, "pack", "--ray", str(source), str(target)]
    return subprocess.run(
        command, cwd=folder, env=plain | environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_ray_starts_whatever_the_folders_and_settings_of_the_machine(tmp_path):
    source = write_tree(tmp_path / "audio", {"a.wav": noise(1.0), "b.wav": noise(1.0, 1)})
    folder, temporary = tmp_path / "mine", tmp_path / ("x" * 150)
    temporary.mkdir()
    # Names of modules that Ray's workers import.
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "__init__.py").touch()
    (folder / "queue.py").write_text("raise SystemExit('this is no queue')")
    ran = packed(
        source,
        tmp_path / "shards",
        folder,
        TMPDIR=str(temporary),
        HOME="/",
        RAY_TRAIN_V2_ENABLED="0",
        UV_PROJECT_ENVIRONMENT="x",
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 utterances" in ran.stdout and "Traceback" not in ran.stderr
    assert not list(temporary.iterdir())


@long
def test_a_node_that_needs_longer_than_ray_waits_is_waited_for(monkeypatch, caplog):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def hold() -> None:
        while not (held := [each for each in psutil.Process().children(recursive=True) if each.name() == "raylet"]):
            time.sleep(0.01)
        held[0].suspend()
        time.sleep(40)
        held[0].resume()

    with ThreadPoolExecutor(1) as beside:
        held = beside.submit(hold)
        session.connect(1)
        held.result()
    assert ray.cluster_resources()["CPU"] >= 1
    assert "trying again" not in caplog.text


def test_a_machine_whose_loopback_is_down_is_one_line(tmp_path):
    alone = ("unshare", "-n")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a network namespace needs root")
    source = write_tree(tmp_path / "audio", {"a.wav": noise(1.0)})
    ran = packed(source, tmp_path / "shards", tmp_path, alone)
    assert ran.returncode == 2
    assert "this machine cannot connect to itself at 127.0.0.1 (" in ran.stderr.splitlines()[-1]


def test_a_folder_that_was_deleted_is_one_line(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    program = f"import os; os.rmdir({str(folder)!r}); {PROGRAM}"
    ran = subprocess.run(
        [sys.executable, "-c", program, "pack", "a", "b"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == ["cpcscale: error: the current folder was deleted: change to another one"]


@pytest.mark.parametrize("job", ["audit", "evaluate", "finetune", "index", "pack", "pretrain", "reproduce", "sweep"])
def test_a_python_without_the_packages_is_one_line_that_names_it(job, tmp_path):
    (tmp_path / "a.yaml").touch()
    program = ROOT / "jobs" / f"{job}.py"
    # -S: without the packages that are installed, as in a venv that was not activated.
    ran = subprocess.run(
        [sys.executable, "-S", str(program), "a.yaml", *(["b"] if job == "pack" else [])],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    [line] = ran.stderr.splitlines()
    assert ran.returncode == 2
    assert line.startswith(f"cpcscale: error: {sys.executable} has no package ") and "ray job submit" in line


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "`ray job submit`"),
        ("https://ray.example.org", "`ray job submit`"),
        ("ray://127.0.0.1:10001", "HOST:6379"),
        ("nohost.invalid:6379", "no Ray cluster answers"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("head..example:6379", "no Ray cluster answers"),
        ("127.0.0.1:closed", "no Ray cluster answers"),
        ("localhost:closed", "no Ray cluster answers"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line_that_says_so(address, words, monkeypatch):
    with socket.socket() as taken:
        # Bound and not listening: nobody answers there.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", address.replace("closed", str(taken.getsockname()[1])))
        monkeypatch.setattr(session, "_ANSWERS_WITHIN_S", 0.2)
        with pytest.raises(UserError, match=words) as caught:
            session.connect()
    assert "\n" not in str(caught.value) and "unset RAY_ADDRESS" in str(caught.value)
    assert not ray.is_initialized()


def test_the_cores_of_a_process_are_those_that_it_was_given(tmp_path, monkeypatch):
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c"]
    program = "from cpcscale import machine; print(machine.usable_cores())"
    ran = subprocess.run([*command, program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert machine.usable_cores() == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "250000 100000"}, [2]),
        ({"cpu.max": "50000 100000"}, [1]),
        ({"cpu.max": "max 100000"}, []),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, [4]),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, []),
        ({}, []),
    ],
)
def test_the_quota_of_a_cgroup_counts(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert list(machine._quota(tmp_path)) == cores


def test_a_user_without_a_home_or_a_name_gets_one_for_the_libraries(tmp_path, monkeypatch):
    def none(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", none)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    machine.check_surroundings()
    home = Path(os.environ["HOME"])
    assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert machine.cache_folder() == Path(tempfile.gettempdir()) / f"cpcscale-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/b")
    assert machine.cache_folder() == Path("/a/b")
