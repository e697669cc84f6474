"""Freed memory stays with the process, in threads too, where the user's environment does not say otherwise."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import ray_nodes

from cpcscale import freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc, whose heap this is about")

# Faults of pages that come back, in a thread that takes and frees 40 MiB as an update does. glibc keeps the odd bytes
# of the first few aligned blocks apart, so these do not fit again at once.
PROGRAM = """
import resource, sys, threading
from cpcscale import freed_memory
if "keep" in sys.argv:
    freed_memory.keep_freed_memory()
import torch
def update():
    torch.empty(10 * 2**20).fill_(1.0)
def updates():
    for _ in range(20):
        update()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        update()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=updates)
thread.start()
thread.join()
"""
WORKER = """
import json, os, ray
from cpcscale.cluster.session import connect
connect()
def settings():
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
print(json.dumps(ray.get(ray.remote(settings).remote())))
"""
PAGES = 40 * 2**20 // os.sysconf("SC_PAGESIZE")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that another test started has left them in this process's environment."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)


def faults(*arguments: str, **environment: str) -> int:
    return int(run(PROGRAM, *arguments, **environment))


def run(program: str, *arguments: str, **environment: str) -> str:
    """What the program prints."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_pages_come_back_ten_times_without_it() -> None:
    assert faults() >= 10 * PAGES


def test_a_process_keeps_what_it_freed() -> None:
    assert faults("keep") < PAGES


def test_a_process_started_with_the_environment_keeps_it_too() -> None:
    assert faults(**freed_memory.environment()) < PAGES


def test_what_the_user_sets_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert "MALLOC_MMAP_THRESHOLD_" not in freed_memory.environment()
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="65536") >= 10 * PAGES


def test_workers_of_its_own_ray_keep_it() -> None:
    assert json.loads(run(WORKER)) == freed_memory.environment()


def test_workers_of_a_cluster_keep_it() -> None:
    with ray_nodes.cluster(head_cpus=1, connect=False) as cluster:
        assert json.loads(run(WORKER, RAY_ADDRESS=cluster.address)) == freed_memory.environment()
