"""A Ray that `ray start` makes, node by node, and jobs that `ray job submit` sends to it.

Where this process may (root on Linux), each node stands in a network namespace with an address of its own, as on
machines of its own; else all have this machine's address and ports of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
import psutil
import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WAIT_S = commands.WAIT_S
# A node that is lost is noticed within seconds.
QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 2000}
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
_NETWORK = "10.203.77"


@dataclass
class Node:
    """What one `ray start` has started."""

    process: subprocess.Popen[Any]

    def workers(self) -> list[psutil.Process]:
        """Those of a pretraining that it has."""
        found = []
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """All of it at once, as a machine that is switched off."""
        tree = self._tree()
        commands.send(tree, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(tree, timeout=30)

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []


@dataclass
class Head:
    """The head of a Ray, which takes jobs at its dashboard; `namespaces`: whether its nodes stand in some."""

    folder: Path
    address: str
    dashboard: str
    namespaces: bool
    nodes: list[Node] = field(default_factory=list)

    def add(self, cpus: int = 1) -> Node:
        """One more node, once its `ray start` says that it runs."""
        number = len(self.nodes)
        node, log = _start(self, number, [f"--address={self.address}", f"--num-cpus={cpus}"])
        self.nodes.append(node)
        _until(lambda: "Ray runtime started" in log.read_text(), node, log)
        return node

    def client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.dashboard)


@contextlib.contextmanager
def head(*, cpus: int, most_nodes: int = 1) -> Iterator[Head]:
    """Its head for the block, on which jobs have their drivers; room for as many nodes in all."""
    # Sockets lie below it, whose paths have 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="cpc-ray-"))
    with pytest.MonkeyPatch.context() as patch, _network(most_nodes) as apart:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        here = _address(0) if apart else _own_address()
        ports = [_free_port() for _ in range(3)]
        made = Head(folder, f"{here}:{ports[0]}", f"http://{here}:{ports[1]}", apart)
        options = [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
        options += ["--head", f"--dashboard-host={here}", f"--num-cpus={cpus}"]
        try:
            options += [f"--system-config={json.dumps(QUICK)}"] if most_nodes > 1 else []
            node, log = _start(made, 0, options)
            made.nodes.append(node)
            _until(lambda: _answers(here, ports[1]) and "Ray runtime started" in log.read_text(), node, log)
            yield made
        finally:
            for node in reversed(made.nodes):
                node.kill()
            shutil.rmtree(folder, ignore_errors=True)


class Job:
    """One `ray job submit` of a project folder, which it sends along; `submitted` has what it prints and its status."""

    def __init__(
        self, head: Head, project: Path, entrypoint: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._client = head.client()
        self.id = f"job-{time.monotonic_ns()}"
        command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--submission-id", self.id]
        command += ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": dict(environment or {})})]
        self._output = head.folder / f"{self.id}.txt"
        with self._output.open("w") as file:
            self.submitted = subprocess.Popen(
                [*command, "--", *entrypoint], stdout=file, stderr=subprocess.STDOUT, cwd=project
            )

    def streamed(self) -> str:
        """What `ray job submit` has printed so far: also the lines of the job, as they come."""
        return self._output.read_text()

    def lines(self) -> list[str]:
        """What `ray job logs` prints."""
        return str(self._client.get_job_logs(self.id)).splitlines()

    def result(self) -> dict[str, Any]:
        """The JSON object that ends the output of a verb with --json."""
        return dict(json.loads(self.lines()[-1]))

    def info(self) -> Any:
        """Its status, message and exit status, as Ray has them."""
        return self._client.get_job_info(self.id)

    def stop(self) -> None:
        """What `ray job stop` asks of Ray; its own start takes longer than a tiny run."""
        self._client.stop_job(self.id)

    def until(self, happened: Callable[[], Any]) -> Any:
        """What `happened` says once it is something, while the job goes on."""
        deadline = time.monotonic() + WAIT_S
        while not (value := happened()):
            assert self.submitted.poll() is None, f"ended before it happened: {self.streamed()[-3000:]}"
            assert time.monotonic() < deadline, f"it does not happen: {self.streamed()[-3000:]}"
            time.sleep(0.02)
        return value

    def reach(self, ids: Path, step: int) -> None:
        """Returns once the ids of `step` are written."""
        self.until(lambda: ids.exists() and f'"step": {step},' in ids.read_text())

    def ended(self) -> str:
        """How it ended, as Ray calls it, once it has."""
        self.submitted.wait(3 * WAIT_S)
        return str(self.info().status)

    def driver(self) -> psutil.Process:
        """The process of the entrypoint."""
        [found] = [each for each in psutil.process_iter() if self._is_driver(each)]
        return found

    def _is_driver(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            named = self.id in process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
            return named and process.cmdline()[:1] != ["/bin/sh"]
        return False


def project(folder: Path) -> Path:
    """A folder with the jobs and configs alone, as of a user who has the package installed."""
    for name in ("jobs", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def _start(head: Head, number: int, options: Sequence[str]) -> tuple[Node, Path]:
    here = ["ip", "netns", "exec", _namespace(number)] if head.namespaces else []
    address = [f"--node-ip-address={_address(number)}"] if head.namespaces else []
    # Gloo asks for the address of the host's name, which is not that of a namespace.
    own = {"GLOO_SOCKET_IFNAME": "eth0"} if head.namespaces else {}
    # Each has files of its own, as on a machine of its own: else one removes what another has unpacked.
    files = [f"--temp-dir={head.folder / str(number)}", "--object-store-memory=100000000"]
    ports = ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    log = head.folder / f"node-{number}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*here, str(BIN / "ray"), "start", "--block", *address, *ports, *files, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, "PATH": f"{BIN}:{os.environ['PATH']}"},
            start_new_session=True,
        )
    return Node(process), log


def _until(happened: Any, node: Node, log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert node.process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _own_address() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


@contextlib.contextmanager
def _network(nodes: int) -> Iterator[bool]:
    """A bridge with a namespace for each node on it for the block; whether there is one."""
    if nodes == 1 or not _may_make_namespaces():
        yield False
        return
    bridge = f"cpc{os.getpid()}"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{_NETWORK}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(nodes):
            name, outside = _namespace(number), f"cpc{os.getpid()}-{number}"
            _ip("netns", "add", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        yield True
    finally:
        for number in range(nodes):
            subprocess.run(["ip", "netns", "del", _namespace(number)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)


def _may_make_namespaces() -> bool:
    if not shutil.which("ip"):
        return False
    name = _namespace(0)
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True).returncode == 0


def _namespace(number: int) -> str:
    return f"cpc-{os.getpid()}-{number}"


def _address(number: int) -> str:
    return f"{_NETWORK}.{number + 1}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
